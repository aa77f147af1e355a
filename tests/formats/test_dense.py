"""F32, F16, BF16: bytes against ggml's own, values against gguf-py's decoder."""

import numpy as np
import pytest
from ggml_oracle import quantize

from quant.formats import FORMATS, Float16Overflow
from quant.formats.dense import DENSE

EVERY_HALF = np.arange(1 << 16, dtype=np.uint16)


def around(values: np.ndarray) -> np.ndarray:
    """The values, the midpoints between neighbours, and the floats next to each; one row."""
    values = np.unique(values[np.isfinite(values)])
    with np.errstate(over="ignore"):
        middles = values[:-1] + (values[1:] - values[:-1]) / np.float32(2)
        points = np.concatenate([values, middles])
        up, down = (np.nextafter(points, np.float32(side)) for side in (np.inf, -np.inf))
    near = np.concatenate([points, up, down])
    return near[np.isfinite(near)].astype(np.float32)[None]


def decoded(format, encoded: np.ndarray, w: np.ndarray) -> np.ndarray:
    return format.decode({"": encoded}, w.shape)


@pytest.mark.parametrize("format", DENSE, ids=lambda f: f.name)
def test_gaussian_rows_equal_ggml(format):
    w = np.random.default_rng(0).standard_normal((5, 37), np.float32)
    encoded = format.encode(w)[""]
    assert encoded.dtype == np.uint8 and encoded.nbytes == format.nbytes(w.shape)
    assert np.array_equal(encoded, quantize(format.ggml_type, w))
    assert np.abs(decoded(format, encoded, w) - w).max() <= np.abs(w).max() / 256
    assert np.array_equal(format.encode(w, np.ones(37, np.float32))[""], encoded)


def test_f32_is_stored_as_it_is():
    w = np.random.default_rng(0).integers(0, 1 << 32, (8, 64), np.uint32).view(np.float32)
    assert np.array_equal(FORMATS["F32"].encode(w)[""], w.view(np.uint8))


def test_f16_rounds_every_neighbourhood_as_ggml_does():
    w = around(EVERY_HALF.view(np.float16).astype(np.float32))
    w = w[:, np.abs(w[0]) < 65520]
    encoded = FORMATS["F16"].encode(w)[""]
    assert np.array_equal(encoded, quantize(1, w))
    assert np.array_equal(encoded.view(np.float16), w.astype(np.float16))


def test_bf16_rounds_every_neighbourhood_as_ggml_does():
    w = around((EVERY_HALF.astype(np.uint32) << 16).view(np.float32))
    w = w[:, np.abs(w[0]) <= np.float32(3.389e38)]
    assert np.array_equal(FORMATS["BF16"].encode(w)[""], quantize(30, w))


def test_every_16_bit_value_comes_back():
    bf16 = (EVERY_HALF.astype(np.uint32) << 16).view(np.float32)[None]
    bf16 = bf16[:, ~np.isnan(bf16[0])]
    assert np.array_equal(decoded(FORMATS["BF16"], FORMATS["BF16"].encode(bf16)[""], bf16), bf16)
    f16 = EVERY_HALF.view(np.float16)
    f16 = f16[~np.isnan(f16)].astype(np.float32)[None]
    assert np.array_equal(decoded(FORMATS["F16"], FORMATS["F16"].encode(f16)[""], f16), f16)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_nan_and_infinity_stay_what_they_are(name):
    patterns = np.uint32([0x7F800000, 0xFF800000, 0x7F800001, 0xFF800001, 0x7FC00000, 0x7FFFFFFF])
    w = np.concatenate([patterns, ~np.uint32([0, 0x80000000]), np.uint32([0, 1])])
    w = w.view(np.float32)[None]
    encoded = FORMATS[name].encode(w)[""]
    assert np.array_equal(encoded, quantize(FORMATS[name].ggml_type, w))


@pytest.mark.parametrize(
    ("name", "largest", "first_beyond"),
    [("F16", 65519.996, 65520), ("BF16", *np.uint32([0x7F7F7FFF, 0x7F7F8000]).view(np.float32))],
)
def test_a_finite_weight_that_would_become_infinite_is_refused(name, largest, first_beyond):
    format = FORMATS[name]
    for sign in (1, -1):
        w = np.full((3, 40), 0.5, np.float32)
        w[1, 7] = sign * largest
        w[2, 0] = np.inf  # an infinity that was there is no overflow
        assert np.isfinite(decoded(format, format.encode(w)[""], w)[1, 7])
        w[1, 7] = sign * first_beyond
        with pytest.raises(Float16Overflow):
            format.encode(w)


@pytest.mark.parametrize("format", DENSE, ids=lambda f: f.name)
def test_only_float32_rows_are_taken(format):
    with pytest.raises(ValueError, match="float32"):
        format.encode(np.ones((2, 32), np.float64))
    with pytest.raises(ValueError, match="float32"):
        format.encode(np.ones(32, np.float32))
