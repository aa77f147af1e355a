"""TQ1_0 and TQ2_0: every weight is -d, 0 or d, for models that were trained so (BitNet, TriLM).

A block of 256 weights shares one float16 d, its largest magnitude; each weight is rounded to the
nearest of the three. On a model that was not trained with three values the result is noise.
TQ1_0 puts five trits in a byte (3**5 = 243 of 256 values, 1.69 bits per weight with d), TQ2_0 four
in a byte, two bits each (2.06), which is quicker to read. An importance matrix changes nothing.

Bytes are those of llama.cpp's library on x86-64.
# ref: ggml/src/ggml-common.h of llama.cpp for the layouts
"""

import numpy as np

from quant.formats.format import Format, kernel_format

BLOCK = 256


def _format(name: str, ggml_type: int, block_nbytes: int) -> Format:
    def run(w: np.ndarray, importance: np.ndarray, out: np.ndarray) -> bool:
        from quant.formats import ternary_kernels  # numba: 0.15 s, which --help need not pay

        return getattr(ternary_kernels, f"encode_{name.lower()}")(w, out)  # as ggml: unweighted

    return kernel_format(name, ggml_type, BLOCK, block_nbytes, run)


TERNARY = (
    _format("TQ1_0", 34, 48 + 4 + 2),  # qs, qh, d
    _format("TQ2_0", 35, 64 + 2),  # qs, d
)
