"""Q4_0 to Q8_0 and IQ4_NL with less error: blocks of 32 with one scale, or a scale and a minimum.

Kernels take `w` float32 (n_blocks * 32,), `importance` float32 (n_columns,) or of size 0, and
`blocks` uint8 ((n_blocks + 1) * block_nbytes,), ggml's blocks and a spare one. Where something
better is found, that block is replaced; the others keep every byte.

The scale is a float16, so there is no level to descend: some seventy scales, of either sign, are
tried from the one that rounds the largest weight to the last value. Each is fitted to the q that it
leads to, rounded to float16, and measured with the q that this leads to.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from quant.formats.compiled import kernel
from quant.formats.iq_kernels_iq4 import VALUES
from quant.formats.iq_kernels_iq4 import nearest_level as nearest_iq4_level
from quant.formats.iq_kernels_iq4 import nearest_value as nearest_iq4
from quant.formats.k_search import ONE, ZERO, F, extreme_of
from quant.formats.lanes import (
    LANES,
    load,
    scatter_halves,
    select,
    splat,
    store,
    to_float16,
    to_int,
)
from quant.formats.legacy_kernels import (
    BLOCK,
    gather,
    place_blocks,
    write_fifth_bits,
    write_low_bits,
)
from quant.formats.refined_search import (
    STRETCHES,
    error_with_min,
    full_stretch,
    inverse_or_zero,
    least_error,
    most_error,
    nearest_level,
    read_float16,
    round_float16,
    spare,
    weigh_errors,
)


class Work(NamedTuple):
    """LANES blocks, one a lane, and where they are."""

    x: np.ndarray  # (32, LANES)
    weights: np.ndarray  # (32, LANES) how much an error counts
    q: np.ndarray  # int32 (32, LANES), not negative
    sources: np.ndarray  # int64 (LANES,): where the block begins in w
    columns: np.ndarray  # in importance
    targets: np.ndarray  # in blocks
    scratch: np.ndarray  # int32 (1, LANES)


@njit
def new_work():
    return Work(
        np.empty((BLOCK, LANES), F),
        np.empty((BLOCK, LANES), F),
        np.empty((BLOCK, LANES), np.int32),
        np.empty(LANES, np.int64),
        np.empty(LANES, np.int64),
        np.empty(LANES, np.int64),
        np.empty((1, LANES), np.int32),
    )


@njit
def begin(work, w, importance, first_block, block_nbytes):
    place_blocks(w, first_block, block_nbytes, work.sources, work.targets)
    gather(w, work.sources, work.x, BLOCK)
    for k in range(LANES):
        work.columns[k] = work.sources[k] % importance.size if importance.size else 0
    weigh_errors(importance, work.columns, work.weights, BLOCK)


# --- Q4_0, Q5_0, Q8_0, IQ4_NL: w ~ d * value[q] --------------------------------------------------


def scale_search(nearest):
    """`improve` for weights that are a scale times the value nearest(w / scale).

    A function as an argument would keep numba from caching the kernels, so it is built in.
    """

    @njit
    def sums(x, weights, d, stretch):
        """Error, sum(w * w), sum(y * w) and sum(y * y), where w ~ d * y, y nearest stretch * w."""
        inverse = inverse_or_zero(d)
        error, xx, xy, yy = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
        for i in range(BLOCK):
            v, w = load(x, i), load(weights, i)
            y = nearest(inverse * (stretch * v))
            diff = d * y - v
            error = error + w * (diff * diff)
            xx = xx + w * v * v
            xy = xy + w * v * y
            yy = yy + w * y * y
        return error, xx, xy, yy

    @njit
    def fitted(x, weights, d):
        """d by least squares, as float16, for the values that `d` leads to."""
        _, _, xy, yy = sums(x, weights, d, splat(ONE))
        return round_float16(xy / yy)

    @njit
    def improve(work, d, lowest, highest, spread, n_steps):
        """Find a better d. Returns it in float16 bits, the stretch of the weights it is for, and
        which lanes are to stay as they were.

        The largest weight is put n_steps steps to either side of the lowest and the highest value,
        up to `spread` away.
        """
        x, weights = work.x, work.weights
        before, xx, _, _ = sums(x, weights, d, splat(ONE))
        least = before
        extreme, _ = extreme_of(x, 0, BLOCK)
        for end in (lowest, highest):
            for step in range(-n_steps, n_steps + 1):
                value = end + spread * (F(step) / F(n_steps))
                this_d = fitted(x, weights, extreme / value)
                error, _, _, _ = sums(x, weights, this_d, splat(ONE))
                better = error < least
                least, d = select(better, error, least), select(better, this_d, d)
        for _ in range(2):
            this_d = fitted(x, weights, d)
            error, _, _, _ = sums(x, weights, this_d, splat(ONE))
            better = error < least
            least, d = select(better, error, least), select(better, this_d, d)
        _, _, xy, _ = sums(x, weights, d, splat(ONE))
        limit, full = least_error(before, xx), full_stretch(xx, d * xy)
        best_d, stretch, unchanged = d, splat(ONE), splat(True)
        for part in STRETCHES:
            this = ONE + part * full
            this_d = round_float16(this * d)
            error, _, _, _ = sums(x, weights, this_d, this)
            fits = most_error(error, xx) < limit
            best_d, stretch = select(fits, this_d, best_d), select(fits, this, stretch)
            unchanged = unchanged & ~fits
        return best_d, stretch, unchanged

    return improve


improve_q4 = scale_search(njit(lambda v: nearest_level(v, F(-8), F(7))))
improve_q5 = scale_search(njit(lambda v: nearest_level(v, F(-16), F(15))))
improve_q8 = scale_search(njit(lambda v: nearest_level(v, F(-127), F(127))))
improve_iq4 = scale_search(nearest_iq4)


@njit
def round_levels(work, d, stretch, low, high):
    """q = the level nearest to stretch * w / d, counted from zero."""
    inverse = inverse_or_zero(d)
    for i in range(BLOCK):
        level = nearest_level(inverse * (stretch * load(work.x, i)), low, high)
        store(work.q, i, to_int(level - low))


@kernel
def refine_q4_0(w, importance, start, blocks):
    work = new_work()
    for first_block in range(0, w.size // BLOCK, LANES):
        begin(work, w, importance, first_block, 18)
        d = read_float16(blocks, work.targets, 0, work.scratch)
        d, stretch, unchanged = improve_q4(work, d, F(-8), F(7), F(1.2), 12)
        spare(unchanged, work.targets, blocks.size - 18, work.scratch)
        round_levels(work, d, stretch, F(-8), F(7))
        scatter_halves(to_float16(d), blocks, work.targets, 0)
        write_low_bits(work.q, BLOCK, blocks, work.targets, 2)


@kernel
def refine_q5_0(w, importance, start, blocks):
    work = new_work()
    for first_block in range(0, w.size // BLOCK, LANES):
        begin(work, w, importance, first_block, 22)
        d = read_float16(blocks, work.targets, 0, work.scratch)
        d, stretch, unchanged = improve_q5(work, d, F(-16), F(15), F(1.8), 18)
        spare(unchanged, work.targets, blocks.size - 22, work.scratch)
        round_levels(work, d, stretch, F(-16), F(15))
        scatter_halves(to_float16(d), blocks, work.targets, 0)
        write_fifth_bits(work.q, BLOCK, blocks, work.targets, 2)
        write_low_bits(work.q, BLOCK, blocks, work.targets, 6)


@kernel
def refine_q8_0(w, importance, start, blocks):
    """q stays in -127..127, as ggml has it: -128 is no value that every program expects."""
    work = new_work()
    for first_block in range(0, w.size // BLOCK, LANES):
        begin(work, w, importance, first_block, 34)
        d = read_float16(blocks, work.targets, 0, work.scratch)
        d, stretch, unchanged = improve_q8(work, d, F(-127), F(127), F(1.5), 10)
        spare(unchanged, work.targets, blocks.size - 34, work.scratch)
        round_levels(work, d, stretch, F(-127), F(127))
        scatter_halves(to_float16(d), blocks, work.targets, 0)
        for j in range(0, BLOCK, 2):
            even, odd = load(work.q, j) - 127, load(work.q, j + 1) - 127
            scatter_halves(even & 255 | odd << 8, blocks, work.targets, 2 + j)


@kernel
def refine_iq4_nl(w, importance, start, blocks):
    work = new_work()
    for first_block in range(0, w.size // BLOCK, LANES):
        begin(work, w, importance, first_block, 18)
        d = read_float16(blocks, work.targets, 0, work.scratch)
        d, stretch, unchanged = improve_iq4(work, d, VALUES[0], VALUES[15], F(20), 10)
        spare(unchanged, work.targets, blocks.size - 18, work.scratch)
        inverse = inverse_or_zero(d)
        for i in range(BLOCK):
            store(work.q, i, nearest_iq4_level(inverse * (stretch * load(work.x, i))))
        scatter_halves(to_float16(d), blocks, work.targets, 0)
        write_low_bits(work.q, BLOCK, blocks, work.targets, 2)


# --- Q4_1, Q5_1: w ~ d * q + m -------------------------------------------------------------------


@njit
def sums_with_min(work, d, m, stretch, q_max):
    """Sums of 1, q, q * q, w, w * q, w * w and w_hat * w, and the error; q are for stretch * w."""
    inverse = inverse_or_zero(d)
    total, q1, q2, x1, xq = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    xx, xy, error = splat(ZERO), splat(ZERO), splat(ZERO)
    for i in range(BLOCK):
        v, w = load(work.x, i), load(work.weights, i)
        q = nearest_level(inverse * (stretch * v - m), ZERO, q_max)
        y = d * q + m
        diff = y - v
        total = total + w
        q1 = q1 + w * q
        q2 = q2 + w * q * q
        x1 = x1 + w * v
        xq = xq + w * v * q
        xx = xx + w * v * v
        xy = xy + w * v * y
        error = error + w * (diff * diff)
    return total, q1, q2, x1, xq, xx, xy, error


@njit
def fitted_with_min(work, d, m, q_max):
    """d and m by least squares, as float16, for the q that `d` and `m` lead to."""
    total, q1, q2, x1, xq, _, _, _ = sums_with_min(work, d, m, splat(ONE), q_max)
    determinant = total * q2 - q1 * q1
    fits = determinant > F(1e-5) * (total * q2)
    this_d = select(fits, (total * xq - x1 * q1) / determinant, d)
    this_m = select(fits, (q2 * x1 - q1 * xq) / determinant, m)
    return round_float16(this_d), round_float16(this_m)


@njit
def improve_with_min(work, d, m, q_max):
    """Find better d and m. Returns them, the stretch of the weights they are for, and which lanes
    are to stay as they were.

    Lowest and highest weight are put on, or up to 1.2 steps below and above, q = 0 and q_max.
    """
    x, weights = work.x, work.weights
    total, _, _, _, _, xx, _, before = sums_with_min(work, d, m, splat(ONE), q_max)
    limit = least_error(before, xx + total * m * m)
    least = before
    low, high = load(x, 0), load(x, 0)
    for i in range(1, BLOCK):
        v = load(x, i)
        low, high = select(v < low, v, low), select(v > high, v, high)
    step = (high - low) / q_max
    for a in range(6):
        for b in range(6):
            # -0.3 .. 1.2 steps inwards
            from_low = low + step * (F(0.3) * F(a - 1))
            to_high = high - step * (F(0.3) * F(b - 1))
            this_d, this_m = fitted_with_min(work, (to_high - from_low) / q_max, from_low, q_max)
            error = error_with_min(x, weights, 0, BLOCK, this_d, -this_m, q_max)
            better = error < least
            least = select(better, error, least)
            d, m = select(better, this_d, d), select(better, this_m, m)
    for _ in range(2):
        this_d, this_m = fitted_with_min(work, d, m, q_max)
        error = error_with_min(x, weights, 0, BLOCK, this_d, -this_m, q_max)
        better = error < least
        least = select(better, error, least)
        d, m = select(better, this_d, d), select(better, this_m, m)
    _, _, _, _, _, xx, xy, _ = sums_with_min(work, d, m, splat(ONE), q_max)
    full = full_stretch(xx, xy)
    best_d, best_m, stretch, unchanged = d, m, splat(ONE), splat(True)
    for part in STRETCHES:
        this = ONE + part * full
        this_d, this_m = round_float16(this * d), round_float16(this * m)
        _, _, _, _, _, _, _, error = sums_with_min(work, this_d, this_m, this, q_max)
        fits = most_error(error, xx + total * this_m * this_m) < limit
        best_d, best_m = select(fits, this_d, best_d), select(fits, this_m, best_m)
        stretch = select(fits, this, stretch)
        unchanged = unchanged & ~fits
    return best_d, best_m, stretch, unchanged


@njit
def refine_with_min(w, importance, blocks, n_bits):
    q_max = F((1 << n_bits) - 1)
    block_nbytes = 20 if n_bits == 4 else 24
    work = new_work()
    for first_block in range(0, w.size // BLOCK, LANES):
        begin(work, w, importance, first_block, block_nbytes)
        d = read_float16(blocks, work.targets, 0, work.scratch)
        m = read_float16(blocks, work.targets, 2, work.scratch)
        d, m, stretch, unchanged = improve_with_min(work, d, m, q_max)
        spare(unchanged, work.targets, blocks.size - block_nbytes, work.scratch)
        inverse = inverse_or_zero(d)
        for i in range(BLOCK):
            above = stretch * load(work.x, i) - m
            store(work.q, i, to_int(nearest_level(inverse * above, ZERO, q_max)))
        scatter_halves(to_float16(d), blocks, work.targets, 0)
        scatter_halves(to_float16(m), blocks, work.targets, 2)
        if n_bits == 5:
            write_fifth_bits(work.q, BLOCK, blocks, work.targets, 4)
        write_low_bits(work.q, BLOCK, blocks, work.targets, block_nbytes - 16)


@kernel
def refine_q4_1(w, importance, start, blocks):
    refine_with_min(w, importance, blocks, 4)


@kernel
def refine_q5_1(w, importance, start, blocks):
    refine_with_min(w, importance, blocks, 5)
