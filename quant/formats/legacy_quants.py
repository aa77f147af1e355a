"""llama.cpp's first quantized types: 32 weights share one float16 scale d.

Q4_0, Q5_0 and Q8_0 store w ~ d * q with q of either sign; Q4_1 and Q5_1 store w ~ d * q + m with
q >= 0, half a bit dearer and better where weights lie to one side of zero. Without an importance
matrix the encoders are one division and one rounding, ten or more times as fast as a K type's
search; at equal size a K type is more exact, because its scales are stored in six bits.

Bytes are those of llama.cpp's library on x86-64.
# ref: ggml/src/ggml-common.h (layouts) and ggml-quants.c (roundings) of llama.cpp
"""

import numpy as np

from quant.formats.format import Format, kernel_format

BLOCK = 32


def _format(name: str, ggml_type: int, block_nbytes: int) -> Format:
    def run(w: np.ndarray, importance: np.ndarray, out: np.ndarray) -> bool:
        from quant.formats import legacy_kernels  # numba: 0.15 s, which --help need not pay

        if len(importance) and name in legacy_kernels.WEIGHTED:
            return legacy_kernels.WEIGHTED[name](w, BLOCK, importance, out)
        return legacy_kernels.PLAIN[name](w, BLOCK, out)

    return kernel_format(name, ggml_type, BLOCK, block_nbytes, run)


LEGACY_QUANTS = (
    _format("Q4_0", 2, 2 + 16),  # d, qs
    _format("Q4_1", 3, 2 + 2 + 16),  # d, m, qs
    _format("Q5_0", 6, 2 + 4 + 16),  # d, qh, qs
    _format("Q5_1", 7, 2 + 2 + 4 + 16),  # d, m, qh, qs
    _format("Q8_0", 8, 2 + 32),  # d, qs
)
