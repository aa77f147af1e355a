"""Decode attention over int8 in Triton: 1.6 to 3.5 instructions for every element of K and V read.

At the speed of an H200's memory each multiprocessor is handed some 17 elements a clock and has 128
lanes, so more than 7 instructions an element and the memory waits. A plain Triton kernel takes 6.7:
it converts integers one by one and reads V byte by byte from shared memory. What brings it down:

- K and V are loaded as 16-bit pairs of channels, (2j, 2j + 1). The even and the odd channels are
  two half-wide matrices: s = K_even . a_even + K_odd . a_odd, and V gives two sums.
- Stored bytes are offset by 128, so that 0x6400 | byte is the float16 1024 + byte: one PRMT for two
  elements puts the bytes in place. For V one HSUB2 takes off the 1152 that are too many. For K
  nothing does: (1152 + q) . a - 1152 sum(a) is what the product starts from, once a row. float16
  for bfloat16 models as well: 8 bits do not fit bfloat16's mantissa.
- Tokens are the rows of the products and queries their columns. Tensor cores multiply 16 rows by 8
  columns, so a token costs 8 exponentials; the other way round it would be 16, most of them of no
  query: models have 1 to 8 query heads to a head of K.
- A tile holds a power of two of channels, so a row is covered by two: 80 channels by 64 and 32.
- The scales are applied to the scores: one multiplication a token instead of head_size.
- Totals are kept apart for 16 tokens of each warp and added up at the end.
- The bounds of the loop are checked only in its last tiles.

The `group` query heads of a head of K, and the queries, are the columns of one matrix product, so K
and V are read once for all of them. The tokens are split among programs where batch x heads
would leave multiprocessors idle; a second, small kernel joins the parts in a fixed order: no
atomics, so results repeat to the bit.

How values keep their float16 range: `a` is divided by a power of two, the same for the rows of a
program: a row 2^14 times smaller than another loses bits, where its logits are as much smaller. And
p * vs is one exponential, with the logarithm of the scale in the exponent, under a running maximum
of its own:

    p_n vs_n = 2^(s_n + log2 vs_n),    sum_n p_n = sum_n (p_n vs_n) / vs_n

so it is at most 1 whatever the sizes of V. Scales below 2^-64 count as 2^-64 there.
# ref: FlashDecoding (pytorch.org/blog/flash-decoding), Marlin and FasterTransformer for the bytes
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from qwq_kernels.decode_attention import HIDES
from qwq_kernels.kv_int8 import QuantizedKV

_LOG2E = tl.constexpr(1.4426950408889634)
_HIDES = tl.constexpr(HIDES)
_LEAST_SCALE = tl.constexpr(2.0**-64)
_RAISED = tl.constexpr(1152.0)  # 1024 of the float16, 128 of the stored byte

MASK_NONE, MASK_TOKENS, MASK_ROWS = range(3)
"""Nothing is hidden; one number a token, added to its logits; one for every query as well."""

# --- bytes to float16 -------------------------------------------------------------------------


@triton.jit
def _unpack_raised(x, ASM: tl.constexpr):
    """uint16 pairs of bytes q + 128 -> float16 1152 + q of the lower bytes, of the upper ones."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            prmt.b32 $0, $2, 0x64646464, 0x4240;
            prmt.b32 $1, $2, 0x64646464, 0x4341;
            """,
            constraints="=&r,=r,r", args=[x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:  # noqa: RET505 - in Triton both branches of a constexpr must end here
        lower = ((x & 0xFF) | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)
        upper = ((x >> 8) | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)
        return lower, upper


@triton.jit
def _unpack_bytes(x, ASM: tl.constexpr):
    """uint16 pairs of bytes q + 128 -> float16 q of the lower bytes, of the upper ones."""
    lower, upper = _unpack_raised(x, ASM)
    return (lower - _RAISED).to(tl.float16), (upper - _RAISED).to(tl.float16)


@triton.jit
def _unpack_nibbles(x, ASM: tl.constexpr):
    """uint16 pairs of bytes of two nibbles q + 8 -> float16 of the lower byte's lower nibble, the
    upper byte's lower nibble, the lower byte's upper nibble, the upper byte's upper nibble."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, t0, t1, t2, t3, offset;
            mov.b32 offset, 0x64086408;
            and.b32 low, $4, 0x0f0f0f0f;
            shr.u32 high, $4, 4;
            and.b32 high, high, 0x0f0f0f0f;
            prmt.b32 t0, low, 0x64646464, 0x4240;
            prmt.b32 t1, low, 0x64646464, 0x4341;
            prmt.b32 t2, high, 0x64646464, 0x4240;
            prmt.b32 t3, high, 0x64646464, 0x4341;
            sub.f16x2 $0, t0, offset;
            sub.f16x2 $1, t1, offset;
            sub.f16x2 $2, t2, offset;
            sub.f16x2 $3, t3, offset;
            }
            """,
            constraints="=r,=r,=r,=r,r", args=[x],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:  # noqa: RET505
        a = ((x & 0xF) | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)
        b = (((x >> 8) & 0xF) | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)
        c = (((x >> 4) & 0xF) | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)
        d = ((x >> 12) | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)
        return (
            (a - 1032.0).to(tl.float16),
            (b - 1032.0).to(tl.float16),
            (c - 1032.0).to(tl.float16),
            (d - 1032.0).to(tl.float16),
        )


# --- elementary functions ---------------------------------------------------------------------
# One instruction each, good to 2^-22; Triton's own guard against subnormal numbers, or are exact.


@triton.jit
def _exp2(x, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # noqa: RET505
        return tl.exp2(x)


@triton.jit
def _log2(x, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # noqa: RET505
        return tl.log2(x)


@triton.jit
def _inverse(x, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # noqa: RET505
        return 1.0 / x


# --- one tile of tokens -----------------------------------------------------------------------


@triton.jit
def _load_tokens(ptr, offs_n, end, other, CHECKED: tl.constexpr):
    """One number a token; `other` from token `end` on, if that is CHECKED."""
    if CHECKED:
        return tl.load(ptr + offs_n, offs_n < end, other=other)
    else:  # noqa: RET505
        return tl.load(ptr + offs_n)


@triton.jit
def _load_pairs(
    ptr, offs_n, offs_p, end, N_PAIRS: tl.constexpr, MASKED: tl.constexpr, CHECKED: tl.constexpr
):
    """Pairs offs_p of tokens offs_n, uint16; 0 from token `end` (CHECKED) and N_PAIRS (MASKED) on.

    One of the two is a column and the other a row, which says how the tile lies: dots read a tile
    as it was loaded, but copy what is transposed after it was unpacked.
    """
    at = ptr + offs_n * N_PAIRS + offs_p
    if CHECKED and MASKED:
        return tl.load(at, (offs_n < end) & (offs_p < N_PAIRS), other=0)
    elif CHECKED:  # noqa: RET505
        return tl.load(at, offs_n < end, other=0)
    elif MASKED:
        return tl.load(at, offs_p < N_PAIRS, other=0)
    else:
        return tl.load(at)


@triton.jit
def _add_scores(
    scores, a, k_ptr, offs_n, end,
    FIRST: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, CHECKED: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """scores (BLOCK_N, BLOCK_R), and (1152 + k) . a of the BLOCK channels from FIRST on."""
    offs_p = FIRST // 2 + tl.arange(0, BLOCK // 2)
    k = _load_pairs(
        k_ptr, offs_n[:, None], offs_p[None, :], end, D // 2, FIRST + BLOCK > D, CHECKED
    )
    even, odd = _unpack_raised(k, ASM)  # (BLOCK_N, BLOCK / 2) each
    scores = tl.dot(even, a[0], scores)
    return tl.dot(odd, a[1], scores)


@triton.jit
def _add_values(
    sums, p, shrink, v_ptr, offs_n, end,
    FIRST: tl.constexpr, BLOCK: tl.constexpr, N_BYTES: tl.constexpr, V_BITS: tl.constexpr,
    CHECKED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """sums * shrink + v . p for the BLOCK bytes from FIRST on: (BLOCK / 2, BLOCK_R) each.

    Two sums, of even and odd bytes; with 4 bits two for the lower nibbles and two for the upper.
    """
    offs_p = FIRST // 2 + tl.arange(0, BLOCK // 2)
    v = _load_pairs(
        v_ptr, offs_n[None, :], offs_p[:, None], end, N_BYTES // 2, FIRST + BLOCK > N_BYTES, CHECKED
    )
    shrink = shrink[None, :]
    if V_BITS == 8:
        even, odd = _unpack_bytes(v, ASM)  # (BLOCK / 2, BLOCK_N) each
        return tl.dot(even, p[0], sums[0] * shrink), tl.dot(odd, p[0], sums[1] * shrink)
    else:  # noqa: RET505
        lower_even, lower_odd, upper_even, upper_odd = _unpack_nibbles(v, ASM)
        return (
            tl.dot(lower_even, p[0], sums[0] * shrink),
            tl.dot(lower_odd, p[0], sums[1] * shrink),
            tl.dot(upper_even, p[1], sums[2] * shrink),
            tl.dot(upper_odd, p[1], sums[3] * shrink),
        )


@triton.jit
def _tile(
    k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, mask_ptr, mask_rows, last_seen,
    a, a_rest, raised, a_scale, largest, total, sums, sums_rest, start, end, capacity,
    D: tl.constexpr, K_BLOCK: tl.constexpr, K_REST: tl.constexpr,
    V_BITS: tl.constexpr, V_BLOCK: tl.constexpr, V_REST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SLOTS: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, CHECKED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add BLOCK_N tokens from `start` on to the running sums; CHECKED: only those before `end`."""
    offs_n = start + tl.arange(0, BLOCK_N)
    k_scale = _load_tokens(k_scale_ptr, offs_n, end, 0.0, CHECKED)
    v_scale = _load_tokens(v_scale_ptr, offs_n, end, 1.0, CHECKED)
    if V_BITS == 4:
        upper_scale = _load_tokens(v_scale_ptr + capacity, offs_n, end, 1.0, CHECKED)
    if V_BITS == 4:
        lower_scale = v_scale
        v_scale = tl.maximum(lower_scale, upper_scale)
    v_scale = tl.where(v_scale < _LEAST_SCALE, _LEAST_SCALE, v_scale)
    exponent = _log2(v_scale, ASM)
    inverse = _inverse(v_scale, ASM)
    if V_BITS == 4:
        lower_share = lower_scale * inverse
        upper_share = upper_scale * inverse
    if MASK == 1:
        added = _load_tokens(mask_ptr, offs_n, end, 0.0, CHECKED)
        seen = added > _HIDES
        exponent = tl.where(seen, added * _LOG2E + exponent, float("-inf"))
        k_scale = tl.where(seen, k_scale, 0.0)  # a scale that is NaN must not reach the sums
        inverse = tl.where(seen, inverse, 0.0)
        if V_BITS == 4:
            lower_share = tl.where(seen, lower_share, 0.0)
            upper_share = tl.where(seen, upper_share, 0.0)
    if MASK == 2:  # the same; where a query sees such a token, its exponent is NaN for all that
        sound = v_scale == v_scale
        if V_BITS == 4:
            sound = (lower_scale == lower_scale) & (upper_scale == upper_scale)
            exponent = tl.where(sound, exponent, float("nan"))
            lower_share = tl.where(sound, lower_share, 0.0)
            upper_share = tl.where(sound, upper_share, 0.0)
        inverse = tl.where(sound, inverse, 0.0)

    scores = tl.broadcast_to(raised[None, :], [BLOCK_N, BLOCK_R])
    scores = _add_scores(scores, a, k_ptr, offs_n, end, 0, K_BLOCK, D, CHECKED, ASM)
    if K_REST:
        scores = _add_scores(scores, a_rest, k_ptr, offs_n, end, K_BLOCK, K_REST, D, CHECKED, ASM)
    scores = scores * (k_scale * a_scale)[:, None] + exponent[:, None]
    if MASK == 2:
        added = _load_tokens(mask_ptr + mask_rows[None, :], offs_n[:, None], end, 0.0, CHECKED)
        scores = tl.where(added > _HIDES, scores + added * _LOG2E, float("-inf"))
    if CHECKED:
        if CAUSAL:
            scores = tl.where(offs_n[:, None] <= last_seen[None, :], scores, float("-inf"))
        scores = tl.where((offs_n < end)[:, None], scores, float("-inf"))

    new_largest = tl.maximum(largest, tl.max(scores, 0))
    reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # nothing seen so far
    p = _exp2(scores - reference[None, :], ASM)  # times its v_scale, in units of the largest
    shrink = _exp2(largest - reference, ASM)
    weights = tl.reshape(p * inverse[:, None], [BLOCK_N // SLOTS, SLOTS, BLOCK_R])
    total = total * shrink[None, :] + tl.sum(weights, 0)
    if V_BITS == 8:
        p = (p.to(tl.float16),)
    else:
        p = (
            (p * lower_share[:, None]).to(tl.float16),
            (p * upper_share[:, None]).to(tl.float16),
        )
    N_BYTES: tl.constexpr = D * V_BITS // 8
    sums = _add_values(
        sums, p, shrink, v_ptr, offs_n, end, 0, V_BLOCK, N_BYTES, V_BITS, CHECKED, ASM
    )
    if V_REST:
        sums_rest = _add_values(
            sums_rest, p, shrink, v_ptr, offs_n, end, V_BLOCK, V_REST, N_BYTES, V_BITS, CHECKED, ASM
        )
    return new_largest, total, sums, sums_rest


# --- the kernels ------------------------------------------------------------------------------


@triton.jit
def _load_queries(
    at, range_ptr, mask_r, FIRST: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
    RANGED: tl.constexpr,
):  # fmt: skip
    """float32 (BLOCK / 2, BLOCK_R) of the even channels from FIRST on, the same of the odd ones,
    and the largest of either in every row."""
    channels = FIRST + 2 * tl.arange(0, BLOCK // 2)
    mask = (channels < D)[:, None] & mask_r[None, :]
    even = tl.load(at[None, :] + channels[:, None], mask, other=0.0).to(tl.float32)
    odd = tl.load(at[None, :] + (channels + 1)[:, None], mask, other=0.0).to(tl.float32)
    if RANGED:
        even *= tl.load(range_ptr + channels, channels < D, other=0.0)[:, None]
        odd *= tl.load(range_ptr + channels + 1, channels < D, other=0.0)[:, None]
    return even, odd, tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), 0)


@triton.jit
def _no_sums(BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, V_BITS: tl.constexpr):
    zeros = tl.zeros([BLOCK // 2, BLOCK_R], tl.float32)
    if V_BITS == 8:
        return zeros, zeros
    else:  # noqa: RET505
        return zeros, zeros, zeros, zeros


@triton.jit
def _store_sums(
    to, sums, factor, mask_r, FIRST: tl.constexpr, BLOCK: tl.constexpr, N_BYTES: tl.constexpr,
    V_BITS: tl.constexpr,
):  # fmt: skip
    """sums * factor, into the rows that `to` points to."""
    offs = FIRST + tl.arange(0, BLOCK)
    mask = mask_r[:, None] & (offs < N_BYTES)[None, :]
    to = to[:, None] + offs[None, :]
    factor = factor[:, None]
    v = tl.interleave(tl.trans(sums[0]), tl.trans(sums[1])) * factor
    tl.store(to, v.to(to.dtype.element_ty), mask)
    if V_BITS == 4:
        v = tl.interleave(tl.trans(sums[2]), tl.trans(sums[3])) * factor
        tl.store(to + N_BYTES, v.to(to.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["length", "tokens_per_split", "n_splits"])
def split_kernel(
    a_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, range_ptr, mask_ptr,
    out_ptr, part_ptr, largest_ptr, total_ptr,
    scaling, length, capacity, heads, tokens_per_split, n_splits,
    stride_ab, stride_ah, stride_aq, stride_ob, stride_oh, stride_oq,
    stride_mb, stride_mh, stride_mq,
    GROUP: tl.constexpr, N_QUERIES: tl.constexpr,
    D: tl.constexpr, K_BLOCK: tl.constexpr, K_REST: tl.constexpr,
    V_BITS: tl.constexpr, V_BLOCK: tl.constexpr, V_REST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SLOTS: tl.constexpr, ROW_BLOCKS: tl.constexpr,
    RANGED: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Grid (batch x heads x row blocks, splits). Row g * N_QUERIES + i is query i of head g.

    SPLIT: write sums over this program's tokens, their total and largest exponent; else the result.
    """
    head_of_batch = tl.program_id(0) // ROW_BLOCKS  # neighbours read the same K and V
    batch = (head_of_batch // heads).to(tl.int64)
    head = head_of_batch % heads
    rows = tl.program_id(0) % ROW_BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = rows < GROUP * N_QUERIES
    query = rows % N_QUERIES
    query_head = head * GROUP + rows // N_QUERIES

    at = a_ptr + batch * stride_ab + query_head.to(tl.int64) * stride_ah + query * stride_aq
    range_ptr += head * D
    even, odd, height = _load_queries(at, range_ptr, mask_r, 0, K_BLOCK, D, RANGED)
    if K_REST:
        even_rest, odd_rest, height_rest = _load_queries(
            at, range_ptr, mask_r, K_BLOCK, K_REST, D, RANGED
        )
        height = tl.maximum(height, height_rest)
    height = tl.max(tl.where(height < float("inf"), height, 0.0), 0)  # a broken row breaks no other
    height = tl.where(height > _LEAST_SCALE, height, 1.0)
    height = (height.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    a = (even / height).to(tl.float16), (odd / height).to(tl.float16)
    a_rest = a
    if K_REST:
        a_rest = (even_rest / height).to(tl.float16), (odd_rest / height).to(tl.float16)
    raised = tl.sum(a[0].to(tl.float32) + a[1].to(tl.float32), 0)
    if K_REST:
        raised += tl.sum(a_rest[0].to(tl.float32) + a_rest[1].to(tl.float32), 0)
    raised *= -_RAISED
    a_scale = height * (scaling * _LOG2E)

    N_BYTES: tl.constexpr = D * V_BITS // 8
    at_head = head_of_batch.to(tl.int64) * capacity
    k_ptr = (k_ptr + at_head * D).to(tl.pointer_type(tl.uint16))
    v_ptr = (v_ptr + at_head * N_BYTES).to(tl.pointer_type(tl.uint16))
    k_scale_ptr += at_head
    v_scale_ptr += at_head * (8 // V_BITS)
    mask_ptr += batch * stride_mb
    mask_rows = tl.where(mask_r, query_head * stride_mh + query * stride_mq, 0)
    last_seen = length - N_QUERIES + query

    largest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([SLOTS, BLOCK_R], tl.float32)  # apart: tiles exchange nothing
    sums = _no_sums(V_BLOCK, BLOCK_R, V_BITS)
    sums_rest = sums
    if V_REST:
        sums_rest = _no_sums(V_REST, BLOCK_R, V_BITS)
    split = tl.program_id(1)
    start = split * tokens_per_split
    end = tl.minimum(start + tokens_per_split, length)
    seen_by_all = end
    if CAUSAL:
        seen_by_all = tl.minimum(end, length - N_QUERIES + 1)
    n_full = tl.maximum(seen_by_all - start, 0) // BLOCK_N
    full = start + n_full * BLOCK_N
    for n in range(start, full, BLOCK_N):
        largest, total, sums, sums_rest = _tile(
            k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, mask_ptr, mask_rows, last_seen,
            a, a_rest, raised, a_scale, largest, total, sums, sums_rest, n, end, capacity,
            D, K_BLOCK, K_REST, V_BITS, V_BLOCK, V_REST, BLOCK_R, BLOCK_N, SLOTS,
            MASK, CAUSAL, False, ASM,
        )  # fmt: skip
    for n in tl.range(full, end, BLOCK_N, num_stages=1):
        largest, total, sums, sums_rest = _tile(
            k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, mask_ptr, mask_rows, last_seen,
            a, a_rest, raised, a_scale, largest, total, sums, sums_rest, n, end, capacity,
            D, K_BLOCK, K_REST, V_BITS, V_BLOCK, V_REST, BLOCK_R, BLOCK_N, SLOTS,
            MASK, CAUSAL, True, ASM,
        )  # fmt: skip

    total = tl.sum(total, 0)
    if SPLIT:
        to_row = (head_of_batch.to(tl.int64) * (GROUP * N_QUERIES) + rows) * n_splits + split
        tl.store(largest_ptr + to_row, largest, mask_r)
        tl.store(total_ptr + to_row, total, mask_r)
        to = part_ptr + to_row * D
        factor = tl.full([BLOCK_R], 1.0, tl.float32)
    else:
        factor = 1.0 / tl.where(total > 0.0, total, 1.0)
        factor = tl.where(total == total, factor, total)  # NaN stays
        to = out_ptr + batch * stride_ob + query_head.to(tl.int64) * stride_oh + query * stride_oq
    _store_sums(to, sums, factor, mask_r, 0, V_BLOCK, N_BYTES, V_BITS)
    if V_REST:
        _store_sums(to, sums_rest, factor, mask_r, V_BLOCK, V_REST, N_BYTES, V_BITS)


@triton.jit(do_not_specialize=["n_splits"])
def join_kernel(
    part_ptr, largest_ptr, total_ptr, out_ptr, n_splits, n_heads, n_queries,
    stride_ob, stride_oh, stride_oq,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (batch x query heads x n_queries): the parts of one query, weighted and added."""
    row = tl.program_id(0)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    mask_s = offs_s < n_splits
    at = row.to(tl.int64) * n_splits + offs_s
    largest = tl.load(largest_ptr + at, mask_s, other=float("-inf"))
    total = tl.load(total_ptr + at, mask_s, other=0.0)
    top = tl.max(largest, 0)
    weight = tl.exp2(largest - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(total * weight, 0)
    mask = mask_s[:, None] & (offs_d < D)[None, :]
    part = tl.load(part_ptr + at[:, None] * D + offs_d[None, :], mask, other=0.0)
    out = tl.sum(part * weight[:, None], 0)
    out = tl.where(total == 0.0, 0.0, out / tl.where(total == 0.0, 1.0, total))
    query = row % n_queries
    head = (row // n_queries) % n_heads
    batch = (row // n_queries // n_heads).to(tl.int64)
    to = out_ptr + batch * stride_ob + head.to(tl.int64) * stride_oh + query * stride_oq
    tl.store(to + offs_d, out.to(out_ptr.dtype.element_ty), offs_d < D)


PTX = isinstance(split_kernel, triton.JITFunction) and torch.version.hip is None
"""Whether inline assembly is understood: not by Triton's interpreter, nor by AMD's machines."""


# --- how it is launched -----------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Sizes of a launch; each compiles to other code."""

    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int  # that fit by registers and shared memory


CONFIGS = {  # head sizes up to -> found by counting instructions: scripts/check_kernels.py
    32: Config(128, 1, 2, 9),
    48: Config(64, 1, 2, 9),
    64: Config(32, 1, 2, 14),
    96: Config(32, 1, 2, 10),
    128: Config(64, 2, 2, 6),
    192: Config(64, 2, 2, 5),
    256: Config(32, 2, 2, 6),
}
"""Warps share V by 16 pairs of channels, so more of them would do the same work twice."""

OPTIONS = {"enable_fp_fusion": True}  # Triton 3.10 no longer fuses by itself
SPLIT_OPTIONS = OPTIONS | ({"maxnreg": 255} if PTX else {})
"""Without a limit of one's own ptxas spills two registers or six, to stay below 128 or 168."""


def config_of(head_size: int) -> Config:
    return next(config for size, config in CONFIGS.items() if head_size <= size)


def tiles_of(n_bytes: int) -> tuple[int, int]:
    """The widths of the two tiles that hold a row of n_bytes; the second is 0 where one will do.

    Powers of two, and at least 32 bytes, or 16 pairs: tensor cores multiply no fewer.
    """
    whole = max(32, triton.next_power_of_2(n_bytes))
    half = whole // 2
    rest = max(32, triton.next_power_of_2(max(1, n_bytes - half)))
    return (half, rest) if rest < half else (whole, 0)


def block_r(n_rows: int, head_size: int, v_bits: int, mask_kind: int) -> int:
    """Rows of queries of a program: 8, or 16 if there are so many, and not too narrow for them.

    Where there are more, several programs read the same K and V, one from memory and the others
    from the second-level cache.
    """
    wide = head_size * v_bits // 8 >= 64
    return 16 if n_rows > 8 and wide and mask_kind != MASK_ROWS else 8


def sizes_of(head_size: int, v_bits: int, config: Config) -> dict[str, int]:
    """The arguments of split_kernel that follow from these."""
    k_block, k_rest = tiles_of(head_size)
    v_block, v_rest = tiles_of(head_size * v_bits // 8)
    return {
        "D": head_size, "K_BLOCK": k_block, "K_REST": k_rest,
        "V_BITS": v_bits, "V_BLOCK": v_block, "V_REST": v_rest,
        "BLOCK_N": config.block_n, "SLOTS": min(16 * config.num_warps, config.block_n),
    }  # fmt: skip


MAX_SPLITS = 64
MIN_TILES = 4
"""A part shorter than this many tiles costs more to start and to join than it saves."""


def choose_splits(n_programs: int, length: int, n_slots: int, block_n: int) -> int:
    """Into how many parts the tokens are split, if `n_slots` programs run at the same time.

    Programs run in waves of n_slots; the fewest parts that fill the waves 90 % as well as any.
    # ref: num_splits_heuristic in FlashAttention's flash_api.cpp
    """
    most = max(1, min(MAX_SPLITS, length // (MIN_TILES * block_n)))
    filled = []
    for n_splits in range(1, most + 1):
        waves = n_programs * n_splits / n_slots
        filled.append(waves / -(-n_programs * n_splits // n_slots))
    enough = 0.9 * max(filled)
    return next(i for i, part in enumerate(filled, 1) if part >= enough)


def _mask_arguments(
    mask: torch.Tensor | None, any_pointer: torch.Tensor
) -> tuple[torch.Tensor, int, tuple[int, int, int]]:
    """The mask as numbers to be added, its kind, and its strides over batch, heads and queries.

    float32: 16 bits would have to be widened for every query and token, an instruction an element.
    """
    if mask is None:
        return any_pointer, MASK_NONE, (0, 0, 0)
    if mask.ndim == 2:
        mask = mask[:, None, None]
    if not mask.is_floating_point():
        mask = torch.where(mask.bool(), 0.0, -torch.inf)
    mask = mask.float()
    if mask.stride(-1) != 1:
        mask = mask.contiguous()
    kind = MASK_TOKENS if mask.shape[1] == mask.shape[2] == 1 else MASK_ROWS
    if mask[0].numel() >= 2**31:
        raise ValueError(f"a mask of {tuple(mask.shape)}: fewer than 2^31 for each of the batch")
    strides = [0 if n == 1 else stride for n, stride in zip(mask.shape, mask.stride(), strict=True)]
    return mask, kind, tuple(strides[:3])


def decode_attention(
    a: torch.Tensor,
    kv: QuantizedKV,
    mask: torch.Tensor | None,
    scaling: float,
    *,
    config: Config | None = None,
    n_splits: int | None = None,
) -> torch.Tensor:
    """See decode_attention.py. `config` and `n_splits` are chosen unless given."""
    batch, n_heads, n_queries, head_size = a.shape
    heads, bits = kv.k.shape[1], kv.value_bits
    group = n_heads // heads
    if a.stride(-1) != 1:
        a = a.contiguous()
    config = config or config_of(head_size)
    mask_argument, mask_kind, mask_strides = _mask_arguments(mask, a)
    rows = block_r(group * n_queries, head_size, bits, mask_kind)
    row_blocks = triton.cdiv(group * n_queries, rows)
    if n_splits is None:
        n_splits = choose_splits(
            batch * heads * row_blocks,
            kv.length,
            _n_multiprocessors(a.device) * config.programs_per_sm,
            config.block_n,
        )
    tiles = triton.cdiv(kv.length, config.block_n)
    tokens_per_split = triton.cdiv(tiles, n_splits) * config.block_n
    n_splits = triton.cdiv(kv.length, tokens_per_split)

    out = torch.empty(batch, n_queries, n_heads, head_size, dtype=a.dtype, device=a.device)
    out = out.transpose(1, 2)
    n_parts = batch * n_heads * n_queries * n_splits if n_splits > 1 else 0
    parts = torch.empty(n_parts, head_size, dtype=torch.float32, device=a.device)
    largest, total = torch.empty(2, n_parts, dtype=torch.float32, device=a.device)
    spread = kv.channels.range.contiguous() if kv.channels is not None else kv.k_scale
    with torch.cuda.device_of(a):
        split_kernel[(batch * heads * row_blocks, n_splits)](
            a, kv.k, kv.k_scale, kv.v, kv.v_scale, spread, mask_argument,
            out, parts, largest, total,
            scaling, kv.length, kv.capacity, heads, tokens_per_split, n_splits,
            *a.stride()[:3], *out.stride()[:3], *mask_strides,
            GROUP=group, N_QUERIES=n_queries, BLOCK_R=rows, ROW_BLOCKS=row_blocks,
            RANGED=kv.channels is not None, MASK=mask_kind,
            CAUSAL=n_queries > 1 and (mask is None or mask.ndim == 2),
            SPLIT=n_splits > 1, ASM=PTX, **sizes_of(head_size, bits, config),
            num_warps=config.num_warps, num_stages=config.num_stages, **SPLIT_OPTIONS,
        )  # fmt: skip
        if n_splits > 1:
            join_kernel[(batch * n_heads * n_queries,)](
                parts, largest, total, out, n_splits, n_heads, n_queries, *out.stride()[:3],
                D=head_size, BLOCK_D=triton.next_power_of_2(head_size),
                BLOCK_S=triton.next_power_of_2(n_splits), num_warps=4, **OPTIONS,
            )  # fmt: skip
    return out


def _n_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
