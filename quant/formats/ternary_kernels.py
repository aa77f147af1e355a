"""The encoders of TQ1_0 and TQ2_0: blocks of 256 float32 to llama.cpp's bytes.

Each takes `w` float32 (n_blocks * 256,), fills `out` uint8 (n_blocks * block_nbytes,) and returns
False if a d is beyond float16.
# ref: quantize_row_tq1_0_ref, quantize_row_tq2_0_ref in ggml/src/ggml-quants.c of llama.cpp
"""

import numpy as np
from numba import njit

from quant.formats.compiled import kernel
from quant.formats.k_blocks import BLOCK, begin_group, is_finite, new_places, pack, scatter
from quant.formats.k_search import ONE, ZERO, F, extreme_of
from quant.formats.lanes import (
    LANES,
    fabs,
    load,
    scatter_halves,
    select,
    splat,
    store,
    to_float,
    to_float16,
    to_int,
)


@njit
def round_to_trits(x):
    """x (256, LANES) becomes 0, 1 or 2 for -d, 0 and d; returns d.

    lroundf rounds halves away from zero, and gives 0 here for what is no number: where 1 / d is
    infinite, so that even weights of magnitude d are stored as 0.
    """
    d = extreme_of(x, 0, BLOCK)[1]
    inverse = select(d == ZERO, ZERO, ONE / d)
    for i in range(BLOCK):
        v = load(x, i) * inverse
        size = select((fabs(v) >= F(0.5)) & (fabs(v) < F(2)), ONE, ZERO)
        store(x, i, ONE + select(v < ZERO, -size, size))
    return d


@kernel
def encode_tq2_0(w, out):
    """Fields qs[64], d."""
    x, places = np.empty((BLOCK, LANES), F), new_places()
    words = np.empty((16, LANES), np.int32)
    finite = True
    for first_block in range(0, w.size // BLOCK, LANES):
        begin_group(w, first_block, 66, 0, places, x)
        d16 = to_float16(round_to_trits(x))
        finite &= is_finite(d16)
        for half in range(2):
            pack(x, 128 * half, 32, 32, 4, 2, 0, words, 8 * half)
        scatter(words, 16, out, places.targets)
        scatter_halves(d16, out, places.targets, 64)
    return finite


@njit
def fives_to_bytes(x, first, n, count, result, at):
    """result[at + i] = the byte of `count` trits x[first + i], x[first + i + n], ..., i < n.

    The trits are the digits of a fraction of 3**5 = 243, the first the highest; the byte is that
    fraction of 256, rounded up, so that multiplying by 3 gives the trits back one by one.
    """
    for i in range(n):
        digits = splat(ZERO)
        for m in range(5):
            digits = digits * F(3)
            if m < count:
                digits = digits + load(x, first + i + m * n)
        # (256 * digits + 242) // 243 by multiplication, right for digits up to 242.
        byte = to_int((digits * F(256) + F(242.5)) * F(1 / 243))
        store(result, at + i, to_float(byte))


@kernel
def encode_tq1_0(w, out):
    """Fields qs[48], qh[4], d: 160 weights as 32 bytes, 80 as 16, the last 16 as four."""
    x, places = np.empty((BLOCK, LANES), F), new_places()
    packed = np.empty((52, LANES), F)
    words = np.empty((13, LANES), np.int32)
    finite = True
    for first_block in range(0, w.size // BLOCK, LANES):
        begin_group(w, first_block, 54, 0, places, x)
        d16 = to_float16(round_to_trits(x))
        finite &= is_finite(d16)
        fives_to_bytes(x, 0, 32, 5, packed, 0)
        fives_to_bytes(x, 160, 16, 5, packed, 32)
        fives_to_bytes(x, 240, 4, 4, packed, 48)
        pack(packed, 0, 52, 0, 1, 8, 0, words, 0)
        for i in range(13):  # fewer than scatter needs
            scatter_halves(load(words, i), out, places.targets, 4 * i)
            scatter_halves(load(words, i) >> 16, out, places.targets, 4 * i + 2)
        scatter_halves(d16, out, places.targets, 52)
    return finite
