"""Qwen-7B's quantize_cache_v and dequantize_cache_torch, with their faults mended."""

import pytest
import torch
from qwq_kernels.qwen_kv import dequantize_cache_torch, quantize_cache_v


def original_quantize(fdata, bits, qmax, qmin):
    """What modeling_qwen.py computed, restated from its description."""
    flat = torch.flatten(fdata, 2)
    fmax, fmin = flat.amax(-1, keepdim=True), flat.amin(-1, keepdim=True)
    scale = (fmax - fmin) / (qmax - qmin)
    zero = qmin - fmin / scale
    scale = scale.unsqueeze(-1).repeat(1, 1, fdata.shape[2], 1)
    zero = zero.unsqueeze(-1).repeat(1, 1, fdata.shape[2], 1)
    return torch.clamp(fdata / scale + zero, qmin, qmax).to(torch.uint8), scale, zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shapes_and_error(dtype):
    x = torch.randn(2, 3, 21, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    qv, scale, zero = quantize_cache_v(x, 8, torch.tensor(255), torch.tensor(0))
    assert qv.dtype == torch.uint8 and qv.shape == x.shape
    assert scale.shape == zero.shape == (2, 3, 21, 1) and scale.dtype == zero.dtype == dtype
    assert (scale == scale[:, :, :1]).all()  # one a head
    out = dequantize_cache_torch(qv, scale, zero)
    assert out.dtype == dtype
    error = (out.double() - x.double()).abs()
    assert (error <= scale.double() * 1.05 + x.double().abs() * 2**-8).all()


def test_rounding_halves_the_error_of_cutting_off():
    x = torch.randn(1, 4, 100, 64, generator=torch.Generator().manual_seed(2))
    errors = [
        (dequantize_cache_torch(*quantize(x, 8, 255, 0)) - x).pow(2).mean()
        for quantize in (quantize_cache_v, original_quantize)
    ]
    assert errors[0] * 3.5 < errors[1]


@pytest.mark.parametrize("constant", [0.0, 5.0, -3.0, 1e-20])
def test_finite_where_max_equals_min(constant):
    x = torch.full((1, 1, 4, 16), constant)
    out = dequantize_cache_torch(*quantize_cache_v(x, 8, 255, 0))
    assert (out - x).abs().max() <= abs(constant) * 1e-6


LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4, 1])
@pytest.mark.parametrize("ends", [(-3e38, 3e38), (-LARGEST, LARGEST), (-1e38, 3.38e38)])
def test_finite_where_max_minus_min_is_not(dtype, bits, ends):
    x = torch.linspace(0, 1, 64).double() * (ends[1] / 2 - ends[0] / 2) * 2 + ends[0]
    most = min(torch.finfo(dtype).max, LARGEST)
    x = x.clamp(-most, most).to(dtype).reshape(1, 1, 4, 16)
    qv, scale, zero = quantize_cache_v(x, bits, 2**bits - 1, 0)
    out = dequantize_cache_torch(qv, scale, zero)
    assert scale.isfinite().all() and out.isfinite().all()
    error = (out.double() - x.double()).abs()
    assert (error <= scale.double() * 1.05 + x.double().abs() * 2**-8).all()


def test_only_what_overflowed_is_computed_otherwise():
    """To the last bit, also next to heads whose ends are too far apart, and with infinity in it."""
    x = torch.randn(1, 400, 5, 16, generator=torch.Generator().manual_seed(3))
    x *= torch.logspace(-30, 37, 400)[:, None, None]
    x[0, -1, 0, 0] = torch.inf
    beside = torch.full_like(x[:, :1], 3e38)
    beside[..., 0] = -3e38
    _, scale, zero = quantize_cache_v(torch.cat([x, beside], dim=1), 8, 255, 0)
    largest = x.flatten(2).amax(-1).clamp_min(0)
    smallest = x.flatten(2).amin(-1).clamp_max(0)
    expected = (largest - smallest) / 255
    assert torch.equal(scale[:, :400, 0, 0], expected) and expected[0, -1] == torch.inf
    assert torch.equal(zero[:, :400, 0, 0], torch.round(-smallest / expected))
    assert scale[:, 400].isfinite().all()


@pytest.mark.parametrize(
    ("bits", "qmax", "qmin"), [(8, 256, 0), (4, 255, 0), (16, 9, 0), (8, 3, 3)]
)
def test_refuses_ranges_that_are_none(bits, qmax, qmin):
    with pytest.raises(ValueError, match="is no range of"):
        quantize_cache_v(torch.zeros(1, 1, 1, 16), bits, qmax, qmin)


def test_no_tokens_and_no_batch():
    qv, scale, zero = quantize_cache_v(torch.zeros(2, 3, 0, 16), 8, 255, 0)
    assert qv.shape == (2, 3, 0, 16) and scale.shape == zero.shape == (2, 3, 0, 1)
    with pytest.raises(ValueError, match="3 dimensions instead of"):
        quantize_cache_v(torch.zeros(3, 4, 16), 8, 255, 0)


def test_four_bits_use_four_bits():
    x = torch.randn(1, 1, 50, 64)
    qv, scale, zero = quantize_cache_v(x, 4, 15, 0)
    assert qv.max() == 15 and qv.min() == 0
    assert (dequantize_cache_torch(qv, scale, zero) - x).abs().max() <= scale.max() * 1.01
