"""Decode attention over int8: torch's own attention in float64; the Triton kernel interpreted."""

import itertools
from dataclasses import replace
from math import ceil

import pytest
import torch
import torch.nn.functional as F
from qwq_kernels.decode_attention import CASES, TOLERANCE, decode_attention, reference
from qwq_kernels.kv_int8 import ChannelScales, QuantizedKV, allocate, append, reference_dequantize

# NumPy, interpreting: the lowest float32 of a mask, in binary orders, is -infinity, as it should be
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")


def make(batch, heads, group, n_queries, length, size, dtype=torch.float32, bits=8, ranged=False):
    """Queries and a cache whose buffers are longer than what is stored."""
    generator = torch.Generator().manual_seed(length)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    channels = None
    if ranged:
        spread = torch.rand(heads, size, generator=generator) * 0.9 + 0.1
        channels = ChannelScales(randn(heads, size), spread)
    k, v = randn(batch, heads, length, size), randn(batch, heads, length, size)
    k[0, 0, length // 2] *= 5  # an outlier
    v[0, 0, 1 : length // 3] = 0
    kv = allocate(batch, heads, length + 21, size, size, value_bits=bits, channels=channels)
    a = randn(batch, n_queries, heads * group, size).to(dtype).transpose(1, 2)
    return a, append(kv, k, v), v.abs().max().item()


def masks(batch, n_heads, n_queries, length):
    """None, left padding, booleans for every query, numbers for every head and query."""
    generator = torch.Generator().manual_seed(0)
    padding = torch.arange(length)[None] >= 3 * torch.arange(batch)[:, None]
    free = torch.rand(batch, 1, n_queries, length, generator=generator) > 0.3
    free[..., 0] = True
    bias = torch.randn(1, n_heads, n_queries, length, generator=generator)
    bias[..., length // 2 + 1 :: 3] = torch.finfo(torch.float32).min
    return {"none": None, "padding": padding, "booleans": free, "numbers": bias}


def sdpa(a, kv: QuantizedKV, mask, scaling) -> torch.Tensor:
    """torch's attention in float64 over the dequantized cache."""
    n, length = a.shape[2], kv.length
    k = reference_dequantize(
        kv.k[:, :, :length], kv.k_scale[..., :length], torch.float64, kv.channels
    )
    v = reference_dequantize(kv.v[:, :, :length], kv.v_scale[..., :length], torch.float64)
    causal = torch.ones(n, length, dtype=torch.bool).tril(length - n)[None, None]
    if mask is None:
        mask = causal
    elif mask.ndim == 2:
        mask = mask[:, None, None] & causal
    mask = mask if mask.dtype == torch.bool else mask.double()
    group = a.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(a.double(), k, v, mask, scale=scaling)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["none", "padding", "booleans", "numbers"])
def test_reference_is_torchs_attention(case, kind):
    a, kv, _ = make(*case, ranged=True)
    mask = masks(case[0], a.shape[1], case[3], case[4])[kind]
    expected = sdpa(a, kv, mask, 0.1)
    out = reference(a.double(), kv, mask, 0.1, torch.float64)
    assert (out - expected).abs().max() < 1e-9
    assert (decode_attention(a, kv, mask, 0.1) - expected).abs().max() < 2e-4


SETTINGS = [  # every case once with each mask, some with the other options
    (case, kind, dtype, bits, ranged, n_splits)
    for i, (case, kind) in enumerate(
        itertools.product(CASES, ["none", "padding", "booleans", "numbers"])
    )
    for dtype, bits, ranged, n_splits in [
        [
            (torch.float32, 8, False, 1),
            (torch.float16, 8, True, 3),
            (torch.bfloat16, 4 if case[5] >= 64 and case[5] % 32 == 0 else 8, False, 2),
        ][i % 3]
    ]
]


@pytest.mark.parametrize(("case", "kind", "dtype", "bits", "ranged", "n_splits"), SETTINGS)
def test_kernel_agrees_with_reference(
    interpreter, poisoned_memory, case, kind, dtype, bits, ranged, n_splits
):
    _, kernels = interpreter
    a, kv, largest = make(*case, dtype=dtype, bits=bits, ranged=ranged)
    mask = masks(case[0], a.shape[1], case[3], case[4])[kind]
    config = kernels.Config(32, 4, 2, 1)
    out = kernels.decode_attention(a, kv, mask, 0.1, config=config, n_splits=n_splits)
    assert out.dtype == dtype and out.shape == a.shape
    assert out.transpose(1, 2).is_contiguous()
    expected = reference(a.double(), kv, mask, 0.1, torch.float64)
    assert (out.double() - expected).abs().max() < TOLERANCE[dtype] * largest


SIZES = [  # head size, bits of V, batch, heads, group, n_queries, mask, channel scales, splits
    (32, 8, 2, 1, 3, 3, "booleans", False, 1),
    (48, 8, 3, 2, 3, 1, "padding", True, 2),
    (80, 8, 2, 1, 3, 4, "none", True, 2),  # 12 rows: 16 at once; 64 + 32 channels
    (80, 8, 1, 1, 2, 16, "numbers", False, 1),
    (64, 4, 2, 1, 5, 2, "padding", True, 2),  # a quarter row of V is 16 channels
    (96, 4, 2, 1, 5, 3, "padding", False, 2),  # 48 bytes of V in a tile of 64
    (112, 8, 2, 2, 7, 1, "padding", False, 1),
    (144, 8, 1, 1, 2, 5, "booleans", True, 2),
    (160, 4, 2, 1, 4, 2, "padding", True, 2),  # V's 80 bytes in 64 + 32
    (160, 8, 1, 1, 1, 16, "none", False, 1),
    (192, 4, 1, 1, 16, 1, "numbers", False, 2),
    (256, 8, 2, 1, 2, 7, "padding", True, 2),
    (256, 4, 1, 1, 8, 1, "padding", True, 1),
]


@pytest.mark.parametrize("setting", SIZES)
def test_any_head_size(interpreter, poisoned_memory, setting):
    """63 tokens, tiles of 16, of which the loop without checks takes some; twice the same bits."""
    _, kernels = interpreter
    size, bits, batch, heads, group, n_queries, kind, ranged, n_splits = setting
    a, kv, largest = make(batch, heads, group, n_queries, 63, size, bits=bits, ranged=ranged)
    mask = masks(batch, heads * group, n_queries, 63)[kind]
    config = replace(kernels.config_of(size), block_n=16)
    outs = [
        kernels.decode_attention(a, kv, mask, 0.1, config=config, n_splits=n_splits)
        for _ in range(2)
    ]
    assert torch.equal(*outs)
    expected = reference(a.double(), kv, mask, 0.1, torch.float64)
    assert (outs[0].double() - expected).abs().max() < TOLERANCE[torch.float32] * largest


def test_two_tiles_hold_every_row(interpreter):
    _, kernels = interpreter
    for n_bytes in range(16, 257, 16):
        first, rest = kernels.tiles_of(n_bytes)
        assert first >= 32 and first + rest >= n_bytes and rest < first
        assert first == 32 or (first + rest) <= 4 / 3 * n_bytes, n_bytes  # little is empty
    assert kernels.tiles_of(80) == (64, 32) and kernels.tiles_of(128) == (128, 0)


def test_a_row_far_smaller_than_its_neighbours_is_right(interpreter):
    """The rows of a program share the power of two that brings them into float16's range."""
    _, kernels = interpreter
    a, kv, largest = make(1, 1, 4, 1, 60, 64)
    a = a * torch.tensor([1.0, 1e-3, 1e-6, 0.0])[None, :, None, None]
    out = kernels.decode_attention(a, kv, None, 1.0)
    expected = reference(a.double(), kv, None, 1.0, torch.float64)
    assert (out - expected).abs().max() < TOLERANCE[torch.float32] * largest


@pytest.mark.parametrize("size", [64, 80, 128])
def test_kernel_as_it_is_launched(interpreter, size):
    """With the tiles of CONFIGS, left padding, drafts, several row blocks, a batch of 3."""
    _, kernels = interpreter
    a, kv, largest = make(3, 2, 5, 4, 263, size)
    mask = masks(3, 10, 4, 263)["padding"]
    out = kernels.decode_attention(a, kv, mask, 0.1)
    expected = reference(a.double(), kv, mask, 0.1, torch.float64)
    assert (out.double() - expected).abs().max() < TOLERANCE[torch.float32] * largest


def test_what_is_hidden_may_be_nan(interpreter, poisoned_memory):
    _, kernels = interpreter
    a, kv, _ = make(2, 1, 2, 1, 40, 64)
    for scale in (kv.k_scale, kv.v_scale):
        scale[1, ..., :5] = torch.nan
    padding = torch.ones(2, 40, dtype=torch.bool)
    padding[1, :5] = False
    for out in (
        kernels.decode_attention(a, kv, padding, 0.1, n_splits=1),
        decode_attention(a, kv, padding, 0.1),
    ):
        assert out.isfinite().all()
        assert kernels.decode_attention(a, kv, None, 0.1)[1].isnan().all()  # and seen, it is seen


@pytest.mark.parametrize("n_splits", [1, 3])
def test_a_query_that_sees_nothing_gives_zeros(interpreter, n_splits):
    _, kernels = interpreter
    a, kv, _ = make(2, 1, 2, 1, 100, 64)
    hidden = torch.ones(2, 100, dtype=torch.bool)
    hidden[0] = False
    config = kernels.Config(32, 4, 2, 1)
    out = kernels.decode_attention(a, kv, hidden, 0.1, config=config, n_splits=n_splits)
    assert (out[0] == 0).all() and (out[1] != 0).all()
    assert torch.equal(decode_attention(a, kv, hidden, 0.1)[0], out[0])


@pytest.mark.parametrize("size_of_v", [1e-9, 1e-4, 1e6])
@pytest.mark.parametrize("size_of_a", [1e-6, 1.0, 1e5])
def test_sizes_beyond_float16(interpreter, size_of_v, size_of_a):
    _, kernels = interpreter
    a, kv, largest = make(1, 1, 4, 1, 60, 64)
    kv.v_scale.mul_(size_of_v)
    kv.v_scale[..., 7] *= 1e-5  # an attention sink: seen by all, worth nothing
    scaling = 0.1 / size_of_a
    out = kernels.decode_attention(a * size_of_a, kv, None, scaling)
    expected = reference((a * size_of_a).double(), kv, None, scaling, torch.float64)
    assert (out - expected).abs().max() < 4e-3 * largest * size_of_v


def test_repeats_to_the_bit_and_splits_change_little(interpreter):
    _, kernels = interpreter
    a, kv, _ = make(1, 2, 3, 1, 500, 64)
    config = kernels.Config(32, 4, 2, 1)
    outs = [
        kernels.decode_attention(a, kv, None, 0.1, config=config, n_splits=n)
        for n in (1, 5, 5, 7, 64)
    ]
    assert torch.equal(outs[1], outs[2])
    assert all((out - outs[0]).abs().max() < 1e-3 for out in outs)


def test_splits_fill_the_machine(interpreter):
    _, kernels = interpreter
    choose = kernels.choose_splits
    assert choose(8, 100, 396, 128) == 1  # too short to be worth it
    assert choose(3960, 100_000, 396, 128) == 1  # full already
    for n_programs, length in itertools.product((1, 4, 8, 30, 130, 400), (600, 4096, 131072)):
        n_splits = choose(n_programs, length, 396, 128)
        assert 1 <= n_splits <= 64 and (n_splits == 1 or length // n_splits >= 4 * 128)
    assert choose(4, 131072, 396, 128) * 4 > 200
    for n_splits, length in itertools.product((1, 2, 63, 64), (1, 127, 128, 129, 100_003)):
        per_split = ceil(ceil(length / 128) / n_splits) * 128  # as the launcher divides
        assert (ceil(length / per_split) - 1) * per_split < length  # no split is empty


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(1, 4, 17, 64)}, "17 queries at once"),
        ({"a": torch.zeros(1, 4, 1, 128)}, "head sizes 128"),
        ({"a": torch.zeros(1, 3, 1, 64)}, "1 x 3 query heads over 1 x 2"),
        ({"a": torch.zeros(2, 4, 1, 64)}, "2 x 4 query heads over 1 x 2"),
        ({"a": torch.zeros(1, 4, 1, 64, dtype=torch.float64)}, "queries of torch.float64"),
        ({"a": torch.zeros(1, 4, 1, 64, device="meta")}, "queries on meta, the cache on cpu"),
        ({"mask": torch.ones(1, 19)}, r"a mask of torch.float32 \(1, 19\)"),
        ({"mask": torch.ones(1, 1, 1, 20, dtype=torch.int64)}, "a mask of torch.int64"),
        ({"length": 0}, "1 queries over 0 tokens"),
    ],
)
def test_refuses_what_it_cannot(change, message):
    a, kv, _ = make(1, 2, 2, 1, 20, 64)
    kv = replace(kv, length=change.get("length", 20))
    with pytest.raises(ValueError, match=message):
        decode_attention(change.get("a", a), kv, change.get("mask"))


def test_refuses_buffers_with_gaps():
    a, kv, _ = make(4, 1, 1, 1, 5, 64)
    kv = replace(kv, **{name: getattr(kv, name)[::2] for name in ("k", "k_scale", "v", "v_scale")})
    with pytest.raises(ValueError, match="not contiguous"):
        decode_attention(a[::2], kv)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_query_breaks_its_own_result_alone(interpreter, broken):
    _, kernels = interpreter
    a, kv, _ = make(1, 1, 3, 1, 40, 64)
    a[0, 1, 0, 5] = broken
    config = kernels.Config(16, 4, 2, 1)
    for n_splits in (1, 2):
        out = kernels.decode_attention(a, kv, None, 0.1, config=config, n_splits=n_splits)
        assert out.isnan().any(-1).flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["booleans", "numbers", "half"])
def test_what_no_query_sees_may_be_nan_under_a_mask_of_each_query(interpreter, kind, bits):
    """And breaks those that see it, no others."""
    _, kernels = interpreter
    a, kv, largest = make(1, 1, 2, 3, 40, 64, bits=bits)
    mask = torch.ones(1, 1, 3, 40, dtype=torch.bool)
    mask[..., 7] = False
    mask[..., 1, 20] = False
    for scale in (kv.k_scale, kv.v_scale):
        scale[..., 7] = torch.nan
    as_given = mask
    if kind != "booleans":
        dtype = torch.float32 if kind == "numbers" else torch.bfloat16
        as_given = torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
    config = kernels.Config(16, 4, 2, 1)
    for n_splits in (1, 2):
        out = kernels.decode_attention(a, kv, as_given, 0.1, config=config, n_splits=n_splits)
        expected = reference(a.double(), kv, mask, 0.1, torch.float64)
        assert (out.double() - expected).abs().max() < TOLERANCE[torch.float32] * largest
    kv.v_scale[..., -1, 20] = torch.nan  # with 4 bits, of the upper nibbles
    out = kernels.decode_attention(a, kv, as_given, 0.1, config=config, n_splits=1)
    assert out.isnan().any(-1).tolist() == [[[True, False, True]] * 2]


def test_refuses_head_sizes_it_cannot_unpack():
    for size, bits in ((16, 8), (32, 4), (272, 8)):
        a, kv, _ = make(1, 1, 1, 1, 5, size, bits=bits)
        with pytest.raises(ValueError, match=f"head size {size} with values in {bits} bits"):
            decode_attention(a, kv)
