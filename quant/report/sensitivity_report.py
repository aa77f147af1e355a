"""What was measured and chosen, as files: figures, their numbers, and the page that holds all."""

from collections.abc import Mapping

from quant.display import human_bytes, printable
from quant.report.choice import Choice, Result
from quant.report.drawing import Drawing
from quant.report.figures import (
    Panel,
    Point,
    capitalized,
    change,
    damage_curve,
    error_panels,
    heat_map,
    number,
)
from quant.report.page import Number, Section, facts, figure, page, prose, table, tiles
from quant.report.style import KINDS
from quant.sensitivity import METRICS, Sensitivity

PAGE = "report.html"

_NOUNS = {"gradient": "gradient-weighted error", "kld": "KL divergence"}


def sensitivity_report(
    sensitivity: Sensitivity, choice: Choice | None = None, metric: str | None = None
) -> dict[str, bytes]:
    """File name -> content: report.html, and each figure as PNG, SVG and CSV.

    Kept modules, the threshold and damage against size are shown if there is a `choice`. The map
    of layers is of `metric`: by default the one that chose, else the error on real inputs where
    it was measured. The same input gives the same bytes.
    """
    fallback = "activation" if "activation" in sensitivity.metrics else "weight"
    metric = metric or (choice.metric if choice else fallback)
    drawings = _draw(sensitivity, choice, metric)
    files = {PAGE: _page(sensitivity, choice, metric, drawings).encode()}
    for drawing in drawings.values():
        files |= drawing.files()
    return files


def _plain_name(sensitivity: Sensitivity) -> str:
    """ "NF4" or "FP4"."""
    return str(sensitivity.quantization["quant_type"]).upper()


def _noun(metric: str) -> str:
    """ "activation" -> "activation error"."""
    return _NOUNS.get(metric, f"{metric} error")


# --- figures ----------------------------------------------------------------------------------


def _draw(sensitivity: Sensitivity, choice: Choice | None, metric: str) -> dict[str, Drawing]:
    """By name; "damage" only where there is a choice."""
    model, plain = printable(sensitivity.model["name"], 60), _plain_name(sensitivity)
    drawings = [
        error_panels(f"{plain} errors in {model}", _panels(sensitivity, choice)),
        heat_map(
            f"{capitalized(_noun(metric))} by layer and kind, {model}",
            _noun(metric),
            METRICS[metric].unit,
            _group_points(sensitivity, choice, metric),
            _threshold(choice, metric),
        ),
    ]
    if choice:
        drawings.append(
            damage_curve(
                f"Predicted damage against size, {model}",
                _noun(choice.metric),
                choice.curve,
                choice.chosen,
                f"plain {plain}",
            )
        )
    return {drawing.name: drawing for drawing in drawings}


def _threshold(choice: Choice | None, metric: str) -> float | None:
    return choice.threshold if choice and choice.metric == metric else None


def _panels(sensitivity: Sensitivity, choice: Choice | None) -> list[Panel]:
    """Of every module: the activation error, where it was measured, above the weight error."""
    measured = next(iter(sensitivity.modules.values())).values
    return [
        Panel(
            metric,
            capitalized(_noun(metric)),
            METRICS[metric].unit,
            _module_points(sensitivity, choice, metric),
            _threshold(choice, metric),
        )
        for metric in ("activation", "weight")
        if metric in measured
    ]


def _module_points(
    sensitivity: Sensitivity, choice: Choice | None, metric: str
) -> tuple[Point, ...]:
    kept = frozenset(choice.kept if choice else ())
    return tuple(
        Point(
            module,
            group.layer,
            _module_kind(module),
            sensitivity.modules[module].values[metric],
            name in kept,
        )
        for name, group in sensitivity.groups.items()
        for module in group.modules
    )


def _module_kind(module: str) -> str:
    """ "model.layers.3.self_attn.q_proj" -> "q"."""
    kind = module.rpartition(".")[2].removesuffix("_proj")
    return kind if kind in KINDS else "other"


def _group_points(
    sensitivity: Sensitivity, choice: Choice | None, metric: str
) -> tuple[Point, ...]:
    kept = frozenset(choice.kept if choice else ())
    groups = sensitivity.groups
    return tuple(
        Point(name, groups[name].layer, groups[name].kind, value, name in kept)
        for name, value in sensitivity.values(metric).items()
    )


# --- the page ---------------------------------------------------------------------------------


def _page(
    sensitivity: Sensitivity, choice: Choice | None, metric: str, drawings: Mapping[str, Drawing]
) -> str:
    sections = [_measured(sensitivity, drawings)]
    if choice:
        sections.insert(0, _chosen(sensitivity, choice, drawings["damage"]))
    sections += [_groups(sensitivity, choice, metric), _provenance(sensitivity)]
    kind = "Dynamic 4-bit" if choice else "Sensitivity"
    return page(sensitivity.model["name"], sections, _lead(sensitivity, choice), kind)


def _lead(sensitivity: Sensitivity, choice: Choice | None) -> str:
    plain, n = _plain_name(sensitivity), len(sensitivity.groups)
    if choice:
        return (
            f"{len(choice.kept)} of {n} groups of linear layers stay in 16 bits, the rest are "
            f"{plain}. {capitalized(_noun(choice.metric))} decided which."
        )
    return f"What it costs to store each of {n} groups of linear layers in {plain}."


def _chosen(sensitivity: Sensitivity, choice: Choice, damage: Drawing) -> Section:
    plain = f"plain {_plain_name(sensitivity)}"
    plain_nbytes, plain_damage = choice.curve[0]
    nbytes, chosen_damage = choice.chosen
    full_nbytes, n_kept = choice.curve[-1][0], len(choice.kept)
    numbers = [
        (
            human_bytes(nbytes),
            f"{change(nbytes, plain_nbytes)} against {plain}",
            f"{100 * nbytes / full_nbytes:.0f} % of 16 bit's {human_bytes(full_nbytes)}",
        ),
        (
            f"{n_kept} of {len(sensitivity.groups)}",
            "groups stay in 16 bits",
            f"the other {len(sensitivity.groups) - n_kept} are {_plain_name(sensitivity)}",
        ),
        (
            change(chosen_damage, plain_damage),
            f"predicted damage against {plain}",
            f"by {_noun(choice.metric)}",
        ),
    ]
    blocks = [tiles(numbers)]
    if choice.results:
        blocks.append(_results(choice.results))
    return Section("What was chosen", [*blocks, figure(damage)])


def _results(results: tuple[Result, ...]) -> str:
    columns = ("model", "size", "perplexity", "KL divergence", "top-1 agreement", "tokens")
    rows = [
        (
            result.name,
            Number(result.nbytes, human_bytes(result.nbytes)),
            _with_error(result.perplexity, result.perplexity_error, ".3f"),
            _with_error(result.kld, result.kld_error, ".5f"),
            Number(result.same_top, f"{100 * (result.same_top or 0):.2f} %"),
            Number(result.n_tokens, f"{result.n_tokens:,}"),
        )
        for result in results
    ]
    caption = (
        "Measured on held-out text. KL divergence from the source in nats a token; ± is one "
        "standard error."
    )
    return table(columns, rows, caption, marked=[len(rows) - 1])


def _with_error(value: float | None, error: float | None, digits: str) -> Number:
    if value is None:
        return Number(None, "")
    return Number(value, f"{value:{digits}}" + (f" ± {error:{digits}}" if error else ""))


def _measured(sensitivity: Sensitivity, drawings: Mapping[str, Drawing]) -> Section:
    text = (
        f"Each weight was rounded to {_plain_name(sensitivity)} and compared with itself. "
        "Weight error is that of the numbers stored"
    )
    if "activation" in sensitivity.metrics:
        text += "; activation error is that of what they then compute from the inputs of real text"
    text += "."
    return Section(
        "Where the error is", [prose(text), figure(drawings["errors"]), figure(drawings["heatmap"])]
    )


def _groups(sensitivity: Sensitivity, choice: Choice | None, metric: str) -> Section:
    """Every group and metric; the largest of `metric` first."""
    plain = _plain_name(sensitivity)
    kept = frozenset(choice.kept if choice else ())
    values = {name: sensitivity.values(name) for name in sensitivity.metrics}
    names = sorted(sensitivity.groups, key=lambda name: (-values[metric][name], name))
    rows = []
    for name in names:
        group = sensitivity.groups[name]
        row = [name, Number(group.layer, str(group.layer)), KINDS[group.kind].label]
        row += [Number(of[name], number(of[name])) for of in values.values()]
        rows.append([*row, "16 bit" if name in kept else plain] if choice else row)
    columns = ["group", "layer", "kind", *values, *(["stored as"] if choice else [])]
    units = "; ".join(f"{name}: {METRICS[name].unit}" for name in values)
    marked = [i for i, name in enumerate(names) if name in kept]
    return Section("Every group", [table(columns, rows, f"{capitalized(units)}.", marked)])


_LABELS = {
    "model": {"name": "model", "revision": "commit"},
    "calibration": {
        "name": "calibration text",
        "sha256": "its sha256",
        "n_tokens": "tokens",
        "seq_len": "tokens in a sequence",
    },
    "quantization": {"quant_type": "type", "blocksize": "block size"},
}
"""What the keys of a Sensitivity are called, where the key itself will not do."""


def _provenance(sensitivity: Sensitivity) -> Section:
    pairs = [
        (labels.get(key, key.replace("_", " ")), _plain(value))
        for part, labels in _LABELS.items()
        for key, value in getattr(sensitivity, part).items()
    ]
    pairs += sensitivity.versions.items()
    pairs += [(_noun(name), METRICS[name].about) for name in sensitivity.metrics]
    return Section("How it was measured", [facts(pairs)])


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else "–" if value is None else str(value)
