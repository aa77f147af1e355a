"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: every byte against ggml's own encoder."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import block_cases
import numpy as np
import pytest
from ggml_oracle import quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quant.formats import FORMATS, Float16Overflow
from quant.formats.dense import DENSE
from quant.formats.legacy_quants import LEGACY_QUANTS

TINY_QWQ = Path(__file__).parents[2] / "examples" / "tiny-qwq" / "model.safetensors"
WITH_MIN = ("Q4_1", "Q5_1")

each_format = pytest.mark.parametrize("format", LEGACY_QUANTS, ids=lambda f: f.name)
each_weighting = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])


def to_bf16_values(w: np.ndarray) -> np.ndarray:
    return (w.view(np.uint32) & 0xFFFF0000).view(np.float32)


def ties(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Blocks with d = 1 whose weights lie on the halves between levels, or a float beside them."""
    w = np.empty((shape[0], shape[1] // 32, 32), np.float32)
    for i, (low, high) in enumerate([(-127, 127), (-8, 8), (-16, 16), (0, 15), (0, 31), (15, 0)]):
        half = rng.integers(min(low, high), max(low, high), w[i::6].shape) + np.float32(0.5)
        beside = np.nextafter(half, rng.choice(np.float32([-99, 0, 99]), half.shape))
        block = np.where(rng.random(half.shape) < 0.5, half, beside)
        block[..., 0], block[..., 31] = low, high
        w[i::6] = block
    w[:, :, 5] = rng.choice(np.float32([0.49999997, -0.49999997, 0.5, -0.5, 0]), w.shape[:2])
    return w.reshape(shape)


def one_outlier(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    w = rng.standard_normal(shape) * 0.02
    w[rng.integers(shape[0]), rng.integers(shape[1])] = -300
    return w


def equal_extremes(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """The largest magnitude occurs with both signs: the first one decides."""
    return rng.choice([-1.0, 1.0, 0.25, -0.25], shape)


def magnitudes(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """One a block, where a d of that size has an infinite inverse or none quite yet."""
    return np.repeat(10.0 ** rng.uniform(-41, -36, (shape[0], shape[1] // 32)), 32, axis=1)


CASES = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape) * 0.02,
    "bf16 values": lambda rng, shape: to_bf16_values(rng.standard_normal(shape, np.float32)),
    "heavy tails": lambda rng, shape: rng.standard_t(2, shape),
    "one outlier": one_outlier,
    "constant": lambda rng, shape: np.full(shape, 0.37),
    "negative constant": lambda rng, shape: np.full(shape, -3.0),
    "zero": lambda rng, shape: np.zeros(shape),
    "minus zero": lambda rng, shape: np.full(shape, -0.0),
    "zeros of both signs": lambda rng, shape: rng.choice([0.0, -0.0], shape),
    "mostly zeros": lambda rng, shape: rng.choice([0.0, -0.0, 1.0], shape, p=[0.5, 0.4, 0.1]),
    "positive": lambda rng, shape: rng.random(shape) + 1,
    "negative": lambda rng, shape: -rng.random(shape),
    "equal extremes": equal_extremes,
    "ties": ties,
    "large": lambda rng, shape: rng.standard_normal(shape) * 8000,
    "d subnormal in float16": lambda rng, shape: rng.standard_normal(shape) * 1e-5,
    "d zero in float16": lambda rng, shape: rng.standard_normal(shape) * 1e-9,
    "around 1 / d = inf": lambda rng, shape: rng.standard_normal(shape) * magnitudes(rng, shape),
    "subnormal": lambda rng, shape: rng.integers(-200, 200, shape) * 2.0**-149,
    "smallest": lambda rng, shape: rng.integers(-2, 3, shape) * 2.0**-149,
}  # fmt: skip
SHAPES = [(1, 32), (1, 96), (3, 64), (33, 160), (7, 2048 + 32)]


def importance_of(rng: np.random.Generator, n_columns: int) -> np.ndarray:
    """Activations' mean squares: over many magnitudes, some columns never used."""
    importance = np.exp(rng.standard_normal(n_columns) * 2).astype(np.float32)
    importance[rng.random(n_columns) < 0.05] = 0
    return importance


def scales_of(encoded: np.ndarray, format) -> np.ndarray:
    """d of every block, and m where the format has one, as float16."""
    blocks = np.ascontiguousarray(encoded).reshape(-1, format.block_nbytes)
    n_halves = 2 if format.name in WITH_MIN else 1
    return np.ascontiguousarray(blocks[:, : 2 * n_halves]).view(np.float16)


def assert_equals_ggml(format, w, importance=None):
    block_cases.assert_equals_ggml(format, w, importance, scales_of)


@each_weighting
@pytest.mark.parametrize("case", CASES)
@each_format
def test_bytes_equal_ggml(format, case, weighted):
    for seed, shape in enumerate(SHAPES):
        rng = np.random.default_rng(seed)
        w = CASES[case](rng, shape).astype(np.float32)
        assert_equals_ggml(format, w, importance_of(rng, shape[1]) if weighted else None)


FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
USUAL = st.floats(-4, 4, width=32)


@each_weighting
@each_format
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    w=st.sampled_from([FINITE, USUAL]).flatmap(lambda f: arrays(np.float32, (2, 64), elements=f)),
    seed=st.integers(0, 99),
)
def test_any_finite_rows_equal_ggml_or_overflow(format, weighted, w, seed):
    importance = importance_of(np.random.default_rng(seed), 64) if weighted else None
    assert_equals_ggml(format, w, importance)


def tiny_qwq_tensors() -> dict[str, np.ndarray]:
    """Every tensor of the example model as float32 rows."""
    raw = TINY_QWQ.read_bytes()
    n_header = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n_header])
    header.pop("__metadata__", None)
    tensors = {}
    for name, info in header.items():
        assert info["dtype"] == "BF16"
        start, end = (8 + n_header + offset for offset in info["data_offsets"])
        bf16 = np.frombuffer(raw[start:end], np.uint16)
        w = (bf16.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = w.reshape(-1, info["shape"][-1])
    return tensors


@pytest.mark.parametrize("format", [*DENSE, *LEGACY_QUANTS], ids=lambda f: f.name)
def test_every_tensor_of_tiny_qwq_equals_ggml(format):
    tensors = {n: w for n, w in tiny_qwq_tensors().items() if w.shape[1] % format.block_size == 0}
    assert len(tensors) > 20
    for name, w in tensors.items():
        importance = importance_of(np.random.default_rng(1), w.shape[1])
        weighings = [None, importance] if format in LEGACY_QUANTS else [None]
        for weights in weighings:
            encoded = format.encode(w, weights)[""]
            assert np.array_equal(encoded, quantize(format.ggml_type, w, weights)), name


# Half a level and float16's rounding of d and m, as a part of the block's range.
LARGEST_ERROR = {"Q4_0": 1 / 8, "Q4_1": 1 / 29, "Q5_0": 1 / 16, "Q5_1": 1 / 60, "Q8_0": 1 / 250}


@each_format
def test_gguf_decodes_to_within_a_level(format):
    w = np.random.default_rng(0).standard_normal((6, 320), np.float32)
    w_hat = format.decode(format.encode(w), w.shape)
    assert w_hat.shape == w.shape and w_hat.dtype == np.float32
    blocks = w.reshape(-1, 32)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    reach = np.ptp(blocks, axis=1, keepdims=True) if format.name in WITH_MIN else largest
    error = np.abs(w_hat.reshape(-1, 32) - blocks)
    assert (error <= LARGEST_ERROR[format.name] * reach + 2e-3 * largest).all()


@each_format
def test_importance_moves_the_error_to_where_it_matters_less(format):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 256), np.float32)
    importance = np.where(np.arange(256) % 4 == 0, 100, 1).astype(np.float32)
    plain = format.decode(format.encode(w), w.shape)
    weighed = format.decode(format.encode(w, importance), w.shape)
    if format.name == "Q8_0":
        assert np.array_equal(plain, weighed)
    else:
        cost = [(importance * (w_hat - w) ** 2).sum() for w_hat in (plain, weighed)]
        assert cost[1] < 0.9 * cost[0]


@each_weighting
@each_format
def test_row_blocks_in_four_threads_give_the_same_bytes(format, weighted):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 352), np.float32)
    importance = importance_of(rng, 352) if weighted else None
    with ThreadPoolExecutor(4) as pool:
        parts = list(
            pool.map(lambda i: format.encode(w[i : i + 3], importance)[""], range(0, 64, 3))
        )
    assert np.array_equal(np.concatenate(parts), format.encode(w, importance)[""])


@each_format
def test_a_scale_beyond_float16_is_refused(format):
    levels = {"Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q8_0": 127}[format.name]
    w = np.zeros((2, 64), np.float32)
    w[1, 40] = 65519 * levels
    assert_equals_ggml(format, w)
    assert np.isfinite(format.decode(format.encode(w), w.shape)).all()
    w[1, 40] = 65521 * levels
    with pytest.raises(Float16Overflow, match=format.name):
        format.encode(w)
    w[1, 40] = 3e38
    with pytest.raises(Float16Overflow):
        format.encode(w, np.ones(64, np.float32)) if format.name != "Q8_0" else format.encode(w)


@pytest.mark.parametrize("name", WITH_MIN)
def test_a_minimum_beyond_float16_is_refused(name):
    w = np.full((1, 32), -65521, np.float32)
    with pytest.raises(Float16Overflow):
        FORMATS[name].encode(w)
    w = np.float32([[-3e38] * 16 + [3e38] * 16])  # the range itself overflows float32
    with pytest.raises(Float16Overflow):
        FORMATS[name].encode(w)


@each_format
def test_arrays_that_kernels_would_misread_are_refused(format):
    w = np.ones((2, 64), np.float32)
    with pytest.raises(ValueError, match="float32"):
        format.encode(w.astype(np.float64))
    with pytest.raises(ValueError, match="multiple"):
        format.encode(np.ones((2, 48), np.float32))
    for wrong in (np.ones(32, np.float32), np.ones(64), np.ones((1, 64), np.float32)):
        with pytest.raises(ValueError, match="importance"):
            format.encode(w, wrong)


@each_format
def test_views_are_taken_by_value(format):
    w = np.random.default_rng(0).standard_normal((8, 128), np.float32)
    importance = np.arange(1, 129, dtype=np.float32)
    expected = format.encode(np.ascontiguousarray(w[::2, 32:96]), importance[::2].copy())[""]
    assert np.array_equal(format.encode(w[::2, 32:96], importance[::2])[""], expected)
    assert format.encode(w[:0])[""].shape == (0, format.row_nbytes(128))


def test_importing_the_formats_imports_neither_numba_nor_gguf():
    code = "import sys, quant.formats; print([m for m in ('numba', 'gguf') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
