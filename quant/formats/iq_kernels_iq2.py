"""Compiled encoders of IQ2_XXS, IQ2_XS and IQ2_S: 8 weights a codebook point.

w ~ d (2 scale_code + 1) sign (2 level + 1), the levels 0 ... 2 of 8 weights a point of a codebook
of 256 (XXS), 512 (XS) or 1024 (S); a scale for 32 weights (XXS) or 16.
# ref: ggml-quants.c, quantize_row_iq2_xxs_impl, quantize_row_iq2_xs_impl, quantize_row_iq2_s_impl
"""

from typing import NamedTuple

import numpy as np

from quant.formats.compiled import kernel
from quant.formats.iq_grids import Grid
from quant.formats.iq_kernels_grid import (
    ALL,
    ONE,
    SUPER_BLOCK,
    THOSE_OFF_GRID,
    TOO_LARGE,
    ZERO,
    Workspace,
    encode_super_block,
    find_extremes,
    greater,
    make_signs_even,
    mean_square,
    nearest_int,
    new_workspace,
    reach_to_top,
    split_signs,
    trials,
)
from quant.formats.iq_kernels_lanes import inlined, new_rows
from quant.formats.lanes import (
    LANES,
    any_of,
    gather16,
    load,
    select,
    splat,
    sqrt,
    store,
    to_float,
)

# weights, weights of a point, bits and number of levels
SHAPE_XXS = (32, 8, 2, 3)
SHAPE = (16, 8, 2, 3)
TOP_LEVEL = np.float32(5)
TRIALS_XXS = trials(5, 0.1, 6)
TRIALS = trials(5, 0.1, 9)
TINY = np.float32(1e-15)  # ref: GROUP_MAX_EPS
TINY_S = np.float32(1e-8)  # ref: GROUP_MAX_EPS_IQ2_S


def new_work(grid: Grid) -> tuple[Workspace]:
    return (new_workspace(1, SHAPE, grid),)


@inlined
def load_super_block(w, start, importance, factor, at, work):
    """Fill work.x, signs, weight and root from `at` on; returns whether sums will be finite.

    An error counts by importance * sqrt(variance + w * w), or without one (IQ2_S only) by
    variance / 4 + w * w; variance = factor * mean(w * w).
    """
    split_signs(w, start, at, work)
    variance = factor * mean_square(w, start)
    column = start % len(importance) if len(importance) else 0
    for i in range(0, SUPER_BLOCK, LANES):
        x = load(work.x, at + i)
        if len(importance):
            weight = load(importance, column + i) * sqrt(variance + x * x)
        else:
            weight = np.float32(0.25) * variance + x * x
        store(work.weight, at + i, weight)
        store(work.root, at + i, sqrt(weight))
    return variance < TOO_LARGE


@kernel
def encode_xs(w, importance, grid, work, points, signs, scale_codes, d):
    """Fill points (n, 16, 2), signs (n, 16, 2) of 7 bits, scale codes (n, 16) and d (n,).

    `w` holds n super-blocks of 256, in rows as long as `importance`. The results must come zeroed.
    Returns False if weights are too large.
    """
    fits = True
    for s in range(len(d)):
        fits &= load_super_block(w, s * SUPER_BLOCK, importance, ONE, 0, work)
        make_signs_even(0, work)
        find_extremes(0, SHAPE, work)
        reach_to_top(TOP_LEVEL, SHAPE, work)
        d[s], is_finite = encode_super_block(
            0, TRIALS, TINY, 0, THOSE_OFF_GRID, 127, SHAPE, grid, work,
            points[s], signs[s], scale_codes[s],
        )  # fmt: skip
        fits &= is_finite
    return fits


@kernel
def encode_s(w, importance, grid, work, points, signs, scale_codes, d):
    """As encode_xs, with signs of 8 bits; importance may be empty."""
    fits = True
    for s in range(len(d)):
        fits &= load_super_block(w, s * SUPER_BLOCK, importance, np.float32(2), 0, work)
        find_extremes(0, SHAPE, work)
        reach_to_top(TOP_LEVEL, SHAPE, work)
        d[s], is_finite = encode_super_block(
            0, TRIALS, TINY_S, 0, THOSE_OFF_GRID, 255, SHAPE, grid, work,
            points[s], signs[s], scale_codes[s],
        )  # fmt: skip
        fits &= is_finite
    return fits


# --- IQ2_XXS: where to look for a block's scale is itself searched for, one lane a block ---------


class Columns(NamedTuple):
    """The blocks of some super-blocks, one a lane: (32, LANES) each."""

    starts: np.ndarray  # int64 (LANES,): where in work.x a block begins
    x: np.ndarray
    weight: np.ndarray
    levels: np.ndarray


BATCH = LANES // 8  # super-blocks whose blocks fill the lanes


def new_work_xxs(grid: Grid) -> tuple[Workspace, Columns]:
    columns = Columns(32 * np.arange(LANES), new_rows(32), new_rows(32), new_rows(32))
    return new_workspace(BATCH, SHAPE_XXS, grid), columns


@inlined
def byte_of(x):
    """An int32 as C stores it in a uint8_t and reads it back, in float32."""
    return to_float(x & 255)


@inlined
def four_at_most(x):
    level = nearest_int(x)
    return select(level > 4, 4, level)


@inlined
def best_inverse(x, weight, top):
    """Per lane 1 / d for which d * (0 ... 4) fits 32 weights best, of 9 values tried."""
    inverse = np.float32(4) / top
    scale = ONE / inverse
    least_error = splat(ZERO)
    for i in range(32):
        difference = load(x, i) - scale * byte_of(nearest_int(inverse * load(x, i)))
        least_error = least_error + load(weight, i) * difference * difference
    for n in range(-4, 5):
        if n == 0:
            continue
        trial = (np.float32(0.1) * np.float32(n) + np.float32(4)) / top
        scale = ONE / trial
        error = splat(ZERO)
        for i in range(32):
            difference = load(x, i) - scale * to_float(four_at_most(trial * load(x, i)))
            error = error + load(weight, i) * difference * difference
        is_better = error < least_error
        least_error = select(is_better, error, least_error)
        inverse = select(is_better, trial, inverse)
    return inverse


@inlined
def first_scales(x, weight, levels):
    """Per lane the scale d >= 0 for which d * (0 ... 4) fits 32 weights well, or 0.

    x, weight and levels are (32, LANES). After the best of 9 scales each level in turn moves where
    that helps, up to 5 times around. # ref: ggml-quants.c, make_qp_quants
    """
    top = splat(ZERO)
    for i in range(32):
        top = greater(top, load(x, i))
    inverse = best_inverse(x, weight, top)
    sumlx = splat(ZERO)
    suml2 = splat(ZERO)
    for i in range(32):
        level = four_at_most(inverse * load(x, i))
        store(levels, i, byte_of(level))
        sumlx = sumlx + load(weight, i) * load(x, i) * to_float(level)
        suml2 = suml2 + load(weight, i) * to_float(level) * to_float(level)
    # A lane in which nothing moved is done: going round again moves nothing either.
    for _ in range(5):
        has_moved = False
        for i in range(32):
            wx = load(weight, i) * load(x, i)
            level = load(levels, i)
            slx = sumlx - wx * level
            sl2 = suml2 - load(weight, i) * level * level
            new_level = four_at_most(load(x, i) * sl2 / slx)
            new = to_float(new_level)
            new_slx = slx + wx * new
            new_sl2 = sl2 + load(weight, i) * new * new
            is_better = (
                (slx > ZERO)
                & (sl2 > ZERO)
                & (new != level)
                & (new_slx * new_slx * suml2 > sumlx * sumlx * new_sl2)
            )
            store(levels, i, select(is_better, byte_of(new_level), level))
            sumlx = select(is_better, new_slx, sumlx)
            suml2 = select(is_better, new_sl2, suml2)
            has_moved |= any_of(is_better)
        if not has_moved:
            break
    scale = select(suml2 > ZERO, sumlx / suml2, ZERO)
    return select(top < TINY, ZERO, scale)


@kernel
def encode_xxs(w, importance, grid, work, columns, points, signs, scale_codes, d):
    """As encode_xs, with 8 blocks of 32: points and signs (n, 8, 4), scale codes (n, 8)."""
    fits = True
    for first in range(0, len(d), BATCH):
        n = min(BATCH, len(d) - first)
        for s in range(n):
            start = (first + s) * SUPER_BLOCK
            fits &= load_super_block(w, start, importance, ONE, s * SUPER_BLOCK, work)
            make_signs_even(s * SUPER_BLOCK, work)
            find_extremes(s * SUPER_BLOCK, SHAPE_XXS, work)
        for i in range(0, 32, 16):
            gather16(work.x[i:], columns.starts, columns.x, i)
            gather16(work.weight[i:], columns.starts, columns.weight, i)
        scales = first_scales(columns.x, columns.weight, columns.levels)
        store(work.scale, 0, scales)
        store(work.reach, 0, scales * np.float32(3))
        for s in range(n):
            out = first + s
            d[out], is_finite = encode_super_block(
                s, TRIALS_XXS, TINY, 0, ALL, 127, SHAPE_XXS, grid, work,
                points[out], signs[out], scale_codes[out],
            )  # fmt: skip
            fits &= is_finite
    return fits
