"""Qwen-7B's own interface to an 8-bit cache: asymmetric, one scale a head for all that is given.

    scale = (max - min) / (qmax - qmin)      max and min over tokens and channels, and 0
    zero_point = round(qmin - min / scale)
    qv = round(x / scale) + zero_point       x ~ scale * (qv - zero_point)

The names and shapes are those of modeling_qwen.py, for code that calls them. What they did wrong is
mended: they cut fractions off, where rounding halves the error; and they divided by zero where max
equals min. 0 is always in the range, so that a constant has a scale too, and so that the zero point
is a whole number of 0 .. 255, which bfloat16 holds exactly.
# ref: quantize_cache_v, dequantize_cache_torch in modeling_qwen.py of huggingface.co/Qwen/Qwen-7B
"""

import torch
import torch.nn.functional as F

Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""qv uint8 (batch, heads, tokens, head_size); scale and zero_point (batch, heads, tokens, 1)."""

MOST = torch.finfo(torch.bfloat16).max
"""The largest number that scales may be or give: float32 goes 0.4 % further."""


def quantize_cache_v(
    fdata: torch.Tensor, bits: int, qmax: torch.Tensor | int, qmin: torch.Tensor | int
) -> Quantized:
    """fdata (batch, heads, tokens, head_size) -> (qv, scale, zero_point), of fdata's dtype.

    Raises ValueError if qmin .. qmax is no range of `bits` bits, or bits more than a byte has, or
    fdata has not 4 dimensions.
    """
    if fdata.ndim != 4:
        raise ValueError(f"{fdata.ndim} dimensions instead of (batch, heads, tokens, head_size)")
    low, high = int(qmin), int(qmax)
    if not 0 <= low < high < 2**bits <= 256:
        raise ValueError(f"qmin {low} to qmax {high} is no range of {bits} bits, 8 at most")
    x = fdata.float()
    flat = F.pad(x.flatten(2), (0, 1))  # (batch, heads, tokens * head_size + 1), the last one 0
    largest = flat.amax(-1)[..., None, None]
    smallest = flat.amin(-1)[..., None, None]
    span, steps = largest - smallest, high - low
    # Finite ends may be further apart than float32 goes. Only there is each divided first: else the
    # last bit would be another.
    wide = torch.isinf(span) & torch.isfinite(largest) & torch.isfinite(smallest)
    scale = torch.where(wide, (largest / steps - smallest / steps).clamp(max=MOST), span / steps)
    scale = scale.to(fdata.dtype)  # as it will be read
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = torch.round(low - smallest / scale.float()).clamp(low, high)
    last = torch.where(wide, torch.floor(MOST / scale.float()), torch.inf)  # finite when read
    qv = torch.round(x / scale.float()).clamp(-last, last) + zero_point
    n_tokens = fdata.shape[2]
    return (
        qv.clamp(low, high).to(torch.uint8),
        scale.expand(-1, -1, n_tokens, 1).contiguous(),
        zero_point.to(fdata.dtype).expand(-1, -1, n_tokens, 1).contiguous(),
    )


def dequantize_cache_torch(
    qv: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
) -> torch.Tensor:
    """scale * (qv - zero_point), computed in float32, in scale's dtype."""
    return ((qv.float() - zero_point.float()) * scale.float()).to(scale.dtype)
