"""Triton kernels of kv_int8: 3.03 bytes of traffic an element either way, and nothing else.

One program takes ROWS rows (one token of one head each) of K or of V. Rows are numbered over
(batch, head, token), so one launch covers a prompt as well as a decoding step of one token.
K and V go in the same launch: at one token a step the launch is what costs.

Rounding is an addition: y + 1.5 * 2^23 has its unit in the last bit of the mantissa, so the sum is
rounded there, ties to even, and the low byte of its bits is the integer. That needs the product and
the sum rounded one after the other, hence no fused multiply-add (`enable_fp_fusion=False`).
"""

import torch
import triton
import triton.language as tl
from qwq_kernels.kv_int8 import TINY, ChannelScales, QuantizedKV

ROWS = 16
N_WARPS = 4
OPTIONS = {"num_warps": N_WARPS, "enable_fp_fusion": False}

_TINY = tl.constexpr(TINY)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23


@triton.jit
def _largest(y):
    """max |y| of every row, (ROWS, n) -> (ROWS,). Compared as integers, NaN is above infinity."""
    return tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def _quantize_rows(y, LEVEL: tl.constexpr):
    """float32 (ROWS, n) -> q int32 (ROWS, n) of 1 .. 2 LEVEL + 1, scale float32 (ROWS,)."""
    largest = _largest(y)
    finite = largest < float("inf")
    live = finite & (largest >= _TINY)
    to_steps = tl.where(live, tl.div_rn(LEVEL + 0.0, tl.where(live, largest, 1.0)), 0.0)
    y = tl.where(finite[:, None], y, 0.0)
    rounded = y * to_steps[:, None] + (_ROUND + (LEVEL + 1))
    q = rounded.to(tl.int32, bitcast=True) & (2 * LEVEL + 1)
    scale = tl.where(live, tl.div_rn(largest, LEVEL + 0.0), 0.0)
    return q, tl.where(finite, scale, float("nan"))


@triton.jit
def _load_channels(
    x_ptr, mid_ptr, inverse_ptr, at_row, head, mask_r, first, size: tl.constexpr,
    BLOCK: tl.constexpr, stride_xd, CENTRED: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """`size` channels of every row, from channel `first` on, as float32 (ROWS, BLOCK)."""
    offs = tl.arange(0, BLOCK)
    mask = mask_r[:, None]
    if size != BLOCK:
        mask = mask & (offs < size)[None, :]
    x = tl.load(x_ptr + at_row[:, None] + (first + offs)[None, :] * stride_xd, mask, other=0.0)
    y = x.to(tl.float32)
    if CENTRED:
        at_channel = head[:, None] * D + (first + offs)[None, :]
        mid = tl.load(mid_ptr + at_channel, mask, other=0.0)
        inverse = tl.load(inverse_ptr + at_channel, mask, other=0.0)
        y = (y - mid) * inverse
    return y


@triton.jit
def _append_rows(
    x_ptr, q_ptr, scale_ptr, mid_ptr, inverse_ptr, n_rows, n_heads, n_new, start, capacity,
    stride_xb, stride_xh, stride_xt, stride_xd,
    D: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    offs_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask_r = offs_r < n_rows
    token = offs_r % n_new
    head_of_batch = offs_r // n_new
    head = head_of_batch % n_heads
    batch = head_of_batch // n_heads
    at_row = batch.to(tl.int64) * stride_xb + head.to(tl.int64) * stride_xh
    at_row += token.to(tl.int64) * stride_xt
    to_token = head_of_batch.to(tl.int64) * capacity + start + token
    offs = tl.arange(0, BLOCK)
    if BITS == 8:
        y = _load_channels(
            x_ptr, mid_ptr, inverse_ptr, at_row, head, mask_r, 0, D, BLOCK, stride_xd, CENTRED, D
        )
        q, scale = _quantize_rows(y, 127)
        tl.store(scale_ptr + to_token, scale, mask_r)
        N_BYTES: tl.constexpr = D
    else:
        N_BYTES: tl.constexpr = D // 2
        lower = _load_channels(
            x_ptr, mid_ptr, inverse_ptr, at_row, head, mask_r, 0, D // 2, BLOCK, stride_xd,
            False, D,
        )  # fmt: skip
        upper = _load_channels(
            x_ptr, mid_ptr, inverse_ptr, at_row, head, mask_r, D // 2, D // 2, BLOCK, stride_xd,
            False, D,
        )  # fmt: skip
        q_lower, scale_lower = _quantize_rows(lower, 7)
        q_upper, scale_upper = _quantize_rows(upper, 7)
        q = q_lower | (q_upper << 4)
        to_scale = head_of_batch.to(tl.int64) * 2 * capacity + start + token
        tl.store(scale_ptr + to_scale, scale_lower, mask_r)
        tl.store(scale_ptr + to_scale + capacity, scale_upper, mask_r)
    mask = mask_r[:, None]
    if BLOCK != N_BYTES:
        mask = mask & (offs < N_BYTES)[None, :]
    tl.store(q_ptr + to_token[:, None] * N_BYTES + offs[None, :], q.to(tl.uint8), mask)


_CHANGING = ["n_rows", "n_new", "start"]  # from call to call: a value of 1 or 16 is no reason to


@triton.jit(do_not_specialize=_CHANGING)  # compile again
def append_kernel(
    k_ptr, kq_ptr, k_scale_ptr, mid_ptr, inverse_ptr,
    v_ptr, vq_ptr, v_scale_ptr,
    n_rows, n_heads, n_new, start, capacity,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    K_SIZE: tl.constexpr, K_BLOCK: tl.constexpr, CENTRED: tl.constexpr,
    V_SIZE: tl.constexpr, V_BLOCK: tl.constexpr, V_BITS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, 2): the second index chooses K or V."""
    if tl.program_id(1) == 0:
        _append_rows(
            k_ptr, kq_ptr, k_scale_ptr, mid_ptr, inverse_ptr,
            n_rows, n_heads, n_new, start, capacity,
            stride_kb, stride_kh, stride_kt, stride_kd, K_SIZE, K_BLOCK, 8, CENTRED, ROWS,
        )  # fmt: skip
    else:
        _append_rows(
            v_ptr, vq_ptr, v_scale_ptr, mid_ptr, inverse_ptr,
            n_rows, n_heads, n_new, start, capacity,
            stride_vb, stride_vh, stride_vt, stride_vd, V_SIZE, V_BLOCK, V_BITS, False, ROWS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "n_tokens"])
def quantize_kernel(
    x_ptr, q_ptr, scale_ptr, mid_ptr, inverse_ptr, n_rows, n_heads, n_tokens,
    stride_xb, stride_xh, stride_xt, stride_xd,
    D: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """x -> (q, scale) with room for exactly n_tokens."""
    _append_rows(
        x_ptr, q_ptr, scale_ptr, mid_ptr, inverse_ptr,
        n_rows, n_heads, n_tokens, 0, n_tokens,
        stride_xb, stride_xh, stride_xt, stride_xd, D, BLOCK, BITS, CENTRED, ROWS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "n_tokens"])
def dequantize_kernel(
    q_ptr, scale_ptr, mid_ptr, range_ptr, out_ptr, n_rows, n_heads, n_tokens,
    stride_qh, stride_sh, stride_sg, stride_ob, stride_oh, stride_ot,
    D: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """(q, scale) -> x; a head of q and scale may have room for more than n_tokens."""
    offs_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask_r = offs_r < n_rows
    token = offs_r % n_tokens
    head_of_batch = offs_r // n_tokens
    head = head_of_batch % n_heads
    N_BYTES: tl.constexpr = D * BITS // 8
    offs = tl.arange(0, BLOCK)
    mask = mask_r[:, None]
    if BLOCK != N_BYTES:
        mask = mask & (offs < N_BYTES)[None, :]
    at_row = head_of_batch.to(tl.int64) * stride_qh + token.to(tl.int64) * N_BYTES
    q = tl.load(q_ptr + at_row[:, None] + offs[None, :], mask, other=0)
    at_scale = scale_ptr + head_of_batch.to(tl.int64) * stride_sh + token
    scale = tl.load(at_scale, mask_r, other=0.0)
    to_row = (head_of_batch // n_heads).to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    to_row = to_row[:, None] + token.to(tl.int64)[:, None] * stride_ot + offs[None, :]
    if BITS == 8:
        x = (q.to(tl.float32) - 128.0) * scale[:, None]
        if CENTRED:
            at_channel = head[:, None] * D + offs[None, :]
            x = x * tl.load(range_ptr + at_channel, mask, other=0.0)
            x = x + tl.load(mid_ptr + at_channel, mask, other=0.0)
        tl.store(out_ptr + to_row, x.to(out_ptr.dtype.element_ty), mask)
    else:
        upper_scale = tl.load(at_scale + stride_sg, mask_r, other=0.0)
        lower = ((q & 15).to(tl.float32) - 8.0) * scale[:, None]
        upper = ((q >> 4).to(tl.float32) - 8.0) * upper_scale[:, None]
        tl.store(out_ptr + to_row, lower.to(out_ptr.dtype.element_ty), mask)
        tl.store(out_ptr + to_row + N_BYTES, upper.to(out_ptr.dtype.element_ty), mask)


# --- launchers --------------------------------------------------------------------------------


def block_size(n: int) -> int:
    """The tile that holds n channels: tiles are powers of two."""
    return max(16, triton.next_power_of_2(n))


def _check_rows(*shape: int) -> int:
    n_rows = 1
    for n in shape:
        n_rows *= n
    if n_rows >= 2**31:
        raise ValueError(f"{n_rows} rows in one call; fewer than 2^31 are possible")
    return n_rows


def _flat_heads(x: torch.Tensor) -> torch.Tensor:
    """x (batch, heads, ...) with one stride over batch x heads, and whole rows, as buffers have."""
    is_flat = x.stride(0) == x.shape[1] * x.stride(1) or x.shape[0] == 1
    whole_rows = x.stride(3) == 1 and (x.dtype != torch.uint8 or x.stride(2) == x.shape[3])
    return x if is_flat and whole_rows else x.contiguous()


def _channel_arguments(
    channels: ChannelScales | None, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """mid and 1 / range, contiguous; any pointer where there are none."""
    if channels is None:
        return like, like
    return channels.mid.contiguous(), channels.inverse.contiguous()


def append(kv: QuantizedKV, k: torch.Tensor, v: torch.Tensor) -> None:
    """Write the rows of k and v behind `kv.length`; see kv_int8.append."""
    batch, heads, n_new, k_size = k.shape
    n_rows = _check_rows(batch, heads, n_new)
    if n_rows == 0:
        return
    mid, inverse = _channel_arguments(kv.channels, kv.k_scale)
    v_size = v.shape[-1]
    with torch.cuda.device_of(k):
        append_kernel[(triton.cdiv(n_rows, ROWS), 2)](
            k, kv.k, kv.k_scale, mid, inverse,
            v, kv.v, kv.v_scale,
            n_rows, heads, n_new, kv.length, kv.capacity,
            *k.stride(), *v.stride(),
            K_SIZE=k_size, K_BLOCK=block_size(k_size), CENTRED=kv.channels is not None,
            V_SIZE=v_size, V_BLOCK=block_size(v_size * kv.value_bits // 8), V_BITS=kv.value_bits,
            ROWS=ROWS, **OPTIONS,
        )  # fmt: skip


def quantize(
    x: torch.Tensor, bits: int, channels: ChannelScales | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See kv_int8.quantize."""
    batch, heads, n, size = x.shape
    q = torch.empty(batch, heads, n, size * bits // 8, dtype=torch.uint8, device=x.device)
    scale = torch.empty(batch, heads, 8 // bits, n, dtype=torch.float32, device=x.device)
    n_rows = _check_rows(batch, heads, n)
    if n_rows == 0:
        return q, scale
    mid, inverse = _channel_arguments(channels, scale)
    with torch.cuda.device_of(x):
        quantize_kernel[(triton.cdiv(n_rows, ROWS),)](
            x, q, scale, mid, inverse, n_rows, heads, n, *x.stride(),
            D=size, BLOCK=block_size(q.shape[-1]), BITS=bits, CENTRED=channels is not None,
            ROWS=ROWS, **OPTIONS,
        )  # fmt: skip
    return q, scale


def dequantize(
    q: torch.Tensor, scale: torch.Tensor, channels: ChannelScales | None, out: torch.Tensor
) -> torch.Tensor:
    """See kv_int8.dequantize."""
    batch, heads, n, size = out.shape
    n_rows = _check_rows(batch, heads, n)
    if n_rows == 0:
        return out
    q, scale = _flat_heads(q), _flat_heads(scale)
    bits = 8 // scale.shape[2]
    mid, spread = (scale, scale) if channels is None else (channels.mid, channels.range)
    with torch.cuda.device_of(q):
        dequantize_kernel[(triton.cdiv(n_rows, ROWS),)](
            q, scale, mid.contiguous(), spread.contiguous(), out, n_rows, heads, n,
            q.stride(1), scale.stride(1), scale.stride(2), *out.stride()[:3],
            D=size, BLOCK=block_size(size * bits // 8), BITS=bits, CENTRED=channels is not None,
            ROWS=ROWS, **OPTIONS,
        )  # fmt: skip
    return out
