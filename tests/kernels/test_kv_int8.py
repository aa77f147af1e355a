"""int8 K and V: the mathematics in float64, and the Triton kernels bit for bit."""

from dataclasses import replace

import pytest
import torch
from qwq_kernels import kv_int8
from qwq_kernels.kv_int8 import (
    CASES,
    DTYPES,
    ChannelScales,
    allocate,
    append,
    dequantize,
    quantize,
    reference_dequantize,
    reference_quantize,
)
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES = [(*case, bits) for case in CASES for bits in (8, 4) if bits == 8 or case[3] % 32 == 0]


def states(batch: int, heads: int, tokens: int, size: int, dtype=torch.float32) -> torch.Tensor:
    """Strided as a model's keys are: (batch, tokens, heads, size), transposed."""
    x = torch.randn(batch, tokens, heads, size, generator=torch.Generator().manual_seed(tokens))
    return x.to(dtype).transpose(1, 2)


def channel_scales(heads: int, size: int) -> ChannelScales:
    generator = torch.Generator().manual_seed(size)
    spread = torch.rand(heads, size, generator=generator) + 0.01
    return ChannelScales(10 * torch.randn(heads, size, generator=generator), spread)


# --- the mathematics --------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "heads", "tokens", "size", "bits"), SHAPES)
def test_error_is_at_most_half_a_step(batch, heads, tokens, size, bits):
    x = states(batch, heads, tokens, size).double()
    q, scale = reference_quantize(x.float(), bits)
    error = (reference_dequantize(q, scale, torch.float64) - x).abs()
    halves = error.unflatten(-1, (scale.shape[2], -1))  # (batch, heads, tokens, 1 or 2, ...)
    step = scale.transpose(2, 3)[..., None].double()
    assert (halves <= step * (0.5 + 1e-5)).all()
    assert q.dtype == torch.uint8 and q.shape[-1] == size * bits // 8


def test_rounding_is_to_nearest_and_ties_to_even():
    x = torch.zeros(1, 1, 1, 16)
    x[0, 0, 0, :8] = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, 0.51, -127])
    q, scale = quantize(x)
    assert scale.item() == 1.0
    assert (q[0, 0, 0, :8].int() - 128).tolist() == [127, 0, 2, 2, 0, -2, 1, -127]


def test_every_byte_is_used_and_none_is_zero():
    x = torch.linspace(-1, 1, 4096).reshape(1, 1, 1, 4096)
    q, _ = quantize(x)
    assert q.unique().tolist() == list(range(1, 256))


def test_rows_without_a_scale():
    x = states(1, 1, 6, 64)
    x[0, 0, 0] = 0.0
    x[0, 0, 1] = 1e-31
    x[0, 0, 2, 3] = torch.nan
    x[0, 0, 3, 5] = -torch.inf
    q, scale = quantize(x)
    assert scale[0, 0, 0, :2].tolist() == [0.0, 0.0]
    assert scale[0, 0, 0, 2:4].isnan().all()
    out = dequantize(q, scale)[0, 0]
    assert (out[:2] == 0).all() and out[2:4].isnan().all()  # broken stays visible
    assert out[4:].isfinite().all() and (out[4:] - x[0, 0, 4:]).abs().max() < 0.02


def test_an_outlier_costs_its_own_row_alone():
    x = states(1, 2, 10, 64)
    plain, _ = quantize(x)
    x[0, 1, 4, 7] = 1e4
    q, _ = quantize(x)
    assert (q != plain).any(-1).nonzero().tolist() == [[0, 1, 4]]


class Divisions(TorchDispatchMode):
    """Remembers what was divided by what."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.div, torch.ops.aten.reciprocal):
            self.seen.append(args)
        return function(*args, **(kwargs or {}))


def test_the_reference_divides_tensors_by_tensors():
    """By a number, torch on CUDA multiplies with its reciprocal: not what the kernel computes."""
    with Divisions() as divisions:
        for bits in (8, 4):
            reference_quantize(states(1, 1, 3, 64), bits)
    assert len(divisions.seen) == 4
    for operands in divisions.seen:
        assert [torch.is_tensor(x) and x.ndim for x in operands] in ([4, 4], [5, 5])


def test_channel_scales_save_what_a_bias_would_crush():
    x = states(1, 2, 40, 64)
    x[..., 3] += 170.0
    channels = ChannelScales(torch.zeros(2, 64), torch.ones(2, 64))
    channels.mid[:, 3] = 170.0

    def error(channels):
        out = dequantize(*quantize(x, 8, channels), channels=channels)
        return (out - x)[..., 4:].pow(2).mean().item()

    assert error(channels) * 1000 < error(None)


def test_append_writes_its_tokens_and_nothing_else():
    k, v = states(2, 3, 9, 64), states(2, 3, 9, 32)
    kv = allocate(2, 3, 32, 64, 32, value_bits=4)
    for buffer in kv.buffers:
        buffer.fill_(77)
    after = append(replace(kv, length=5), k, v)
    assert after.length == 14 and after.k is kv.k
    for buffer, axis in zip(kv.buffers, (2, 3, 2, 3), strict=True):
        untouched = torch.cat([buffer.narrow(axis, 0, 5), buffer.narrow(axis, 14, 18)], axis)
        assert (untouched == 77).all()
    q, scale = quantize(k)
    assert torch.equal(kv.k[:, :, 5:14], q) and torch.equal(kv.k_scale[..., 5:14], scale)


def test_buffers_join_no_graph():
    """Of keys with gradients only the numbers are kept; and in inference mode nothing else is."""
    k = states(1, 2, 9, 64)
    kv = append(allocate(1, 2, 32, 64, 64), k.clone().requires_grad_(), k.clone().requires_grad_())
    with torch.inference_mode():
        other = append(allocate(1, 2, 32, 64, 64), k, k)
    for buffers in (kv.buffers, append(other, k, k).buffers):
        assert not any(x.requires_grad for x in buffers)
    assert torch.equal(kv.k[:, :, :9], other.k[:, :, :9])


def test_no_tokens_are_no_trouble(interpreter):
    kernels, _ = interpreter
    none = torch.zeros(2, 3, 0, 64)
    for bits in (8, 4):
        for q, scale in (quantize(none, bits), kernels.quantize(none, bits, None)):
            assert q.shape == (2, 3, 0, 8 * bits) and scale.shape == (2, 3, 8 // bits, 0)
            assert dequantize(q, scale).shape == none.shape
            assert kernels.dequantize(q, scale, None, none) is none
    assert append(allocate(2, 3, 16, 64, 64), none, none).length == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, c: quantize(x, 4, c), "channel scales are for 8 bits, not 4"),
        (lambda x, c: quantize(x[:, :1], 8, c), r"\(2, 64\) on cpu, needed is .*\(1, 64\)"),
        (lambda x, c: quantize(x[0], 8, c), "3 dimensions instead of"),
        (lambda x, c: allocate(1, 2, 16, 32, 32, channels=c), r"needed is .*\(2, 32\)"),
        (lambda x, c: dequantize(*quantize(x), channels=replace(c, mid=c.mid[:1])), "mid of the"),
        (lambda x, c: dequantize(*quantize(x), channels=c.to("meta")), "on meta, needed is"),
        (lambda x, c: dequantize(quantize(x)[0], quantize(x[:, :, :5])[1]), "scales of"),
        (lambda x, c: dequantize(*quantize(x), out=x[:, :, :5]), r"out is \(1, 2, 5, 64\)"),
        (
            lambda x, c: dequantize(*quantize(x), out=x.mT.contiguous().mT),
            "with a last stride of 1",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(call, message):
    """On CUDA it would be read beyond its end, or written to wrong places."""
    with pytest.raises(ValueError, match=message):
        call(states(1, 2, 7, 64), channel_scales(2, 64))


def test_append_refuses_buffers_with_gaps():
    kv = allocate(4, 1, 16, 64, 64)
    k = torch.zeros(2, 1, 1, 64)
    with pytest.raises(ValueError, match="not contiguous"):
        append(replace(kv, k=kv.k[::2]), k, k)


@pytest.mark.parametrize("size", [0, 8, 24, 72])
def test_head_sizes_that_cannot_be(size):
    with pytest.raises(ValueError, match=f"head size of {size} in 8 bits"):
        quantize(torch.zeros(1, 1, 1, size))


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (torch.zeros(2, 1, 1, 64), r"k is \(2, 1, 1, 64\)"),
        (torch.zeros(1, 1, 1, 32), r"k is \(1, 1, 1, 32\)"),
        (torch.zeros(1, 1, 1, 64, dtype=torch.float64), "float64"),
        (torch.zeros(1, 1, 1, 64, device="meta"), "on meta"),
        (torch.zeros(1, 1, 5, 64), r"0 \+ 5 tokens, but room for 4"),
    ],
)
def test_append_refuses_what_does_not_fit(k, message):
    kv = allocate(1, 1, 4, 64, 64)
    with pytest.raises(ValueError, match=message):
        append(kv, k, torch.zeros(1, 1, k.shape[2], 64))


# --- the kernels, interpreted -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "size", "bits", "centred"),
    [(*shape, False) for shape in SHAPES] + [(*shape, True) for shape in SHAPES if shape[4] == 8],
)
def test_kernel_equals_reference(
    interpreter, poisoned_memory, batch, heads, tokens, size, bits, centred
):
    kernels, _ = interpreter
    channels = channel_scales(heads, size) if centred else None
    for dtype in DTYPES:
        x = states(batch, heads, tokens, size, dtype)
        x[0, 0, 0] = 0
        x[-1, -1, -1, 1] = 1000.0
        q, scale = kernels.quantize(x, bits, channels)
        expected = reference_quantize(x, bits, channels)
        assert torch.equal(q, expected[0]) and torch.equal(scale, expected[1])
        out = torch.empty(x.shape, dtype=dtype)
        kernels.dequantize(q, scale, channels, out)
        wanted = reference_dequantize(q, scale, dtype, channels)
        if dtype == torch.bfloat16:  # the interpreter cuts bfloat16 off; a GPU rounds
            assert ((out - wanted).abs() <= wanted.abs() * 2**-7).all()
        else:
            assert torch.equal(out, wanted)


def test_kernel_on_rows_without_a_scale(interpreter):
    kernels, _ = interpreter
    x = states(1, 1, 5, 64)
    x[0, 0, 0], x[0, 0, 1], x[0, 0, 2, 3], x[0, 0, 3, 5] = 0.0, 1e-31, torch.nan, torch.inf
    for bits in (8, 4):
        q, scale = kernels.quantize(x, bits, None)
        expected = reference_quantize(x, bits)
        assert torch.equal(q, expected[0])
        assert torch.equal(scale.nan_to_num(-1), expected[1].nan_to_num(-1))


@pytest.mark.parametrize("value_bits", [8, 4])
def test_append_kernel_equals_reference(interpreter, value_bits):
    kernels, _ = interpreter
    channels = channel_scales(2, 80)
    for n_new in (1, 17):
        k, v = states(3, 2, n_new, 80), states(3, 2, n_new, 64).flip(-1)
        pair = [allocate(3, 2, 40, 80, 64, value_bits=value_bits, channels=channels) for _ in "ab"]
        for kv in pair:
            for buffer in kv.buffers:
                buffer.fill_(9)
        ours, expected = (replace(kv, length=11) for kv in pair)
        kernels.append(ours, k, v)
        kv_int8.reference(expected, k, v)
        for a, b in zip(ours.buffers, expected.buffers, strict=True):
            assert torch.equal(a, b)


def test_kernel_reads_any_strides(interpreter):
    kernels, _ = interpreter
    x = states(1, 2, 7, 32)
    every_second = torch.zeros(1, 2, 14, 64)[:, :, ::2, ::2].copy_(x)
    one_for_all = x[:, :1].expand(1, 2, 7, 32)
    assert torch.equal(kernels.quantize(every_second, 8, None)[0], reference_quantize(x)[0])
    assert torch.equal(
        kernels.quantize(one_for_all, 8, None)[0], reference_quantize(one_for_all.clone())[0]
    )


def test_kernel_addresses_more_than_2_31_bytes(interpreter):
    """The second sequence of a batch starts 2^31 bytes on; what lies between is never touched."""
    kernels, decode = interpreter
    try:
        kv = allocate(2, 1, 2**31 // 64 + 16, 64, 64)
    except RuntimeError:
        pytest.skip("not enough address space for 9 GB")
    k, v = states(2, 1, 9, 64), states(2, 1, 9, 64).flip(-1)
    kernels.append(kv, k, v)
    q, scale = quantize(k)
    assert torch.equal(kv.k[:, :, :9], q) and torch.equal(kv.k_scale[..., :9], scale)
    a = states(2, 1, 1, 64)
    small = append(allocate(2, 1, 16, 64, 64), k, v)
    assert torch.equal(
        decode.decode_attention(a, replace(kv, length=9), None, 0.1),
        decode.decode_attention(a, small, None, 0.1),
    )
