"""qwq-quant inspect: what a model is, and what differs between two."""

import json
import textwrap
from itertools import zip_longest

import click

from quant.cli import options
from quant.cli.plan_table import print_columns

WIDTH = 80
LABEL = 20
"""Columns of a fact's name; its value has what is left."""
MOST_KINDS = 40
"""Rows of the tensor table; a model with more kinds of tensors has odd names, or hundreds."""


@click.command("inspect")
@click.argument("model")
@click.argument("other", required=False)
@options.output_format
@options.model_options
@options.debug
def command(model, other, output_format, **where):
    """Say what MODEL is, or what differs between MODEL and OTHER.

    Architecture, sizes, types, tokenizer, chat template and generation settings, from headers and
    small files alone: a 65 GB model takes a second. Checkpoints and .gguf files are described in
    the same words, so that any two can be compared. The values of weights are not.

    \b
    Examples:
      qwq-quant inspect examples/tiny-qwq
      qwq-quant inspect examples/tiny-qwq tiny-qwq-Q8_0.gguf
      qwq-quant inspect Qwen/Qwen1.5-7B Qwen/Qwen2-7B
      qwq-quant inspect examples/tiny-qwq --format json
    """
    from quant.inspection.compare import compare
    from quant.inspection.describe import describe
    from quant.source import open_source

    found = [describe(open_source(name, **where)) for name in (model, other) if name is not None]
    answer = found[0] if other is None else compare(*found)
    if output_format == "json":
        click.echo(json.dumps(answer.as_json(), indent=1))
    elif other is None:
        _print_description(answer)
    else:
        _print_comparison(answer)


# --- one model --------------------------------------------------------------------------------


def _print_description(description) -> None:
    click.echo(_cut(description.model, WIDTH))
    for section in description.sections:
        click.echo(f"\n{section.title}")
        for fact in section.facts:
            _print_row(_label(fact), fact.text)
        if section.problem:
            _print_wrapped(section.problem)
    if description.tensors:
        click.echo("\nTensors")
        _print_kinds(description.tensors)
    if description.notes:
        click.echo("\nNotes")
    for note in description.notes:
        _print_wrapped(note)


def _print_kinds(kinds) -> None:
    """One row for a kind: how many, shape, weights, bytes, types."""
    from quant.display import human_bytes
    from quant.inspection.facts import human_count
    from quant.inspection.tensor_kinds import shares

    rows = [("kind", "n", "shape", "weights", "size", "type")]
    rows += [
        (
            kind.name,
            str(kind.n_tensors),
            _shapes(kind),
            human_count(kind.n_weights),
            human_bytes(kind.nbytes),
            shares(kind.types),
        )
        for kind in kinds[:MOST_KINDS]
    ]
    print_columns(_fitted(rows, shrinking=(5, 0, 2)), right=(1, 3, 4))
    if len(kinds) > MOST_KINDS:
        click.echo(f"  … and {len(kinds) - MOST_KINDS} more kinds")


def _shapes(kind) -> str:
    """Rows x columns; of many shapes the first and how many others there are."""
    shapes = [" x ".join(map(str, shape)) or "scalar" for shape in kind.shapes]
    return ", ".join(shapes) if len(shapes) < 3 else f"{shapes[0]}, {len(shapes) - 1} others"


# --- two models -------------------------------------------------------------------------------


def _print_comparison(comparison) -> None:
    if comparison.identical:
        click.echo("No fact differs. The values of the weights were not compared.")
        return
    names = _short_names(comparison.a.model, comparison.b.model)
    _print_row("", *names)
    title = None
    for difference in comparison.facts:
        if difference.section.title != title:
            title = difference.section.title
            click.echo(f"\n{title}")
        texts = (fact.text if fact else "-" for fact in (difference.a, difference.b))
        _print_row(_label(difference), *texts)
    if comparison.tensors:
        click.echo("\nTensors")
    for a, b in comparison.tensors[:MOST_KINDS]:
        _print_pair(a, b)
    if len(comparison.tensors) > MOST_KINDS:
        click.echo(f"  … and {len(comparison.tensors) - MOST_KINDS} more kinds")
    click.echo("\nNo other fact is known to differ. The values of the weights were not compared.")


def _short_names(a: str, b: str) -> tuple[str, str]:
    """The last part of each path, or the whole where those are equal."""
    short = tuple(name.rstrip("/").rpartition("/")[2] for name in (a, b))
    return (a, b) if short[0] == short[1] else short


def _print_pair(a, b) -> None:
    """A kind of tensor in two models: shapes if they differ, then size and types."""
    name = (a or b).name
    shapes = [_shapes(kind) if kind else "-" for kind in (a, b)]
    if shapes[0] != shapes[1]:
        _print_row(name, *shapes)
        name = ""
    _print_row(name, *(_amount(kind) if kind else "-" for kind in (a, b)))


def _amount(kind) -> str:
    from quant.display import human_bytes
    from quant.inspection.tensor_kinds import shares

    return f"{human_bytes(kind.nbytes)}, {shares(kind.types)}"


# --- 80 columns -------------------------------------------------------------------------------


def _label(item) -> str:
    return item.label or item.key.replace("_", " ")


def _cut(text: str, width: int) -> str:
    """Untrusted text, safe to print, in at most `width` columns of a terminal."""
    from rich.cells import cell_len, set_cell_size

    from quant.display import printable

    text = printable(text, 4 * WIDTH)
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def _padded(text: str, width: int) -> str:
    from rich.cells import cell_len

    return text + " " * (width - cell_len(text))


def _print_row(label: str, *values: str) -> None:
    """A label and one value, or two side by side; long values go on below, then end in "…"."""
    room = (WIDTH - 2 - LABEL) // len(values) - 2
    columns = [["  " + _cut(label, LABEL)], *(_lines(value, room) for value in values)]
    for label, *cells in zip_longest(*columns, fillvalue=""):
        row = [_padded(label, 2 + LABEL), *(_padded(cell, room) for cell in cells)]
        click.echo("  ".join(row).rstrip())


def _lines(text: str, width: int) -> list[str]:
    """Untrusted text, safe to print, in at most three lines."""
    from quant.display import printable

    lines = textwrap.wrap(printable(text, 4 * WIDTH), width, max_lines=3, placeholder="…")
    return [_cut(line, width) for line in lines]


def _fitted(rows: list[tuple[str, ...]], shrinking: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Rows indented and cut to 80 columns: those of `shrinking` give way, in that order."""
    rows = [("  " + _cut(row[0], WIDTH), *(_cut(cell, WIDTH) for cell in row[1:])) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for i in shrinking:
        excess = sum(widths) + 2 * (len(widths) - 1) - WIDTH
        widths[i] -= min(max(excess, 0), max(widths[i] - 16, 0))
    return [tuple(map(_cut, row, widths)) for row in rows]


def _print_wrapped(text: str) -> None:
    from quant.display import printable

    for line in textwrap.wrap(printable(text, 2000), WIDTH - 2):
        click.echo(f"  {line}")
