"""Pictures of an evaluation: divergence against size, by category, and what became of p.

They take names and numbers, and know nothing of models or files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quant.display import human_bytes, printable
from quant.evaluation.labels import Label, place_labels, short_names
from quant.report.axes import log_axis, log_range, within
from quant.report.drawing import Drawing, Tips, render
from quant.report.figures import number
from quant.report.style import COLOURS, FIGURE_WIDTH

INK, MUTED, SURFACE, ACCENT, LOSS, GAIN = (
    COLOURS[role].light for role in ("ink", "muted", "surface", "accent", "down", "v")
)
MARKS = (("q", "o"), ("down", "s"), ("v", "^"), ("gate", "D"), ("o", "v"), ("k", "P"), ("up", "X"))
"""Colour and marker of each category in turn."""

N_COLUMNS = 3  # of histograms


@dataclass(frozen=True)
class SizePoint:
    """A candidate's place in the picture of divergence against size."""

    name: str
    nbytes: int
    kld: float
    error: float


def frontier(points: Sequence[SizePoint]) -> list[SizePoint]:
    """Those that no other candidate beats in both size and divergence, smallest first."""
    best: list[SizePoint] = []
    for point in sorted(points, key=lambda p: (p.nbytes, p.kld)):
        if not best or point.kld < best[-1].kld:
            best.append(point)
    return best


def size_figure(title: str, points: Sequence[SizePoint]) -> Drawing:
    """Mean KL divergence against size, log scale, with the frontier as a line."""
    best = frontier(points)
    unit, scale = ("GB", 1e9) if max(p.nbytes for p in points) >= 1e9 else ("MB", 1e6)
    low, high = log_range([point.kld for point in points])
    short = dict(zip(points, short_names([point.name for point in points]), strict=True))

    def place(point: SizePoint) -> tuple[float, float]:
        return point.nbytes / scale, within(point.kld, low, high)

    labels = [
        Label(printable(short[point], 40), place(point), INK if point in best else MUTED)
        for point in [*best, *(other for other in points if other not in best)]
    ]

    def draw(figure: Figure) -> Tips:
        figure.set_size_inches(FIGURE_WIDTH, 4.6)
        ax = figure.subplots()
        line = [place(point) for point in best]
        ax.plot(*zip(*line, strict=True), color=ACCENT, linewidth=1.4, alpha=0.5, zorder=2)
        tips = {}
        for i, point in enumerate(points):
            on_it = point in best
            tips[f"point-{i}"] = [f"{point.name}: {number(point.kld)}, {human_bytes(point.nbytes)}"]
            ax.scatter(
                *place(point),
                gid=f"point-{i}",
                s=52,
                facecolors=ACCENT if on_it else SURFACE,
                edgecolors=ACCENT if on_it else MUTED,
                linewidths=1.3,
                zorder=3,
            )
        log_axis(ax.yaxis, low, high)
        ax.margins(x=0.06)
        ax.set_xlabel(f"size in {unit}")
        ax.set_ylabel("mean KL divergence, nats a token")
        place_labels(ax, labels, line, MUTED)
        return tips

    caption = (
        "Mean KL divergence from the reference against size: the lower and the farther left, the "
        f"better. The line joins the {len(best)} of {len(points)} that no other one beats in both."
    )
    rows = [(p.name, p.nbytes, p.kld, p.error, "yes" if p in best else "no") for p in points]
    return render(
        "kld-size", title, caption, draw, ["model", "nbytes", "kld", "error", "frontier"], rows
    )


def category_figure(title: str, klds: Mapping[str, Mapping[str, float]]) -> Drawing:
    """Mean KL divergence of each candidate (rows) in each category (marks). klds[model][category].

    The candidates stand from top to bottom in the order given.
    """
    categories = list(next(iter(klds.values())))
    low, high = log_range([x for of in klds.values() for x in of.values()])

    def draw(figure: Figure) -> Tips:
        figure.set_size_inches(FIGURE_WIDTH, 1.2 + 0.32 * len(klds))
        ax = figure.subplots()
        ax.grid(True, axis="x")
        tips = {}
        for i, category in enumerate(categories):
            colour, marker = MARKS[i % len(MARKS)]
            x = [within(of[category], low, high) for of in klds.values()]
            gid = f"category-{i}"
            look = {"s": 42, "c": COLOURS[colour].light, "marker": marker, "linewidths": 0}
            label = printable(category, 24) or "text"
            # Side by side, for marks that are equal would hide each other.
            y = [row + 0.4 * ((i + 0.5) / len(categories) - 0.5) for row in range(len(klds))]
            ax.scatter(x, y, label=label, gid=gid, zorder=3, **look)
            tips[gid] = [f"{n}, {category}: {number(of[category])}" for n, of in klds.items()]
        ax.set_yticks(range(len(klds)), [printable(name, 40) for name in klds])
        ax.tick_params(axis="y", labelcolor=INK)
        ax.set_ylim(len(klds) - 0.5, -0.5)
        _log_x(ax, low, high)
        ax.set_xlabel("mean KL divergence, nats a token")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(categories), borderpad=0)
        return tips

    caption = f"Mean KL divergence of {len(klds)} models in {len(categories)} kinds of text."
    rows = [(name, c, kld) for name, of in klds.items() for c, kld in of.items()]
    return render("kld-category", title, caption, draw, ["model", "category", "kld"], rows)


def _log_x(ax: Axes, low: float, high: float) -> None:
    """log_axis sets an y axis up; here its limits, ticks and texts are those of x."""
    other = ax.figure.add_axes((0, 0, 0.1, 0.1))
    log_axis(other.yaxis, low, high)
    ax.set_xscale("log")
    ax.set_xlim(other.get_ylim())
    ax.xaxis.set_major_locator(other.yaxis.get_major_locator())
    ax.xaxis.set_minor_locator(other.yaxis.get_minor_locator())
    ax.xaxis.set_major_formatter(other.yaxis.get_major_formatter())
    other.remove()


def change_figure(
    title: str, edges: Sequence[float], counts: Mapping[str, Sequence[int]]
) -> Drawing:
    """What became of the probability of the token that came next: a histogram for each candidate.

    edges: of the bins, -1 ... 1, an odd number of bins; the middle one, hardly any change, is told
    in words, for it dwarfs the others. counts[model]: positions in each bin.
    """
    middle = (len(edges) - 2) // 2
    texts = [f"{100 * edge:g}" for edge in edges]

    def draw(figure: Figure) -> Tips:
        n_rows = ceil(len(counts) / N_COLUMNS)
        figure.set_size_inches(FIGURE_WIDTH, 0.5 + 1.85 * n_rows)
        axes = figure.subplots(n_rows, N_COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
        for ax, (name, found) in zip(axes, counts.items(), strict=False):
            percent = [100 * n / max(sum(found), 1) for n in found]
            still = percent[middle]
            percent[middle] = 0
            colours = [LOSS if i < middle else GAIN for i in range(len(percent))]
            ax.bar(range(len(percent)), percent, width=0.9, color=colours)
            ax.set_title(printable(name, 34), fontsize=8.5, pad=15)
            ax.annotate(
                f"{still:.0f} % hardly changed",
                (0, 1),
                xycoords="axes fraction",
                xytext=(0, 4),
                textcoords="offset points",
                color=MUTED,
                fontsize=8,
            )
            ticks = [0, 4, middle + 0.5, len(edges) - 5, len(edges) - 1]
            labels = [texts[0], texts[4], "0", f"+{texts[-5]}", f"+{texts[-1]}"]
            ax.set_xticks([tick - 0.5 for tick in ticks], labels)
        for ax in axes[len(counts) :]:
            ax.set_visible(False)
        for ax in axes[max(len(counts) - N_COLUMNS, 0) : len(counts)]:
            ax.tick_params(labelbottom=True)  # what stands below may not be there
        figure.supxlabel("change in percentage points", fontsize=8.5, color=MUTED)
        figure.supylabel("% of positions", fontsize=8.5, color=MUTED)
        return {}

    caption = (
        "Change of the probability of the token that really came next: lost to the left, gained to "
        "the right of the middle. Bins are finer near zero; those within "
        f"{texts[middle + 1]} points are left out of the bars."
    )
    header = ["model", "from", "to", "positions"]
    rows = [
        (name, edges[i], edges[i + 1], n)
        for name, found in counts.items()
        for i, n in enumerate(found)
    ]
    return render("dp", title, caption, draw, header, rows)


def size_text(nbytes: int, bits_per_weight: float | None) -> str:
    """ "4.4 MB, 5.14 bits per weight"."""
    bits = f", {bits_per_weight:.2f} bits per weight" if bits_per_weight else ""
    return f"{human_bytes(nbytes)}{bits}"
