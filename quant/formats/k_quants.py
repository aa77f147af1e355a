"""llama.cpp's K types: blocks of 256 weights, whose sub-blocks' scales are themselves quantized.

A float16 scale for every 32 weights costs half a bit a weight. Here sub-blocks of 16 or 32 have
scales of 4, 6 or 8 bits, multiples of one float16 d per block; Q2_K, Q4_K and Q5_K also have
minima, multiples of dmin, which suits weights that lie to one side of zero:

    Q2_K Q4_K Q5_K   w ~ d * scale * q - dmin * min
    Q3_K Q6_K        w ~ d * scale * q

Each sub-block's scale is searched for the least weighted error. Without an importance matrix,
errors of large weights count more; with one, those of columns whose inputs were large in the
calibration run. The fewer the bits the more that helps: llama.cpp's own table for Llama-3-8B has a
mean KL divergence of 0.445 for Q2_K without and 0.332 with, of 0.031 and 0.028 for Q4_K_M.

Bytes are those of llama.cpp's library on x86-64.
# ref: ggml/src/ggml-common.h (layouts), tools/perplexity/README.md (divergences) of llama.cpp
"""

import numpy as np

from quant.formats.format import Format, kernel_format

BLOCK = 256


def _format(name: str, ggml_type: int, block_nbytes: int) -> Format:
    def run(w: np.ndarray, importance: np.ndarray, out: np.ndarray) -> bool:
        from quant.formats import k_kernels  # numba: 0.15 s, which --help need not pay

        return getattr(k_kernels, f"encode_{name.lower()}")(w, importance, out)

    return kernel_format(name, ggml_type, BLOCK, block_nbytes, run)


K_QUANTS = (
    _format("Q2_K", 10, 16 + 64 + 2 + 2),  # scales, qs, d, dmin
    _format("Q3_K", 11, 32 + 64 + 12 + 2),  # hmask, qs, scales, d
    _format("Q4_K", 12, 2 + 2 + 12 + 128),  # d, dmin, scales, qs
    _format("Q5_K", 13, 2 + 2 + 12 + 32 + 128),  # d, dmin, scales, qh, qs
    _format("Q6_K", 14, 128 + 64 + 16 + 2),  # ql, qh, scales, d
)
