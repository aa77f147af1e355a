"""Keys and values of attention in 8 bits: 132 bytes a token and head of 128, where bf16 takes 256.

Symmetric, rounded to nearest, one scale a token and head; values optionally in 4 bits, with a scale
for each half of the head. A row x of `head_size` channels becomes

    y = (x - mid) / range            K only, and only where channel scales are given
    scale = max |y| / L              L = 127 (8 bits) or 7 (4 bits)
    q = round(y / scale) + L + 1     ties to even; 1 .. 255, or 1 .. 15
    x ~ (q - L - 1) * scale * range + mid

`q` is stored with its offset (never as a signed byte) because a kernel can then turn a byte into a
16-bit float by placing it in a mantissa, without a conversion: see decode_attention_triton.py.

mid and range are constants of the model, per head and channel, and attention is blind to them:

    softmax_n(a . k_n) = softmax_n((a * range) . ((k_n - mid) / range))

since a . mid is the same for all n. So they cost neither bytes nor time, nor can a bad choice make
a result wrong, only less accurate. Without them Qwen2's key biases (up to 170, where everything
else is below 10) leave the other channels of a row with a handful of the 255 steps.

A row whose largest |y| is below 1e-30 becomes zeros with scale 0. A row with a NaN or infinity gets
scale NaN: what was broken stays visibly broken.

This file is plain torch, for any device; on CUDA the same work is done by kv_int8_triton.py.
# ref: KIVI (arXiv 2402.02750), SageAttention's smooth K (2410.02367), QServe (2405.04532)
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

HEAD_SIZE_MULTIPLE = 16
"""Rows are loaded 16 bytes at a time, and 16 is the depth of a tensor core's step."""

LEVELS = {8: 127, 4: 7}
"""bits -> the largest magnitude of a stored integer."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

TINY = 1e-30
"""Rows below this are zero: 127 / max would overflow."""

TOLERANCE = {"q": 0, "scale": 0.0, "dequantized": 0.0}
"""The kernels agree with `reference` to the last bit."""

CASES = [  # batch, heads, tokens, head size
    (1, 1, 1, 16),
    (3, 2, 63, 64),
    (2, 2, 17, 80),
    (1, 3, 40, 96),
    (2, 4, 63, 128),
    (1, 1, 5, 256),
]


@dataclass(frozen=True)
class ChannelScales:
    """The centre and half-width of every channel of K, both float32 (heads, head_size)."""

    mid: torch.Tensor
    range: torch.Tensor

    @cached_property
    def inverse(self) -> torch.Tensor:
        return 1.0 / self.range

    def to(self, device: torch.device) -> "ChannelScales":
        return ChannelScales(self.mid.to(device), self.range.to(device))


@dataclass(frozen=True)
class QuantizedKV:
    """One layer's cache: buffers for `capacity` tokens, of which the first `length` are filled.

    k        uint8   (batch, heads, capacity, head_size)
    k_scale  float32 (batch, heads, 1, capacity)          contiguous along tokens, so that
    v        uint8   (batch, heads, capacity, head_size or head_size / 2)      a tile of scales
    v_scale  float32 (batch, heads, 1 or 2, capacity)                          is one load
    All contiguous. In 4 bits byte j of v holds channel j in its lower half and channel
    head_size / 2 + j in its upper half; v_scale has one row for each half.
    """

    k: torch.Tensor
    k_scale: torch.Tensor
    v: torch.Tensor
    v_scale: torch.Tensor
    length: int = 0
    channels: ChannelScales | None = None

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    @property
    def value_bits(self) -> int:
        return 8 if self.v_scale.shape[2] == 1 else 4

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.k, self.k_scale, self.v, self.v_scale


def check_head_size(head_size: int, bits: int = 8) -> None:
    """Raise ValueError for a size that rows of `bits` cannot have."""
    multiple = HEAD_SIZE_MULTIPLE if bits == 8 else 2 * HEAD_SIZE_MULTIPLE
    if head_size <= 0 or head_size % multiple:
        raise ValueError(
            f"a head size of {head_size} in {bits} bits: it must be a multiple of {multiple}"
        )


def allocate(
    batch: int,
    heads: int,
    capacity: int,
    k_size: int,
    v_size: int,
    *,
    value_bits: int = 8,
    channels: ChannelScales | None = None,
    device: torch.device | str = "cpu",
) -> QuantizedKV:
    """Empty buffers, not initialised: whoever reads must stop at `length`.

    Raises ValueError for head sizes that cannot be, or channels that are not those of k.
    """
    check_head_size(k_size)
    check_head_size(v_size, value_bits)

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(batch, heads, *shape, dtype=dtype, device=device)

    # What is made in inference mode cannot be written to outside of it; a cache may go on there.
    with torch.inference_mode(False):
        kv = QuantizedKV(
            k=empty(capacity, k_size, dtype=torch.uint8),
            k_scale=empty(1, capacity, dtype=torch.float32),
            v=empty(capacity, v_size * value_bits // 8, dtype=torch.uint8),
            v_scale=empty(8 // value_bits, capacity, dtype=torch.float32),
            channels=channels,
        )
    _check_channels(channels, heads, k_size, kv.k.device, 8)
    return kv


def token_nbytes(k_size: int, v_size: int, value_bits: int = 8) -> int:
    """Bytes of one token in one head, K and V."""
    return k_size + 4 + v_size * value_bits // 8 + 4 * (8 // value_bits)  # q, scale, q, scales


# --- the mathematics --------------------------------------------------------------------------


def _quantize_rows(y: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (..., n) -> q uint8 (..., n), scale float32 (...)."""
    largest = y.abs().amax(-1, keepdim=True)  # NaN and infinity come through
    finite = torch.isfinite(largest)
    live = finite & (largest >= TINY)
    # A tensor, for a division by it and of it to be rounded once: where one side is a number, torch
    # multiplies by a rounded reciprocal (divided by a number, only on CUDA).
    level_each = torch.full_like(largest, level)
    to_steps = torch.where(live, level_each / largest, 0.0)
    q = torch.round(torch.where(finite, y, 0.0) * to_steps) + (level + 1)
    scale = torch.where(live, largest / level_each, torch.where(finite, 0.0, torch.nan))
    return q.to(torch.uint8), scale.squeeze(-1)


def reference_quantize(
    x: torch.Tensor, bits: int = 8, channels: ChannelScales | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (batch, heads, tokens, head_size) -> q uint8 (..., head_size * bits / 8), and
    scale float32 (batch, heads, 8 / bits, tokens)."""
    y = x.float()
    if channels is not None:
        y = (y - channels.mid[:, None]) * channels.inverse[:, None]
    if bits == 8:
        q, scale = _quantize_rows(y, LEVELS[8])
        return q, scale.unsqueeze(2)
    q, scale = _quantize_rows(y.unflatten(-1, (2, -1)), LEVELS[4])  # (..., 2, head_size / 2)
    return q[..., 0, :] | q[..., 1, :] << 4, scale.transpose(2, 3)


def reference_dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    channels: ChannelScales | None = None,
) -> torch.Tensor:
    """The inverse, up to rounding; sums in float32 (in float64 if that is `dtype`)."""
    at_least = torch.promote_types(dtype, torch.float32)
    if scale.shape[2] == 1:
        x = (q.to(at_least) - 128) * scale.squeeze(2)[..., None].to(at_least)
    else:
        halves = torch.stack((q & 15, q >> 4), dim=-2)  # (batch, heads, tokens, 2, head_size / 2)
        x = (halves.to(at_least) - 8) * scale.transpose(2, 3)[..., None].to(at_least)
        x = x.flatten(-2)
    if channels is not None:
        x = x * channels.range[:, None].to(at_least) + channels.mid[:, None].to(at_least)
    return x.to(dtype)


@torch.no_grad()  # the buffers would join k's graph, and keep it
def reference(kv: QuantizedKV, k: torch.Tensor, v: torch.Tensor) -> None:
    """`append` in plain torch, and its implementation where there is no CUDA."""
    new = slice(kv.length, kv.length + k.shape[2])
    kv.k[:, :, new], kv.k_scale[..., new] = reference_quantize(k, 8, kv.channels)
    kv.v[:, :, new], kv.v_scale[..., new] = reference_quantize(v, kv.value_bits)


# --- public -----------------------------------------------------------------------------------


def quantize(
    x: torch.Tensor, bits: int = 8, channels: ChannelScales | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (batch, heads, tokens, head_size), any strides -> (q, scale) as in `QuantizedKV`.

    Raises ValueError for a head size or dtype that cannot be, or channels that are not x's.
    """
    _check_states(x)
    check_head_size(x.shape[-1], bits)
    _check_channels(channels, x.shape[1], x.shape[3], x.device, bits)
    if not x.is_cuda:
        return reference_quantize(x, bits, channels)
    from qwq_kernels import kv_int8_triton

    return kv_int8_triton.quantize(x, bits, channels)


def dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    channels: ChannelScales | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """(q, scale) -> (batch, heads, tokens, head_size) of `dtype`, into `out` if given.

    q and scale may be the first tokens of longer buffers. Raises ValueError for sizes that do not
    belong together, or an `out` whose channels are not side by side.
    """
    batch, heads, n_tokens, n_bytes = q.shape
    shape = (batch, heads, n_tokens, n_bytes * scale.shape[2])
    if scale.shape[2] not in (1, 2) or scale.shape != (batch, heads, scale.shape[2], n_tokens):
        raise ValueError(f"scales of {tuple(scale.shape)} for {tuple(q.shape)} bytes")
    _check_channels(channels, heads, shape[3], q.device, 8 // scale.shape[2])
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=q.device)
    elif out.shape != shape or out.stride(3) != 1 or out.device != q.device:
        raise ValueError(
            f"out is {tuple(out.shape)} on {out.device} with strides {out.stride()}; needed is "
            f"{shape} on {q.device} with a last stride of 1"
        )
    if not q.is_cuda:
        return out.copy_(reference_dequantize(q, scale, out.dtype, channels))
    from qwq_kernels import kv_int8_triton

    return kv_int8_triton.dequantize(q, scale, channels, out)


def append(kv: QuantizedKV, k: torch.Tensor, v: torch.Tensor) -> QuantizedKV:
    """Quantize the tokens k, v (batch, heads, n_new, head_size) behind the `length` that are there.

    In place, and in one launch. Returns the same buffers with the new length.
    Raises ValueError for other shapes, dtypes, devices, or too little room.
    """
    _check_append(kv, k, v)
    if k.is_cuda:
        from qwq_kernels import kv_int8_triton

        kv_int8_triton.append(kv, k, v)
    else:
        reference(kv, k, v)
    return replace(kv, length=kv.length + k.shape[2])


def _check_states(x: torch.Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"{x.ndim} dimensions instead of (batch, heads, tokens, head_size)")
    if x.dtype not in DTYPES:
        raise ValueError(f"{x.dtype}: one of {', '.join(map(str, DTYPES))} is needed")


def _check_channels(
    channels: ChannelScales | None, heads: int, size: int, device: torch.device, bits: int
) -> None:
    if channels is None:
        return
    if bits != 8:
        raise ValueError(f"channel scales are for 8 bits, not {bits}")
    for name, x in (("mid", channels.mid), ("range", channels.range)):
        if tuple(x.shape) != (heads, size) or x.device != device or x.dtype != torch.float32:
            raise ValueError(
                f"{name} of the channels is {x.dtype} {tuple(x.shape)} on {x.device}, needed is "
                f"{torch.float32} {(heads, size)} on {device}"
            )


def _check_append(kv: QuantizedKV, k: torch.Tensor, v: torch.Tensor) -> None:
    _check_states(k)
    _check_states(v)
    v_size = kv.v.shape[-1] * kv.v_scale.shape[2]
    for name, x, size in (("k", k, kv.k.shape[-1]), ("v", v, v_size)):
        wanted = (*kv.k.shape[:2], k.shape[2], size)
        if x.shape != wanted:
            raise ValueError(f"{name} is {tuple(x.shape)}, the cache needs {wanted}")
        if x.device != kv.k.device:
            raise ValueError(f"{name} is on {x.device}, the cache on {kv.k.device}")
    if not all(x.is_contiguous() for x in kv.buffers):
        raise ValueError("the cache's buffers are not contiguous")
    if kv.length + k.shape[2] > kv.capacity:
        raise ValueError(f"{kv.length} + {k.shape[2]} tokens, but room for {kv.capacity}")
