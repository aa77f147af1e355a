"""The GPTQ format against AutoGPTQ's pack() and forward(), written down plainly in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.formats.format import Float16Overflow
from quant.formats.gptq import WHOLE_ROW, Gptq

SHAPE = (32, 96)
ALL = [
    Gptq(bits, group_size, symmetric)
    for bits in (4, 8)
    for group_size in (32, 96, WHOLE_ROW)
    for symmetric in (True, False)
]


def weight(format: Gptq, shape=SHAPE, seed=0):
    """Random codes, scales and zero points: Q, scale, zero."""
    rng = np.random.default_rng(seed)
    rows, columns = shape
    n_groups = columns // format.columns_of_group(columns)
    Q = rng.integers(0, 2**format.bits, shape, np.uint8)
    scale = rng.uniform(1e-4, 0.1, (n_groups, rows)).astype(np.float16).astype(np.float32)
    zero = np.full(scale.shape, 2 ** (format.bits - 1), np.float32)
    if not format.symmetric:
        zero = rng.integers(0, 2**format.bits, scale.shape).astype(np.float32)
    return Q, scale, zero


def autogptq_pack(W, scales, zeros, group_size, bits, offset):
    """W float64 (rows, columns) already on the grid; scales, zeros (rows, n_groups).

    # ref: AutoGPTQ 0.7.1, nn_modules/qlinear/qlinear_cuda_old.py, pack
    """
    rows, columns = W.shape
    g_idx = [j // group_size for j in range(columns)]
    scales, zeros = scales.T, zeros.T
    scale_zeros = zeros * scales
    intweight = [
        np.round((W[:, j] + scale_zeros[g_idx[j]]) / scales[g_idx[j]]) for j in range(columns)
    ]
    k = 32 // bits
    qweight = [[0] * rows for _ in range(columns // k)]
    for i in range(columns):
        for row in range(rows):
            qweight[i // k][row] |= int(intweight[i][row]) << bits * (i % k)
    qzeros = [[0] * (rows // k) for _ in scales]
    for group, line in enumerate(zeros):
        for row, zero in enumerate(line):
            qzeros[group][row // k] |= (int(zero) - offset) << bits * (row % k)
    as_int32 = [np.array(words, np.uint64).astype(np.uint32).view(np.int32) for words in (
        qweight, qzeros)]  # fmt: skip
    return *as_int32, np.array(g_idx, np.int32)


def autogptq_weight(parts, bits, offset):
    """# ref: the same, forward: what x is multiplied by, (rows, columns), float64"""
    shifts = np.arange(0, 32, bits)
    mask = 2**bits - 1
    zeros = (parts["qzeros"].astype(np.int64)[:, :, None] >> shifts) & mask
    zeros = zeros.reshape(len(zeros), -1) + offset
    codes = (parts["qweight"].astype(np.int64)[:, None, :] >> shifts[:, None]) & mask
    codes = codes.reshape(-1, codes.shape[-1])
    group = parts["g_idx"]
    return (parts["scales"].astype(np.float64)[group] * (codes - zeros[group])).T


@pytest.mark.parametrize("format", ALL, ids=str)
def test_packing_is_autogptqs(format):
    Q, scale, zero = weight(format)
    group_size = format.columns_of_group(SHAPE[1])
    scales, zeros = scale.T.astype(np.float64), zero.T
    W = (Q - zeros.repeat(group_size, 1)) * scales.repeat(group_size, 1)
    offset = 1 if format.checkpoint_format == "gptq" else 0
    parts = format.encode(Q, scale, zero)
    expected = autogptq_pack(W, scales, zeros, group_size, format.bits, offset)
    for suffix, words in zip(("qweight", "qzeros", "g_idx"), expected, strict=True):
        np.testing.assert_array_equal(parts[suffix], words)
    np.testing.assert_array_equal(parts["scales"], scale)


@pytest.mark.parametrize("format", ALL, ids=str)
def test_decoding_is_autogptqs(format):
    parts = format.encode(*weight(format))
    offset = 1 if format.checkpoint_format == "gptq" else 0
    expected = autogptq_weight(parts, format.bits, offset)
    w = format.decode(parts, SHAPE)
    assert w.dtype == np.float32 and w.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(w, expected.astype(np.float32))


@pytest.mark.parametrize("format", ALL, ids=str)
def test_parts_are_as_planned(format):
    parts = format.encode(*weight(format))
    names = {"I32": np.int32, "F16": np.float16}
    planned = format.parts(SHAPE)
    assert list(parts) == list(planned)
    for suffix, (dtype, shape) in planned.items():
        assert (parts[suffix].dtype, parts[suffix].shape) == (names[dtype], shape)
        assert parts[suffix].flags["C_CONTIGUOUS"]
    assert format.nbytes(SHAPE) == sum(part.nbytes for part in parts.values())


def test_symmetric_zero_points_are_stored_less_one():
    assert (Gptq(4, 32).encode(*weight(Gptq(4, 32)))["qzeros"] == 0x77777777).all()
    assert (Gptq(8, 32).encode(*weight(Gptq(8, 32)))["qzeros"] == 0x7F7F7F7F).all()


def test_bits_per_weight():
    shape = (5120, 27648)
    assert 8 * Gptq().nbytes(shape) / (shape[0] * shape[1]) == pytest.approx(4.1625, abs=0.001)
    assert 8 * Gptq(8).nbytes(shape) / (shape[0] * shape[1]) == pytest.approx(8.194, abs=0.001)


@given(st.sampled_from(ALL), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_there_and_back(format, rows, columns, seed):
    shape = (8 * rows, 96 * columns)
    Q, scale, zero = weight(format, shape, seed)
    size = format.columns_of_group(shape[1])
    expected = (Q - zero.T.repeat(size, 1)) * scale.T.repeat(size, 1)
    np.testing.assert_array_equal(format.decode(format.encode(Q, scale, zero), shape), expected)


def test_columns_in_another_order_are_decoded_too():
    """desc_act=true, which we never write."""
    format = Gptq(4, 32)
    Q, scale, zero = weight(format)
    parts = format.encode(Q, scale, zero)
    parts["g_idx"] = parts["g_idx"][::-1].copy()
    expected = (Q - zero.T.repeat(32, 1)) * scale.T.repeat(32, 1)[:, ::-1]
    np.testing.assert_array_equal(format.decode(parts, SHAPE), expected)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="bits"):
        Gptq(3)
    with pytest.raises(ValueError, match="group_size"):
        Gptq(4, 0)
    assert Gptq(4, 128).misfit((32, 96)) == "groups of 128 do not divide its rows of 96 weights"
    assert "words of 8" in Gptq(4, 6).misfit((32, 12))
    assert "words of 4" in Gptq(8, WHOLE_ROW).misfit((30, 96))
    with pytest.raises(ValueError, match="groups of 128"):
        Gptq(4, 128).parts((32, 96))
    format = Gptq(4, 32)
    Q, scale, zero = weight(format)
    with pytest.raises(ValueError, match="scales of"):
        format.encode(Q, scale[:2], zero)
    with pytest.raises(ValueError, match="4 bits"):
        format.encode(Q + 16, scale, zero)
    with pytest.raises(ValueError, match="4 bits"):
        format.encode(Q, scale, 0 * zero)
    with pytest.raises(Float16Overflow):
        format.encode(Q, scale * 1e6, zero)


def test_damaged_parts():
    format = Gptq(4, 32)
    parts = format.encode(*weight(format))
    for change in (
        {"g_idx": parts["g_idx"] + 1},
        {"g_idx": parts["g_idx"] - 1},
        {"scales": parts["scales"][:2]},
        {"qweight": parts["qweight"].astype(np.int64)},
        {"qzeros": parts["qzeros"].T},
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            format.decode({**parts, **change}, SHAPE)
    del parts["g_idx"]
    with pytest.raises(ValueError, match="g_idx is missing"):
        format.decode(parts, SHAPE)
