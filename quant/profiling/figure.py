"""Memory and speed over batch sizes and lengths, as one figure.

Memory is a stack: weights, cache, and whatever else a run takes, from strong to faint. What is
planned is an outline with hatching, and has no part that could not be computed.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from quant.display import human_bytes, printable
from quant.profiling.profile import Row
from quant.report.drawing import Drawing, Tips, render
from quant.report.style import COLOURS, FIGURE_WIDTH

INK, MUTED, SURFACE = (COLOURS[role].light for role in ("ink", "muted", "surface"))
ROLES = ("q", "down", "v", "gate", "o", "k", "up")
"""Colour of each variant in turn."""

PARTS = (("weights", 1.0), ("cache", 0.55), ("other", 0.2))
"""From the bottom up, with their opacity."""

BARS_WIDTH = 0.8  # of the distance between two sizes


def memory_and_speed(
    title: str, rows: Sequence[Row], header: Sequence[str], numbers: Sequence[Sequence]
) -> Drawing:
    """Four panels: memory and tokens a second, over batch sizes and over lengths.

    rows: of all cases; those of encoding are left out of the picture. header, numbers: its CSV.
    """
    rows = [row for row in rows if not row.case.is_encoding]
    names = list(dict.fromkeys(row.variant for row in rows))
    in_batches = _at_one_length(rows)
    one_by_one = [row for row in rows if row.case.batch == 1]
    sides = [(one_by_one, "length")]
    if len({row.case.batch for row in in_batches}) > 1:
        sides.append((in_batches, "batch"))
    any_measured = any(row.measured for row in rows)

    def draw(figure: Figure) -> Tips:
        n_lines = 2 if any_measured else 1
        figure.set_size_inches(FIGURE_WIDTH, 0.8 + 2.8 * n_lines)
        grid = figure.subplots(n_lines, len(sides), squeeze=False)
        tips = {}
        for column, (part, by) in enumerate(sides):
            tips |= _draw_memory(grid[0, column], part, by, names)
            if any_measured:
                _draw_speed(grid[1, column], part, by, names)
        _legend(figure, names, any(row.measured is None for row in rows))
        return tips

    caption = (
        "Memory at its peak, and tokens generated a second by all sequences together, over the "
        "number of tokens generated and the number of sequences at once. Bars are stacks of "
        "weights, cache and whatever else was needed"
    )
    n_planned = sum(row.measured is None for row in rows)
    caption += (
        f"; {n_planned} of {len(rows)} are hatched: planned, not measured." if n_planned else "."
    )
    return render("profile", title, caption, draw, header, numbers)


def _at_one_length(rows: Sequence[Row]) -> list[Row]:
    """Those of the length that was run in batches."""
    lengths = {row.case.length for row in rows if row.case.batch > 1}
    return [row for row in rows if row.case.length in lengths]


# --- panels -----------------------------------------------------------------------------------


def _draw_memory(ax: Axes, rows: Sequence[Row], by: str, names: list[str]) -> Tips:
    unit, scale = _unit(max(row.peak_nbytes or row.bytes.total for row in rows))
    tips = {}
    sizes = _sizes(rows, by)
    for k, name in enumerate(names):
        colour = COLOURS[ROLES[k % len(ROLES)]].light
        for planned in (False, True):
            boxes, faces, lines = [], [], []
            for row in (r for r in rows if r.variant == name and (r.measured is None) == planned):
                x = _place(sizes.index(_size(row, by)), k, len(names))
                for (part, opacity), bottom, height in _stack(row):
                    box = (x, bottom / scale), BARS_WIDTH / len(names), height / scale
                    boxes.append(Rectangle(*box))
                    faces.append(to_rgba(colour, 0 if planned else opacity))
                    lines.append(f"{name}, {row.case}: {part} {human_bytes(height)}")
            if boxes:  # on paper of their own: the grid would show through
                ax.add_collection(PatchCollection(boxes, facecolors=SURFACE, linewidths=0))
                gid = f"memory-{by}-{k}-{'planned' if planned else 'measured'}"
                look = {"facecolors": faces, "edgecolors": colour if planned else SURFACE}
                look |= {"hatch": "////" if planned else None, "linewidths": 0.7}
                ax.add_collection(PatchCollection(boxes, gid=gid, **look))
                tips[gid] = [line + (", planned" if planned else "") for line in lines]
    highest = max((row.peak_nbytes or row.bytes.total) / scale for row in rows)
    ax.set_ylim(0, 1.08 * highest)
    _size_axis(ax, sizes, by, rows)
    ax.set_ylabel(f"peak memory, {unit}")
    return tips


def _stack(row: Row) -> list[tuple[tuple[str, float], int, int]]:
    """(part, bottom, height) in bytes, from the bottom up; other only where it was measured."""
    weights, cache = row.bytes.model_nbytes, row.bytes.cache_nbytes
    heights = [weights, cache]
    if row.measured and row.peak_nbytes is not None:
        heights.append(max(0, row.peak_nbytes - weights - cache))
    bottoms = [sum(heights[:i]) for i in range(len(heights))]
    return list(zip(PARTS, bottoms, heights, strict=False))


def _draw_speed(ax: Axes, rows: Sequence[Row], by: str, names: list[str]) -> None:
    sizes = _sizes(rows, by)
    for k, name in enumerate(names):
        colour = COLOURS[ROLES[k % len(ROLES)]].light
        found = [row for row in rows if row.variant == name and row.measured]
        x = [sizes.index(_size(row, by)) + _shift(k, len(names)) for row in found]
        speeds = [row.speed[0] for row in found]
        ends = [
            [y - min(r.tokens_per_s) for y, r in zip(speeds, found, strict=True)],
            [max(r.tokens_per_s) - y for y, r in zip(speeds, found, strict=True)],
        ]
        look = {"color": colour, "elinewidth": 1, "capsize": 2.5, "markersize": 5}
        ax.errorbar(x, speeds, yerr=ends, fmt="o", **look, zorder=3)
        ax.plot(x, speeds, color=colour, linewidth=0.8, alpha=0.4, zorder=2)
    ax.set_ylim(0, 1.08 * max(max(row.tokens_per_s, default=0) for row in rows) or 1)
    _size_axis(ax, sizes, by, rows)
    ax.set_ylabel("tokens a second")


# --- axes and legend --------------------------------------------------------------------------


def _size(row: Row, by: str) -> int:
    return row.case.length if by == "length" else row.case.batch


def _sizes(rows: Sequence[Row], by: str) -> list[int]:
    return sorted({_size(row, by) for row in rows})


def _place(i: int, k: int, n: int) -> float:
    """The left edge of variant k's bar, of n, at the size i."""
    return i + BARS_WIDTH * (k / n - 0.5)


def _shift(k: int, n: int) -> float:
    """The middle of variant k's bar, from the size's."""
    return BARS_WIDTH * ((k + 0.5) / n - 0.5)


def _size_axis(ax: Axes, sizes: list[int], by: str, rows: Sequence[Row]) -> None:
    ax.set_xlim(-0.6, len(sizes) - 0.4)
    ax.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    length = rows[0].case.length
    ax.set_xlabel(
        "tokens generated, batch 1" if by == "length" else f"batch, {length:,} tokens generated"
    )


def _unit(nbytes: int) -> tuple[str, float]:
    return ("GB", 1e9) if nbytes >= 1e9 else ("MB", 1e6)


def _legend(figure: Figure, names: list[str], any_planned: bool) -> None:
    """The variants on the left, the parts of a bar on the right."""
    variants = [
        Patch(facecolor=COLOURS[ROLES[k % len(ROLES)]].light, label=printable(name, 20))
        for k, name in enumerate(names)
    ]
    parts = [Patch(facecolor=to_rgba(MUTED, opacity), label=part) for part, opacity in PARTS]
    if any_planned:
        parts.append(Patch(facecolor="none", edgecolor=MUTED, hatch="////", label="planned"))
    figure.legend(handles=variants, loc="outside lower left", ncols=3)
    figure.legend(handles=parts, loc="outside lower right", ncols=len(parts))
