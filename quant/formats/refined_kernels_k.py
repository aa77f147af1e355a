"""Q2_K to Q6_K and IQ4_XS with less error: the search that follows ggml's, compiled.

Each kernel takes `w` float32 (n_blocks * 256,), `importance` float32 (n_columns,) or of size 0,
`start` uint8, encoded blocks from which the search sets out, and `blocks` uint8 ((n_blocks + 1) *
block_nbytes,), encoded blocks to do better than, and a spare one. They may be the same array.
Where something better is found, that block of `blocks` is replaced; the others keep every byte.

The search goes up to ROUNDS times round: for every sub-block all levels of its scale (and min)
within a few steps; then d (and dmin) by least squares, the q being what they are.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from quant.formats.compiled import kernel
from quant.formats.iq_kernels_iq4 import nearest_level as nearest_iq4_level
from quant.formats.iq_kernels_iq4 import nearest_value as nearest_iq4
from quant.formats.k_blocks import BLOCK, Places, begin_group, new_places, pack, scatter
from quant.formats.k_kernels import (
    Group,
    new_group,
    pack_nibble_levels,
    pack_signed_levels,
    pack_six_bit_levels,
    round_signed,
    round_with_min,
)
from quant.formats.k_search import ONE, ZERO, F, clip
from quant.formats.lanes import (
    LANES,
    any_of,
    from_float16,
    load,
    scatter_halves,
    select,
    splat,
    store,
    to_float,
    to_float16,
    to_int,
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

ROUNDS = 4
RADIUS = 4
"""Levels to either side that the first round tries; later ones try the neighbours."""


class Work(NamedTuple):
    """One group of blocks and what belongs to it."""

    group: Group
    places: Places
    weights: np.ndarray  # (256, LANES) how much an error counts
    words: np.ndarray  # int32 (52, LANES) of the block's bytes
    scratch: np.ndarray  # int32 (1, LANES)


@njit
def new_work():
    return Work(
        new_group(),
        new_places(),
        np.empty((BLOCK, LANES), F),
        np.empty((52, LANES), np.int32),
        np.empty((1, LANES), np.int32),
    )


@njit
def begin(work, w, importance, first_block, block_nbytes):
    begin_group(w, first_block, block_nbytes, importance.size, work.places, work.group.x)
    weigh_errors(importance, work.places.columns, work.weights, BLOCK)


@njit
def finish(work, stretch, unchanged, end):
    """Stretch the weights, which are then rounded to the new scales; see `spare` for `end`."""
    group = work.group
    for i in range(BLOCK):
        store(group.x, i, stretch * load(group.x, i))
        store(group.q, i, splat(ZERO))  # where a scale is 0
    spare(unchanged, work.places.targets, end, work.scratch)


# --- Q2_K, Q4_K, Q5_K: w ~ d * scale_level * q - dmin * min_level -------------------------------


@njit
def search_levels(work, j, n, d, dmin, q_max, level_max, radius):
    """The best levels of sub-block j not more than `radius` away; returns the error."""
    group, weights = work.group, work.weights
    s0, m0 = load(group.scale_levels, j), load(group.min_levels, j)
    s, m = s0, m0
    least = error_with_min(group.x, weights, n * j, n, d * s, dmin * m, q_max)
    for a in range(-radius, radius + 1):
        this_s = clip(s0 + F(a), ZERO, level_max)
        for b in range(-radius, radius + 1):
            this_m = clip(m0 + F(b), ZERO, level_max)
            error = error_with_min(group.x, weights, n * j, n, d * this_s, dmin * this_m, q_max)
            better = error < least
            least = select(better, error, least)
            s, m = select(better, this_s, s), select(better, this_m, m)
    store(group.scale_levels, j, s)
    store(group.min_levels, j, m)
    return least


@njit
def block_error_with_min(work, n, d, dmin, q_max):
    group = work.group
    error = splat(ZERO)
    for j in range(BLOCK // n):
        scale, low = d * load(group.scale_levels, j), dmin * load(group.min_levels, j)
        error = error + error_with_min(group.x, work.weights, n * j, n, scale, low, q_max)
    return error


@njit
def fit_d_and_dmin(work, n, d, dmin, q_max):
    """Least squares for w ~ d * a - dmin * b, where a = scale_level * q, b = min_level."""
    group = work.group
    aa, ab, bb, xa, xb = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    for j in range(BLOCK // n):
        s, m = load(group.scale_levels, j), load(group.min_levels, j)
        inverse, low = inverse_or_zero(d * s), dmin * m
        total, q1, q2, x1, xq = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
        for i in range(n * j, n * j + n):
            v, w = load(group.x, i), load(work.weights, i)
            q = nearest_level(inverse * (v + low), ZERO, q_max)
            total = total + w
            q1 = q1 + w * q
            q2 = q2 + w * q * q
            x1 = x1 + w * v
            xq = xq + w * v * q
        aa = aa + s * s * q2
        ab = ab + s * m * q1
        bb = bb + m * m * total
        xa = xa + s * xq
        xb = xb + m * x1
    determinant = aa * bb - ab * ab
    both = determinant > F(1e-4) * (aa * bb)
    new_d = select(both, (xa * bb - xb * ab) / determinant, (xa + dmin * ab) / aa)
    new_dmin = select(both, (xa * ab - xb * aa) / determinant, dmin)
    return round_float16(new_d), round_float16(new_dmin)


@njit
def descend_with_min(work, n, d, dmin, q_max, level_max):
    """Improve levels, d and dmin in turn until nothing changes."""
    for step in range(ROUNDS):
        error = splat(ZERO)
        for j in range(BLOCK // n):
            radius = RADIUS if step == 0 else 1
            error = error + search_levels(work, j, n, d, dmin, q_max, level_max, radius)
        new_d, new_dmin = fit_d_and_dmin(work, n, d, dmin, q_max)
        new_error = block_error_with_min(work, n, new_d, new_dmin, q_max)
        better = (new_error < error) & (new_d > ZERO) & (new_dmin >= ZERO)
        d, dmin = select(better, new_d, d), select(better, new_dmin, dmin)
        if not any_of(better):
            break
    return d, dmin


@njit
def sums_with_min(work, n, d, dmin, q_max, stretch):
    """Error, sum(w * w), sum(w_hat * w) and the size of what is rounded on the way to the error,
    squared; q are those of stretch * w."""
    group = work.group
    error, xx, xy, size = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    for j in range(BLOCK // n):
        scale, low = d * load(group.scale_levels, j), dmin * load(group.min_levels, j)
        inverse = inverse_or_zero(scale)
        for i in range(n * j, n * j + n):
            v, w = load(group.x, i), load(work.weights, i)
            y = scale * nearest_level(inverse * (stretch * v + low), ZERO, q_max) - low
            diff = y - v
            error = error + w * (diff * diff)
            xx = xx + w * v * v
            xy = xy + w * v * y
            size = size + w * (v * v + low * low)
    return error, xx, xy, size


@njit
def improve_with_min(work, n, d, dmin, limit, q_max, level_max):
    """Find better levels, d and dmin. Returns d and dmin in float16 bits, the stretch of the
    weights they are for, and which lanes have none whose error is surely within `limit`."""
    d, dmin = descend_with_min(work, n, d, dmin, q_max, level_max)
    _, xx, xy, _ = sums_with_min(work, n, d, dmin, q_max, splat(ONE))
    full = full_stretch(xx, xy)
    best_d, best_dmin, stretch, unchanged = d, dmin, splat(ONE), splat(True)
    for part in STRETCHES:
        this = ONE + part * full
        this_d, this_dmin = round_float16(this * d), round_float16(this * dmin)
        error, _, _, size = sums_with_min(work, n, this_d, this_dmin, q_max, this)
        fits = most_error(error, size) < limit
        best_d, best_dmin = select(fits, this_d, best_d), select(fits, this_dmin, best_dmin)
        stretch = select(fits, this, stretch)
        unchanged = unchanged & ~fits
    return to_float16(best_d), to_float16(best_dmin), stretch, unchanged


@njit
def limit_with_min(work, n, d, dmin, q_max):
    """What an error must be within to be smaller than that of these levels, d and dmin."""
    error, _, _, size = sums_with_min(work, n, d, dmin, q_max, splat(ONE))
    return least_error(error, size)


@njit
def read_nibble_levels(work, blocks, at):
    """As pack_nibble_levels wrote them."""
    for k in range(LANES):
        t = work.places.targets[k] + at
        for j in range(16):
            work.group.scale_levels[j, k] = F(blocks[t + j] & 15)
            work.group.min_levels[j, k] = F(blocks[t + j] >> 4)


@njit
def read_six_bit_levels(work, blocks, at):
    """As pack_six_bit_levels wrote them."""
    s, m = work.group.scale_levels, work.group.min_levels
    for k in range(LANES):
        t = work.places.targets[k] + at
        for j in range(4):
            a, b, c = blocks[t + j], blocks[t + j + 4], blocks[t + j + 8]
            s[j, k], m[j, k] = F(a & 63), F(b & 63)
            s[j + 4, k] = F((c & 15) | (a >> 6) << 4)
            m[j + 4, k] = F((c >> 4) | (b >> 6) << 4)


@njit
def read_q2_k(work, blocks):
    """Fill the levels; returns d and dmin."""
    read_nibble_levels(work, blocks, 0)
    d = read_float16(blocks, work.places.targets, 80, work.scratch)
    return d, read_float16(blocks, work.places.targets, 82, work.scratch)


@njit
def read_q4_or_q5(work, blocks):
    """Fill the levels; returns d and dmin."""
    read_six_bit_levels(work, blocks, 4)
    d = read_float16(blocks, work.places.targets, 0, work.scratch)
    return d, read_float16(blocks, work.places.targets, 2, work.scratch)


@kernel
def refine_q2_k(w, importance, start, blocks):
    work = new_work()
    group, places, words = work.group, work.places, work.words
    end = w.size // BLOCK * 84
    for first_block in range(0, w.size // BLOCK, LANES):
        begin(work, w, importance, first_block, 84)
        d, dmin = read_q2_k(work, blocks)
        limit = limit_with_min(work, 16, d, dmin, F(3))
        d, dmin = read_q2_k(work, start)
        d16, dmin16, stretch, unchanged = improve_with_min(work, 16, d, dmin, limit, F(3), F(15))
        finish(work, stretch, unchanged, end)
        pack_nibble_levels(group, words, 0)
        round_with_min(group, 16, d16, dmin16, F(3))
        for half in range(2):
            pack(group.x, 128 * half, 32, 32, 4, 2, 0, words, 4 + 8 * half)
        store(words, 20, d16 | dmin16 << 16)
        scatter(words, 21, blocks, places.targets)


@njit
def refine_q4_or_q5(w, importance, start, blocks, n_bits):
    q_max = F((1 << n_bits) - 1)
    n_words = 36 if n_bits == 4 else 44
    work = new_work()
    group, places, words = work.group, work.places, work.words
    end = w.size // BLOCK * 4 * n_words
    for first_block in range(0, w.size // BLOCK, LANES):
        begin(work, w, importance, first_block, 4 * n_words)
        d, dmin = read_q4_or_q5(work, blocks)
        limit = limit_with_min(work, 32, d, dmin, q_max)
        d, dmin = read_q4_or_q5(work, start)
        d16, dmin16, stretch, unchanged = improve_with_min(work, 32, d, dmin, limit, q_max, F(63))
        finish(work, stretch, unchanged, end)
        store(words, 0, d16 | dmin16 << 16)
        pack_six_bit_levels(group, words, 1)
        round_with_min(group, 32, d16, dmin16, q_max)
        if n_bits == 5:
            pack(group.x, 0, 32, 32, 8, 1, 4, words, 4)
        for pair in range(4):
            pack(group.x, 64 * pair, 32, 32, 2, 4, 0, words, n_words - 32 + 8 * pair)
        scatter(words, n_words, blocks, places.targets)


@kernel
def refine_q4_k(w, importance, start, blocks):
    refine_q4_or_q5(w, importance, start, blocks, 4)


@kernel
def refine_q5_k(w, importance, start, blocks):
    refine_q4_or_q5(w, importance, start, blocks, 5)


# --- Q3_K, Q6_K, IQ4_XS: w ~ d * level * value[q], q of either sign -----------------------------


def signed_search(nearest):
    """`limit_of` and `improve` for weights that are a scale times the value nearest(w / scale).

    A function as an argument would keep numba from caching the kernels, so it is built in.
    """

    @njit
    def error_of(x, weights, first, n, scale):
        """Of x[first : first + n] ~ scale * y, where y are the values nearest to x / scale."""
        inverse = inverse_or_zero(scale)
        error = splat(ZERO)
        for i in range(first, first + n):
            v = load(x, i)
            diff = scale * nearest(inverse * v) - v
            error = error + load(weights, i) * (diff * diff)
        return error

    @njit
    def search_levels(work, j, n, d, low, high, radius):
        """The best level of sub-block j near its own or, values being uneven, near minus that."""
        x, weights, levels = work.group.x, work.weights, work.group.scale_levels
        s0 = load(levels, j)
        s = s0
        least = error_of(x, weights, n * j, n, d * s)
        for sign in (ONE, -ONE):
            for a in range(-radius, radius + 1):
                this_s = clip(sign * s0 + F(a), low, high)
                error = error_of(x, weights, n * j, n, d * this_s)
                better = error < least
                least, s = select(better, error, least), select(better, this_s, s)
        store(levels, j, s)
        return least

    @njit
    def sums(work, n, d, stretch):
        """Error, sum(w * w), sum(w_hat * w), sum(w_hat**2); the q are those of stretch * w."""
        group = work.group
        error, xx, xy, yy = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
        for j in range(BLOCK // n):
            scale = d * load(group.scale_levels, j)
            inverse = inverse_or_zero(scale)
            for i in range(n * j, n * j + n):
                v, w = load(group.x, i), load(work.weights, i)
                y = scale * nearest(inverse * (stretch * v))
                diff = y - v
                error = error + w * (diff * diff)
                xx = xx + w * v * v
                xy = xy + w * v * y
                yy = yy + w * y * y
        return error, xx, xy, yy

    @njit
    def descend(work, n, d, low, high, first_radius):
        """Improve levels and d in turn until nothing changes."""
        for step in range(ROUNDS):
            error = splat(ZERO)
            for j in range(BLOCK // n):
                radius = first_radius if step == 0 else 1
                error = error + search_levels(work, j, n, d, low, high, radius)
            _, _, xy, yy = sums(work, n, d, splat(ONE))
            new_d = round_float16(d * (xy / yy))
            new_error, _, _, _ = sums(work, n, new_d, splat(ONE))
            better = (new_error < error) & (new_d != ZERO)
            d = select(better, new_d, d)
            if not any_of(better):
                break
        return d

    @njit
    def improve(work, n, d, limit, low, high, radius):
        """Find better levels, within low..high, and d. Returns d in float16 bits, the stretch of
        the weights it is for, and which lanes have none whose error is surely within `limit`."""
        d = descend(work, n, d, low, high, radius)
        _, xx, xy, _ = sums(work, n, d, splat(ONE))
        full = full_stretch(xx, xy)
        best_d, stretch, unchanged = d, splat(ONE), splat(True)
        for part in STRETCHES:
            this = ONE + part * full
            this_d = round_float16(this * d)
            error, _, _, _ = sums(work, n, this_d, this)
            fits = most_error(error, xx) < limit
            best_d, stretch = select(fits, this_d, best_d), select(fits, this, stretch)
            unchanged = unchanged & ~fits
        return to_float16(best_d), stretch, unchanged

    @njit
    def limit_of(work, n, d):
        """What an error must be within to be smaller than that of these levels and d."""
        error, xx, _, _ = sums(work, n, d, splat(ONE))
        return least_error(error, xx)

    return limit_of, improve


limit_q3, improve_q3 = signed_search(njit(lambda v: nearest_level(v, F(-4), F(3))))
limit_q6, improve_q6 = signed_search(njit(lambda v: nearest_level(v, F(-32), F(31))))
limit_iq4, improve_iq4 = signed_search(nearest_iq4)


@njit
def read_q3_k(work, blocks):
    """Fill the levels, as pack_signed_levels wrote them; returns d."""
    for k in range(LANES):
        t = work.places.targets[k] + 96
        for j in range(16):
            four = blocks[t + j % 8] >> (4 * (j // 8)) & 15
            two = blocks[t + 8 + j % 4] >> (2 * (j // 4)) & 3
            work.group.scale_levels[j, k] = F(np.int32(four | two << 4) - 32)
    return read_float16(blocks, work.places.targets, 108, work.scratch)


@njit
def read_q6_k(work, blocks):
    """Fill the levels; returns d."""
    for k in range(LANES):
        t = work.places.targets[k] + 192
        for j in range(16):
            work.group.scale_levels[j, k] = F(np.int8(blocks[t + j]))
    return read_float16(blocks, work.places.targets, 208, work.scratch)


@njit
def read_iq4_xs(work, blocks):
    """Fill the levels; returns d."""
    for k in range(LANES):
        t = work.places.targets[k]
        for j in range(8):
            four = blocks[t + 4 + j // 2] >> (4 * (j % 2)) & 15
            two = blocks[t + 2 + j // 4] >> (2 * (j % 4)) & 3
            work.group.scale_levels[j, k] = F(np.int32(four | two << 4) - 32)
    return read_float16(blocks, work.places.targets, 0, work.scratch)


@kernel
def refine_q3_k(w, importance, start, blocks):
    work = new_work()
    group, places, words = work.group, work.places, work.words
    end = w.size // BLOCK * 110
    for first_block in range(0, w.size // BLOCK, LANES):
        begin(work, w, importance, first_block, 110)
        limit = limit_q3(work, 16, read_q3_k(work, blocks))
        d = read_q3_k(work, start)
        d16, stretch, unchanged = improve_q3(work, 16, d, limit, F(-32), F(31), 6)
        finish(work, stretch, unchanged, end)
        round_signed(group, d16, F(4))
        pack(group.x, 0, 32, 32, 8, 1, 2, words, 0)
        for half in range(2):
            pack(group.x, 128 * half, 32, 32, 4, 2, 0, words, 8 + 8 * half)
        pack_signed_levels(group, words, 24)
        scatter(words, 27, blocks, places.targets)
        scatter_halves(d16, blocks, places.targets, 108)


@kernel
def refine_q6_k(w, importance, start, blocks):
    work = new_work()
    group, places, words = work.group, work.places, work.words
    end = w.size // BLOCK * 210
    for first_block in range(0, w.size // BLOCK, LANES):
        begin(work, w, importance, first_block, 210)
        limit = limit_q6(work, 16, read_q6_k(work, blocks))
        d = read_q6_k(work, start)
        d16, stretch, unchanged = improve_q6(work, 16, d, limit, F(-128), F(127), 16)
        finish(work, stretch, unchanged, end)
        round_signed(group, d16, F(32))
        for half in range(2):
            pack(group.x, 128 * half, 64, 64, 2, 4, 0, words, 16 * half)
            pack(group.x, 128 * half, 32, 32, 4, 2, 4, words, 32 + 8 * half)
        pack(group.scale_levels, 0, 16, 0, 1, 8, 0, words, 48)
        scatter(words, 52, blocks, places.targets)
        scatter_halves(d16, blocks, places.targets, 208)


@njit
def round_iq4(group, d):
    """x becomes the place of the nearest value."""
    for j in range(8):
        inverse = inverse_or_zero(d * load(group.scale_levels, j))
        for i in range(32 * j, 32 * j + 32):
            store(group.x, i, to_float(nearest_iq4_level(inverse * load(group.x, i))))


@kernel
def refine_iq4_xs(w, importance, start, blocks):
    work = new_work()
    group, places, words = work.group, work.places, work.words
    end = w.size // BLOCK * 136
    for first_block in range(0, w.size // BLOCK, LANES):
        begin(work, w, importance, first_block, 136)
        limit = limit_iq4(work, 32, read_iq4_xs(work, blocks))
        d = read_iq4_xs(work, start)
        d16, stretch, unchanged = improve_iq4(work, 32, d, limit, F(-32), F(31), 5)
        finish(work, stretch, unchanged, end)
        round_iq4(group, from_float16(d16))
        high, low = splat(0), splat(0)
        for j in range(8):
            code = to_int(load(group.scale_levels, j)) + 32
            low = low | (code & 15) << (4 * j)
            high = high | (code >> 4) << (2 * j)
        store(words, 0, d16 | high << 16)
        store(words, 1, low)
        for j in range(8):
            pack(group.x, 32 * j, 16, 16, 2, 4, 0, words, 2 + 4 * j)
        scatter(words, 34, blocks, places.targets)
