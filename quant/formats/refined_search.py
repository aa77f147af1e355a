"""What all refinements share, for thirty-two blocks side by side: weights, errors, the last step.

A block is improved from what it is: numbers that the format can store (d in float16, levels in
6 bits, ...) are exchanged for neighbouring ones, all weights are rounded again to the values that
would really be decoded, and the new ones stay where the block's error is smaller. So an error here
is never an estimate, and nothing is lost between a search and the bytes.

Least error alone shrinks. Where the error is least, decoded weights w_hat lie between the true
weights of their cell, and are uncorrelated with their own error: sum(w_hat * w) = sum(w_hat**2),
which is less than sum(w**2), by 0.5 % in Q4_K, by 7 % in Q2_K. Every layer's output is weaker by
that much, all of its errors in one direction, and that costs more than the little error it saves.
`stretch` multiplies a block by sum(w**2) / sum(w_hat * w), so that on average the output keeps its
size. KL divergence of examples/tiny-qwq, all weights rounded, all else in float32: Q2_K 0.168
without and 0.153 with, Q4_K 0.0099 and 0.0098. Half of the stretch, or one and a half, is worse
than all of it, in Q2_K by 2 and 4 %.

Errors are weighed by importance alone. ggml's further factor sqrt(2 * mean(w**2) + w**2), by which
errors of large weights count more, bought nothing: Q4_K 0.0101 with it and 0.0099 without; given
importance, 0.0092 with and without.

Where the stretch would make a block's error larger than ggml's, only part of it is taken.
"""

import numpy as np
from numba import njit

from quant.formats.k_blocks import gather
from quant.formats.k_search import MAGIC, ONE, ZERO, F, clip
from quant.formats.lanes import (
    LANES,
    fabs,
    from_float16,
    load,
    select,
    splat,
    sqrt,
    store,
    to_float16,
)

STRETCHES = (F(0), F(0.25), F(0.5), F(0.75), F(1))
"""Parts of the full stretch, in the order they are tried: the last that fits is taken."""


@njit
def weigh_errors(importance, columns, weights, n):
    """weights[:n] = importance over the largest of the block; 1 if there is no importance.

    The quotient keeps squares inside float32 whatever the unit of importance.
    """
    if importance.size == 0:
        for i in range(n):
            store(weights, i, splat(ONE))
        return
    gather(importance, columns, 0, weights, n)
    largest = splat(ZERO)
    for i in range(n):
        v = load(weights, i)
        largest = select(v > largest, v, largest)
    largest = select(largest > ZERO, largest, ONE)
    for i in range(n):
        store(weights, i, load(weights, i) / largest)


@njit
def nearest_level(v, low, high):
    """The whole number in low..high that is nearest to `v`; `low` if `v` is NaN."""
    return clip((v + MAGIC) - MAGIC, low, high)


@njit
def inverse_or_zero(v):
    return select(v == ZERO, ZERO, ONE / v)


@njit
def round_float16(v):
    """`v` as float16 would keep it; 0 where that is infinite, or `v` NaN."""
    return from_float16(to_float16(select(fabs(v) < F(65520), v, ZERO)))


@njit
def full_stretch(xx, xy):
    """sum(w * w) / sum(w_hat * w) - 1; 0 where so little of w is left that it says nothing."""
    return select((xy > ZERO) & (xx < F(2) * xy), xx / xy - ONE, ZERO)


@njit
def least_error(error, size):
    """The square root of the error that a block has at least, whose computed error is `error`.

    `size` is the weighted sum of squares of what is rounded on the way: of each of them some
    2**-23 may be missing; and of a sum of 256 terms, 256 * 2**-24 of itself.
    """
    return sqrt(error) * F(1 - 2e-5) - sqrt(size) * F(2.0**-21)


@njit
def most_error(error, size):
    """The square root of the error that a block has at most; see `least_error`."""
    return sqrt(error) + sqrt(size) * F(2.0**-21)


@njit
def error_with_min(x, weights, first, n, scale, low, q_max):
    """Of x[first : first + n] ~ scale * q - low with the best q."""
    inverse = inverse_or_zero(scale)
    error = splat(ZERO)
    for i in range(first, first + n):
        above = load(x, i) + low
        diff = scale * nearest_level(inverse * above, ZERO, q_max) - above
        error = error + load(weights, i) * (diff * diff)
    return error


@njit
def read_float16(blocks, starts, at, halves):
    """The float16 at byte `at` of every block; `halves` int32 (1, LANES) is scratch."""
    for k in range(LANES):
        t = starts[k] + at
        halves[0, k] = np.int32(blocks[t]) | np.int32(blocks[t + 1]) << 8
    return from_float16(load(halves, 0))


@njit
def spare(unchanged, starts, end, flags):
    """Send what is written for the lanes of `unchanged` to the spare block at `end`."""
    store(flags, 0, select(unchanged, 1, 0))
    for k in range(LANES):
        if flags[0, k]:
            starts[k] = end
