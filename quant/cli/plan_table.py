"""The plan of a GGUF file as a table that fits 80 columns."""

import sys
import tempfile
import textwrap
from collections import Counter

import click

from quant.display import human_bytes, printable


def print_plan(job, needs, estimate) -> None:
    """Tensors folded to classes, totals, needs, notes; on stdout."""
    rows = [("tensor", "n", "from", "to", "size", "why")]
    classes = job.plan.classes()
    for c in classes:
        rows.append(
            (
                printable(c.name, 34),
                str(c.n_tensors),
                c.source_type,
                c.format,
                human_bytes(c.nbytes),
                c.rule,
            )
        )
    print_columns(_narrow(rows), right=(1, 4), below=[[], *_layers(classes)])
    plan = job.plan
    files = f" in {len(plan.files)} files" if len(plan.files) > 1 else ""
    click.echo(
        f"\n{len(plan.assignments)} tensors, {plan.n_weights / 1e6:.1f} million weights: "
        f"{human_bytes(plan.nbytes)}{files}, {plan.bits_per_weight:.2f} bits per weight"
    )
    print_needs(needs, estimate)
    for note in job.notes:
        print_note(note)
    sys.stdout.flush()


def print_needs(needs, estimate) -> None:
    """What a run takes against what there is, how long it takes, and what stands in its way."""
    click.echo(f"Disk:   {_against(needs.disk, needs.disk_free)}")
    if needs.temporary:
        folder = f" in {printable(tempfile.gettempdir(), 30)}"
        click.echo(f"Files:  {_against(needs.temporary, needs.temporary_free)}{folder}")
    click.echo(f"Memory: {_against(needs.memory, needs.memory_free)}")
    click.echo(f"Time:   {estimate}")
    if needs.obstacle is not None:
        whole = {"break_on_hyphens": False, "break_long_words": False}  # of paths
        lines = textwrap.wrap(f"Output: CANNOT BE WRITTEN. {needs.obstacle.what}", 72, **whole)
        click.echo("\n        ".join(lines))


def _narrow(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The rows with reasons cut to what is left of 80 columns."""
    others = [max(len(row[i]) for row in rows) + 2 for i in range(len(rows[0]) - 1)]
    return [(*row[:-1], printable(row[-1], 80 - sum(others))) for row in rows]


def _layers(classes) -> list[list[str]]:
    """Below each class whose format was chosen by its errors: which layers it is of, where others
    of its kind are of another format; and what there was to choose."""
    n_classes = Counter(c.name for c in classes)
    lines = []
    for c in classes:
        parts = []
        if c.layers and n_classes[c.name] > 1:
            parts.append(f"layers {_ranges(c.layers)};")
        if c.damage is not None:
            parts.append(f"damage {c.damage:.2g};")
        if c.step is not None:
            more = human_bytes(c.step.nbytes)
            parts.append(f"{c.step.format}: {more} more for {c.step.mends:.2g} less")
        text = " ".join(parts).rstrip(";")
        lines.append(textwrap.wrap(text, 80, initial_indent=" " * 4, subsequent_indent=" " * 11))
    return lines


def _ranges(numbers: tuple[int, ...]) -> str:
    """0 1 2 5 -> "0-2, 5"."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def print_note(text: str, err: bool = False) -> None:
    """A note to the user, wrapped at 80 columns."""
    indent = " " * 8
    click.echo(
        textwrap.fill(text, 80, initial_indent="Note:   ", subsequent_indent=indent), err=err
    )


def print_columns(
    rows: list[tuple[str, ...]], right: tuple[int, ...] = (), below: list[list[str]] | None = None
) -> None:
    """Rows aligned in columns, the first one a heading; `right` are aligned to the right.

    below: further lines for each row.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row, more in zip(rows, below or [[]] * len(rows), strict=True):
        cells = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        click.echo("\n".join(["  ".join(cells).rstrip(), *more]))


def _against(needed: int, free: int) -> str:
    verdict = "" if needed <= free else f"  DOES NOT FIT, {human_bytes(needed - free)} too little"
    return f"needs {human_bytes(needed)}, {human_bytes(free)} free{verdict}"
