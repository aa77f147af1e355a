"""float32 to the two 16-bit floats, as bits, rounded half to even.

NumPy has no bfloat16, and converts to float16 one number at a time.
"""

import numpy as np

from quant.formats.compiled import kernel

U32, F32 = np.uint32, np.float32  # numba widens what is left unsaid to 64 bits
INFINITY = U32(0x7F800000)
"""The bits of float32's infinity: a NaN's, without the sign, are above."""


@kernel
def encode_float16(w, out):
    """`w` float32 (n,) as float16 into `out` uint16 (n,); from 65520 on it becomes infinity.

    The adder does the rounding: `base` is a power of two so far above w that the mantissa of
    their sum has just the bits that float16 keeps.
    # ref: ggml/src/ggml-impl.h, ggml_compute_fp32_to_fp16
    """
    for i in range(w.size):
        bits = F32(w[i]).view(U32)
        magnitude = U32(bits & U32(0x7FFFFFFF))
        exponent = U32(max(U32(magnitude & INFINITY), U32(0x38800000)))  # 2**-14 at least
        base = U32(exponent + U32(0x07800000)).view(F32)
        # Overflows to infinity where float16 does, and is w * 4 elsewhere.
        scaled = (abs(w[i]) * F32(2.0**112)) * F32(2.0**-110)
        total = F32(base + scaled).view(U32)
        half = ((total >> U32(13)) & U32(0x7C00)) + (total & U32(0xFFF))
        half = U32(0x7E00) if magnitude > INFINITY else U32(half)
        out[i] = np.uint16(((bits >> U32(16)) & U32(0x8000)) | half)


@kernel
def encode_bfloat16(w, out):
    """`w` float32 (n,) as bfloat16 into `out` uint16 (n,); beyond 3.39e38 it becomes infinity.

    # ref: ggml/src/ggml-impl.h, ggml_compute_fp32_to_bf16
    """
    for i in range(w.size):
        bits = F32(w[i]).view(U32)
        rounded = U32(bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
        is_nan = U32(bits & U32(0x7FFFFFFF)) > INFINITY
        out[i] = np.uint16((bits >> U32(16)) | U32(64) if is_nan else rounded)
