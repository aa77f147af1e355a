"""Q2_K to Q6_K, TQ1_0 and TQ2_0: every byte against ggml's own encoder."""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import block_cases
import numpy as np
import pytest
from block_cases import CASES, importance_kinds
from ggml_oracle import quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file

from quant.formats import k_kernels, ternary_kernels
from quant.formats.format import Float16Overflow
from quant.formats.k_quants import K_QUANTS
from quant.formats.ternary import TERNARY

ROOT = Path(__file__).parents[2]
FORMATS = (*K_QUANTS, *TERNARY)
D_PLACES = {
    "Q2_K": slice(80, 84), "Q3_K": slice(108, 110), "Q4_K": slice(0, 4), "Q5_K": slice(0, 4),
    "Q6_K": slice(208, 210), "TQ1_0": slice(52, 54), "TQ2_0": slice(64, 66),
}  # fmt: skip
"""The bytes of d, and of dmin beside it, in a block."""

each_format = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
each_k_format = pytest.mark.parametrize("format", K_QUANTS, ids=lambda f: f.name)


def scales_of(encoded, format):
    """d of every block, and dmin where the format has one, as float16."""
    blocks = encoded.reshape(-1, format.block_nbytes)
    return np.ascontiguousarray(blocks[:, D_PLACES[format.name]]).view(np.float16)


def assert_equals_ggml(format, w, importance=None):
    block_cases.assert_equals_ggml(format, w, importance, scales_of)


# In blocks: one; fewer than LANES; more, of which the last group is not full; row by row.
SHAPES = [(1, 256), (3, 768), (13, 1024), (65, 256)]


@pytest.mark.parametrize("case", CASES)
@each_format
def test_bytes_equal_ggml(format, case):
    for seed, shape in enumerate(SHAPES):
        rng = np.random.default_rng(seed)
        w = CASES[case](rng, shape)
        for importance in importance_kinds(rng, shape[1]).values():
            assert_equals_ggml(format, w, importance)


@each_format
def test_a_million_weights_equal_ggml(format):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((512, 2048), np.float32) * np.float32(0.02)
    assert_equals_ggml(format, w)
    assert_equals_ggml(format, w, (rng.standard_normal(2048) ** 2).astype(np.float32))


FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
USUAL = st.floats(-4, 4, width=32)


@each_format
@settings(max_examples=60, deadline=None)
@given(
    w=st.sampled_from([FINITE, USUAL]).flatmap(lambda f: arrays(np.float32, (2, 256), elements=f)),
    kind=st.sampled_from(sorted(importance_kinds(np.random.default_rng(0), 256))),
)
def test_any_finite_rows_equal_ggml_or_overflow(format, w, kind):
    assert_equals_ggml(format, w, importance_kinds(np.random.default_rng(0), 256)[kind])


@each_format
def test_every_tensor_of_tiny_qwq_equals_ggml(format):
    rng = np.random.default_rng(0)
    n_tensors = 0
    for tensor in load_file(ROOT / "examples" / "tiny-qwq" / "model.safetensors").values():
        w = tensor.float().numpy()
        if w.ndim == 2 and w.shape[1] % 256 == 0:
            importance = (rng.standard_normal(w.shape[1]) ** 2).astype(np.float32)
            assert_equals_ggml(format, w)
            assert_equals_ggml(format, w, importance)
            n_tensors += 1
    assert n_tensors > 20


def test_more_bits_mean_a_smaller_error():
    w = np.random.default_rng(0).standard_normal((64, 512), np.float32)
    errors = [np.abs(f.decode(f.encode(w), w.shape) - w).mean() for f in K_QUANTS]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.3 and errors[-1] < 0.02


@each_k_format
def test_importance_moves_the_error_to_where_it_matters_less(format):
    w = np.random.default_rng(0).standard_normal((64, 256), np.float32)
    importance = np.where(np.arange(256) % 4 == 0, 100, 1).astype(np.float32)
    plain = format.decode(format.encode(w), w.shape)
    weighed = format.decode(format.encode(w, importance), w.shape)
    cost = [(importance * (w_hat - w) ** 2).sum() for w_hat in (plain, weighed)]
    assert cost[1] < 0.95 * cost[0]


@pytest.mark.parametrize("format", TERNARY, ids=lambda f: f.name)
def test_three_values_survive(format):
    w = np.random.default_rng(0).choice(np.float32([-0.25, 0, 0.25]), (33, 512))
    assert np.array_equal(format.decode(format.encode(w), w.shape), w)


@each_format
def test_a_scale_beyond_float16_is_refused(format):
    w = np.zeros((2, 512), np.float32)
    w[1, 300] = 3e9
    with pytest.raises(Float16Overflow, match=format.name):
        format.encode(w)
    with pytest.raises(Float16Overflow, match=format.name):
        format.encode(w, np.ones(512, np.float32))


@each_format
def test_row_blocks_in_four_threads_give_the_same_bytes(format):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 768), np.float32)
    importance = rng.random(768, np.float32)
    with ThreadPoolExecutor(4) as pool:
        parts = list(
            pool.map(lambda i: format.encode(w[i : i + 3], importance)[""], range(0, 64, 3))
        )
    assert np.array_equal(np.concatenate(parts), format.encode(w, importance)[""])


@each_format
def test_views_and_read_only_arrays_are_taken_by_value(format):
    w = np.random.default_rng(0).standard_normal((8, 768), np.float32)
    importance = np.arange(1, 769, dtype=np.float32)
    part = np.ascontiguousarray(w[::2, 256:768:2])
    expected = format.encode(part, importance[256:768:2].copy())[""]
    w.setflags(write=False)
    importance.setflags(write=False)
    assert np.array_equal(format.encode(w[::2, 256:768:2], importance[256:768:2])[""], expected)
    assert format.encode(w[:0])[""].shape == (0, format.row_nbytes(768))
    module = k_kernels if format in K_QUANTS else ternary_kernels
    assert len(getattr(module, f"encode_{format.name.lower()}").signatures) == 1  # compiled once


@each_format
def test_arrays_that_kernels_would_misread_are_refused(format):
    w = np.ones((2, 256), np.float32)
    with pytest.raises(ValueError, match="float32"):
        format.encode(w.astype(np.float64))
    with pytest.raises(ValueError, match="multiple"):
        format.encode(np.ones((2, 384), np.float32))
    with pytest.raises(ValueError, match="importance"):
        format.encode(w, np.ones(512, np.float32))


ON_ANOTHER_PROCESSOR = """
import sys
import numpy as np
from quant.formats.k_quants import K_QUANTS
w = np.random.default_rng(0).standard_normal((8, 1280), np.float32)
encoded = next(f for f in K_QUANTS if f.name == "Q4_K").encode(w, w[0] ** 2)[""]
sys.stdout.buffer.write(encoded.tobytes())
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names an x86 processor")
def test_an_old_processor_gives_the_same_bytes(tmp_path):
    """Compiled for the first x86-64: no AVX, no float16 conversion; numba aborts if one is used."""
    compiled_for = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    environment = os.environ | compiled_for | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", ON_ANOTHER_PROCESSOR]
    shown = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, check=True)
    w = np.random.default_rng(0).standard_normal((8, 1280), np.float32)
    assert shown.stdout == quantize(12, w, w[0] ** 2).tobytes()
