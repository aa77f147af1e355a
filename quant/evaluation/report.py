"""An evaluation as files: one page that works offline, the figures, and every number.

report.html    everything, to look at
results.json   everything, to compute with, answers included
results.csv    candidate, category, figure (llama.cpp's name), value, standard error, positions
*.png *.svg *.csv   each figure and its numbers
"""

import json
from collections.abc import Sequence
from math import floor, log10
from pathlib import Path

from quant.display import human_bytes
from quant.durable import write_whole
from quant.evaluation.divergence import Estimate, Statistics
from quant.evaluation.evaluate import DP_EDGES, PAGE, Evaluation, Measured
from quant.evaluation.figures import (
    SizePoint,
    category_figure,
    change_figure,
    frontier,
    size_figure,
    size_text,
)
from quant.output_file import check_output_file
from quant.report.drawing import Drawing, csv_text
from quant.report.files import write_files
from quant.report.page import Number, Section, facts, figure, page, prose, table, tiles

JSON, CSV = "results.json", "results.csv"
FIGURES = ("kld-size", "kld-category", "dp")


def check_places(folder: Path, *, force: bool) -> None:
    """Refuse before any work what could not be written after it. Raises CannotCreate."""
    names = [PAGE, CSV, *(f"{name}{end}" for name in FIGURES for end in (".png", ".svg", ".csv"))]
    starts = {".html": b"<!doc", ".png": b"\x89PNG\r", ".svg": b"<?xml", ".csv": b""}
    for name in names:
        start = starts[Path(name).suffix]
        check_output_file(
            folder / name, force=force, sources=(), starts_with=start, kind="file of a report"
        )
    _check_json(folder, force)


def _check_json(folder: Path, force: bool) -> None:
    check_output_file(
        folder / JSON, force=force, sources=(), starts_with=b'{\n "qwq', kind="file of a report"
    )


def write_report(evaluation: Evaluation, folder: Path, *, force: bool) -> list[Path]:
    """All files of the report. Raises CannotCreate or OutputFailed."""
    drawings = _draw(evaluation)
    files = {PAGE: _page(evaluation, drawings).encode(), CSV: csv_of(evaluation).encode()}
    for drawing in drawings.values():
        files |= drawing.files()
    write_files(folder, files, force=force)
    _check_json(folder, force)
    write_whole(folder / JSON, json.dumps(evaluation.as_json(), indent=1).encode())
    return [folder / name for name in (*files, JSON)]


def csv_of(evaluation: Evaluation) -> str:
    """One line for each candidate, category and figure; "" is all categories together."""
    rows = []
    for candidate in evaluation.candidates:
        parts = {"": candidate.statistics, **candidate.statistics.by_category}
        for category, statistics in parts.items():
            rows += [
                (candidate.name, candidate.nbytes, category, *row, statistics.n_positions)
                for row in statistics.rows()
            ]
    header = ["model", "nbytes", "category", "figure", "value", "error", "n_positions"]
    return csv_text(header, rows)


# --- figures ----------------------------------------------------------------------------------


def _draw(evaluation: Evaluation) -> dict[str, Drawing]:
    """By name; none without candidates, no categories where there is one."""
    candidates = by_size(evaluation.candidates)
    if not candidates:
        return {}
    reference = evaluation.reference.name
    drawings = [size_figure(f"Divergence from {reference} against size", _points(candidates))]
    if candidates[0].statistics.by_category:
        klds = {
            c.name: {k: s.kld.value for k, s in c.statistics.by_category.items()}
            for c in candidates
        }
        drawings.append(category_figure(f"Divergence from {reference} by kind of text", klds))
    counts = {c.name: c.dp_histogram for c in candidates}
    drawings.append(change_figure("Change of the next token's probability", DP_EDGES, counts))
    return {drawing.name: drawing for drawing in drawings}


def by_size(candidates: Sequence[Measured]) -> list[Measured]:
    """Largest first."""
    return sorted(candidates, key=lambda c: -c.nbytes)


def _points(candidates: Sequence[Measured]) -> list[SizePoint]:
    return [
        SizePoint(c.name, c.nbytes, c.statistics.kld.value, c.statistics.kld.error)
        for c in candidates
    ]


# --- the page ---------------------------------------------------------------------------------


def _page(evaluation: Evaluation, drawings: dict[str, Drawing]) -> str:
    sections = []
    if evaluation.candidates:
        sections.append(_overview(evaluation, drawings))
    if "kld-category" in drawings:
        sections.append(_categories(evaluation, drawings["kld-category"]))
    if "dp" in drawings:
        sections.append(_changes(evaluation, drawings["dp"]))
    models = [evaluation.reference, *by_size(evaluation.candidates)]
    if any(model.answers.loops for model in models):
        sections.append(_loops(models, evaluation))
    if any(model.answers.questions or model.answers.tasks for model in models):
        sections.append(_tasks(models))
    if evaluation.failed:
        sections.append(_left_out(evaluation))
    sections.append(_settings(evaluation))
    return page(evaluation.reference.name, sections, _lead(evaluation), "Evaluation")


def _lead(evaluation: Evaluation) -> str:
    text = evaluation.text
    return (
        f"{len(evaluation.candidates)} candidates against {evaluation.reference.name}, at "
        f"{text['n_positions']:,} positions of {text['name']}."
    )


def _overview(evaluation: Evaluation, drawings: dict[str, Drawing]) -> Section:
    candidates = by_size(evaluation.candidates)
    best = {point.name for point in frontier(_points(candidates))}
    reference = evaluation.reference
    columns = (
        "model", "size", "bits", "perplexity", "mean KLD", "RMS Δp", "same top"
    )  # fmt: skip
    rows = [
        [c.name, Number(c.nbytes, human_bytes(c.nbytes)), _bits(c), *_figures(c.statistics)]
        for c in candidates
    ]
    caption = (
        "Bits are those of the files for each weight of the reference. KL divergences are in nats "
        "a token; ± is one standard error. Same top: how often both think the same token likeliest."
        " Marked rows are on the frontier: no other candidate is both smaller and nearer to the "
        "reference."
    )
    marked = [i for i, c in enumerate(candidates) if c.name in best]
    nearest = min(candidates, key=lambda c: c.statistics.kld.value)
    smallest = candidates[-1]
    numbers = [
        (
            human_bytes(reference.nbytes),
            "the reference",
            f"perplexity {_plus_minus(reference.ppl, '.3f')}",
        ),
        (
            divergence(nearest.statistics.kld).partition(" ±")[0],
            f"nats, the least divergence: {nearest.name}",
            size_text(nearest.nbytes, nearest.bits_per_weight),
        ),
        (
            human_bytes(smallest.nbytes),
            f"the smallest: {smallest.name}",
            f"diverges by {decimals(smallest.statistics.kld.value, 5)} nats",
        ),
    ]
    return Section(
        "What was lost",
        [
            tiles(numbers),
            figure(drawings["kld-size"]),
            table(columns, rows, caption, marked),
            _percentiles(candidates),
        ],
    )


def _percentiles(candidates: Sequence[Measured]) -> str:
    shown = (50.0, 90.0, 95.0, 99.0, 99.9, 100.0)
    columns = ("model", "median", "90 %", "95 %", "99 %", "99.9 %", "maximum")
    rows = []
    for c in candidates:
        of = c.statistics.kld_percentiles
        rows.append([c.name, *(Number(of[p], decimals(of[p], 5)) for p in shown)])
    caption = "KL divergence at single positions: so many of them diverge by no more than this."
    return table(columns, rows, caption)


def _figures(s: Statistics) -> list[Number]:
    return [
        Number(s.ppl.value, _plus_minus(s.ppl, ".3f")),
        Number(s.kld.value, divergence(s.kld)),
        Number(s.dp_rms.value, f"{100 * s.dp_rms.value:.2f} %"),
        Number(s.same_top.value, f"{100 * s.same_top.value:.2f} %"),
    ]


def _bits(model: Measured) -> Number:
    bits = model.bits_per_weight
    return Number(bits, f"{bits:.2f}" if bits else "")


def divergence(kld: Estimate) -> str:
    """ "0.00541 ± 0.00013": five decimals, up to seven where the error needs them."""
    digits = min(max(5, -floor(log10(kld.error))), 7) if kld.error > 0 else 5
    return f"{decimals(kld.value, digits)} ± {kld.error:.{digits}f}"


def decimals(x: float, digits: int) -> str:
    """Rounded; what rounds to zero has no sign. Stored in 16 bits, a divergence may be -1e-9."""
    text = f"{x:.{digits}f}"
    return text if float(text) else text.lstrip("-")


def _plus_minus(x: Estimate, digits: str) -> str:
    return f"{x.value:{digits}} ± {x.error:{digits}}"


def _categories(evaluation: Evaluation, drawing: Drawing) -> Section:
    candidates = by_size(evaluation.candidates)
    names = list(candidates[0].statistics.by_category)
    columns = ["model", *(name or "(none)" for name in names)]
    rows = [
        [
            c.name,
            *(Number(s.kld.value, divergence(s.kld)) for s in c.statistics.by_category.values()),
        ]
        for c in candidates
    ]
    counts = ", ".join(
        f"{name or '(none)'} {s.n_positions:,}"
        for name, s in candidates[0].statistics.by_category.items()
    )
    caption = f"Mean KL divergence by kind of text. Positions: {counts}."
    return Section("By kind of text", [figure(drawing), table(columns, rows, caption)])


def _changes(evaluation: Evaluation, drawing: Drawing) -> Section:
    text = (
        "At each position the reference gives the token that really came next some probability, "
        "and a candidate gives it another. A good copy changes few of them, and as often up as "
        "down; one that has lost knowledge loses more than it gains."
    )
    return Section("What became of the probabilities", [prose(text), figure(drawing)])


def _loops(models: Sequence[Measured], evaluation: Evaluation) -> Section:
    settings = evaluation.settings["loops"]
    columns = (
        "model", "sampling", "answers", "endless", "looping", "repeated", "thoughts", "median",
        "longest",
    )  # fmt: skip
    rows = []
    for model in models:
        for report in model.answers.loops:
            rows.append(
                [
                    model.name,
                    report["profile"],
                    Number(report["n_answers"], str(report["n_answers"])),
                    *(_percent(report[key]) for key in ("endless", "looping", "repeated")),
                    Number(report["n_thoughts"], str(report["n_thoughts"])),
                    *(_tokens(report[key]) for key in ("thought_median", "thought_longest")),
                ]
            )
    text = (
        f"{len(settings['prompts'])} prompts, seeds {', '.join(map(str, settings['seeds']))}, at "
        f"most {settings['limit']} tokens an answer. Endless: it did not stop by itself. Looping: "
        "its end is one piece of text, four times or more. Repeated: share of eight tokens in a "
        "row that stood in the answer before."
    )
    by_seed = [
        [
            model.name,
            report["profile"],
            seed,
            *(_percent(of[key]) for key in ("endless", "looping", "repeated")),
            _tokens(of["thought_median"]),
        ]
        for model in models
        for report in model.answers.loops
        for seed, of in report["by_seed"].items()
    ]
    by_seed_columns = ("model", "sampling", "seed", "endless", "looping", "repeated", "median")
    caption = (
        "Answers in sum. Thoughts: how many ended, and the median and the longest of them in "
        "tokens."
    )
    return Section(
        "Does it stop",
        [
            prose(text),
            table(columns, rows, caption),
            table(by_seed_columns, by_seed, "The same by seed."),
        ],
    )


def _percent(share: float) -> Number:
    return Number(share, f"{100 * share:.0f} %")


def _tokens(n: float | None) -> Number:
    return Number(n, "" if n is None else f"{n:.0f}")


def _tasks(models: Sequence[Measured]) -> Section:
    rows = []
    for model in models:
        asked = model.answers.questions
        if asked:
            exact = Estimate(**asked["exact_match"])
            rows.append(
                [model.name, "questions", "exact match", *_share(exact, asked["n_questions"])]
            )
        for task, metrics in model.answers.tasks.items():
            for metric, found in metrics.items():
                estimate = Estimate(found["value"], found["error"] or 0.0)
                rows.append([model.name, task, metric, *_share(estimate, found["n"])])
    caption = "± is one standard error; n is the number of questions."
    return Section("Tasks", [table(("model", "task", "figure", "value", "n"), rows, caption)])


def _share(x: Estimate, n: int | None) -> list[Number]:
    text = f"{100 * x.value:.1f} % ± {100 * x.error:.1f}"
    return [Number(x.value, text), Number(n, str(n))]


def _left_out(evaluation: Evaluation) -> Section:
    rows = [[f.name, f.error.what, f.error.why] for f in evaluation.failed]
    return Section("Left out", [table(("model", "what", "why"), rows, "These were not measured.")])


def _settings(evaluation: Evaluation) -> Section:
    text = evaluation.text
    categories = ", ".join(f"{name or 'text'} {n}" for name, n in text["categories"].items())
    pairs = [
        ("text", text["name"]),
        ("its sha256", text["sha256"] or "not known"),
        ("tokens in a window", str(text["n_ctx"])),
        ("windows", f"{text['n_windows']} ({categories})"),
        ("positions scored", f"{text['n_positions']:,}, the second half of each window"),
    ]
    loops = evaluation.settings["loops"]
    for name, settings in (loops["profiles"] if loops else {}).items():
        shown = ", ".join(f"{key} {value}" for key, value in settings.items())
        pairs.append((f"sampling {name}", shown))
    versions = evaluation.as_json()["versions"]
    pairs += [(name, version) for name, version in versions.items()]
    text = (
        "Statistics have llama.cpp's names and definitions (llama-perplexity --kl-divergence), and "
        "agree with it on GGUF files. Standard errors take positions as independent."
    )
    return Section("How it was measured", [prose(text), facts(pairs)])
