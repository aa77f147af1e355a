"""A profile as tables of 80 columns."""

from itertools import groupby

import click

from quant.cli.plan_table import print_columns, print_note
from quant.display import human_bytes, printable
from quant.profiling.cases import ENCODED, nearest

WIDTH = 80


def print_profile(profile) -> None:
    """Qwen's two tables: one sequence, and every case with its bytes split; then notes."""
    click.echo(f"{printable(profile.machine.name, 78)}\n")
    _print_one_sequence(profile.rows)
    _print_cases(profile.rows)
    for text in _notes(profile):
        print_note(text)


def _print_one_sequence(rows) -> None:
    """Speed of generating and peaks of encoding and generating, a line for each model."""
    alone = [row for row in rows if row.case.batch == 1]
    lengths = sorted({row.case.length for row in alone if not row.case.is_encoding})
    short, long = nearest(lengths, ENCODED), lengths[-1]
    shown = [short, long] if short < long else [long]
    found = {(row.variant, row.case.length, row.case.is_encoding): row for row in alone}
    encoded = next(row.case.length for row in alone if row.case.is_encoding)
    columns = [
        *(("generate", n, "tokens/s") for n in shown),
        ("encode", encoded, "peak"),
        ("generate", long, "peak"),
    ]
    table = [
        ("one sequence", *(what for what, _, _ in columns)),
        ("", *(f"{n:,}" for _, n, _ in columns)),
        ("", *(unit for _, _, unit in columns)),
    ]
    for name in dict.fromkeys(row.variant for row in rows):
        cells = (found[name, n, what == "encode"] for what, n, _ in columns)
        table.append(
            (
                name,
                *(
                    _speed(row) if unit == "tokens/s" else _peak(row)
                    for row, (_, _, unit) in zip(cells, columns, strict=True)
                ),
            )
        )
    _print_fitted(table)


def _print_cases(rows) -> None:
    table = [("", "weights", "cache", "other", "peak", "tokens/s")]
    below: list[list[str]] = [[]]
    for case, group in groupby(rows, key=lambda row: row.case):
        below[-1] = ["", f"{case}"]
        for row in group:
            table.append(
                (
                    f"  {row.variant}",
                    human_bytes(row.bytes.model_nbytes),
                    human_bytes(row.bytes.cache_nbytes),
                    _other(row),
                    _peak(row),
                    _speed(row),
                )
            )
            below.append([])
    click.echo()
    _print_fitted(table, below)


def _print_fitted(rows: list[tuple[str, ...]], below: list[list[str]] | None = None) -> None:
    """Columns of numbers behind names, which are cut so that 80 columns are enough."""
    numbers = list(zip(*(row[1:] for row in rows), strict=True))
    room = WIDTH - sum(2 + max(map(len, column)) for column in numbers)
    rows = [(printable(row[0], room), *row[1:]) for row in rows]
    print_columns(rows, right=tuple(range(1, len(rows[0]))), below=below)


def _speed(row) -> str:
    if row.speed is None:
        return "planned"
    middle, spread = row.speed
    digits = 0 if middle >= 100 else 1
    return f"{middle:,.{digits}f} ± {spread:,.{digits}f}"


def _peak(row) -> str:
    if row.peak_nbytes is None:
        return "-"
    return ("" if row.measured else "> ") + human_bytes(row.peak_nbytes)


def _other(row) -> str:
    if row.measured is None or row.peak_nbytes is None:
        return "-"
    return human_bytes(max(0, row.peak_nbytes - row.bytes.total))


def _notes(profile) -> list[str]:
    notes = []
    if any(row.measured for row in profile.rows):
        notes.append(
            f"tokens/s: median of {profile.n_repeats} ± half of what lies between the slowest and "
            "the fastest; of encoding, tokens of the prompt. All sequences of a batch together."
        )
        if profile.machine.device == "cpu":
            notes.append(
                "peak: the weights, and what the process grew by while it ran. Its libraries are "
                "not counted. The int8 cache is read in plain torch on a CPU: it saves memory "
                "there, not time."
            )
    reasons = dict.fromkeys(row.why for row in profile.rows if row.measured is None)
    for why in reasons:
        n = sum(row.measured is None and row.why == why for row in profile.rows)
        notes.append(
            f"{n} of {len(profile.rows)} are planned ({why}): weights and cache by arithmetic. A "
            "run takes more than that."
        )
    warned = dict.fromkeys((row.variant, text) for row in profile.rows for text in row.notes)
    notes += [f"{printable(variant, 40)}: {text}" for variant, text in warned]
    notes += [f"{printable(x.variant, 40)} is left out: {x.why}." for x in profile.left_out]
    notes += [
        f"{printable(failed.variant, 40)} could not be run to the end. {failed.error.what} "
        f"{failed.error.why}"
        for failed in profile.failed
    ]
    return notes
