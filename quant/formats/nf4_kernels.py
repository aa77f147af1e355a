"""Compiled NF4 and FP4: blocks of weights that share one scale, sixteen levels, two weights a byte.

Arrays are flat. `bounds` (15,) are the middles between neighbouring levels in ascending order,
`codes` (16,) the code of each of these levels: a weight's code is codes[number of bounds below
weight / absmax], so that a tie goes to the lower level, as in bitsandbytes.
"""

import numpy as np
from numba import njit

from quant.formats.compiled import kernel
from quant.formats.lanes import LANES, gather16, load, select, splat, store

F32, U32, U8 = np.float32, np.uint32, np.uint8
ZERO, HALF, ONE = F32(0), F32(0.5), F32(1)
SMALLEST = F32(1e-38)
"""What bitsandbytes divides by instead of a smaller absmax."""

N_BOUNDS = 15
MAX_BLOCKSIZE = 4096
MAGNITUDE = U32(0x7FFFFFFF)

# Factors of absmax that the search tries: 0.40, 0.45 ... 1.60, and half a step on either side of
# the best. Where all weights count alike, none below 0.70 was ever the best.
FIRST_FACTOR, FACTOR_STEP, N_FACTORS = F32(0.4), F32(0.05), 25
N_LOW_FACTORS = 6


@njit(inline="always")
def absmax_of(w):
    """max |w|. On the bits, where LLVM may reorder: a maximum of floats would be one long chain."""
    words = w.view(U32)
    largest = U32(0)
    for i in range(words.size):
        largest = max(largest, U32(words[i] & MAGNITUDE))
    return U32(largest).view(F32)


@njit(inline="always")
def write_codes(w, factor, bounds, codes, ranks, packed):
    """The codes of w * factor into packed: even weights in the upper four bits, odd in the lower.

    `ranks` is uint8 scratch of w's size, rounded up to even.
    """
    for i in range(w.size):
        v = w[i] * factor
        rank = U8(0)
        for k in range(N_BOUNDS):
            rank += U8(v > bounds[k])
        ranks[i] = rank
    if w.size % 2:
        ranks[w.size] = U8(0)
        for k in range(N_BOUNDS):
            ranks[w.size] += U8(bounds[k] < ZERO)
    for i in range(packed.size):
        packed[i] = (codes[ranks[2 * i]] << U8(4)) | codes[ranks[2 * i + 1]]


@kernel
def encode_blocks(w, blocksize, bounds, codes, absmax, packed):
    """Each block of `w` against its own largest magnitude: what quantize_4bit does.

    w float32 (n,); absmax float32 (ceil(n / blocksize),) and packed uint8 (ceil(n / 2),) are
    filled. Full blocks are multiplied by 1 / absmax, a short last one is divided by absmax, and
    only there a stored absmax is 1e-38 at least: so it is in the code that writes such files.
    # ref: bitsandbytes 0.50.2, backends/default/ops.py, quantize_4bit
    """
    ranks = np.empty(MAX_BLOCKSIZE, U8)
    n_full = w.size // blocksize
    half = blocksize // 2
    for b in range(n_full):
        block = w[b * blocksize : (b + 1) * blocksize]
        absmax[b] = absmax_of(block)
        factor = ONE / max(absmax[b], SMALLEST)
        write_codes(block, factor, bounds, codes, ranks, packed[b * half : (b + 1) * half])
    if w.size > n_full * blocksize:
        block = w[n_full * blocksize :].copy()
        absmax[n_full] = max(absmax_of(block), SMALLEST)
        for i in range(block.size):
            block[i] = block[i] / absmax[n_full]
        write_codes(block, ONE, bounds, codes, ranks, packed[n_full * half :])


@kernel
def encode_with_scales(w, blocksize, bounds, codes, scales, packed):
    """Each weight's nearest level under a given scale: float32 (ceil(n / blocksize),), any sign."""
    ranks = np.empty(MAX_BLOCKSIZE, U8)
    half = blocksize // 2
    for b in range(scales.size):
        block = w[b * blocksize : min((b + 1) * blocksize, w.size)]
        scale = scales[b] if abs(scales[b]) > SMALLEST else SMALLEST
        end = b * half + (block.size + 1) // 2
        write_codes(block, ONE / scale, bounds, codes, ranks, packed[b * half : end])


@kernel
def decode_blocks(packed, blocksize, quant_map, absmax, out):
    """out[i] = quant_map[code i] * absmax of its block, float32 (n,)."""
    for b in range(absmax.size):
        for i in range(b * blocksize, min((b + 1) * blocksize, out.size)):
            code = (packed[i >> 1] >> U8(0 if i & 1 else 4)) & U8(15)
            out[i] = quant_map[code] * absmax[b]


# --- the scale search ----------------------------------------------------------------------------


@njit(inline="always")
def nearest_level(v, bounds, levels):
    level = splat(levels[0])
    for k in range(N_BOUNDS):
        level = select(v > bounds[k], levels[k + 1], level)
    return level


@kernel
def search_scales(w, blocksize, bounds, levels, importance, n_columns, scales):
    """The scale of each block that minimises sum of importance * (w - scale * level)^2.

    For every factor tried, each weight takes its nearest level under factor * absmax. The best
    scale for these levels is then

        scale = sum(importance * w * level) / sum(importance * level^2)

    and lowers the error by sum(importance * w * level)^2 / sum(importance * level^2), the largest
    of which wins. Thirty-two blocks side by side, one a lane.

    w float32 (n_blocks * blocksize,); levels (16,) ascending; scales float32 (n_blocks,), filled.
    importance: float32 (n_columns + blocksize,), repeated past its end, or empty; w[0] is of
    column 0. A block whose importance is zero throughout is searched as if all of it were one.
    """
    x = np.empty((blocksize, LANES), F32)
    weights = np.ones((blocksize, LANES), F32)
    largest, heaviest = np.empty(LANES, F32), np.empty(LANES, F32)
    found = np.empty(LANES, F32)  # in units of the largest magnitude
    starts, columns = np.zeros(LANES, np.int64), np.zeros(LANES, np.int64)
    for first in range(0, scales.size, LANES):
        for k in range(LANES):  # past the end, lanes repeat the last block
            starts[k] = min(first + k, scales.size - 1) * blocksize
            columns[k] = starts[k] % n_columns
            largest[k] = absmax_of(w[starts[k] : starts[k] + blocksize])
            if importance.size:
                heaviest[k] = absmax_of(importance[columns[k] : columns[k] + blocksize])
        for i in range(0, blocksize, 16):
            gather16(w, starts, x, i)
            if importance.size:
                gather16(importance, columns, weights, i)
            for k in range(LANES):
                starts[k], columns[k] = starts[k] + 16, columns[k] + 16
        for k in range(LANES):  # sums of squares of tiny numbers would be zero
            factor = ONE / max(largest[k], SMALLEST)
            for i in range(blocksize):
                x[i, k] *= factor
                if importance.size:
                    weights[i, k] = weights[i, k] / heaviest[k] if heaviest[k] > ZERO else ONE
        first_factor = 0 if importance.size else N_LOW_FACTORS
        _search_lanes(x, weights, bounds, levels, first_factor, found)
        for k in range(min(LANES, scales.size - first)):
            scales[first + k] = found[k] * largest[k]


@njit
def _search_lanes(x, weights, bounds, levels, first_factor, found):
    """The best scale of LANES blocks x (blocksize, LANES) with |x| <= 1, into found (LANES,).

    From the first_factor-th factor on, in whole steps, then half a step around the best: against
    every half step the error is 0.03 % larger, and the search takes half as long.
    """
    best, scale, middle = splat(F32(-1)), splat(ONE), splat(ONE)
    for step in range(first_factor, N_FACTORS):
        factor = splat(FIRST_FACTOR + F32(step) * FACTOR_STEP)
        gain, at_best = _gain(x, weights, bounds, levels, factor)
        better = gain > best  # false for the NaN of a block of zeros
        best = select(better, gain, best)
        scale = select(better, at_best, scale)
        middle = select(better, factor, middle)
    for side in range(-1, 2, 2):
        factor = middle + F32(side) * HALF * FACTOR_STEP
        gain, at_best = _gain(x, weights, bounds, levels, factor)
        better = gain > best
        best = select(better, gain, best)
        scale = select(better, at_best, scale)
    store(found, 0, scale)


@njit(inline="always")
def _gain(x, weights, bounds, levels, factor):
    """By how much `factor` lowers the error of each block, and the best scale for its levels."""
    inverse = ONE / factor
    sum_wl, sum_ll = splat(ZERO), splat(ZERO)
    for i in range(len(x)):
        v = load(x, i)
        level = nearest_level(v * inverse, bounds, levels)
        weighted = load(weights, i) * level
        sum_wl = sum_wl + weighted * v
        sum_ll = sum_ll + weighted * level
    return sum_wl * sum_wl / sum_ll, sum_wl / sum_ll


# --- the scales of the scales --------------------------------------------------------------------


@kernel
def encode_nested(values, blocksize, codes_of_steps, absmax, out):
    """8-bit codes of `values` (n,) in blocks; absmax (ceil(n / blocksize),) and out are filled.

    bitsandbytes does not look for the nearest of 256 levels but rounds value / absmax to one of
    65536 steps and looks the code up, so that a value near the middle may take the farther level.
    # ref: bitsandbytes 0.50.2, csrc/cpu_ops.cpp, quantize_cpu_impl and norm_to_lut_index
    """
    for b in range(absmax.size):
        block = values[b * blocksize : min((b + 1) * blocksize, values.size)]
        absmax[b] = absmax_of(block)
        factor = ONE / absmax[b]
        for i in range(block.size):
            v = block[i] * factor
            step = 0
            if v == v:  # else it is 0 * infinity: absmax is 0, or below 2.9e-39
                step = int((min(max(v, -ONE), ONE) + ONE) * HALF * F32(65535) + HALF)
            out[b * blocksize + i] = codes_of_steps[step]


@kernel
def mean(values):
    """The mean of float32 (n,) as torch computes it on one thread: to the last bit.

    torch adds in four levels: every 2^p rows of 32 numbers the sums of one level go up to the next
    (pairwise summation, nearly). Vectors are of 8 numbers on every x86-64 processor. With several
    threads torch adds 32768 numbers or more in as many parts as there are threads, and the last
    bit of bitsandbytes' own result depends on that.
    # ref: aten/src/ATen/native/cpu/SumKernel.cpp, cascade_sum
    """
    n_levels, width, n_side = 4, 8, 4
    if values.size < width:
        width = 1  # too few for a vector
    row = width * n_side
    n_vectors = values.size // width
    n_rows = n_vectors // n_side
    bits = 0
    while (1 << bits) < n_rows:
        bits += 1
    power = max(4, bits // n_levels)
    sums = np.zeros((n_levels, row), F32)
    i = 0
    while i + (1 << power) <= n_rows:
        for _ in range(1 << power):
            for k in range(row):
                sums[0, k] += values[i * row + k]
            i += 1
        for level in range(1, n_levels):
            for k in range(row):
                sums[level, k] += sums[level - 1, k]
                sums[level - 1, k] = ZERO
            if i & (((1 << power) - 1) << (level * power)):
                break
    for j in range(i, n_rows):
        for k in range(row):
            sums[0, k] += values[j * row + k]
    for level in range(1, n_levels):
        for k in range(row):
            sums[0, k] += sums[level, k]
    total = sums[0]
    for v in range(n_rows * n_side, n_vectors):
        for k in range(width):
            total[k] += values[v * width + k]
    for s in range(1, n_side):
        for k in range(width):
            total[k] += total[s * width + k]
    result = ZERO
    for j in range(n_vectors * width, values.size):
        result += values[j]
    for k in range(width):
        result += total[k]
    return F32(result / F32(values.size))
