"""Compiled encoder of IQ4_NL and IQ4_XS: 16 uneven levels, w ~ d * scale * VALUES[q].

One lane a super-block. For each block of 32 weights 16 scales are tried; each time every weight
takes its nearest level and the best scale for these levels follows by weighted least squares.
# ref: ggml-quants.c, quantize_row_iq4_nl_impl
"""

from typing import NamedTuple

import numpy as np

from quant.formats.compiled import kernel
from quant.formats.iq_kernels_grid import ONE, TOO_LARGE, ZERO, nearest_int
from quant.formats.iq_kernels_lanes import inlined, new_rows
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

VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
# From here on x is nearer to VALUES[k + 1] than to VALUES[k]. ggml compares the two distances,
# which are exact in float32 near the middle: the middle alone decides, and goes upwards.
MIDDLES = (VALUES[1:] + VALUES[:-1]) / np.float32(2)
TINY = np.float32(1e-15)  # ref: GROUP_MAX_EPS
N_TRIES = 7  # scales tried on either side of max / VALUES[0]
BLOCK = 32


class Work(NamedTuple):
    """Arrays that the kernel works in: LANES super-blocks, one a lane."""

    x: np.ndarray  # (size of a super-block, LANES)
    weight: np.ndarray  # (32, LANES): of one block
    scales: np.ndarray  # (n_blocks, LANES)
    codes: np.ndarray  # int32 (1, LANES)
    d: np.ndarray  # (1, LANES)
    starts: np.ndarray  # int64 (LANES,): where the super-block begins in w
    columns: np.ndarray  # int64 (LANES,): and in importance


def new_work(n_blocks: int) -> Work:
    return Work(
        x=new_rows(n_blocks * BLOCK),
        weight=new_rows(BLOCK),
        scales=new_rows(n_blocks),
        codes=new_rows(1, np.int32),
        d=new_rows(1),
        starts=np.zeros(LANES, np.int64),
        columns=np.zeros(LANES, np.int64),
    )


@inlined
def nearest_value(x):
    value = splat(VALUES[0])
    for k in range(15):
        value = select(x >= MIDDLES[k], VALUES[k + 1], value)
    return value


@inlined
def nearest_level(x):
    level = splat(0)
    for k in range(15):
        level = select(x >= MIDDLES[k], k + 1, level)
    return level


@inlined
def fit(inverse, x, first, weight):
    """sum w q x and sum w q q over a block, where q is the nearest value to x * inverse."""
    sumqx = splat(ZERO)
    sumq2 = splat(ZERO)
    for j in range(BLOCK):
        q = nearest_value(inverse * load(x, first + j))
        wq = load(weight, j) * q
        sumqx = sumqx + wq * load(x, first + j)
        sumq2 = sumq2 + wq * q
    return sumqx, sumq2


@inlined
def block_scale(x, first, weight):
    """The scale of rows first ... first + 31 of x; 0 where all are tiny."""
    largest = splat(ZERO)
    extreme = splat(ZERO)
    for j in range(BLOCK):
        xj = load(x, first + j)
        is_larger = fabs(xj) > largest
        largest = select(is_larger, fabs(xj), largest)
        extreme = select(is_larger, xj, extreme)
    sumqx, sumq2 = fit(ONE / (-extreme / VALUES[0]), x, first, weight)
    scale = select(sumq2 > ZERO, sumqx / sumq2, ZERO)
    best = scale * sumqx
    for i in range(-N_TRIES, N_TRIES + 1):
        sumqx, sumq2 = fit((np.float32(i) + VALUES[0]) / extreme, x, first, weight)
        is_better = (sumq2 > ZERO) & (sumqx * sumqx > best * sumq2)
        scale = select(is_better, sumqx / sumq2, scale)
        best = select(is_better, scale * sumqx, best)
    return select(largest < TINY, ZERO, scale)


@inlined
def inverse_or_zero(x):
    """1 / x, or 0 where x is 0."""
    return select(x == ZERO, ZERO, ONE / x)


@inlined
def weigh(x, first, importance, columns, sigma2, weight):
    """weight = x * x of a block's rows of x, or importance * sqrt(sigma2 + x * x)."""
    if len(importance):
        for j in range(0, BLOCK, 16):
            gather16(importance[first + j :], columns, weight, j)
    for j in range(BLOCK):
        square = load(x, first + j) * load(x, first + j)
        if len(importance):
            square = load(weight, j) * sqrt(sigma2 + square)
        store(weight, j, square)


@inlined
def put_levels(x, first, inverse, n, pairs, qs):
    """Block k's levels of weights j and j + 16 in the low and high half of qs[k, j], for k < n."""
    for j in range(BLOCK // 2):
        low = nearest_level(inverse * load(x, first + j))
        high = nearest_level(inverse * load(x, first + j + BLOCK // 2))
        store(pairs, 0, low | high << 4)
        for k in range(n):
            qs[k, j] = pairs[0, k]


@kernel
def encode(w, importance, work, d, scale_codes, qs):
    """Fill d (n,), qs (n, n_blocks, 16) and, for n_blocks = 8, 6-bit scale codes (n, 8).

    `w` holds n super-blocks of n_blocks blocks, in rows as long as `importance`, which may be
    empty. Returns False if weights are too large.
    """
    n_blocks = qs.shape[1]
    size = n_blocks * BLOCK
    x, starts, columns = work.x, work.starts, work.columns
    fits = True
    for first in range(0, len(d), LANES):
        n = min(LANES, len(d) - first)
        for k in range(LANES):
            starts[k] = (first + min(k, n - 1)) * size
            columns[k] = starts[k] % len(importance) if len(importance) else 0
        sum_x2 = splat(ZERO)
        for j in range(size):
            if j % 16 == 0:
                gather16(w[j:], starts, x, j)
            sum_x2 = sum_x2 + load(x, j) * load(x, j)
        sigma2 = sum_x2 * (np.float32(2) / np.float32(size))
        fits &= not any_of(~(sigma2 < TOO_LARGE))

        largest = splat(ZERO)
        largest_scale = splat(ZERO)
        for b in range(n_blocks):
            weigh(x, b * BLOCK, importance, columns, sigma2, work.weight)
            scale = block_scale(x, b * BLOCK, work.weight)
            store(work.scales, b, scale)
            is_larger = fabs(scale) > largest
            largest = select(is_larger, fabs(scale), largest)
            largest_scale = select(is_larger, scale, largest_scale)

        if n_blocks == 1:
            d_all = load(work.scales, 0)
            put_levels(x, 0, inverse_or_zero(d_all), n, work.codes, qs[first:, 0])
        else:
            d_all = -largest_scale / np.float32(32)
            for b in range(n_blocks):
                code = nearest_int(inverse_or_zero(d_all) * load(work.scales, b))
                code = select(code < -32, -32, code)
                code = select(code > 31, 31, code)
                store(work.codes, 0, code + 32)
                for k in range(n):
                    scale_codes[first + k, b] = work.codes[0, k]
                inverse = inverse_or_zero(d_all * to_float(code))
                put_levels(x, b * BLOCK, inverse, n, work.codes, qs[first:, b])
        store(work.d, 0, d_all)
        for k in range(n):
            d[first + k] = work.d[0, k]
    return fits
