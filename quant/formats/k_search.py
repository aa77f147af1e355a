"""The scale searches of the K types, thirty-two blocks side by side, llama.cpp's results exactly.

A sub-block of 16 or 32 weights is stored as small integers q with a scale, or a scale and a
minimum: w ~ scale * q, or w ~ scale * q + min. Rounding to the obvious scale is not best: each
search tries some twenty slightly different ones, rounds, fits scale (and min) to the rounded q by
weighted least squares, and keeps the best. Which trial wins can hang on the last bit of a sum, so
operand order and association below are those of the C code. Do not tidy them.

Arrays of lanes have shape (n, LANES); `x` is (256, LANES), element e of 32 blocks in row e.
# ref: ggml/src/ggml-quants.c of llama.cpp, whose function each docstring names
"""

import numpy as np
from numba import njit

from quant.formats.lanes import (
    any_of,
    bits,
    fabs,
    from_bits,
    load,
    select,
    splat,
    store,
    to_float,
    to_int,
)

F = np.float32
ZERO, ONE = F(0), F(1)
ALMOST_ZERO = F(1e-15)  # GROUP_MAX_EPS
MAGIC = F(12582912)  # 1.5 * 2**23: adding it leaves the rounded number in the low mantissa bits


@njit
def nearest_int(v):
    """`v` rounded half to even, as float lanes. # ref: nearest_int

    Beyond +-2**22 the C code keeps 23 mantissa bits of something else; so does this: it happens
    where a search divides by nearly nothing, and the result decides which trial wins.
    """
    return from_bits((bits(v + MAGIC) & 0x7FFFFF) | 0x4B000000) - MAGIC


@njit
def clip(v, low, high):
    v = select(v > low, v, low)
    return select(v < high, v, high)


@njit
def as_uint8(v):
    """What C keeps when the whole number `v` is assigned to a uint8_t."""
    return to_float(to_int(v) & 255)


@njit
def search_scale_and_min(x, first, n, weights, q, q_max, r_min, r_delta, n_steps, absolute):
    """Fit w ~ scale * q + low to x[first : first + n], q in 0..q_max, low <= 0.

    `weights` (n, LANES) weigh the errors, squared or `absolute`; `q` (n, LANES) is scratch.
    Returns (scale, low, inverse, origin, sum of weights), where the q that belong to scale and
    low are nearest_int(inverse * (x - origin)). A sub-block of one value has scale 0, all q 0.
    # ref: make_qkx2_quants; make_qkx3_quants differs only in its callers' arguments
    """
    low = load(x, first)
    high = low
    sum_w = load(weights, 0)
    sum_x = sum_w * low
    for i in range(1, n):
        v, w = load(x, first + i), load(weights, i)
        low = select(v < low, v, low)
        high = select(v > high, v, high)
        sum_w = sum_w + w
        sum_x = sum_x + w * v
    low = select(low > ZERO, ZERO, low)
    flat = high == low
    inverse = q_max / (high - low)
    scale = ONE / inverse
    origin = low
    best = splat(ZERO)
    for i in range(n):
        v = load(x, first + i)
        level = clip(nearest_int(inverse * (v - low)), ZERO, q_max)
        diff = scale * level + low - v
        diff = fabs(diff) if absolute else diff * diff
        best = best + load(weights, i) * diff
    for step in range(n_steps + 1):
        trial = (r_min + r_delta * F(step) + q_max) / (high - low)
        sum_l, sum_l2, sum_xl = splat(ZERO), splat(ZERO), splat(ZERO)
        for i in range(n):
            v = load(x, first + i)
            level = clip(nearest_int(trial * (v - low)), ZERO, q_max)
            store(q, i, level)
            wl = load(weights, i) * level
            sum_l = sum_l + wl
            sum_l2 = sum_l2 + wl * level
            sum_xl = sum_xl + wl * v
        determinant = sum_w * sum_l2 - sum_l * sum_l
        this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        this_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = this_low > ZERO
        if any_of(above):
            this_low = select(above, ZERO, this_low)
            this_scale = select(above, sum_xl / sum_l2, this_scale)
        error = splat(ZERO)
        for i in range(n):
            diff = this_scale * load(q, i) + this_low - load(x, first + i)
            diff = fabs(diff) if absolute else diff * diff
            error = error + load(weights, i) * diff
        better = (determinant > ZERO) & (error < best)
        best = select(better, error, best)
        scale = select(better, this_scale, scale)
        inverse = select(better, trial, inverse)
        origin = select(better, low, origin)
        low = select(better, this_low, low)  # the next trial starts from it
    return select(flat, ZERO, scale), low, select(flat, ZERO, inverse), origin, sum_w


@njit
def search_scale(x, first, n, weights, q_max):
    """Fit w ~ scale * q to x[first : first + n], q in -q_max..q_max - 1.

    `weights` (n, LANES) weigh the squared errors. Returns (scale, inverse), where the q that
    belong to scale are nearest_int(inverse * x). A sub-block of zeros has scale 0, inverse 0.
    # ref: make_qx_quants with rmse_type 1
    """
    extreme, largest = extreme_of(x, first, n)
    q_low, q_high = -q_max, q_max - ONE
    inverse = q_low / extreme
    sum_lx, sum_l2 = splat(ZERO), splat(ZERO)
    for i in range(n):
        v, w = load(x, first + i), load(weights, i)
        level = clip(nearest_int(inverse * v), q_low, q_high)
        sum_lx = sum_lx + w * v * level
        sum_l2 = sum_l2 + w * level * level
    scale = select(sum_l2 != ZERO, sum_lx / sum_l2, ZERO)
    best = scale * sum_lx
    for step in range(-9, 10):
        if step == 0:
            continue
        trial = -(q_max + F(0.1) * F(step)) / extreme
        sum_lx, sum_l2 = splat(ZERO), splat(ZERO)
        for i in range(n):
            v, w = load(x, first + i), load(weights, i)
            level = clip(nearest_int(trial * v), q_low, q_high)
            sum_lx = sum_lx + w * v * level
            sum_l2 = sum_l2 + w * level * level
        better = (sum_l2 > ZERO) & (sum_lx * sum_lx > best * sum_l2)
        this_scale = sum_lx / sum_l2
        scale = select(better, this_scale, scale)
        best = select(better, this_scale * sum_lx, best)
        inverse = select(better, trial, inverse)
    zero = largest < ALMOST_ZERO
    return select(zero, ZERO, scale), select(zero, ZERO, inverse)


@njit
def extreme_of(x, first, n):
    """The value of largest magnitude, the first of several, with its sign; and the magnitude."""
    extreme, largest = splat(ZERO), splat(ZERO)
    for i in range(n):
        v = load(x, first + i)
        further = fabs(v) > largest
        largest = select(further, fabs(v), largest)
        extreme = select(further, v, extreme)
    return extreme, largest


@njit
def descend(x, first, n, weights, q, q_low, q_high, sum_lx, sum_l2, unsigned):
    """Improve q[first : first + n] one at a time; returns the scale sum_lx / sum_l2 they end with.

    Each q is set to the best whole number for the scale that the others ask for, kept if
    sum_lx**2 / sum_l2 grows; up to five rounds, or until a round changes nothing.
    # ref: the last loops of make_qp_quants (`unsigned`) and make_q3_quants, which differ in which
    # sum_l2 must be positive, and in that the former's q is a uint8_t
    """
    for _ in range(5):
        changed = splat(False)
        for i in range(n):
            v, w, level = load(x, first + i), load(weights, i), load(q, first + i)
            wx = w * v
            others_lx = sum_lx - wx * level
            others_l2 = sum_l2 - w * level * level
            new = clip(nearest_int(v * others_l2 / others_lx), q_low, q_high)
            valid = (others_lx > ZERO) & (new != level)
            if unsigned:
                valid = valid & (others_l2 > ZERO)
            if any_of(valid):
                new_lx = others_lx + wx * new
                new_l2 = others_l2 + w * new * new
                if not unsigned:
                    valid = valid & (new_l2 > ZERO)
                better = valid & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
                store(q, first + i, select(better, as_uint8(new) if unsigned else new, level))
                sum_lx = select(better, new_lx, sum_lx)
                sum_l2 = select(better, new_l2, sum_l2)
                changed = changed | better
        if not any_of(changed):
            break
    return select(sum_l2 > ZERO, sum_lx / sum_l2, ZERO)


@njit
def fit_scale_stepwise(x, first, n, weights, q, q_max):
    """Fit w ~ scale * q to x[first : first + n], q in -q_max..q_max - 1, errors weighed by w**2.

    Returns the scale; q[first : first + n] get the whole numbers; `weights` (n, LANES) is scratch.
    # ref: make_q3_quants with do_rmse
    """
    extreme, largest = extreme_of(x, first, n)
    q_low, q_high = -q_max, q_max - ONE
    inverse = q_low / extreme
    sum_lx, sum_l2 = splat(ZERO), splat(ZERO)
    for i in range(n):
        v = load(x, first + i)
        w = v * v
        level = clip(nearest_int(inverse * v), q_low, q_high)
        store(weights, i, w)
        store(q, first + i, level)
        sum_lx = sum_lx + w * v * level
        sum_l2 = sum_l2 + w * level * level
    scale = descend(x, first, n, weights, q, q_low, q_high, sum_lx, sum_l2, False)
    zero = largest < ALMOST_ZERO
    if any_of(zero):
        for i in range(first, first + n):
            store(q, i, select(zero, q_low, load(q, i)))
    return select(zero, ZERO, scale)


@njit
def fit_scale_of_scales(x, n, weights, q, q_max):
    """Fit x[:n] ~ d * q, q in 0..q_max, to the scales (or minima) of one block's sub-blocks.

    Returns d; q (n, LANES) get the whole numbers. A negative x gives a negative q, which wraps to
    uint8 as in C. # ref: make_qp_quants
    """
    largest = splat(ZERO)
    for i in range(n):
        v = load(x, i)
        largest = select(largest > v, largest, v)
    inverse = q_max / largest
    scale = ONE / inverse
    best = splat(ZERO)
    for i in range(n):
        v = load(x, i)
        diff = v - scale * as_uint8(nearest_int(inverse * v))
        best = best + load(weights, i) * diff * diff
    for step in range(-4, 5):
        if step == 0:
            continue
        trial = (F(0.1) * F(step) + q_max) / largest
        scale = ONE / trial
        error = splat(ZERO)
        for i in range(n):
            v = load(x, i)
            level = nearest_int(trial * v)
            diff = v - scale * select(level < q_max, level, q_max)
            error = error + load(weights, i) * diff * diff
        better = error < best
        best = select(better, error, best)
        inverse = select(better, trial, inverse)
    sum_lx, sum_l2 = splat(ZERO), splat(ZERO)
    for i in range(n):
        v, w = load(x, i), load(weights, i)
        level = nearest_int(inverse * v)
        level = select(level < q_max, level, q_max)
        store(q, i, as_uint8(level))
        sum_lx = sum_lx + w * v * level
        sum_l2 = sum_l2 + w * level * level
    d = descend(x, 0, n, weights, q, F(-(2**22)), q_max, sum_lx, sum_l2, True)
    zero = largest < ALMOST_ZERO
    for i in range(n):
        store(q, i, select(zero, ZERO, load(q, i)))
    return select(zero, ZERO, d)
