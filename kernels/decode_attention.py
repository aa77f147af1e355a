"""Attention of a few new queries over an int8 cache: what a decoding step does in every layer.

    out = sum_n softmax_n(scaling * a . k_n) v_n

for `a` (batch, query heads, n_queries, head_size), n_queries 1 to 16 (one; more where drafted
tokens are checked), and k, v as kv_int8.py stores them. `group` query heads share a head of k, v.
With k_n = qk_n * ks_n * range + mid and v_n = qv_n * vs_n the integers are all that is multiplied:

    s_n = ks_n * (scaling * a * range) . qk_n         mid drops out of the softmax
    out = sum_n (p_n * vs_n) qv_n / sum_n p_n

so a token costs its 132 bytes of memory traffic where bf16 costs 256, and decoding is traffic.

What may be seen: with no mask, or one of (batch, length), query i of n sees the tokens up to
length - n + i (the newest query sees all). A mask (batch, 1 or heads, n_queries, length) says all
there is to say. Masks are booleans, true where a token may be seen, or floats, which are added to
the logits, and hide where they are -65504 or less. A query that may see nothing gives zeros.

This file is plain torch, for any device; on CUDA the work is done by decode_attention_triton.py.
"""

from math import sqrt

import torch
from qwq_kernels.kv_int8 import DTYPES, QuantizedKV, reference_dequantize

MAX_QUERIES = 16

MAX_HEAD_SIZE = 256
MIN_HEAD_SIZE = {8: 32, 4: 64}
"""By the bits of values. Tensor cores multiply 16 pairs of channels at least: of 16 channels half a
tile would be empty, twice the work for an element. Four bits are unpacked into quarters of a row,
and a quarter of less than 64 channels is too narrow."""

HIDES = -65504.0
"""float16's lowest number; masks hold that of their own type, or -infinity."""

TOLERANCE = {torch.float32: 4e-3, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
"""Largest difference from `reference` in float64, in units of the largest |v|: the kernel
multiplies in float16 (2^-11), sums in float32, and the result is rounded to the query's type."""

CASES = [  # batch, heads, group, n_queries, length, head size
    (1, 1, 1, 1, 1, 64),
    (3, 2, 7, 1, 63, 128),
    (2, 2, 1, 1, 200, 80),
    (1, 2, 4, 5, 129, 64),
    (2, 1, 3, 16, 70, 96),
    (1, 1, 8, 1, 300, 128),
    (1, 1, 2, 2, 20, 32),
    (1, 1, 2, 1, 40, 256),
]


def reference(
    a: torch.Tensor,
    kv: QuantizedKV,
    mask: torch.Tensor | None = None,
    scaling: float | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`decode_attention` in plain torch, and its implementation where there is no CUDA."""
    batch, n_heads, n_queries, head_size = a.shape
    heads, length = kv.k.shape[1], kv.length
    scaling = 1 / sqrt(head_size) if scaling is None else scaling
    rows = a.to(compute_dtype).reshape(batch, heads, -1, head_size)  # (.., group x n_queries, ..)
    if kv.channels is not None:
        rows = rows * kv.channels.range[:, None].to(compute_dtype)
    k = kv.k[:, :, :length].to(compute_dtype) - 128
    scores = rows @ k.mT * kv.k_scale[..., :length].to(compute_dtype) * scaling
    scores = scores.reshape(batch, n_heads, n_queries, length)
    seen = visible(mask, n_queries, length, a.device)
    if seen is not None and seen.dtype == torch.bool:
        scores = scores.masked_fill(~seen, -torch.inf)
    elif seen is not None:
        scores = (scores + seen.to(compute_dtype)).masked_fill(seen <= HIDES, -torch.inf)
    p = torch.softmax(scores, -1)
    if seen is not None:
        p = torch.where((scores == -torch.inf).all(-1, keepdim=True), 0.0, p)
    v = reference_dequantize(
        kv.v[:, :, :length], kv.v_scale[..., :length], compute_dtype
    )  # (batch, heads, length, head_size)
    if seen is not None:  # what nobody may see may be NaN, and 0 * NaN is NaN
        hidden = seen == 0 if seen.dtype == torch.bool else seen <= HIDES
        hidden = hidden.all(2).all(1)[:, None, :, None]
        v = v.masked_fill(hidden, 0.0)
    out = p.reshape(batch, heads, -1, length) @ v
    return out.reshape(a.shape).to(a.dtype)


def visible(
    mask: torch.Tensor | None, n_queries: int, length: int, device: torch.device
) -> torch.Tensor | None:
    """What each query may see, as a mask of 4 dimensions; None if that is everything."""
    if mask is not None and mask.ndim == 4:
        return mask
    causal = None
    if n_queries > 1:
        last = torch.arange(length - n_queries, length, device=device)  # of each query
        causal = (torch.arange(length, device=device) <= last[:, None])[None, None]
    if mask is None:
        return causal
    padding = mask[:, None, None, :]
    if not mask.is_floating_point():
        padding = padding.bool()
        return padding if causal is None else padding & causal
    return padding if causal is None else torch.where(causal, padding, -torch.inf)


def decode_attention(
    a: torch.Tensor,
    kv: QuantizedKV,
    mask: torch.Tensor | None = None,
    scaling: float | None = None,
) -> torch.Tensor:
    """a (batch, query heads, n_queries, head_size), any strides -> the same shape and dtype.

    The result's memory is (batch, n_queries, query heads, head_size): what comes next in a model.
    scaling: 1 / sqrt(head_size) if not given. Deterministic. Raises ValueError for what `supports`
    does not.
    """
    why_not = supports(a, kv, mask)
    if why_not:
        raise ValueError(why_not)
    scaling = 1 / sqrt(a.shape[-1]) if scaling is None else scaling
    if not a.is_cuda:
        return reference(a, kv, mask, scaling).transpose(1, 2).contiguous().transpose(1, 2)
    from qwq_kernels import decode_attention_triton

    return decode_attention_triton.decode_attention(a, kv, mask, scaling)


def supports(a: torch.Tensor, kv: QuantizedKV, mask: torch.Tensor | None) -> str:
    """Why these inputs cannot be, or an empty string."""
    if a.ndim != 4 or a.dtype not in DTYPES:
        return f"queries of {a.dtype} {tuple(a.shape)}"
    batch, n_heads, n_queries, head_size = a.shape
    if a.device != kv.k.device:
        return f"queries on {a.device}, the cache on {kv.k.device}"
    if not 1 <= n_queries <= MAX_QUERIES:
        return f"{n_queries} queries at once; 1 to {MAX_QUERIES} are possible"
    if not n_queries <= kv.length:
        return f"{n_queries} queries over {kv.length} tokens"
    v_size = kv.v.shape[-1] * kv.v_scale.shape[2]
    if not head_size == kv.k.shape[-1] == v_size:
        return f"head sizes {head_size} (queries), {kv.k.shape[-1]} (keys), {v_size} (values)"
    if not MIN_HEAD_SIZE[kv.value_bits] <= head_size <= MAX_HEAD_SIZE:
        possible = f"{MIN_HEAD_SIZE[kv.value_bits]} to {MAX_HEAD_SIZE} are possible"
        return f"head size {head_size} with values in {kv.value_bits} bits; {possible}"
    if batch != kv.k.shape[0] or n_heads % kv.k.shape[1]:
        return f"{batch} x {n_heads} query heads over {kv.k.shape[0]} x {kv.k.shape[1]}"
    if not all(x.is_contiguous() for x in kv.buffers):
        return "buffers that are not contiguous"
    if mask is None:
        return ""
    if mask.ndim == 2:
        fits = tuple(mask.shape) == (batch, kv.length)
    else:
        fits = (
            mask.ndim == 4
            and mask.shape[0] in (1, batch)
            and mask.shape[1] in (1, n_heads)
            and tuple(mask.shape[2:]) == (n_queries, kv.length)
            and (mask.dtype == torch.bool or mask.is_floating_point())
        )
    return "" if fits else f"a mask of {mask.dtype} {tuple(mask.shape)}"
