"""Compiled encoders of IQ1_S and IQ1_M: 8 weights a codebook point, levels 0 ... 2.

w ~ d (2 scale_code + 1) (level - 1 + delta), delta = +-1/8 for 32 weights (S) or 8 (M), a scale
for 32 (S) or 16 (M). The best three-way split of a block is found exactly: sort the weights, then
try both boundaries at every place; sums over a range are differences of prefix sums. That is done
with one lane a block.
# ref: ggml-quants.c, quantize_row_iq1_s_impl and quantize_row_iq1_m_impl
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from quant.formats.compiled import kernel
from quant.formats.iq_grids import Grid
from quant.formats.iq_kernels_grid import (
    FARTHEST,
    ONE,
    SUPER_BLOCK,
    TOO_LARGE,
    ZERO,
    Workspace,
    add_up,
    greater,
    mean_square,
    nearest_point,
    new_workspace,
    put_points,
    put_scale_codes,
    set_levels,
)
from quant.formats.iq_kernels_lanes import bitmask, inlined, new_rows
from quant.formats.lanes import (
    LANES,
    any_of,
    fabs,
    gather16,
    load,
    select,
    splat,
    sqrt,
    store,
    to_float,
)

# weights, weights of a point, bits and number of levels
SHAPE_S = (32, 8, 2, 3)
SHAPE_M = (16, 8, 2, 3)
DELTA = np.float32(0.125)
# The three values of a level with delta = +1/8 and -1/8
PLUS = np.array([-0.875, 0.125, 1.125], np.float32)
MINUS = np.array([-1.125, -0.125, 0.875], np.float32)
TINY_S = np.float32(1e-12)  # ref: GROUP_MAX_EPS_IQ1_S
TINY_M = np.float32(1e-7)  # ref: GROUP_MAX_EPS_IQ1_M


class Columns(NamedTuple):
    """The blocks of some super-blocks, one a lane. (block, LANES) where nothing else is said."""

    starts: np.ndarray  # int64 (LANES,): where in work.x a block begins
    x: np.ndarray
    weight: np.ndarray
    rank: np.ndarray  # int32: of x in ascending order, equals in their order
    sorted_x: np.ndarray  # weight * x in that order
    sorted_weight: np.ndarray
    sorted_index: np.ndarray  # int32
    sums: np.ndarray  # (4 * (block + 1), LANES): of the first j weights in that order
    parts: np.ndarray  # (4 * (block + 1), LANES): what they contribute to a split
    codes: np.ndarray  # int32 (block / 8, LANES)
    scales: np.ndarray  # (LANES,)
    kinds: np.ndarray  # int32 (LANES,): -1 for a block of zeros, or which deltas are -1/8


def _new_work(shape: tuple[int, int, int, int], grid: Grid) -> tuple[Workspace, Columns]:
    block = shape[0]
    columns = Columns(
        starts=block * np.arange(LANES),
        x=new_rows(block),
        weight=new_rows(block),
        rank=new_rows(block, np.int32),
        sorted_x=new_rows(block),
        sorted_weight=new_rows(block),
        sorted_index=new_rows(block, np.int32),
        sums=new_rows(4 * (block + 1)),
        parts=new_rows(4 * (block + 1)),
        codes=new_rows(block // 8, np.int32),
        scales=np.zeros(LANES, np.float32),
        kinds=np.zeros(LANES, np.int32),
    )
    # As many super-blocks as fill the lanes with their blocks
    return new_workspace(LANES * block // SUPER_BLOCK, shape, grid), columns


new_work_s = partial(_new_work, SHAPE_S)
new_work_m = partial(_new_work, SHAPE_M)


# --- the best three-way split, one lane a block --------------------------------------------------


@inlined
def load_super_block(w, start, importance, at, work):
    """Fill work.x and weight from `at` on; returns whether sums will be finite.

    An error counts by w * w, or with importance by importance * sqrt(2 mean(w * w) + w * w).
    """
    variance = np.float32(2) * mean_square(w, start)
    column = start % len(importance) if len(importance) else 0
    for i in range(0, SUPER_BLOCK, LANES):
        x = load(w, start + i)
        weight = x * x
        if len(importance):
            weight = load(importance, column + i) * sqrt(variance + weight)
        store(work.x, at + i, x)
        store(work.weight, at + i, weight)
    return variance < TOO_LARGE


@inlined
def sort_lanes(block, columns):
    """Per lane the rank of each x, and all in order. Equals keep theirs: glibc's qsort merges."""
    x, weight = columns.x, columns.weight
    for i in range(block):
        place = splat(0)
        for j in range(i):
            place = place + select(load(x, j) <= load(x, i), 1, 0)
        for j in range(i + 1, block):
            place = place + select(load(x, j) < load(x, i), 1, 0)
        store(columns.rank, i, place)
    for i in range(block):
        for k in range(LANES):
            place = columns.rank[i, k]
            columns.sorted_weight[place, k] = weight[i, k]
            columns.sorted_x[place, k] = weight[i, k] * x[i, k]
            columns.sorted_index[place, k] = i


@inlined
def largest_magnitude(x, block):
    top = splat(ZERO)
    for i in range(block):
        top = greater(fabs(load(x, i)), top)
    return top


@inlined
def is_better(qx, q2, best):
    return (q2 > ZERO) & (qx * qx > best * q2)


@inlined
def split_s(columns):
    """Per lane the best boundaries, scale and sign of delta (0 if none) of 32 sorted weights."""
    sums, rests = columns.sums, columns.parts
    store(sums, 0, splat(ZERO))
    store(sums, 1, splat(ZERO))
    for j in range(32):
        store(sums, 2 * j + 2, load(sums, 2 * j) + load(columns.sorted_x, j))
        store(sums, 2 * j + 3, load(sums, 2 * j + 1) + load(columns.sorted_weight, j))
    # What the weights from a second boundary on contribute
    for j in range(33):
        x, w = load(sums, 64) - load(sums, 2 * j), load(sums, 65) - load(sums, 2 * j + 1)
        store(rests, 4 * j, x * PLUS[2])
        store(rests, 4 * j + 1, w * PLUS[2] * PLUS[2])
        store(rests, 4 * j + 2, x * MINUS[2])
        store(rests, 4 * j + 3, w * MINUS[2] * MINUS[2])
    best = splat(-FARTHEST)
    scale = splat(ZERO)
    best_i1 = splat(0)
    best_i2 = splat(0)
    sign = splat(0)
    for i1 in range(33):
        x1, w1 = load(sums, 2 * i1), load(sums, 2 * i1 + 1)
        plus_x, plus_w = x1 * PLUS[0], w1 * PLUS[0] * PLUS[0]
        minus_x, minus_w = x1 * MINUS[0], w1 * MINUS[0] * MINUS[0]
        for i2 in range(i1, 33):
            middle_x = (load(sums, 2 * i2) - x1) * PLUS[1]
            middle_w = (load(sums, 2 * i2 + 1) - w1) * PLUS[1] * PLUS[1]
            qx = plus_x + middle_x + load(rests, 4 * i2)
            q2 = plus_w + middle_w + load(rests, 4 * i2 + 1)
            qx_minus = minus_x - middle_x + load(rests, 4 * i2 + 2)  # as MINUS[1] is -PLUS[1]
            q2_minus = minus_w + middle_w + load(rests, 4 * i2 + 3)
            found = is_better(qx, q2, best)
            if any_of(found | is_better(qx_minus, q2_minus, best)):
                scale = select(found, qx / q2, scale)
                best = select(found, scale * qx, best)
                found_minus = is_better(qx_minus, q2_minus, best)
                scale = select(found_minus, qx_minus / q2_minus, scale)
                best = select(found_minus, scale * qx_minus, best)
                best_i1 = select(found | found_minus, i1, best_i1)
                best_i2 = select(found | found_minus, i2, best_i2)
                sign = select(found_minus, -1, select(found, 1, sign))
    return best_i1, best_i2, scale, sign


@inlined
def put_codes(best_i1, best_i2, scale, block, columns):
    """columns.codes[g]: levels of group g, mirrored in lanes whose scale is negative."""
    for g in range(block // 8):
        code = splat(0)
        for i in range(8):
            place = load(columns.rank, 8 * g + i)
            level = select(place >= best_i1, 1, 0) + select(place >= best_i2, 1, 0)
            code = code | select(scale < ZERO, 2 - level, level) << 2 * i
        store(columns.codes, g, code)
    store(columns.scales, 0, fabs(scale))


# --- codebook points, one lane a weight ----------------------------------------------------------


@inlined
def settle_block(start, scale, shape, grid, work):
    """Move the codes of a block to codebook points; returns the scale, refitted if any moved.

    In place of work.root stands each weight's delta. # ref: ggml-quants.c, iq1_find_best_neighbour2
    """
    block, group, _, _ = shape
    all_on_grid = True
    for g in range(block // group):
        all_on_grid &= grid.spans[work.codes[g]] == 0
    if all_on_grid:
        return scale
    set_levels(shape, work)
    has_nearest = 0  # bit i: weight i has the level with the least error
    for c in range(0, block, LANES):
        x, weight = load(work.x, start + c), load(work.weight, start + c)
        delta = load(work.root, start + c)
        low = scale * (delta - ONE) - x
        middle = scale * delta - x
        high = scale * (delta + ONE) - x
        low, middle, high = weight * low * low, weight * middle * middle, weight * high * high
        store(work.terms, 3 * c, low)
        store(work.terms, 3 * c + LANES, middle)
        store(work.terms, 3 * c + 2 * LANES, high)
        level = load(work.levels, c)
        is_nearest = (
            ((level == 0) & (low <= middle) & (middle <= high))
            | ((level == 1) & (middle <= low) & (middle <= high))
            | ((level == 2) & (high <= middle) & (middle <= low))
        )
        has_nearest |= bitmask(is_nearest) << c
    for g in range(block // group):
        first_span = 1 << 16 if has_nearest >> group * g & 255 == 255 else 0
        work.codes[g] = nearest_point(group * g, first_span, shape, grid, work)
    set_levels(shape, work)
    for c in range(0, block, LANES):
        q = to_float(load(work.levels, c)) - ONE + load(work.root, start + c)
        wq = load(work.weight, start + c) * q
        store(work.sumqx, c, wq * load(work.x, start + c))
        store(work.sumq2, c, wq * q)
    sumqx, sumq2 = add_up(work.sumqx, work.sumq2, block)
    return sumqx / sumq2 if sumqx > ZERO and sumq2 > ZERO else scale


@inlined
def encode_super_block(s, columns, shape, grid, work, points, scale_codes):
    """Settle the blocks of super-block s.

    Returns their largest scale and whether all numbers were finite.
    """
    block, group, _, _ = shape
    n_blocks = SUPER_BLOCK // block
    max_scale = ZERO
    is_finite = True
    for i in range(n_blocks):
        b = s * n_blocks + i
        work.scales[i] = ZERO
        if columns.kinds[b] < 0:
            continue
        for g in range(block // group):
            work.codes[g] = columns.codes[g, b]
        scale = settle_block(b * block, columns.scales[b], shape, grid, work)
        is_finite &= scale >= ZERO
        is_finite &= put_points(i, i, points, shape, grid, work)
        work.scales[i] = scale
        max_scale = max(max_scale, scale)
    if max_scale > ZERO:
        put_scale_codes(8, max_scale / np.float32(15), scale_codes, work)
    return max_scale, is_finite


@inlined
def load_batch(w, importance, first, n, shape, work, columns):
    """Super-blocks first ... first + n - 1 into work and columns; whether sums will be finite."""
    block = shape[0]
    fits = True
    for s in range(n):
        start = (first + s) * SUPER_BLOCK
        fits &= load_super_block(w, start, importance, s * SUPER_BLOCK, work)
    for i in range(0, block, 16):
        gather16(work.x[i:], columns.starts, columns.x, i)
        gather16(work.weight[i:], columns.starts, columns.weight, i)
    return fits


# --- IQ1_S ---------------------------------------------------------------------------------------


@kernel
def encode_s(w, importance, grid, work, columns, points, shifts, scale_codes, d):
    """Fill points (n, 8, 4), shifts (n, 8, 1): 1 for -1/8, scale codes (n, 8) and d (n,).

    `w` holds n super-blocks of 256, in rows as long as `importance`. The results must come zeroed.
    Returns False if weights are too large.
    """
    batch = LANES // 8
    fits = True
    for first in range(0, len(d), batch):
        n = min(batch, len(d) - first)
        fits &= load_batch(w, importance, first, n, SHAPE_S, work, columns)
        sort_lanes(32, columns)
        i1, i2, scale, sign = split_s(columns)
        put_codes(i1, i2, scale, 32, columns)
        is_zero = (largest_magnitude(columns.x, 32) < TINY_S) | (sign == 0)
        sign = select(scale < ZERO, 0 - sign, sign)
        store(columns.kinds, 0, select(is_zero, -1, select(sign < 0, 1, 0)))
        for i in range(len(work.root)):
            work.root[i] = -DELTA if columns.kinds[i // 32 % LANES] == 1 else DELTA
        for s in range(n):
            out = first + s
            max_scale, is_finite = encode_super_block(
                s, columns, SHAPE_S, grid, work, points[out], scale_codes[out]
            )
            fits &= is_finite
            d[out] = max_scale / np.float32(15)
            if max_scale > ZERO:
                for b in range(8):
                    shifts[out, b, 0] = columns.kinds[8 * s + b] == 1
    return fits


# --- IQ1_M: each half of a block has its own delta -----------------------------------------------


@inlined
def put_prefix_sums(columns):
    """sums[4 j : 4 j + 4]: of the first j weights, those in the first and the last half:

    sum w x of the first half, of the last half, sum w of the first half, of the last half.
    """
    sums = columns.sums
    for h in range(4):
        store(sums, h, splat(ZERO))
    for j in range(16):
        is_first = load(columns.sorted_index, j) < 8
        x, w = load(columns.sorted_x, j), load(columns.sorted_weight, j)
        x0, x1 = load(sums, 4 * j), load(sums, 4 * j + 1)
        w0, w1 = load(sums, 4 * j + 2), load(sums, 4 * j + 3)
        store(sums, 4 * j + 4, select(is_first, x0 + x, x0))
        store(sums, 4 * j + 5, select(is_first, x1, x1 + x))
        store(sums, 4 * j + 6, select(is_first, w0 + w, w0))
        store(sums, 4 * j + 7, select(is_first, w1, w1 + w))


@inlined
def split_m(columns):
    """Per lane the best boundaries, scale and kind of 16 sorted weights, from their prefix sums.

    Bit 1 and bit 0 of the kind are set where delta is -1/8 for the first and the last half; -1 if
    there is no split. A level's value falls by 1 at each boundary passed, whatever delta is, so
    sum w q x is the sum for level 2 less the sums before either boundary; with squares alike.
    """
    sums, parts = columns.sums, columns.parts
    plus_1 = PLUS[0] * PLUS[0] - PLUS[1] * PLUS[1]
    plus_2 = PLUS[1] * PLUS[1] - PLUS[2] * PLUS[2]
    minus_1 = MINUS[0] * MINUS[0] - MINUS[1] * MINUS[1]
    minus_2 = MINUS[1] * MINUS[1] - MINUS[2] * MINUS[2]
    for j in range(17):
        for h in range(2):
            store(parts, 4 * j + h, load(sums, 4 * j + 2 + h) * plus_2)
            store(parts, 4 * j + 2 + h, load(sums, 4 * j + 2 + h) * minus_2)
    # p and m: delta is plus or minus 1/8; 0 and 1: first and last half
    x_p0, x_p1 = load(sums, 64) * PLUS[2], load(sums, 65) * PLUS[2]
    x_m0, x_m1 = load(sums, 64) * MINUS[2], load(sums, 65) * MINUS[2]
    w_p0, w_p1 = load(sums, 66) * PLUS[2] * PLUS[2], load(sums, 67) * PLUS[2] * PLUS[2]
    w_m0, w_m1 = load(sums, 66) * MINUS[2] * MINUS[2], load(sums, 67) * MINUS[2] * MINUS[2]
    best = splat(-FARTHEST)
    scale = splat(ZERO)
    best_i1 = splat(0)
    best_i2 = splat(0)
    kind = splat(-1)
    for i1 in range(17):
        w1_p0, w1_p1 = load(sums, 4 * i1 + 2) * plus_1, load(sums, 4 * i1 + 3) * plus_1
        w1_m0, w1_m1 = load(sums, 4 * i1 + 2) * minus_1, load(sums, 4 * i1 + 3) * minus_1
        w1_p0, w1_p1, w1_m0, w1_m1 = w_p0 + w1_p0, w_p1 + w1_p1, w_m0 + w1_m0, w_m1 + w1_m1
        for i2 in range(i1, 17):
            x0 = load(sums, 4 * i1) + load(sums, 4 * i2)
            x1 = load(sums, 4 * i1 + 1) + load(sums, 4 * i2 + 1)
            qx_p0, qx_p1, qx_m0, qx_m1 = x_p0 - x0, x_p1 - x1, x_m0 - x0, x_m1 - x1
            q2_p0, q2_p1 = w1_p0 + load(parts, 4 * i2), w1_p1 + load(parts, 4 * i2 + 1)
            q2_m0, q2_m1 = w1_m0 + load(parts, 4 * i2 + 2), w1_m1 + load(parts, 4 * i2 + 3)
            qx = (qx_p0 + qx_p1, qx_p0 + qx_m1, qx_m0 + qx_p1, qx_m0 + qx_m1)
            q2 = (q2_p0 + q2_p1, q2_p0 + q2_m1, q2_m0 + q2_p1, q2_m0 + q2_m1)
            found = is_better(qx[0], q2[0], best) | is_better(qx[1], q2[1], best)
            found = found | is_better(qx[2], q2[2], best) | is_better(qx[3], q2[3], best)
            if any_of(found):
                for k in range(4):
                    found = is_better(qx[k], q2[k], best)
                    scale = select(found, qx[k] / q2[k], scale)
                    best = select(found, scale * qx[k], best)
                    best_i1 = select(found, i1, best_i1)
                    best_i2 = select(found, i2, best_i2)
                    kind = select(found, k, kind)
    return best_i1, best_i2, scale, kind


@inlined
def put_deltas(kinds, deltas):
    """deltas[16 b : 16 b + 16] of block b, from its kind; 1/8 in a block of zeros."""
    for b in range(LANES):
        kind = max(kinds[b], 0)
        for i in range(16):
            deltas[16 * b + i] = -DELTA if kind & (2 if i < 8 else 1) else DELTA


@inlined
def fit_d(at, points, scale_codes, d, grid, work):
    """The d that fits super-block work.x[at:] best; `d` if none of its weights counts."""
    sumqx, sumq2 = ZERO, ZERO
    for b in range(16):
        factor = np.float32(2 * scale_codes[b] + 1)
        for g in range(2):
            row = 8 * np.int64(points[b, g])
            for i in range(8):
                place = at + 16 * b + 8 * g + i
                q = (np.float32(grid.levels[row + i]) - ONE + work.root[place]) * factor
                wq = work.weight[place] * q
                sumqx = sumqx + wq * work.x[place]
                sumq2 = sumq2 + wq * q
    return sumqx / sumq2 if sumq2 > ZERO else d


@kernel
def encode_m(w, importance, grid, work, columns, points, shifts, scale_codes, d):
    """As encode_s, with 16 blocks of 16 and d fitted last: points and shifts (n, 16, 2).

    `importance` may be empty.
    """
    batch = LANES // 16
    fits = True
    for first in range(0, len(d), batch):
        n = min(batch, len(d) - first)
        fits &= load_batch(w, importance, first, n, SHAPE_M, work, columns)
        sort_lanes(16, columns)
        put_prefix_sums(columns)
        i1, i2, scale, kind = split_m(columns)
        put_codes(i1, i2, scale, 16, columns)
        kind = select(scale < ZERO, 3 - kind, kind)
        store(columns.kinds, 0, select(largest_magnitude(columns.x, 16) < TINY_M, -1, kind))
        put_deltas(columns.kinds, work.root)
        for s in range(n):
            out = first + s
            max_scale, is_finite = encode_super_block(
                s, columns, SHAPE_M, grid, work, points[out], scale_codes[out]
            )
            fits &= is_finite
            d[out] = max_scale / np.float32(15)
            if max_scale > ZERO:
                for b in range(16):
                    kind = max(columns.kinds[16 * s + b], 0)
                    shifts[out, b, 0] = kind >> 1
                    shifts[out, b, 1] = kind & 1
                d[out] = fit_d(s * SUPER_BLOCK, points[out], scale_codes[out], d[out], grid, work)
    return fits
