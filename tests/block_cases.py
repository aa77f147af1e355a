"""Weights that are hard for block formats, and how what is made of them is held against ggml."""

import numpy as np
import pytest
from ggml_oracle import quantize

from quant.formats.format import Float16Overflow


def assert_equals_ggml(format, w, importance, scales_of):
    """Byte equality; where ggml stores an infinite or NaN scale, Float16Overflow.

    scales_of: (encoded, format) -> the scales in it, float16.
    """
    w = np.ascontiguousarray(w, np.float32)
    expected = quantize(format.ggml_type, w, importance)
    if np.isfinite(scales_of(expected, format)).all():
        encoded = format.encode(w, importance)[""]
        assert encoded.dtype == np.uint8 and encoded.shape == expected.shape
        wrong = np.argwhere(encoded != expected)
        assert not len(wrong), f"{len(wrong)} bytes differ, first at {wrong[0]}"
    else:
        with pytest.raises(Float16Overflow):
            format.encode(w, importance)


def one_outlier(rng, shape):
    w = rng.standard_normal(shape) * 0.02
    w[0, 100] = 300
    return w


def sub_block_sizes(rng, shape):
    """Sub-blocks of very different magnitude: the stored scale of many is zero."""
    sizes = np.exp(rng.standard_normal((shape[0], shape[1] // 16)) * 4)
    return rng.standard_normal(shape) * np.repeat(sizes, 16, axis=1) * 1e-3


def outlier_columns(rng, shape):
    """Every seventh column is a million times larger; see also importance "none of outliers"."""
    w = rng.standard_normal(shape) * 1e-5
    w[:, ::7] *= 1e6
    return w


CASES = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape) * 0.02,
    "bf16 values": lambda rng, shape: (
        rng.standard_normal(shape, np.float32).view(np.uint32) & 0xFFFF0000
    ).view(np.float32),
    "heavy tails": lambda rng, shape: rng.standard_t(2, shape) * 0.02,
    "one outlier": one_outlier,
    "outlier columns": outlier_columns,
    "sub-blocks of many sizes": sub_block_sizes,
    "weights of many sizes": lambda rng, shape: (
        rng.standard_normal(shape) * np.exp(rng.standard_normal(shape) * 3)
    ),
    "constant": lambda rng, shape: np.full(shape, 0.37),
    "negative constant": lambda rng, shape: np.full(shape, -3.0),
    "zero": lambda rng, shape: np.zeros(shape),
    "zeros of both signs": lambda rng, shape: rng.choice([0.0, -0.0], shape),
    "mostly zero": lambda rng, shape: rng.standard_normal(shape) * (rng.random(shape) < 0.03),
    "half zero blocks": lambda rng, shape: (
        rng.standard_normal(shape) * (np.arange(shape[1]) // 16 % 2)
    ),
    "few values": lambda rng, shape: rng.integers(-2, 3, shape),
    "signs": lambda rng, shape: rng.choice([-1.0, 1.0], shape),
    "positive": lambda rng, shape: np.abs(rng.standard_normal(shape)),
    "negative": lambda rng, shape: -np.abs(rng.standard_normal(shape)),
    "far above zero": lambda rng, shape: 5 + rng.standard_normal(shape) * 1e-3,
    "far below zero": lambda rng, shape: -5 + rng.standard_normal(shape) * 1e-6,
    "large": lambda rng, shape: rng.standard_normal(shape) * 3000,
    "too large": lambda rng, shape: rng.standard_normal(shape) * 1e9,
    "d subnormal in float16": lambda rng, shape: rng.standard_normal(shape) * 1e-6,
    "d zero in float16": lambda rng, shape: rng.standard_normal(shape) * 1e-9,
    "squares subnormal": lambda rng, shape: rng.standard_normal(shape) * 1e-20,
    "around 1e-15": lambda rng, shape: rng.standard_normal(shape) * 1e-15,
    "subnormal": lambda rng, shape: rng.standard_normal(shape) * 1e-39,
    "smallest": lambda rng, shape: rng.integers(-2, 3, shape) * 2.0**-149,
}


def importance_kinds(rng, n_columns) -> dict:
    importance = {
        "none": None,
        "ones": np.ones(n_columns),
        "zeros": np.zeros(n_columns),
        "uniform": rng.random(n_columns),
        "uneven": np.exp(rng.standard_normal(n_columns) * 4),
        "mostly zero": rng.random(n_columns) * (rng.random(n_columns) < 0.1),
        "none of outliers": rng.random(n_columns) * (np.arange(n_columns) % 7 > 0),
        "minute": rng.random(n_columns) * 1e-35,
        "enormous": rng.random(n_columns) * 1e30,
    }
    return {k: None if v is None else v.astype(np.float32) for k, v in importance.items()}
