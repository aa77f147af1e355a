"""F32, F16 and BF16: every weight by itself, in 32 or 16 bits.

BF16 is the upper half of a float32: its range, with 8 bits of precision; it is what models are
trained and published in. F16 has 11 bits, but nothing beyond 65504: coming from BF16 it gains
nothing and may overflow.

A NaN or an infinity is stored as ggml stores it; a finite weight never becomes one.
"""

import numpy as np

from quant.finite import count_nonfinite
from quant.formats.format import (
    Encoded,
    Float16Overflow,
    Format,
    check_arguments,
    gguf_decoder,
)


def _encode_f32(w: np.ndarray, importance: np.ndarray | None = None) -> Encoded:
    check_arguments(w, importance)
    return {"": np.ascontiguousarray(w).view(np.uint8)}


def _encode_f16(w: np.ndarray, importance: np.ndarray | None = None) -> Encoded:
    from quant.formats.dense_kernels import encode_float16  # numba: 0.15 s, not for --help

    check_arguments(w, importance)
    return _encode_16_bits("F16", encode_float16, w)


def _encode_bf16(w: np.ndarray, importance: np.ndarray | None = None) -> Encoded:
    from quant.formats.dense_kernels import encode_bfloat16  # numba: 0.15 s, not for --help

    check_arguments(w, importance)
    return _encode_16_bits("BF16", encode_bfloat16, w)


def _encode_16_bits(name: str, kernel, w: np.ndarray) -> Encoded:
    halves = np.empty(w.shape, np.uint16)
    kernel(w.reshape(-1), halves.reshape(-1))
    n_nonfinite = count_nonfinite(halves, name)
    if n_nonfinite and n_nonfinite > count_nonfinite(w, "F32"):
        raise Float16Overflow(f"{name}: a weight is beyond its largest finite number")
    return {"": halves.view(np.uint8)}


DENSE = (
    Format("F32", 0, 1, 4, _encode_f32, gguf_decoder(0)),
    Format("F16", 1, 1, 2, _encode_f16, gguf_decoder(1)),
    Format("BF16", 30, 1, 2, _encode_bf16, gguf_decoder(30)),
)
