"""The encoders of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: float32 to llama.cpp's bytes.

A plain kernel takes `w` float32 (n_blocks * 32,) and fills `out` uint8 (n_blocks * block_nbytes,);
a weighted one also takes `importance` float32 (n_columns,). They return False if a scale or
minimum is beyond float16. LANES blocks go side by side, one a lane; past the last block, lanes
repeat it. Kernels hold no lock and share nothing, so row blocks may run in several threads.

`n` is the block size, always 32: were it a constant, LLVM would unroll every loop over a block,
which takes longer to compile and runs hardly faster.
# ref: quantize_row_q*_ref, quantize_row_q*_impl in ggml/src/ggml-quants.c of llama.cpp
"""

import numpy as np
from numba import njit

from quant.formats.compiled import kernel
from quant.formats.k_search import (
    ONE,
    ZERO,
    F,
    clip,
    extreme_of,
    nearest_int,
    search_scale,
    search_scale_and_min,
)
from quant.formats.lanes import (
    LANES,
    any_of,
    bits,
    fabs,
    from_bits,
    gather16,
    load,
    scatter_halves,
    select,
    splat,
    sqrt,
    store,
    to_float16,
    to_int,
)

BLOCK = 32
SMALLEST_INVERTIBLE = F(2.0**-128)
"""1 / d is infinite for d up to this."""


# --- reading and writing blocks ------------------------------------------------------------------


@njit
def place_blocks(w, first_block, block_nbytes, sources, targets):
    """Where the block of each lane begins in w and in out, int64 (LANES,)."""
    last = w.size // BLOCK - 1
    for k in range(LANES):
        block = min(first_block + k, last)
        sources[k] = block * BLOCK
        targets[k] = block * block_nbytes


@njit
def gather(flat, sources, rows, n):
    """rows[i, k] = flat[sources[k] + i] for i < n."""
    for i in range(0, n, 16):
        gather16(flat[i:], sources, rows, i)


@njit
def write_float16(value, out, targets, at):
    """`value` at byte `at` of every block; False if that is infinite for one of them."""
    half = to_float16(value)
    scatter_halves(half, out, targets, at)
    return not any_of((half & 0x7C00) == 0x7C00)


@njit
def write_low_bits(q, n, out, targets, at):
    """qs: byte j holds the low four bits of q[j] and, above them, of q[j + 16]."""
    half = n // 2
    for j in range(0, half, 2):
        even = load(q, j) & 15 | (load(q, j + half) & 15) << 4
        odd = load(q, j + 1) & 15 | (load(q, j + 1 + half) & 15) << 4
        scatter_halves(even | odd << 8, out, targets, at + j)


@njit
def write_fifth_bits(q, n, out, targets, at):
    """qh: bit j holds bit 4 of q[j]."""
    qh = splat(0)
    for j in range(n):
        qh = qh | (load(q, j) >> 4) << j
    scatter_halves(qh, out, targets, at)
    scatter_halves(qh >> 16, out, targets, at + 2)


# --- one scale from the largest weight -----------------------------------------------------------


@njit
def invert(d):
    """1 / d, and 0 where that is infinite.

    There ggml multiplies by infinity and converts to an int, which on x86 gives low bits of 0.
    """
    return select(fabs(d) > SMALLEST_INVERTIBLE, ONE / d, ZERO)


@njit
def round_half_away(v):
    """`v` as int, halves away from zero, for |v| < 2**22. # ref: roundf

    Adds the float before 0.5 and truncates: with 0.5 itself, 0.49999997 would become 1.
    """
    return to_int(v + from_bits((bits(v) & -0x80000000) | 0x3EFFFFFF))


@njit
def minimum(a, b):
    return select(a < b, a, b)


@njit
def largest_magnitude(x, n):
    largest = splat(ZERO)
    for j in range(n):
        v = fabs(load(x, j))
        largest = select(v > largest, v, largest)
    return largest


@kernel
def encode_q8_0(w, n, out):
    """d, qs[32]: w ~ d * q, q in -127..127. # ref: quantize_row_q8_0_ref"""
    x = np.empty((BLOCK, LANES), F)
    sources, targets = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    finite = True
    for first_block in range(0, w.size // BLOCK, LANES):
        place_blocks(w, first_block, 34, sources, targets)
        gather(w, sources, x, n)
        d = largest_magnitude(x, n) / F(127)
        inverse = invert(d)
        finite &= write_float16(d, out, targets, 0)
        for j in range(0, n, 2):
            even = round_half_away(load(x, j) * inverse)
            odd = round_half_away(load(x, j + 1) * inverse)
            scatter_halves(even & 255 | odd << 8, out, targets, 2 + j)
    return finite


@njit
def encode_symmetric(w, n, out, n_bits):
    """w ~ d * (q - 2 ** (n_bits - 1)); d has the sign that gives the largest magnitude q = 0.

    # ref: quantize_row_q4_0_ref, quantize_row_q5_0_ref
    """
    zero_level = F(1 << (n_bits - 1))
    block_nbytes = 18 if n_bits == 4 else 22
    x, q = np.empty((BLOCK, LANES), F), np.empty((BLOCK, LANES), np.int32)
    sources, targets = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    finite = True
    for first_block in range(0, w.size // BLOCK, LANES):
        place_blocks(w, first_block, block_nbytes, sources, targets)
        gather(w, sources, x, n)
        extreme, _ = extreme_of(x, 0, n)
        d = extreme / -zero_level
        inverse = invert(d)
        # With no inverse every q is 0 (see `invert`), unless d itself is 0.
        offset = select((inverse == ZERO) & (d != ZERO), ZERO, splat(zero_level + F(0.5)))
        for j in range(n):
            level = to_int(load(x, j) * inverse + offset)
            store(q, j, minimum(level, (1 << n_bits) - 1))
        finite &= write_float16(d, out, targets, 0)
        if n_bits == 5:
            write_fifth_bits(q, n, out, targets, 2)
        write_low_bits(q, n, out, targets, block_nbytes - 16)
    return finite


@njit
def encode_with_min(w, n, out, n_bits):
    """w ~ d * q + m, where m is the least weight. # ref: quantize_row_q4_1_ref, ..q5_1_ref"""
    q_max = (1 << n_bits) - 1
    block_nbytes = 20 if n_bits == 4 else 24
    x, q = np.empty((BLOCK, LANES), F), np.empty((BLOCK, LANES), np.int32)
    sources, targets = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    finite = True
    for first_block in range(0, w.size // BLOCK, LANES):
        place_blocks(w, first_block, block_nbytes, sources, targets)
        gather(w, sources, x, n)
        low = load(x, 0)
        high = low
        for j in range(1, n):
            v = load(x, j)
            low = select(v < low, v, low)
            high = select(v > high, v, high)
        d = (high - low) / F(q_max)
        inverse = invert(d)
        for j in range(n):
            level = to_int((load(x, j) - low) * inverse + F(0.5))
            store(q, j, minimum(level, q_max))
        finite &= write_float16(d, out, targets, 0)
        finite &= write_float16(low, out, targets, 2)
        if n_bits == 5:
            write_fifth_bits(q, n, out, targets, 4)
        write_low_bits(q, n, out, targets, block_nbytes - 16)
    return finite


@kernel
def encode_q4_0(w, n, out):
    """d, qs[16]."""
    return encode_symmetric(w, n, out, 4)


@kernel
def encode_q5_0(w, n, out):
    """d, qh[4], qs[16]."""
    return encode_symmetric(w, n, out, 5)


@kernel
def encode_q4_1(w, n, out):
    """d, m, qs[16]."""
    return encode_with_min(w, n, out, 4)


@kernel
def encode_q5_1(w, n, out):
    """d, m, qh[4], qs[16]."""
    return encode_with_min(w, n, out, 5)


# --- a scale searched for, errors weighed by importance ------------------------------------------


@njit
def mean_squares(w, n_columns, n):
    """Mean of w**2 of each row, float32 (n_rows,), summed in order; LANES rows side by side."""
    n_rows = w.size // n_columns
    means = np.empty(n_rows, F)
    x, total = np.empty((BLOCK, LANES), F), np.empty((1, LANES), F)
    starts = np.empty(LANES, np.int64)
    for first_row in range(0, n_rows, LANES):
        for k in range(LANES):
            starts[k] = min(first_row + k, n_rows - 1) * n_columns
        sums = splat(ZERO)
        for _ in range(0, n_columns, n):
            gather(w, starts, x, n)
            starts += n
            for j in range(n):
                v = load(x, j)
                sums = sums + v * v
        store(total, 0, sums / F(n_columns))
        for k in range(min(LANES, n_rows - first_row)):
            means[first_row + k] = total[0, k]
    return means


@njit
def weigh(w, n, sources, importance, means, x, columns, spread, weights):
    """Load blocks into x; weights[j] = importance * sqrt(mean of the row's w**2 + w**2).

    `columns` int64 (LANES,) and `spread` float32 (1, LANES) are scratch.
    """
    n_columns = importance.size
    for k in range(LANES):
        columns[k] = sources[k] % n_columns
        spread[0, k] = means[sources[k] // n_columns]
    gather(w, sources, x, n)
    gather(importance, columns, weights, n)
    for j in range(n):
        v = load(x, j)
        store(weights, j, load(weights, j) * sqrt(load(spread, 0) + v * v))


@njit
def encode_symmetric_weighted(w, n, importance, out, n_bits):
    """# ref: quantize_row_q4_0_impl, quantize_row_q5_0_impl"""
    zero_level = F(1 << (n_bits - 1))
    block_nbytes = 18 if n_bits == 4 else 22
    means = mean_squares(w, importance.size, n)
    x, q = np.empty((BLOCK, LANES), F), np.empty((BLOCK, LANES), np.int32)
    weights, spread = np.empty((BLOCK, LANES), F), np.empty((1, LANES), F)
    sources, targets = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    columns = np.empty(LANES, np.int64)
    finite = True
    for first_block in range(0, w.size // BLOCK, LANES):
        place_blocks(w, first_block, block_nbytes, sources, targets)
        weigh(w, n, sources, importance, means, x, columns, spread, weights)
        d, inverse = search_scale(x, 0, n, weights, zero_level)
        for j in range(n):
            level = clip(nearest_int(load(x, j) * inverse), -zero_level, zero_level - ONE)
            # A block of zeros has q = 0 here, not the zero level.
            store(q, j, to_int(select(inverse == ZERO, ZERO, level + zero_level)))
        finite &= write_float16(d, out, targets, 0)
        if n_bits == 5:
            write_fifth_bits(q, n, out, targets, 2)
        write_low_bits(q, n, out, targets, block_nbytes - 16)
    return finite


@njit
def encode_with_min_weighted(w, n, importance, out, n_bits):
    """# ref: quantize_row_q4_1_impl, quantize_row_q5_1_impl"""
    q_max = F((1 << n_bits) - 1)
    block_nbytes = 20 if n_bits == 4 else 24
    means = mean_squares(w, importance.size, n)
    x, q = np.empty((BLOCK, LANES), F), np.empty((BLOCK, LANES), np.int32)
    weights, spread = np.empty((BLOCK, LANES), F), np.empty((1, LANES), F)
    scratch = np.empty((BLOCK, LANES), F)
    sources, targets = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    columns = np.empty(LANES, np.int64)
    finite = True
    for first_block in range(0, w.size // BLOCK, LANES):
        place_blocks(w, first_block, block_nbytes, sources, targets)
        weigh(w, n, sources, importance, means, x, columns, spread, weights)
        d, low, inverse, origin, _ = search_scale_and_min(
            x, 0, n, weights, scratch, q_max, F(-0.9), F(0.05), 36, False
        )
        for j in range(n):
            level = clip(nearest_int(inverse * (load(x, j) - origin)), ZERO, q_max)
            store(q, j, to_int(level))
        finite &= write_float16(d, out, targets, 0)
        finite &= write_float16(low, out, targets, 2)
        if n_bits == 5:
            write_fifth_bits(q, n, out, targets, 4)
        write_low_bits(q, n, out, targets, block_nbytes - 16)
    return finite


@kernel
def encode_q4_0_weighted(w, n, importance, out):
    return encode_symmetric_weighted(w, n, importance, out, 4)


@kernel
def encode_q5_0_weighted(w, n, importance, out):
    return encode_symmetric_weighted(w, n, importance, out, 5)


@kernel
def encode_q4_1_weighted(w, n, importance, out):
    return encode_with_min_weighted(w, n, importance, out, 4)


@kernel
def encode_q5_1_weighted(w, n, importance, out):
    return encode_with_min_weighted(w, n, importance, out, 5)


PLAIN = {
    "Q4_0": encode_q4_0,
    "Q4_1": encode_q4_1,
    "Q5_0": encode_q5_0,
    "Q5_1": encode_q5_1,
    "Q8_0": encode_q8_0,
}
WEIGHTED = {
    "Q4_0": encode_q4_0_weighted,
    "Q4_1": encode_q4_1_weighted,
    "Q5_0": encode_q5_0_weighted,
    "Q5_1": encode_q5_1_weighted,
}
"""Q8_0 ignores importance, as ggml does."""
