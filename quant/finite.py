"""NaN and infinite weights, found and zeroed in the stored bits, without widening them.

A float is not finite when all its exponent bits are set: its bits, without the sign, are then at
least those of infinity. Read as whole numbers, the positive ones lie above every finite positive
(as int), the negative ones above everything (as unsigned), so two maxima over the array settle the
usual case, at the speed of memory.
"""

import numpy as np

_INFINITY = {
    "F64": (np.uint64, 0x7FF0000000000000),
    "F32": (np.uint32, 0x7F800000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E4M3": (np.uint8, 0x7F),  # has no infinity: this is its NaN
}
"""Of each stored dtype: its bits as an unsigned type, and the least that is not finite."""


def count_nonfinite(stored: np.ndarray, dtype: str) -> int:
    """How many of the stored values are NaN or infinite; `dtype` in safetensors' spelling."""
    bits, infinity, sign = _bits(stored, dtype)
    if bits.size == 0 or not (
        bits.max() >= sign | infinity or bits.view(f"i{bits.itemsize}").max() >= infinity
    ):
        return 0
    return int(np.count_nonzero(_nonfinite(bits, infinity, sign)))


def zero_nonfinite(stored: np.ndarray, dtype: str) -> int:
    """Set NaN and infinite values to zero, in place. Returns how many there were."""
    bits, infinity, sign = _bits(stored, dtype)
    wrong = _nonfinite(bits, infinity, sign)
    bits[wrong] = 0
    return int(np.count_nonzero(wrong))


def _bits(stored: np.ndarray, dtype: str) -> tuple[np.ndarray, int, int]:
    unsigned, infinity = _INFINITY[dtype]
    return stored.view(unsigned), infinity, 1 << (8 * stored.itemsize - 1)


def _nonfinite(bits: np.ndarray, infinity: int, sign: int) -> np.ndarray:
    return bits & (sign - 1) >= infinity
