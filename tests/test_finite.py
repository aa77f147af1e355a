"""quant/finite.py against numpy.isfinite of the widened values."""

import numpy as np
import pytest

from quant.finite import count_nonfinite, zero_nonfinite
from quant.tensors import STORED_DTYPES, to_float32

EVERY_16_BITS = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)


def stored_values(dtype: str) -> np.ndarray:
    """Every value of a dtype of up to 16 bits; of wider ones many, with all kinds of NaN."""
    numpy_dtype = np.dtype(STORED_DTYPES[dtype])
    if numpy_dtype.itemsize == 1:
        return np.arange(256, dtype=np.uint8).reshape(16, 16)
    if numpy_dtype.itemsize == 2:
        return EVERY_16_BITS.view(numpy_dtype)
    raw = np.random.default_rng(0).integers(0, 256, (64, 512 * numpy_dtype.itemsize), np.uint8)
    raw[::2, numpy_dtype.itemsize - 1 :: numpy_dtype.itemsize] |= 0x7F  # exponents at the top
    raw[::4, numpy_dtype.itemsize - 2 :: numpy_dtype.itemsize] |= 0xF0
    values = raw.view(numpy_dtype)
    values[1, :4] = np.inf, -np.inf, np.nan, 0
    return values


def is_finite(stored: np.ndarray, dtype: str) -> np.ndarray:
    return np.isfinite(stored if dtype == "F64" else to_float32(stored, dtype))


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3"])
def test_counts_and_zeroes_what_is_not_finite(dtype):
    stored = stored_values(dtype)
    finite = is_finite(stored, dtype)
    assert 0 < np.count_nonzero(~finite) < stored.size
    assert count_nonfinite(stored, dtype) == np.count_nonzero(~finite)

    kept = stored.copy()
    assert zero_nonfinite(kept, dtype) == np.count_nonzero(~finite)
    assert np.array_equal(kept.view(np.uint8), np.where(finite, stored, 0).view(np.uint8))
    assert count_nonfinite(kept, dtype) == 0


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3"])
def test_sees_a_single_wrong_value_of_either_sign(dtype):
    clean = stored_values(dtype).copy()
    zero_nonfinite(clean, dtype)
    wrong = stored_values(dtype)[~is_finite(stored_values(dtype), dtype)]
    signs = np.signbit(to_float32(wrong, dtype)) if dtype != "F8_E4M3" else wrong > 127
    for sign in (True, False):
        planted = clean.copy()
        planted[3, 5] = wrong[signs == sign][0]
        assert count_nonfinite(planted, dtype) == 1
        assert count_nonfinite(planted[:3], dtype) == 0


def test_an_empty_array_is_finite():
    assert count_nonfinite(np.empty((0, 32), np.float32), "F32") == 0
    assert zero_nonfinite(np.empty((0, 32), np.uint16), "BF16") == 0
