"""NF4 and FP4: every byte, and every decoded value, against bitsandbytes."""

import os
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _get_4bit_quantize_bounds
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.torch import load_file

from quant.formats import nf4_kernels
from quant.formats.nf4 import (
    ASCENDING,
    BLOCKSIZES,
    DTYPES,
    QUANT_MAPS,
    Bnb4bit,
    nested_codes,
    nested_quant_map,
)

ROOT = Path(__file__).parents[2]
SHAPES = [(64, 256), (130, 65), (3, 100), (7, 33), (1, 1), (1, 64), (40, 4096)]

each_type = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
each_nesting = pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])


@pytest.fixture(autouse=True)
def one_thread():
    """Torch's mean of many numbers depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bnb_parts(stored: torch.Tensor, format: Bnb4bit) -> dict[str, np.ndarray]:
    packed, state = functional.quantize_4bit(
        stored,
        blocksize=format.blocksize,
        quant_type=format.quant_type,
        compress_statistics=format.double_quant,
    )
    parts = {"": packed, **state.as_dict(packed=True)}
    return {name: part.numpy() for name, part in parts.items()}


def to_state(parts: dict[str, np.ndarray]) -> functional.QuantState:
    tensors = {f"w.{name}": torch.from_numpy(part) for name, part in parts.items() if name}
    return functional.QuantState.from_dict(tensors, torch.device("cpu"))


def decode_by_definition(parts: dict[str, np.ndarray], shape) -> np.ndarray:
    """With bitsandbytes' scales and rounding, but not its AVX-512 code, which is wrong for some."""
    state = to_state(parts)
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    packed = torch.from_numpy(parts[""]).reshape(-1).int()
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: np.prod(shape)]
    scales = absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    return (state.code[codes] * scales).to(state.dtype).float().reshape(shape).numpy()


def assert_same_parts(parts: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(parts) == list(expected)
    for name, part in expected.items():
        assert (parts[name].dtype, parts[name].shape) == (part.dtype, part.shape), name
        wrong = np.argwhere(parts[name].view(np.uint8) != part.view(np.uint8))
        assert not len(wrong), f"{name}: {len(wrong)} bytes differ, first at {wrong[0]}"


def assert_equals_bnb(w: np.ndarray, dtype: str, format: Bnb4bit) -> None:
    stored = torch.from_numpy(np.ascontiguousarray(w, np.float32)).to(getattr(torch, dtype))
    w = stored.float().numpy()
    parts = format.encode(w, dtype)
    assert_same_parts(parts, bnb_parts(stored, format))
    decoded = format.decode(parts, w.shape)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, decode_by_definition(parts, w.shape))


def zero_blocks(rng, shape):
    w = rng.standard_normal(shape) * 0.02
    w.reshape(-1)[: w.size // 3] = 0
    return w


def one_outlier(rng, shape):
    w = rng.standard_normal(shape) * 0.02
    w[0, -1] = 300
    return w


def ties(rng, shape):
    """Weights at the middles between levels, and at the floats next to them."""
    bounds = _get_4bit_quantize_bounds("nf4", torch.device("cpu"))[0].numpy()
    w = rng.choice(np.concatenate([bounds, np.nextafter(bounds, np.float32(2)), [1, -1]]), shape)
    w.reshape(-1)[::32] = 1
    return w


def blocks_of_many_sizes(rng, shape):
    n = shape[0] * shape[1]
    sizes = np.exp(4 * rng.standard_normal(-(-n // 32)))
    return (rng.standard_normal(n) * np.repeat(sizes, 32)[:n] * 1e-3).reshape(shape)


CASES = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape) * 0.02,
    "heavy tails": lambda rng, shape: rng.standard_t(2, shape) * 0.02,
    "one outlier": one_outlier,
    "zeros": lambda rng, shape: np.zeros(shape),
    "zero blocks": zero_blocks,
    "constant": lambda rng, shape: np.full(shape, 0.3),
    "negative constant": lambda rng, shape: np.full(shape, -0.3),
    "ties": ties,
    "blocks of many sizes": blocks_of_many_sizes,
    "large": lambda rng, shape: rng.standard_normal(shape) * 1e4,
    "subnormal": lambda rng, shape: rng.standard_normal(shape) * 1e-40,
}


@each_type
@each_nesting
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_bytes_and_values_are_those_of_bitsandbytes(quant_type, double_quant, blocksize):
    format = Bnb4bit(quant_type, double_quant, blocksize)
    rng = np.random.default_rng(blocksize)
    for make in CASES.values():
        for i, shape in enumerate(SHAPES):
            assert_equals_bnb(make(rng, shape), DTYPES[i % len(DTYPES)], format)


@each_type
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(quant_type, dtype):
    rng = np.random.default_rng(7)
    for name, make in CASES.items():
        if (name, dtype) != ("large", "float16"):
            assert_equals_bnb(make(rng, (64, 256)), dtype, Bnb4bit(quant_type))


@settings(max_examples=150, deadline=None)
@given(
    arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, max_side=70),
        elements=st.floats(-(2.0**120), 2.0**120, width=32),
    ),
    st.sampled_from(["nf4", "fp4"]),
    st.booleans(),
    st.sampled_from([32, 64, 128]),
)
def test_any_finite_weights(w, quant_type, double_quant, blocksize):
    format = Bnb4bit(quant_type, double_quant, blocksize)
    assert_same_parts(format.encode(w, "float32"), bnb_parts(torch.from_numpy(w), format))


@each_type
def test_trained_weights(quant_type, tiny_qwq):
    weights = load_file(tiny_qwq / "model.safetensors")
    names = [name for name in weights if name.endswith("proj.weight")]
    assert len(names) > 20
    for name in names[::5]:
        assert_equals_bnb(weights[name].float().numpy(), "bfloat16", Bnb4bit(quant_type))


def test_a_large_weight():
    """From 32768 blocks on torch may add in threads."""
    rng = np.random.default_rng(0)
    assert_equals_bnb(rng.standard_normal((600, 4096)), "bfloat16", Bnb4bit())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_tables(quant_type):
    ours = QUANT_MAPS[quant_type]
    np.testing.assert_array_equal(ours, functional.get_4bit_type(quant_type, device="cpu").numpy())
    _, order = _get_4bit_quantize_bounds(quant_type, torch.device("cpu"))
    np.testing.assert_array_equal(ASCENDING[quant_type], order.numpy())


def test_nested_table():
    np.testing.assert_array_equal(nested_quant_map(), functional.create_dynamic_map().numpy())


def test_mean_is_torchs_to_the_last_bit():
    rng = np.random.default_rng(0)
    sizes = [*range(1, 100), *(2**k + d for k in range(8, 21) for d in (-1, 0, 1, 33))]
    sizes += [int(n) for n in np.exp(rng.uniform(5, 14, 50))]
    sizes += [2**24 + 12345, 2**24 + 2**19 + 7]  # over 2^19 rows of 32: longer runs a level
    for n in sizes:
        values = np.abs(np.random.default_rng(0).standard_normal(n, np.float32)) ** 3
        assert nf4_kernels.mean(values) == torch.from_numpy(values).mean().item(), n


def test_nested_codes_are_bitsandbytes_own():
    """Every step, and the smallest numbers, whose reciprocal is infinite."""
    rng = np.random.default_rng(0)
    steps = np.linspace(-1, 1, 2**18 + 1, dtype=np.float32)[: 2**18]
    near = np.nextafter(steps, np.float32(2))
    tiny = (rng.integers(-9, 10, 2**12) * 1e-40).astype(np.float32)
    steps[::256] = near[::256] = 1  # so that each is divided by 1
    for values in (steps, near, tiny, tiny[-77:], np.zeros(300, np.float32)):
        codes, state = functional.quantize_blockwise(torch.from_numpy(values), blocksize=256)
        ours, absmax = np.empty(values.size, np.uint8), np.empty(-(-values.size // 256), np.float32)
        nf4_kernels.encode_nested(values, 256, nested_codes(), absmax, ours)
        np.testing.assert_array_equal(ours, codes.numpy())
        np.testing.assert_array_equal(absmax, state.absmax.numpy())


@each_type
@each_nesting
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_dequantizes_to_the_same(quant_type, double_quant, dtype):
    """Its own compiled decoder, where that is right: rows of whole blocks, no subnormal bf16."""
    rng = np.random.default_rng(3)
    for blocksize in BLOCKSIZES[:6]:
        for search in (False, True):
            format = Bnb4bit(quant_type, double_quant, blocksize, search)
            w = rng.standard_t(4, (16, 2048)).astype(np.float32)
            parts = format.encode(w, dtype)
            theirs = functional.dequantize_4bit(torch.from_numpy(parts[""]), to_state(parts))
            ours = format.decode(parts, w.shape)
            np.testing.assert_array_equal(ours, theirs.float().numpy())


# --- sizes, streams, threads ----------------------------------------------------------------------


@each_type
@each_nesting
def test_sizes_are_known_before(quant_type, double_quant):
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        for scale in (1e-39, 1e-7, 1e-3, 1, 1234567):
            format = Bnb4bit(quant_type, double_quant, 64)
            w = (rng.standard_normal(shape) * scale).astype(np.float32)
            parts = format.encode(w, "bfloat16")
            found = {name: part.nbytes for name, part in parts.items()}
            planned = format.parts_nbytes(shape)
            state = f"quant_state.bitsandbytes__{quant_type}"
            assert 0 <= planned[state] - found[state] <= 20
            assert {**planned, state: 0} == {**found, state: 0}
            assert format.nbytes(shape) == sum(planned.values())
            for name, (dtype, part_shape) in format.parts(shape).items():
                assert parts[name].dtype == {"U8": np.uint8, "F32": np.float32}[dtype]
                assert parts[name].shape == part_shape or name == state


def test_bits_per_weight():
    """dynamic4bit.md 2.1: 4.127 bits with double quantization, 4.5 without."""
    shape = (5120, 27648)
    assert 8 * Bnb4bit().nbytes(shape) / np.prod(shape) == pytest.approx(4.127, abs=5e-4)
    nbytes = Bnb4bit(double_quant=False).nbytes(shape)
    assert 8 * nbytes / np.prod(shape) == pytest.approx(4.5, abs=5e-4)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("shape", [(3000, 1000), (2100, 999), (130, 6001)])
def test_rows_in_threads_give_the_same_bytes(shape, search, monkeypatch):
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape).astype(np.float32)
    importance = np.exp(rng.standard_normal(shape[1])).astype(np.float32)
    format = Bnb4bit(search_scales=search)
    monkeypatch.setattr("quant.formats.nf4.WEIGHTS_AT_ONCE", 2**40)
    at_once = format.encode(w, "bfloat16", importance)
    monkeypatch.setattr("quant.formats.nf4.WEIGHTS_AT_ONCE", 2**18)
    reads = []

    def read_rows(start, stop):
        reads.append((start, stop))
        return w[start:stop].copy()

    with ThreadPoolExecutor(4) as pool:
        streamed = format.encode_rows(read_rows, shape, "bfloat16", importance, pool.map)
    assert_same_parts(streamed, at_once)
    assert len(reads) > 1 + search


def test_a_large_weight_is_never_in_memory_as_a_whole():
    rows, columns = 4096, 4096
    halves = np.random.default_rng(0).integers(0x3C00, 0x3E00, (rows, columns), np.uint16)
    format = Bnb4bit(search_scales=True)
    Bnb4bit(search_scales=True).encode(np.ones((64, 64), np.float32), "bfloat16")  # compiles

    def read_rows(start, stop):
        return (halves[start:stop].astype(np.uint32) << 16).view(np.float32)

    tracemalloc.start()
    format.encode_rows(read_rows, halves.shape, "bfloat16")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.8 * halves.nbytes


def test_many_tensors_at_once():
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((64, 512)).astype(np.float32) for _ in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for w, parts in zip(
            weights, pool.map(lambda w: Bnb4bit().encode(w, "float32"), weights), strict=True
        ):
            assert_same_parts(parts, Bnb4bit().encode(w, "float32"))


def test_an_error_while_reading_is_raised():
    def read_rows(start, stop):
        raise OSError("the disk is gone")

    with ThreadPoolExecutor(2) as pool, pytest.raises(OSError, match="disk is gone"):
        Bnb4bit().encode_rows(read_rows, (64, 64), "bfloat16", None, pool.map)


# --- the search -----------------------------------------------------------------------------------


def error(w, format, importance=None) -> float:
    diff = format.decode(format.encode(w, "float32", importance), w.shape) - w
    return float((diff.astype(np.float64) ** 2 * (1 if importance is None else importance)).sum())


def best_error(w, format) -> float:
    """The least error with any scale of 700, block by block, each weight at its nearest level."""
    levels = np.sort(QUANT_MAPS[format.quant_type])
    blocks = w.reshape(-1, format.blocksize)
    absmax = np.abs(blocks).max(1, keepdims=True)
    best = np.full(len(blocks), np.inf)
    for factor in np.linspace(0.3, 1.7, 700):
        scaled = blocks / (absmax * factor)
        nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, scaled)]
        best = np.minimum(best, ((blocks - nearest * absmax * factor) ** 2).sum(1))
    return float(best.sum())


@each_type
@each_nesting
def test_the_search_gains_what_its_docstring_says(quant_type, double_quant, tiny_qwq):
    rng = np.random.default_rng(0)
    weights = load_file(tiny_qwq / "model.safetensors")
    trained = weights["model.layers.3.mlp.down_proj.weight"].float().numpy()
    least = {"nf4": (-0.145, -0.145, -0.105), "fp4": (-0.145, -0.145, -0.13)}[quant_type]
    samples = rng.standard_normal((256, 1024)), trained, rng.standard_t(5, (256, 1024))
    for w, gain in zip(samples, least, strict=True):
        w = w.astype(np.float32)
        plain = error(w, Bnb4bit(quant_type, double_quant))
        assert error(w, Bnb4bit(quant_type, double_quant, 64, True)) / plain - 1 < gain


@each_type
def test_the_search_finds_nearly_the_best_scales(quant_type):
    rng = np.random.default_rng(0)
    for w in (rng.standard_normal((64, 512)), rng.standard_t(3, (64, 512))):
        w = w.astype(np.float32)
        format = Bnb4bit(quant_type, double_quant=False, search_scales=True)
        assert error(w, format) < 1.003 * best_error(w, format)


@each_type
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"subnormal"}))  # too coarse for any scale
def test_the_search_never_loses(quant_type, name):
    rng = np.random.default_rng(5)
    for shape in SHAPES:
        w = CASES[name](rng, shape).astype(np.float32)
        for blocksize in (32, 64, 4096):
            plain = error(w, Bnb4bit(quant_type, False, blocksize))
            most = plain * (1 + 1e-5) + 1e-9 * np.square(w.astype(np.float64)).sum()
            assert error(w, Bnb4bit(quant_type, False, blocksize, True)) <= most


@pytest.mark.parametrize("n_columns", [512, 100, 48, 2050])
def test_importance_belongs_to_its_column(n_columns):
    """The columns that matter gain; blocks here begin at any column."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((300, n_columns)).astype(np.float32)
    importance = np.where(rng.random(n_columns) < 0.1, 100, 1).astype(np.float32)
    search = Bnb4bit(search_scales=True)
    assert error(w, Bnb4bit(), importance) > 1.5 * error(w, search, importance)
    decoded = search.decode(search.encode(w, "float32", importance), w.shape)
    by_column = ((decoded - w) ** 2).mean(0)
    assert by_column[importance == 100].mean() < 0.5 * by_column[importance == 1].mean()


def test_importance_that_says_nothing_or_is_extreme():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 256)).astype(np.float32)
    search = Bnb4bit(search_scales=True)
    plain = search.encode(w, "float32")
    for value in (0, 1e-30, 1, 1e15):  # alike everywhere: as if there were none
        assert_same_parts(search.encode(w, "float32", np.full(256, value, np.float32)), plain)
    importance = np.zeros(256, np.float32)
    importance[::64] = 1e15
    assert np.isfinite(search.decode(search.encode(w, "float32", importance), w.shape)).all()


def test_codes_are_nearest_under_the_stored_scale():
    w = np.random.default_rng(0).standard_t(3, (128, 512)).astype(np.float32)
    format = Bnb4bit(search_scales=True)
    parts = format.encode(w, "float32")
    state = to_state(parts)
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    choices = scales.numpy()[:, None, None] * QUANT_MAPS["nf4"]
    blocks = w.reshape(-1, 64)
    least = np.abs(blocks[:, :, None] - choices).min(2)
    ours = np.abs(format.decode(parts, w.shape).reshape(-1, 64) - blocks)
    np.testing.assert_allclose(ours, least, rtol=0, atol=1e-6)


# --- what is refused ------------------------------------------------------------------------------


def test_wrong_arguments_are_refused():
    w = np.ones((4, 64), np.float32)
    for wrong in ({"quant_type": "int4"}, {"blocksize": 16}, {"blocksize": 96}):
        with pytest.raises(ValueError, match="must be"):
            Bnb4bit(**wrong)
    with pytest.raises(ValueError, match="dtype must be"):
        Bnb4bit().encode(w, "float64")
    with pytest.raises(ValueError, match="weights must be float32"):
        Bnb4bit().encode(w.astype(np.float64), "float32")
    with pytest.raises(ValueError, match="importance must be"):
        Bnb4bit().encode_rows(lambda a, b: w[a:b], w.shape, "float32", np.ones(63, np.float32))
    with pytest.raises(ValueError, match="rows 0:4"):
        Bnb4bit().encode_rows(lambda a, b: w[:1], w.shape, "float32")


def test_parts_of_another_shape_are_refused():
    parts = Bnb4bit().encode(np.ones((4, 64), np.float32), "float32")
    with pytest.raises(ValueError, match="parts of"):
        Bnb4bit().decode(parts, (4, 128))
    with pytest.raises(ValueError, match="parts of"):
        Bnb4bit("fp4").decode(parts, (4, 64))
    with pytest.raises(ValueError, match="parts of"):
        Bnb4bit().decode({**parts, "quant_map": parts["quant_map"][:8]}, (4, 64))


def test_arguments_are_not_changed():
    w = np.random.default_rng(0).standard_normal((3, 100)).astype(np.float32)
    importance = np.ones(100, np.float32)
    for array in (w, importance):
        array.flags.writeable = False
    before = w.copy()
    Bnb4bit(search_scales=True).encode(w, "float32", importance)
    np.testing.assert_array_equal(w, before)


def test_neither_torch_nor_numba_is_imported():
    code = """
import sys
from quant.formats.nf4 import Bnb4bit
Bnb4bit().nbytes((64, 64))
assert not {"torch", "numba", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ)
