"""Names beside marks, none on top of another: twenty sizes of one model lie close together.

Each name in turn takes the nearest free place around its mark; one that found none beside it is
joined to it by a line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from matplotlib.axes import Axes

FONT_SIZE = 8.5

GAP = 6.0
"""Points between a mark's middle and a name beside it."""

RINGS = (0, 9, 18, 28, 40, 54, 70, 90)
"""Points farther away than beside it."""

SIDES = ((1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1), (1, -1), (-1, 1))
"""Right or left, above or below, in the order of preference: a frontier falls to the right."""

APART = 1.5
"""Points that stay free around a name."""


@dataclass(frozen=True)
class Label:
    """A name, and the place of its mark in the units of the axes."""

    text: str
    place: tuple[float, float]
    colour: str


def short_names(names: Sequence[str]) -> list[str]:
    """ "QwQ-32B-Q4_K_M.gguf" as "Q4_K_M", where others begin with "QwQ-32B-" too.

    Names stay whole if two would be the same.
    """
    stems = [name.removesuffix(".gguf") for name in names]
    heads = [stem[: stem.rfind("-") + 1] for stem in stems]
    short = [
        stem[len(head) :] if heads.count(head) > 1 else stem
        for stem, head in zip(stems, heads, strict=True)
    ]
    return short if len(set(short)) == len(names) and all(short) else list(names)


def place_labels(
    ax: Axes, labels: Sequence[Label], line: Sequence[tuple[float, float]], colour: str
) -> None:
    """Draw the names on finished axes, off the marks and off `line`, which joins its points.

    colour: of the lines from names to their marks. Earlier labels have the better places.
    """
    figure = ax.figure
    figure.draw_without_rendering()  # so that the axes are where they will be
    point = figure.dpi / 72  # in pixels, as everything below
    marks = ax.transData.transform([label.place for label in labels])
    taken = [_box(mark, (2 * GAP * point, 2 * GAP * point)) for mark in marks]
    path = _along(ax.transData.transform(line), 3 * point)
    inside = np.array(ax.get_window_extent().extents)
    for label, mark in zip(labels, marks, strict=True):
        size = _size(ax, label.text) + 2 * APART * point
        boxes = [(ring, _beside(mark, size, ring, side, point))
                 for ring, side in product(RINGS, SIDES)]  # fmt: skip
        costs = [_cost(box, ring, taken, path, inside) for ring, box in boxes]
        ring, box = boxes[int(np.argmin(costs))]
        taken.append(box)
        middle = (box[:2] + box[2:]) / 2
        joined = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4}
        ax.annotate(
            label.text,
            label.place,
            xytext=(middle - mark) / point,
            textcoords="offset points",
            ha="center",
            va="center",
            color=label.colour,
            fontsize=FONT_SIZE,
            arrowprops=joined if ring else None,
            zorder=4,
        ).set_in_layout(False)


def _size(ax: Axes, text: str) -> np.ndarray:
    """Width and height."""
    drawn = ax.text(0, 0, text, fontsize=FONT_SIZE)
    extent = drawn.get_window_extent()
    drawn.remove()
    return np.array([extent.width, extent.height])


def _box(middle: np.ndarray, size: Sequence[float]) -> np.ndarray:
    """(left, bottom, right, top)."""
    half = np.asarray(size) / 2
    return np.concatenate([middle - half, middle + half])


def _beside(
    mark: np.ndarray, size: np.ndarray, ring: float, side: tuple[int, int], point: float
) -> np.ndarray:
    """The box of a name of that size on one side of its mark."""
    far = np.array([GAP + 0.7 * ring, GAP + ring]) * point
    if all(side):  # at a corner, less of the gap will do
        far[1] -= 0.6 * GAP * point
    return _box(mark + np.array(side) * (far + size / 2), size)


def _along(corners: np.ndarray, step: float) -> np.ndarray:
    """Points on the line through `corners`, (n, 2)."""
    parts = [corners[:1]]
    for a, b in pairwise(corners):
        n = max(2, int(np.hypot(*(b - a)) / step))
        parts.append(a + (b - a) * np.linspace(0, 1, n)[:, None])
    return np.concatenate(parts)


def _cost(
    box: np.ndarray, ring: float, taken: Sequence[np.ndarray], path: np.ndarray, inside: np.ndarray
) -> float:
    """Pixels that it covers, weighed by what they are; far away is worse than near."""
    others = np.array(taken)
    width = np.minimum(box[2], others[:, 2]) - np.maximum(box[0], others[:, 0])
    height = np.minimum(box[3], others[:, 3]) - np.maximum(box[1], others[:, 1])
    covered = float((width.clip(0) * height.clip(0)).sum())
    crossed = int(((path >= box[:2]) & (path <= box[2:])).all(axis=1).sum())
    outside = float((inside[:2] - box[:2]).clip(0).sum() + (box[2:] - inside[2:]).clip(0).sum())
    return 20 * covered + 60 * crossed + 500 * outside + ring
