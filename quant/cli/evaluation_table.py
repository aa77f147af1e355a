"""What an evaluation found, as tables of 80 columns."""

import click

from quant.cli.plan_table import print_columns, print_note
from quant.display import human_bytes, printable
from quant.evaluation.report import by_size, decimals, divergence

WIDTH = 80
NAME = 28
"""Columns of a model's name, where there is room."""


def print_evaluation(evaluation) -> None:
    """Size, perplexity, divergence and agreement; categories; loops; tasks; what was left out."""
    text = evaluation.text
    click.echo(
        f"{text['n_positions']:,} positions in {text['n_windows']} windows of {text['n_ctx']} "
        f"tokens of {printable(text['name'], 30)}\n"
    )
    candidates = by_size(evaluation.candidates)
    _print_losses(evaluation.reference, candidates)
    if candidates and candidates[0].statistics.by_category:
        _print_categories(candidates)
    models = [evaluation.reference, *candidates]
    if any(model.answers.loops for model in models):
        _print_loops(models, evaluation.settings["loops"]["limit"])
    if any(model.answers.questions or model.answers.tasks for model in models):
        _print_tasks(models)
    for failed in evaluation.failed:
        print_note(f"{_name(failed.name)} was left out. {failed.error.what}")


def _name(text: str) -> str:
    return printable(text, NAME)


def _print_fitted(rows: list[tuple[str, ...]]) -> None:
    """Columns of numbers behind names, which are cut so that 80 columns are enough."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = max(12, WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1))
    rows = [(printable(row[0], room), *row[1:]) for row in rows]
    print_columns(rows, right=tuple(range(1, len(widths))))


def _print_losses(reference, candidates) -> None:
    rows = [("model", "size", "bits", "PPL", "mean KLD", "99%", "top-1")]
    rows.append(
        (_name(reference.name), human_bytes(reference.nbytes), _bits(reference),
         f"{reference.ppl.value:.3f}", "reference", "", "")
    )  # fmt: skip
    for c in candidates:
        s = c.statistics
        rows.append(
            (
                _name(c.name),
                human_bytes(c.nbytes),
                _bits(c),
                f"{s.ppl.value:.3f}",
                divergence(s.kld).replace("0.", "."),
                decimals(s.kld_percentiles[99.0], 4).replace("0.", "."),
                f"{100 * s.same_top.value:.1f} %",
            )
        )
    _print_fitted(rows)


def _bits(model) -> str:
    return f"{model.bits_per_weight:.2f}" if model.bits_per_weight else ""


def _print_categories(candidates) -> None:
    click.echo("\nMean KLD by kind of text")
    names = list(candidates[0].statistics.by_category)
    width = max(8, (WIDTH - NAME) // len(names) - 2)
    rows = [("model", *(printable(name or "(none)", width) for name in names))]
    for c in candidates:
        klds = (decimals(s.kld.value, 5) for s in c.statistics.by_category.values())
        rows.append((_name(c.name), *klds))
    _print_fitted(rows)


def _print_loops(models, limit: int) -> None:
    click.echo(f"\nAnswers of at most {limit} tokens")
    rows = [("model", "sampling", "n", "endless", "looping", "thought")]
    for model in models:
        for report in model.answers.loops:
            median = report["thought_median"]
            rows.append(
                (
                    _name(model.name),
                    printable(report["profile"], 22),
                    str(report["n_answers"]),
                    f"{100 * report['endless']:.0f} %",
                    f"{100 * report['looping']:.0f} %",
                    "-" if median is None else f"{median:.0f}",
                )
            )
    print_columns(rows, right=(2, 3, 4, 5))


def _print_tasks(models) -> None:
    click.echo("\nTasks")
    rows = [("model", "task", "figure", "value", "n")]
    for model in models:
        asked = model.answers.questions
        if asked:
            exact = asked["exact_match"]
            n = str(asked["n_questions"])
            rows.append((_name(model.name), "questions", "exact match", _percent(exact), n))
        for task, metrics in model.answers.tasks.items():
            for metric, found in metrics.items():
                shown = printable(task, 16), printable(metric, 14), _percent(found)
                rows.append((_name(model.name), *shown, str(found["n"])))
    print_columns(rows, right=(3, 4))


def _percent(x: dict) -> str:
    return f"{100 * x['value']:.1f} % ± {100 * (x['error'] or 0):.1f}"
