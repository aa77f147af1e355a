"""What was measured and chosen, as files: figures, their numbers, and the page that holds all."""

from collections.abc import Mapping
from math import prod

from quant.budget import Levels
from quant.display import human_bytes, printable
from quant.formats.nf4 import Bnb4bit
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

NAME_LENGTH, VALUE_LENGTH = 60, 120
"""Names come from files; longer ones are cut."""

_NOUNS = {"gradient": "gradient-weighted error", "kld": "KL divergence"}

_BEST_FIRST = ("gradient", "kld", "block", "activation", "weight")
"""The first that was measured is shown where nothing was chosen."""


def sensitivity_report(
    sensitivity: Sensitivity, choice: Choice | None = None, metric: str | None = None
) -> dict[str, bytes]:
    """File name -> content: report.html, and each figure as PNG, SVG and CSV.

    The first panel and the map of layers show `metric`: by default the one that chose, or the best
    that was measured. Damage against size is that by the choice, or by `metric` where there is
    none. What is kept, and the threshold, are shown if there is a `choice`. The same input gives
    the same bytes.
    """
    best = next(name for name in _BEST_FIRST if name in sensitivity.metrics)
    metric = metric or (choice.metric if choice else best)
    drawings = _draw(sensitivity, choice, metric)
    files = {PAGE: _page(sensitivity, choice, metric, drawings).encode()}
    for drawing in drawings.values():
        files |= drawing.files()
    return files


def _type_name(sensitivity: Sensitivity) -> str:
    """ "NF4" or "FP4"."""
    return str(sensitivity.quantization["quant_type"]).upper()


def _base_name(sensitivity: Sensitivity) -> str:
    """What everything would be without any 16 bits. "plain NF4" is bitsandbytes' own rounding."""
    name = _type_name(sensitivity)
    searched = sensitivity.quantization["search_scales"]
    return f"{name} with searched scales" if searched else f"plain {name}"


def _noun(metric: str) -> str:
    """ "activation" -> "activation error"."""
    return _NOUNS.get(metric, f"{metric} error")


# --- figures ----------------------------------------------------------------------------------


def _draw(sensitivity: Sensitivity, choice: Choice | None, metric: str) -> dict[str, Drawing]:
    """By name; "damage" only where more bytes can lessen it."""
    model = printable(sensitivity.model["name"], NAME_LENGTH)
    drawings = [
        error_panels(
            f"{_type_name(sensitivity)} errors in {model}", _panels(sensitivity, choice, metric)
        ),
        heat_map(
            f"{capitalized(_noun(metric))} by layer and kind, {model}",
            _noun(metric),
            METRICS[metric].unit,
            _group_points(sensitivity, choice, metric),
            _threshold(choice, metric),
        ),
    ]
    curve = choice.curve if choice else _curve(sensitivity, metric)
    if len(curve) > 1:
        drawings.append(
            damage_curve(
                f"Predicted damage against size, {model}",
                _noun(choice.metric if choice else metric),
                curve,
                choice.chosen if choice else None,
                _base_name(sensitivity),
                sized="size" if choice else "size of the linear layers",
            )
        )
    return {drawing.name: drawing for drawing in drawings}


def _curve(sensitivity: Sensitivity, metric: str) -> tuple[tuple[int, float], ...]:
    """The best choices at every size of the linear layers; of the rest the file does not tell.

    Empty where 16 bits would take no more than 4: matrices of a few hundred weights.
    """
    format = Bnb4bit(**sensitivity.quantization)
    groups = list(sensitivity.groups.values())
    shapes = [[sensitivity.modules[name].shape for name in group.modules] for group in groups]
    sizes = [
        (sum(map(format.nbytes, of_group)), sum(2 * prod(shape) for shape in of_group))
        for of_group in shapes
    ]
    if any(sixteen <= four for four, sixteen in sizes):
        return ()
    values = sensitivity.values(metric)
    return Levels(groups, sizes, rest=0).curve([(values[group.name], 0.0) for group in groups])


def _threshold(choice: Choice | None, metric: str) -> float | None:
    return choice.threshold if choice and choice.metric == metric else None


def _panels(sensitivity: Sensitivity, choice: Choice | None, metric: str) -> list[Panel]:
    """`metric` of every group; then the errors of every module: of its output, where they were
    measured, and of its weight. The threshold is a group's value, so it is drawn there alone."""
    by_group = Panel(
        metric,
        capitalized(_noun(metric)),
        METRICS[metric].unit,
        _group_points(sensitivity, choice, metric),
        _threshold(choice, metric),
        level="group",
    )
    measured = next(iter(sensitivity.modules.values())).values
    by_module = (
        Panel(
            name,
            capitalized(_noun(name)),
            METRICS[name].unit,
            _module_points(sensitivity, choice, name),
        )
        for name in ("activation", "weight")
        if name in measured
    )
    return [by_group, *by_module]


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
    damage, errors = drawings.get("damage"), _measured(sensitivity, metric, drawings)
    if choice:
        sections = [_chosen(sensitivity, choice, damage), errors]
    else:
        sections = [errors, *([_buyable(sensitivity, metric, damage)] if damage else [])]
    sections += [_groups(sensitivity, choice, metric), _provenance(sensitivity)]
    kind = "Dynamic 4-bit" if choice else "Sensitivity"
    name = printable(sensitivity.model["name"], NAME_LENGTH)
    return page(name, sections, _lead(sensitivity, choice), kind)


def _lead(sensitivity: Sensitivity, choice: Choice | None) -> str:
    n = len(sensitivity.groups)
    if choice:
        return (
            f"{len(choice.kept)} of {n} groups of linear layers stay in 16 bits, the rest are "
            f"{_type_name(sensitivity)}. {capitalized(_noun(choice.metric))} decided which."
        )
    return (
        f"What it costs to store each of {n} groups of linear layers in {_type_name(sensitivity)}."
    )


def _chosen(sensitivity: Sensitivity, choice: Choice, damage: Drawing | None) -> Section:
    base = _base_name(sensitivity)
    base_nbytes, base_damage = choice.curve[0]
    nbytes, chosen_damage = choice.chosen
    full_nbytes, n_kept = choice.curve[-1][0], len(choice.kept)
    numbers = [
        (
            human_bytes(nbytes),
            f"{change(nbytes, base_nbytes)} against {base}",
            f"{100 * nbytes / full_nbytes:.0f} % of 16 bit's {human_bytes(full_nbytes)}",
        ),
        (
            f"{n_kept} of {len(sensitivity.groups)}",
            "groups stay in 16 bits",
            f"the other {len(sensitivity.groups) - n_kept} are {_type_name(sensitivity)}",
        ),
        (
            change(chosen_damage, base_damage),
            f"predicted damage against {base}",
            f"by {_noun(choice.metric)}",
        ),
    ]
    blocks = [tiles(numbers)]
    if choice.results:
        blocks.append(_results(sensitivity, choice.results))
    if damage:
        blocks.append(figure(damage))
    return Section("What was chosen", blocks)


def _buyable(sensitivity: Sensitivity, metric: str, damage: Drawing) -> Section:
    text = (
        f"If the linear layers may take more bytes than {_base_name(sensitivity)} needs, some "
        "groups can stay in 16 bits. The curve is what the best choice of groups leaves of the "
        f"predicted damage, by {_noun(metric)}."
    )
    return Section("What more bytes would buy", [prose(text), figure(damage)])


def _results(sensitivity: Sensitivity, results: tuple[Result, ...]) -> str:
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
    if sensitivity.quantization["search_scales"]:
        caption += (
            f" Plain {_type_name(sensitivity)} is bitsandbytes' own rounding, without searched "
            "scales."
        )
    return table(columns, rows, caption, marked=[len(rows) - 1])


def _with_error(value: float | None, error: float | None, digits: str) -> Number:
    if value is None:
        return Number(None, "")
    return Number(value, f"{value:{digits}}" + (f" ± {error:{digits}}" if error else ""))


def _measured(sensitivity: Sensitivity, metric: str, drawings: Mapping[str, Drawing]) -> Section:
    text = (
        f"Each weight was rounded to {_base_name(sensitivity)} and compared with itself. "
        "Weight error is that of the numbers stored"
    )
    if "activation" in sensitivity.metrics:
        text += "; activation error is that of what they then compute from the inputs of real text"
    text += f". The first panel and the map show {_noun(metric)} of what is quantized together."
    return Section(
        "Where the error is", [prose(text), figure(drawings["errors"]), figure(drawings["heatmap"])]
    )


def _groups(sensitivity: Sensitivity, choice: Choice | None, metric: str) -> Section:
    """Every group and metric; the largest of `metric` first."""
    plain = _type_name(sensitivity)
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
    pairs += [(name, _plain(value)) for name, value in sensitivity.versions.items()]
    pairs += [(_noun(name), METRICS[name].about) for name in sensitivity.metrics]
    return Section("How it was measured", [facts(pairs)])


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "–" if value is None else printable(value, VALUE_LENGTH)
