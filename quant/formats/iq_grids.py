"""The codebooks of the 1-, 2- and 3-bit I-quants, and which of their points lie near a code.

These formats store no level per weight but, for 8 weights (4 in the 3-bit types), the number of
a point in a fixed codebook: 256 to 2048 of the 6561 or 4096 possible rows of levels. A level l
stands for the odd number 2 l + 1 (for l - 1 in IQ1). Rounding gives a row of levels, its `code`;
unless that is a codebook point, an encoder tries the points near it. Which ones, and in which
order, decides ties, and so bytes: they are ggml's.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

UNROLL = 4
"""Lists of points are filled up to a multiple of this, by their last point."""

OFF_GRID = 1 << 16
"""Set in a code that was chosen from a list: the rounded row itself was no codebook point."""


class Grid(NamedTuple):
    """A codebook of `n_points` rows of levels, and the points near every row that is none.

    A code packs a row of levels, first weight in the lowest bits: 8 x 2 bits or 4 x 3 bits, so
    there are 2**16 or 2**12 codes. All arrays are flat. Named tuples go into compiled functions.
    """

    point_of: np.ndarray  # int32 (n_codes,): a code's point, or -1
    codes: np.ndarray  # int32 (n_points,), with OFF_GRID set
    levels: np.ndarray  # uint8 (n_points * 8 or 4,)
    near: np.ndarray  # uint16: lists of points
    spans: np.ndarray
    """int32 (2 * n_codes,): where a code's list begins in `near`, and how long it is, as
    (start / UNROLL) << 8 | length / UNROLL; 0 if the code is itself a point. The second half leads
    to shorter lists, equivalent if every level of the code is the nearest to its weight."""


# type name: how many distinct distances from a code count as near
_N_DISTANCES = {"IQ1_S": 3, "IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 1, "IQ3_XXS": 2, "IQ3_S": 3}


@cache
def grid_of(type_name: str) -> Grid:
    """The codebook of a GGUF type; IQ1_M shares that of IQ1_S."""
    levels = _levels(type_name)
    n_points, n_dims = levels.shape
    n_bits, n_levels = (2, 3) if n_dims == 8 else (3, 8)
    shifts = n_bits * np.arange(n_dims)
    codes = (levels << shifts).sum(axis=1)  # (n_points,)
    point_of = np.full(1 << n_bits * n_dims, -1, np.int32)
    point_of[codes] = np.arange(n_points)

    rows = np.indices((n_levels,) * n_dims).reshape(n_dims, -1).T.astype(np.int16)
    row_codes = (rows.astype(np.int64) << shifts).sum(axis=1)
    is_off_grid = point_of[row_codes] < 0
    rows, row_codes = rows[is_off_grid], row_codes[is_off_grid]

    counts, points = _nearest_points(rows, levels, _N_DISTANCES[type_name])
    owner = np.repeat(np.arange(len(rows)), counts)
    is_useful = ~_is_dominated(levels[points] - rows[owner], owner, counts)
    spans = np.zeros((2, len(point_of)), np.int32)
    spans[0, row_codes], near = _pack_lists(points, counts, 0)
    useful_counts = np.bincount(owner[is_useful], minlength=len(rows))
    spans[1, row_codes], fewer = _pack_lists(points[is_useful], useful_counts, len(near))
    near = np.concatenate([near, fewer]).astype(np.uint16)
    codes = (codes | OFF_GRID).astype(np.int32)
    return Grid(point_of, codes, levels.astype(np.uint8).reshape(-1), near, spans.reshape(-1))


def _levels(type_name: str) -> np.ndarray:
    """Levels of every codebook point, int16 (n_points, 8 or 4), from gguf's decoder."""
    import gguf.quants

    decoder = getattr(gguf.quants, type_name)
    decoder.init_grid()
    values = decoder.grid.reshape(decoder.grid_shape)
    return np.searchsorted(np.array(decoder.grid_map, np.float32), values).astype(np.int16)


def _nearest_points(rows: np.ndarray, levels: np.ndarray, n_distances: int):
    """For each row the points at its `n_distances` least distances, by distance, then number.

    Returns how many each row has, (n_rows,), and their numbers, one row's after another's.
    # ref: ggml-quants.c, iq2xs_init_impl and iq3xs_init_impl
    """
    counts, points = [], []
    for some_rows in np.array_split(rows, len(rows) // 256 + 1):
        squares = (some_rows[:, None, :] - levels[None]) ** 2  # (n_rows, n_points, 8 or 4)
        distance = squares.sum(axis=2, dtype=np.int16)
        limit = np.full((len(some_rows), 1), -1, np.int16)
        for _ in range(n_distances):
            limit = np.where(distance > limit, distance, 9999).min(axis=1, keepdims=True)
        row, point = np.nonzero(distance <= limit)
        order = np.lexsort((point, distance[row, point], row))
        counts.append(np.bincount(row, minlength=len(some_rows)))
        points.append(point[order])
    return np.concatenate(counts), np.concatenate(points)


def _is_dominated(steps: np.ndarray, owner: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Whether an earlier point of the list lies between the code and this point, in each weight.

    `steps`, (n, 8 or 4), lead from the code to the points. If the code's levels are the nearest
    to the weights, each step away adds to the error: then the earlier point is no worse, and a
    later one must be better to be taken.
    """
    first = (np.cumsum(counts) - counts)[owner]
    place = np.arange(len(steps)) - first
    result = np.zeros(len(steps), bool)
    for i in range(counts.max()):
        later = np.flatnonzero((place > i) & ~result)
        reference = steps[first[later] + i]
        step = steps[later]
        is_between = (np.abs(reference) <= np.abs(step)) & (reference * step >= 0)
        result[later] = is_between.all(axis=1)
    return result


def _pack_lists(points: np.ndarray, counts: np.ndarray, offset: int):
    """Spans (n_rows,) and the lists, each filled up to a multiple of UNROLL, from `offset` on."""
    n_quads = -(-counts // UNROLL)
    starts = np.cumsum(n_quads) - n_quads  # (n_rows,), in units of UNROLL
    place = np.arange(UNROLL * n_quads.sum())
    row = np.repeat(np.arange(len(counts)), UNROLL * n_quads)
    in_list = np.minimum(place - UNROLL * starts[row], counts[row] - 1)
    filled = points[(np.cumsum(counts) - counts)[row] + in_list]
    return (starts + offset // UNROLL) << 8 | n_quads, filled
