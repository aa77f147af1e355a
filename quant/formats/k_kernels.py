"""The encoders of Q2_K to Q6_K: blocks of 256 float32 to llama.cpp's bytes.

Each kernel takes `w` float32 (n_blocks * 256,), `importance` float32 (n_columns,) or of size 0 for
none, and fills `out` uint8 (n_blocks * block_nbytes,). It returns False if a scale is beyond
float16. Kernels hold no lock and share nothing, so row blocks may run in several threads.

All do the same: search a scale (and min) for each sub-block, fit the block's float16 d to those
scales, round the scales to 4, 6 or 8 bits, round the weights again to the scales that are stored.
Where a stored scale is zero, the q of the search stay: they mean nothing, but they are bytes.

LANES = 32 blocks go side by side: x and q (32 KB each) stay near the processor, and two AVX-512
registers per value hide the additions' latency: 16 lanes are 15 % slower, 64 are 8 %. Cache-line
alignment and constant loop bounds made no difference. Loops over lanes for LLVM to vectorise
reached 150 million weights a second in Q4_K's search alone; this does 350 for the whole encoder.
# ref: ggml/src/ggml-quants.c (quantize_row_*) and ggml-common.h (layouts) of llama.cpp
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from quant.formats.compiled import kernel
from quant.formats.k_blocks import BLOCK, begin_group, gather, is_finite, new_places, pack, scatter
from quant.formats.k_search import (
    ALMOST_ZERO,
    ONE,
    ZERO,
    F,
    as_uint8,
    clip,
    extreme_of,
    fit_scale_of_scales,
    fit_scale_stepwise,
    nearest_int,
    search_scale,
    search_scale_and_min,
)
from quant.formats.lanes import (
    LANES,
    any_of,
    fabs,
    from_float16,
    load,
    scatter_halves,
    select,
    splat,
    sqrt,
    store,
    to_float,
    to_float16,
    to_int,
)


class Group(NamedTuple):
    """One group of blocks on its way through an encoder; arrays of lanes, row by row."""

    x: np.ndarray  # (256, LANES) the weights; at the end the whole numbers to store
    q: np.ndarray  # (256, LANES) the whole numbers that the searches found
    weights: np.ndarray  # (32, LANES) how much an error counts, in one sub-block
    trial: np.ndarray  # (32, LANES) scratch
    scales: np.ndarray  # (16, LANES) and below: of each sub-block
    mins: np.ndarray  # not negative: w ~ scale * q - min
    total_weights: np.ndarray
    scale_levels: np.ndarray  # whole numbers: scale ~ d * scale_level
    min_levels: np.ndarray  # min ~ dmin * min_level
    scale_bytes: np.ndarray  # both levels, as the block's `scales` field has them


@njit
def new_group():
    return Group(
        np.empty((BLOCK, LANES), F),
        np.empty((BLOCK, LANES), F),
        np.empty((32, LANES), F),
        np.empty((32, LANES), F),
        np.empty((16, LANES), F),
        np.empty((16, LANES), F),
        np.empty((16, LANES), F),
        np.empty((16, LANES), F),
        np.empty((16, LANES), F),
        np.empty((16, LANES), F),
    )


# --- how much an error counts --------------------------------------------------------------------


@njit
def sum_of_squares(x, first, n):
    total = splat(ZERO)
    for i in range(first, first + n):
        v = load(x, i)
        total = total + v * v
    return total


@njit
def weigh_by_importance(group, first, n, importance, columns, spread):
    """weights[i] = importance * sqrt(spread + w**2)."""
    gather(importance, columns, first, group.weights, n)
    for i in range(n):
        v = load(group.x, first + i)
        store(group.weights, i, load(group.weights, i) * sqrt(spread + v * v))


@njit
def weigh_by_magnitude(group, first, n, base):
    """weights[i] = base + |w|."""
    for i in range(n):
        store(group.weights, i, base + fabs(load(group.x, first + i)))


# --- Q2_K, Q4_K, Q5_K: w ~ d * scale_level * q - dmin * min_level -------------------------------


@njit
def fit_with_min(group, j, n, q_max, r_min, r_delta, n_steps, absolute):
    """Find scale, min and q of sub-block j."""
    scale, low, inverse, origin, total = search_scale_and_min(
        group.x, n * j, n, group.weights, group.trial, q_max, r_min, r_delta, n_steps, absolute
    )
    store(group.scales, j, scale)
    store(group.mins, j, -low)
    store(group.total_weights, j, total)
    for i in range(n * j, n * j + n):
        q = nearest_int(inverse * (load(group.x, i) - origin))
        store(group.q, i, clip(q, ZERO, q_max))


@njit
def level_by_largest(values, n, levels, level_max):
    """Divide by the d that makes the largest `level_max`; returns d, 0 if none is positive."""
    largest = splat(ZERO)
    for j in range(n):
        v = load(values, j)
        largest = select(v > largest, v, largest)
    inverse = select(largest > ZERO, level_max / largest, ZERO)
    for j in range(n):
        store(levels, j, as_uint8(nearest_int(inverse * load(values, j))))
    return largest / level_max


@njit
def level_scales_and_mins(group, n, level_max, weighted):
    """Fill scale_levels and min_levels; returns d and dmin, float16 bits."""
    if weighted:
        d = fit_scale_of_scales(group.scales, n, group.total_weights, group.scale_levels, level_max)
        dmin = fit_scale_of_scales(group.mins, n, group.total_weights, group.min_levels, level_max)
    else:
        d = level_by_largest(group.scales, n, group.scale_levels, level_max)
        dmin = level_by_largest(group.mins, n, group.min_levels, level_max)
    return to_float16(d), to_float16(dmin)


@njit
def round_with_min(group, n, d16, dmin16, q_max):
    """x becomes the q to store."""
    for j in range(BLOCK // n):
        d = from_float16(d16) * load(group.scale_levels, j)
        dm = from_float16(dmin16) * load(group.min_levels, j)
        unused = d == ZERO
        any_unused = any_of(unused)
        for i in range(n * j, n * j + n):
            q = clip(nearest_int((load(group.x, i) + dm) / d), ZERO, q_max)
            if any_unused:
                q = select(unused, load(group.q, i), q)
            store(group.x, i, q)


@njit
def pack_nibble_levels(group, words, at):
    """Sixteen bytes, scale_level | min_level << 4. The levels become what is read back."""
    for j in range(16):
        s, m = to_int(load(group.scale_levels, j)), to_int(load(group.min_levels, j))
        byte = (s | m << 4) & 255  # a negative scale's level wraps, as in C
        store(group.scale_bytes, j, to_float(byte))
        store(group.scale_levels, j, to_float(byte & 15))
        store(group.min_levels, j, to_float(byte >> 4))
    pack(group.scale_bytes, 0, 16, 0, 1, 8, 0, words, at)


@njit
def pack_six_bit_levels(group, words, at):
    """Twelve bytes for eight pairs of levels. The levels become what is read back.

    # ref: get_scale_min_k4
    """
    for j in range(4):
        s, m = to_int(load(group.scale_levels, j)), to_int(load(group.min_levels, j))
        s4, m4 = to_int(load(group.scale_levels, j + 4)), to_int(load(group.min_levels, j + 4))
        s_byte = (s | (s4 >> 4) << 6) & 255
        m_byte = (m | (m4 >> 4) << 6) & 255
        store(group.scale_bytes, j, to_float(s_byte))
        store(group.scale_bytes, j + 4, to_float(m_byte))
        store(group.scale_bytes, j + 8, to_float((s4 & 15) | (m4 & 15) << 4))
        store(group.scale_levels, j, to_float(s_byte & 63))
        store(group.min_levels, j, to_float(m_byte & 63))
        store(group.scale_levels, j + 4, to_float((s4 & 15) | (s_byte >> 6) << 4))
        store(group.min_levels, j + 4, to_float((m4 & 15) | (m_byte >> 6) << 4))
    pack(group.scale_bytes, 0, 12, 0, 1, 8, 0, words, at)


@kernel
def encode_q2_k(w, importance, out):
    """16 sub-blocks of 16; fields scales[16], qs[64], d, dmin."""
    weighted = importance.size > 0
    r_min, r_delta, n_steps = (F(-0.9), F(0.05), 36) if weighted else (F(-0.5), F(0.1), 15)
    group, places = new_group(), new_places()
    words = np.empty((21, LANES), np.int32)
    finite = True
    for first_block in range(0, w.size // BLOCK, LANES):
        begin_group(w, first_block, 84, importance.size, places, group.x)
        spread = sum_of_squares(group.x, 0, BLOCK) / F(BLOCK)
        for j in range(16):
            if weighted:
                weigh_by_importance(group, 16 * j, 16, importance, places.columns, spread)
            else:
                weigh_by_magnitude(group, 16 * j, 16, ZERO)
            fit_with_min(group, j, 16, F(3), r_min, r_delta, n_steps, not weighted)
        d16, dmin16 = level_scales_and_mins(group, 16, F(15), weighted)
        finite &= is_finite(d16) and is_finite(dmin16)
        pack_nibble_levels(group, words, 0)
        round_with_min(group, 16, d16, dmin16, F(3))
        for half in range(2):
            pack(group.x, 128 * half, 32, 32, 4, 2, 0, words, 4 + 8 * half)
        store(words, 20, d16 | dmin16 << 16)
        scatter(words, 21, out, places.targets)
    return finite


@njit
def encode_q4_or_q5(w, importance, out, n_bits, r_min, n_steps):
    """8 sub-blocks of 32; fields d, dmin, scales[12], qh[32] if n_bits is 5, qs[128]."""
    weighted = importance.size > 0
    r_delta = F(0.1)
    if weighted:
        r_min, r_delta, n_steps = F(-0.9), F(0.05), 36
    q_max = F((1 << n_bits) - 1)
    n_words = 36 if n_bits == 4 else 44
    group, places = new_group(), new_places()
    words = np.empty((n_words, LANES), np.int32)
    finite = True
    for first_block in range(0, w.size // BLOCK, LANES):
        begin_group(w, first_block, 4 * n_words, importance.size, places, group.x)
        spread = F(2) * sum_of_squares(group.x, 0, BLOCK) / F(BLOCK)
        for j in range(8):
            if weighted:
                weigh_by_importance(group, 32 * j, 32, importance, places.columns, spread)
            else:
                rms = sqrt(sum_of_squares(group.x, 32 * j, 32) / F(32))
                weigh_by_magnitude(group, 32 * j, 32, rms)
            fit_with_min(group, j, 32, q_max, r_min, r_delta, n_steps, False)
        d16, dmin16 = level_scales_and_mins(group, 8, F(63), weighted)
        finite &= is_finite(d16) and is_finite(dmin16)
        if n_bits == 5 or not weighted:  # Q4_K with importance lets a wrapped level stand
            for j in range(8):
                store(group.scale_levels, j, clip(load(group.scale_levels, j), ZERO, F(63)))
                store(group.min_levels, j, clip(load(group.min_levels, j), ZERO, F(63)))
        store(words, 0, d16 | dmin16 << 16)
        pack_six_bit_levels(group, words, 1)
        round_with_min(group, 32, d16, dmin16, q_max)
        if n_bits == 5:
            pack(group.x, 0, 32, 32, 8, 1, 4, words, 4)
        for pair in range(4):
            pack(group.x, 64 * pair, 32, 32, 2, 4, 0, words, n_words - 32 + 8 * pair)
        scatter(words, n_words, out, places.targets)
    return finite


@kernel
def encode_q4_k(w, importance, out):
    return encode_q4_or_q5(w, importance, out, 4, F(-1), 20)


@kernel
def encode_q5_k(w, importance, out):
    return encode_q4_or_q5(w, importance, out, 5, F(-0.5), 15)


# --- Q3_K, Q6_K: 16 sub-blocks of 16, w ~ d * scale_level * q, q of either sign ------------------


@njit
def fit_signed(group, j, q_max):
    """Find scale and q of sub-block j."""
    scale, inverse = search_scale(group.x, 16 * j, 16, group.weights, q_max)
    store(group.scales, j, scale)
    for i in range(16 * j, 16 * j + 16):
        q = clip(nearest_int(inverse * load(group.x, i)), -q_max, q_max - ONE)
        store(group.q, i, select(inverse == ZERO, -q_max, q))


@njit
def round_signed(group, d16, q_max):
    """x becomes the q to store: q + q_max."""
    for j in range(16):
        d = from_float16(d16) * load(group.scale_levels, j)
        unused = d == ZERO
        any_unused = any_of(unused)
        for i in range(16 * j, 16 * j + 16):
            q = clip(nearest_int(load(group.x, i) / d), -q_max, q_max - ONE)
            if any_unused:
                q = select(unused, load(group.q, i), q)
            store(group.x, i, q + q_max)


@njit
def fit_q3_weighted(group, importance, columns):
    """Scales, q and scale_levels -32..31 of Q3_K; returns d."""
    spread = F(2) * sum_of_squares(group.x, 0, BLOCK) / F(BLOCK)
    for j in range(16):
        weigh_by_importance(group, 16 * j, 16, importance, columns, spread)
        total = splat(ZERO)
        for i in range(16):
            total = total + load(group.weights, i)
        store(group.total_weights, j, total)
        fit_signed(group, j, F(4))
    d, inverse = search_scale(group.scales, 0, 16, group.total_weights, F(32))
    level_signed(group, inverse, F(-32), F(31))
    return d


@njit
def fit_q3(group):
    """Scales, q and scale_levels -32..31 of Q3_K without importance; returns d."""
    for j in range(16):
        scale = fit_scale_stepwise(group.x, 16 * j, 16, group.weights, group.q, F(4))
        store(group.scales, j, scale)
    inverse = F(-32) / extreme_of(group.scales, 0, 16)[0]
    level_signed(group, inverse, F(-32), F(31))
    return ONE / inverse


@njit
def level_signed(group, inverse, low, high):
    for j in range(16):
        level = nearest_int(inverse * load(group.scales, j))
        store(group.scale_levels, j, clip(level, low, high))


@njit
def pack_signed_levels(group, words, at):
    """Twelve bytes for sixteen levels + 32: eight of low nibble pairs, four of the high bits."""
    for j in range(16):
        store(group.scale_bytes, j, load(group.scale_levels, j) + F(32))
    pack(group.scale_bytes, 0, 8, 8, 2, 4, 0, words, at)
    pack(group.scale_bytes, 0, 4, 4, 4, 2, 4, words, at + 2)


@kernel
def encode_q3_k(w, importance, out):
    """Fields hmask[32], qs[64], scales[12], d."""
    weighted = importance.size > 0
    group, places = new_group(), new_places()
    words = np.empty((27, LANES), np.int32)
    finite = True
    for first_block in range(0, w.size // BLOCK, LANES):
        begin_group(w, first_block, 110, importance.size, places, group.x)
        if weighted:
            d = fit_q3_weighted(group, importance, places.columns)
            zero = extreme_of(group.scales, 0, 16)[1] < ALMOST_ZERO
        else:
            d = fit_q3(group)
            zero = extreme_of(group.scales, 0, 16)[1] == ZERO
        d16 = select(zero, 0, to_float16(d))
        for j in range(16):
            store(group.scale_levels, j, select(zero, F(-32), load(group.scale_levels, j)))
        finite &= is_finite(d16)
        round_signed(group, d16, F(4))
        pack(group.x, 0, 32, 32, 8, 1, 2, words, 0)
        for half in range(2):
            pack(group.x, 128 * half, 32, 32, 4, 2, 0, words, 8 + 8 * half)
        pack_signed_levels(group, words, 24)
        scatter(words, 27, out, places.targets)
        scatter_halves(d16, out, places.targets, 108)
    return finite


@kernel
def encode_q6_k(w, importance, out):
    """Fields ql[128], qh[64], scales[16], d. Importance weighs the errors as it is."""
    weighted = importance.size > 0
    group, places = new_group(), new_places()
    words = np.empty((52, LANES), np.int32)
    finite = True
    for first_block in range(0, w.size // BLOCK, LANES):
        begin_group(w, first_block, 210, importance.size, places, group.x)
        for j in range(16):
            if weighted:
                gather(importance, places.columns, 16 * j, group.weights, 16)
            else:
                for i in range(16):
                    v = load(group.x, 16 * j + i)
                    store(group.weights, i, v * v)
            fit_signed(group, j, F(32))
        extreme, largest = extreme_of(group.scales, 0, 16)
        inverse = F(-128) / extreme
        level_signed(group, inverse, F(-128), F(127))
        zero = largest < ALMOST_ZERO
        d16 = select(zero, 0, to_float16(ONE / inverse))
        finite &= is_finite(d16)
        round_signed(group, d16, F(32))
        for half in range(2):
            pack(group.x, 128 * half, 64, 64, 2, 4, 0, words, 16 * half)
            pack(group.x, 128 * half, 32, 32, 4, 2, 4, words, 32 + 8 * half)
        pack(group.scale_levels, 0, 16, 0, 1, 8, 0, words, 48)
        if any_of(zero):  # all of the block is zero bytes
            for i in range(52):
                store(words, i, select(zero, 0, load(words, i)))
        scatter(words, 52, out, places.targets)
        scatter_halves(d16, out, places.targets, 208)
    return finite
