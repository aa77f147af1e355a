"""Three figures: errors along depth, a map of layers by kind, damage against size.

They take points and names, and know nothing of models, files or how a metric was measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from quant.display import human_bytes
from quant.report.axes import log_axis, log_range, within
from quant.report.drawing import Drawing, Tips, render
from quant.report.style import COLOURS, FIGURE_WIDTH, KINDS, N_SHADES

INK, MUTED, SURFACE, ACCENT = (
    COLOURS[role].light for role in ("ink", "muted", "surface", "accent")
)
SHADES = ListedColormap([COLOURS[f"shade-{i}"].light for i in range(N_SHADES)])


@dataclass(frozen=True)
class Point:
    """The error of one module or group."""

    name: str
    layer: int
    kind: str  # a key of KINDS
    value: float  # on a log scale; 0, or a divergence below it, is drawn on the lower edge
    kept: bool = False  # in 16 bits


@dataclass(frozen=True)
class Panel:
    """One metric along depth, of modules or of the groups that are quantized together."""

    metric: str
    title: str
    unit: str
    points: tuple[Point, ...]
    threshold: float | None = None  # of just these points: a group's value is no module's
    level: str = "module"  # or "group"


# --- errors along depth -----------------------------------------------------------------------


def error_panels(title: str, panels: Sequence[Panel]) -> Drawing:
    """Errors along depth, a panel for each metric; log scale.

    All panels of a level have the same points (name, layer, kind, kept) in the same order.
    """
    levels = {panel.level: panel.points for panel in panels}
    n_layers = max(map(_n_layers, levels.values()))
    any_kept = any(point.kept for points in levels.values() for point in points)

    def draw(figure: Figure) -> Tips:
        figure.set_size_inches(FIGURE_WIDTH, 0.9 + 2.5 * len(panels))
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        tips = {}
        explained = set()
        for ax, panel in zip(axes, panels, strict=True):
            kinds = _kinds(panel.points)
            tips |= _draw_panel(ax, panel, kinds, n_layers)
            if panel.level not in explained:
                _legend(ax, kinds, any_kept)
                explained.add(panel.level)
        _depth_axis(axes[-1], n_layers)
        return tips

    seen = (
        " and ".join(_inside(panel.title) for panel in panels if panel.level == level)
        + f" of {len(points)} {level}s"
        for level, points in levels.items()
    )
    caption = capitalized("; ".join(seen)) + f" in {n_layers} layers, on a log scale."
    if any_kept:
        caption += " Rings mark what stays in 16 bits."
    if thresholds := [panel.threshold for panel in panels if panel.threshold is not None]:
        caption += f" The dashed line is the least that does: {number(thresholds[0])}."
    caption += _about_zeros(panels)
    return render("errors", title, caption, draw, *_panel_rows(panels))


def _panel_rows(panels: Sequence[Panel]) -> tuple[list[str], list[tuple]]:
    """The numbers: a row for each group, then for each module; a column for each metric."""
    metrics = list(dict.fromkeys(panel.metric for panel in panels))
    rows = []
    for level in dict.fromkeys(panel.level for panel in panels):
        of_level = {panel.metric: panel.points for panel in panels if panel.level == level}
        for i, p in enumerate(next(iter(of_level.values()))):
            values = (of_level[m][i].value if m in of_level else None for m in metrics)
            rows.append((level, p.name, p.kind, p.layer, _yes_no(p.kept), *values))
    return ["level", "name", "kind", "layer", "kept_16_bit", *metrics], rows


def _draw_panel(ax: Axes, panel: Panel, kinds: list[str], n_layers: int) -> Tips:
    """Points of each kind joined by a faint line; within a layer they stand side by side."""
    threshold = [panel.threshold] if panel.threshold else []
    low, high = log_range([point.value for point in panel.points] + threshold)
    area = min(46.0, max(9.0, 1500 / n_layers))  # of a mark, in square points
    tips = {}

    def place(points: Sequence[Point]) -> tuple[list[float], list[float]]:
        """Layer 3 is around x = 3, its weights in the order of a forward pass."""
        x = [p.layer + 0.8 * ((kinds.index(p.kind) + 0.5) / len(kinds) - 0.5) for p in points]
        return x, [within(p.value, low, high) for p in points]

    for kind in kinds:
        points = sorted((p for p in panel.points if p.kind == kind), key=lambda p: p.layer)
        colour = COLOURS[KINDS[kind].colour].light
        gid = f"{panel.level}-{panel.metric}-{kind}"
        ax.plot(*place(points), color=colour, linewidth=0.8, alpha=0.3, zorder=2)
        look = {"s": area, "c": colour, "marker": KINDS[kind].marker, "linewidths": 0}
        ax.scatter(*place(points), **look, gid=gid, zorder=3)
        tips[gid] = [_tip(point, panel.unit) for point in points]
    rings = {"s": 3.2 * area + 20, "facecolors": "none", "edgecolors": INK, "linewidths": 1.1}
    ax.scatter(*place([point for point in panel.points if point.kept]), **rings, zorder=4)
    spread = max(1.0, (2 / (high / low)) ** 0.5)  # less than a factor of 2 is not blown up
    log_axis(ax.yaxis, low / spread, high * spread)
    ax.set_title(f"{panel.title}, by group" if panel.level == "group" else panel.title)
    ax.set_ylabel(panel.unit)
    if panel.threshold:
        _draw_threshold(ax, panel.threshold)
    return tips


def _draw_threshold(ax: Axes, threshold: float) -> None:
    ax.axhline(threshold, color=INK, linewidth=1, linestyle=(0, (5, 3)), zorder=1.5)
    ax.annotate(
        f"least kept\n{number(threshold)}",
        (1, threshold),
        xycoords=("axes fraction", "data"),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        annotation_clip=False,
    )


def _depth_axis(ax: Axes, n_layers: int) -> None:
    """A tick for every layer, or for every 2nd, 4th, 8th ... where there are many."""
    margin = max(0.2, 0.012 * n_layers)
    ax.set_xlim(-0.5 - margin, n_layers - 0.5 + margin)
    step = 1
    while n_layers > 17 * step:
        step *= 2
    ax.set_xticks(range(0, n_layers, step))
    ax.set_xlabel("layer")


def _legend(ax: Axes, kinds: list[str], any_kept: bool) -> None:
    """Every kind, on the line of the panel's title."""
    marks = []
    for kind in kinds:
        style = KINDS[kind]
        colour = COLOURS[style.colour].light
        marks.append(_mark(style.label, marker=style.marker, color=colour, markersize=6.5))
    if any_kept:
        ring = {"markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.1}
        marks.append(_mark("kept in 16 bits", marker="o", markersize=10, **ring))
    ax.legend(
        handles=marks,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=len(marks),
        borderpad=0,
        borderaxespad=0.5,
    )


def _mark(label: str, **style) -> Line2D:
    return Line2D([], [], linestyle="none", label=label, **{"markeredgewidth": 0} | style)


def _about_zeros(panels: Sequence[Panel]) -> str:
    n = sum(point.value <= 0 for panel in panels for point in panel.points)
    return f" {n} without any error stand at the lower edge." if n else ""


# --- layers by kind ---------------------------------------------------------------------------


def heat_map(
    title: str, metric: str, unit: str, groups: Sequence[Point], threshold: float | None = None
) -> Drawing:
    """A metric of groups as colour, layers to the right, kinds downwards; dots on what is kept."""
    kinds = _kinds(groups)
    n_layers = _n_layers(groups)
    any_kept = any(group.kept for group in groups)

    def draw(figure: Figure) -> Tips:
        figure.set_size_inches(FIGURE_WIDTH, 1.1 + 0.36 * len(kinds))
        ax = figure.subplots()
        ax.grid(False)
        ax.spines[:].set_visible(False)
        norm = LogNorm(*log_range([group.value for group in groups]))
        _draw_cells(ax, groups, kinds, norm)
        _depth_axis(ax, n_layers)
        ax.set_xlim(-0.5, n_layers - 0.5)
        ax.set_ylim(len(kinds) - 0.5, -0.5)
        ax.set_yticks(range(len(kinds)), [KINDS[kind].label for kind in kinds])
        ax.tick_params(axis="y", labelcolor=INK)
        _colour_scale(figure, ax, norm, unit, threshold)
        return {"cells": [_tip(group, unit) for group in groups]}

    caption = (
        f"{capitalized(metric)} of {len(groups)} groups: the more a cell stands out, the worse."
    )
    if any_kept:
        caption += " Dots mark what stays in 16 bits."
    if threshold is not None:
        caption += f" The line in the scale is the least that does: {number(threshold)}."
        if any(group.value > threshold and not group.kept for group in groups):
            caption += " Some worse groups do not: they would take more bytes than they are worth."
    header = ["group", "kind", "layer", "kept_16_bit", metric]
    rows = [(g.name, g.kind, g.layer, _yes_no(g.kept), g.value) for g in groups]
    return render("heatmap", title, caption, draw, header, rows)


def _draw_cells(ax: Axes, groups: Sequence[Point], kinds: list[str], norm: LogNorm) -> None:
    cells = [Rectangle((g.layer - 0.5, kinds.index(g.kind) - 0.5), 1, 1) for g in groups]
    colours = [SHADES(norm(within(group.value, norm.vmin, norm.vmax))) for group in groups]
    ax.add_collection(
        PatchCollection(cells, facecolors=colours, edgecolors=SURFACE, linewidths=1.0, gid="cells")
    )
    kept = [group for group in groups if group.kept]
    ax.scatter(
        [group.layer for group in kept],
        [kinds.index(group.kind) for group in kept],
        s=22,
        facecolors=SURFACE,
        edgecolors=INK,
        linewidths=1.1,
        zorder=3,
    )


def _colour_scale(
    figure: Figure, ax: Axes, norm: LogNorm, unit: str, threshold: float | None
) -> None:
    bar = figure.colorbar(ScalarMappable(norm, SHADES), ax=ax, pad=0.015, aspect=12, fraction=0.04)
    bar.outline.set_visible(False)
    bar.solids.set(rasterized=False, edgecolor="face")
    bar.set_label(unit)
    log_axis(bar.ax.yaxis, norm.vmin, norm.vmax, room=0)
    if threshold is not None and norm.vmin <= threshold <= norm.vmax:
        bar.ax.axhline(threshold, color=INK, linewidth=1.4)


# --- damage against size ----------------------------------------------------------------------


def damage_curve(
    title: str,
    metric: str,
    curve: Sequence[tuple[int, float]],
    chosen: tuple[int, float] | None,
    plain_name: str,
    chosen_name: str = "chosen",
    sized: str = "size",
) -> Drawing:
    """Predicted damage, as a share of that without any 16 bits, against size.

    curve: (nbytes, damage) of the best choices, from all in 4 bits to 16 bits, smallest first.
    chosen: the point that is marked, if there is one; sized: what the bytes are those of.
    """
    ends = [(*curve[0], plain_name), (*curve[-1], "16 bit")]
    if chosen:
        ends.append((*chosen, chosen_name))
    plain_nbytes, plain_damage = curve[0]
    unit, scale = ("GB", 1e9) if curve[-1][0] >= 1e9 else ("MB", 1e6)

    def percent(damage: float) -> float:
        return 100 * damage / plain_damage if plain_damage > 0 else 0.0

    def draw(figure: Figure) -> Tips:
        figure.set_size_inches(FIGURE_WIDTH, 3.7)
        ax = figure.subplots()
        x = [nbytes / scale for nbytes, _ in curve]
        y = [percent(damage) for _, damage in curve]
        colour = COLOURS["q"].light
        ax.plot(x, y, color=colour, linewidth=1.6, zorder=2)
        ax.fill_between(x, y, color=colour, alpha=0.08, linewidth=0)
        dots = {"s": 18 if len(x) < 80 else 2, "linewidths": 0, "zorder": 3}
        ax.scatter(x, y, color=colour, gid="curve", **dots)
        marks = [(nbytes / scale, percent(damage)) for nbytes, damage, _ in ends]
        _draw_ends(ax, marks)
        texts = [f"{name}, {human_bytes(nbytes)}" for nbytes, _, name in ends]
        if chosen:
            texts[2] += (
                f": {change(chosen[0], plain_nbytes)} bytes, "
                f"{change(chosen[1], plain_damage)} predicted damage"
            )
        _label_ends(ax, marks, texts)
        ax.set_ylim(-4, 114)
        ax.set_xlabel(f"{sized} in {unit}")
        ax.set_ylabel(f"predicted damage, % of\n{plain_name}")
        return {"curve": [f"{human_bytes(n)}: {percent(d):.1f} %" for n, d in curve]}

    caption = f"Predicted damage ({metric}) of the best choice at every size."
    if chosen:
        caption += (
            f" The chosen one has {human_bytes(chosen[0])}, {change(chosen[0], plain_nbytes)} "
            f"against {plain_name}, and {percent(chosen[1]):.0f} % of its predicted damage."
        )
    labels = [plain_name, *[""] * (len(curve) - 2), "16 bit", *[name for *_, name in ends[2:]]]
    points = [*curve, *([chosen] if chosen else [])]
    rows = [
        (nbytes, damage, percent(damage), label)
        for (nbytes, damage), label in zip(points, labels, strict=True)
    ]
    header = ["nbytes", "predicted_damage", "percent_of_plain", "label"]
    return render("damage", title, caption, draw, header, rows)


def _draw_ends(ax: Axes, ends: Sequence[tuple[float, float]]) -> None:
    """All in 4 bits, 16 bits, and what was chosen, if anything was."""
    open_mark = {"s": 46, "facecolors": SURFACE, "edgecolors": INK, "linewidths": 1.2}
    full_mark = {"s": 90, "color": ACCENT, "edgecolors": SURFACE, "linewidths": 1.5}
    for end, marker, style in zip(ends, "sDo", (open_mark, open_mark, full_mark), strict=False):
        ax.scatter(*end, marker=marker, zorder=4, clip_on=False, **style)


def _label_ends(ax: Axes, ends: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
    """Texts beside the marks. What was chosen may be one of the ends: then only it speaks.

    Far to the right its text would lie on the curve: it stands above, with a line to the mark.
    """
    room = {"boxstyle": "square,pad=0.15", "facecolor": SURFACE, "edgecolor": "none", "alpha": 0.8}
    common = {"textcoords": "offset points", "bbox": room, "zorder": 3.5}
    (plain, _), (full, _), *rest = ends
    chosen = rest[0][0] if rest else None
    if chosen != plain:
        ax.annotate(texts[0], (plain, 100), xytext=(9, 4), **common)
    if chosen != full:
        ax.annotate(texts[1], (full, 0), xytext=(0, 10), ha="right", **common)
    if chosen is None:
        return
    percent = rest[0][1]
    common |= {"text": texts[2], "xy": (chosen, percent), "fontweight": "bold"}
    if chosen - plain > 0.4 * (full - plain):
        line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.8, "shrinkB": 6}
        common |= {"textcoords": "axes fraction", "arrowprops": line, "ha": "right"}
        ax.annotate(xytext=(0.98, 0.62), **common)
    else:
        below = plain < chosen and percent > 88  # above would be on top of plain's text
        ax.annotate(xytext=(11, -15 if below else 6), **common)


# --- shared -----------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three significant digits: "0.0041", "3.2e-06"."""
    return f"{value:.3g}"


def capitalized(text: str) -> str:
    """ "KL divergence" keeps its capitals, which str.capitalize would lower."""
    return text[:1].upper() + text[1:]


def _inside(title: str) -> str:
    """A title as it stands inside a sentence."""
    return title if title[1:2].isupper() else title[:1].lower() + title[1:]


def change(new: float, old: float) -> str:
    """ "+10.0 %" or "−46.2 %"."""
    return f"{100 * (new / old - 1):+.1f} %".replace("-", "−") if old else "±0 %"


def _tip(point: Point, unit: str) -> str:
    kept = ", kept in 16 bits" if point.kept else ""
    return f"{point.name}: {number(point.value)} {unit}{kept}"


def _yes_no(kept: bool) -> str:
    return "yes" if kept else "no"


def _kinds(points: Sequence[Point]) -> list[str]:
    """The kinds that are there, in the order of a forward pass."""
    there = {point.kind for point in points}
    return [kind for kind in KINDS if kind in there]


def _n_layers(points: Sequence[Point]) -> int:
    return 1 + max(point.layer for point in points)
