"""Decode attention over int8 in Triton: 2.2 to 3.5 instructions for every element of K and V read.

At the speed of an H200's memory each multiprocessor is handed some 17 elements a clock and has 128
lanes, so more than 7 instructions an element and the memory waits. A plain Triton kernel takes 6.7:
it converts integers one by one and reads V byte by byte from shared memory. What brings it down:

- K and V are loaded as 16-bit pairs of channels, (2j, 2j + 1). The even and the odd channels are
  two half-wide matrices: s = a_even . K_even + a_odd . K_odd, and V gives two accumulators.
- Stored bytes are offset by 128, so that 0x6400 | byte is the float16 1024 + byte: one PRMT for two
  elements puts the bytes in place, one HSUB2 takes off 1152. float16 for bfloat16 models as well:
  8 bits do not fit bfloat16's mantissa.
- The scales are applied to the scores: one multiplication a token instead of head_size.
- The bounds of the loop are checked only in its last tiles.

The `group` query heads of a head of K, and the queries, are the rows of one 16-row matrix product,
so K and V are read once for all of them. The tokens are split among programs where batch x heads
would leave multiprocessors idle; a second, small kernel joins the parts in a fixed order: no
atomics, so results repeat to the bit.

How values keep their float16 range: rows of `a` are divided by a power of two, and p * vs is one
exponential, with the logarithm of the scale in the exponent, under a running maximum of its own:

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

MASK_NONE, MASK_TOKENS, MASK_ROWS = range(3)
"""Nothing is hidden; one number a token, added to its logits; one for every query as well."""

# --- bytes to float16 -------------------------------------------------------------------------


@triton.jit
def _unpack_bytes(x, ASM: tl.constexpr):
    """uint16 pairs of bytes q + 128 -> float16 of the lower bytes, float16 of the upper ones."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 lower, upper, offset;
            mov.b32 offset, 0x64806480;
            prmt.b32 lower, $2, 0x64646464, 0x4240;
            prmt.b32 upper, $2, 0x64646464, 0x4341;
            sub.f16x2 $0, lower, offset;
            sub.f16x2 $1, upper, offset;
            }
            """,
            constraints="=r,=r,r", args=[x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:  # noqa: RET505 - in Triton both branches of a constexpr must end here
        lower = ((x & 0xFF) | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)
        upper = ((x >> 8) | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)
        return (lower - 1152.0).to(tl.float16), (upper - 1152.0).to(tl.float16)


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
def _load_pairs(ptr, offs_n, offs_p, mask_n, N: tl.constexpr, BLOCK: tl.constexpr,
                CHECKED: tl.constexpr):  # fmt: skip
    """Rows of N byte pairs, (BLOCK_N, BLOCK) uint16. What is masked is irrelevant, but finite."""
    at = ptr + offs_n[:, None] * N + offs_p[None, :]
    if CHECKED:
        mask = mask_n[:, None]
        if N != BLOCK:
            mask = mask & (offs_p < N)[None, :]
        return tl.load(at, mask, other=0)
    elif N != BLOCK:  # noqa: RET505
        return tl.load(at, (offs_p < N)[None, :], other=0)
    else:
        return tl.load(at)


@triton.jit
def _tile(
    k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, mask_ptr, mask_rows, last_seen,
    a_even, a_odd, row_scale, largest, total, v0, v1, v2, v3,
    start, end, capacity,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, V_BITS: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, CHECKED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add BLOCK_N tokens from `start` on to the running sums; CHECKED: only those before `end`."""
    offs_n = start + tl.arange(0, BLOCK_N)
    mask_n = offs_n < end
    offs_k = tl.arange(0, BLOCK_D // 2)
    k = _load_pairs(k_ptr, offs_n, offs_k, mask_n, D // 2, BLOCK_D // 2, CHECKED)
    if CHECKED:
        k_scale = tl.load(k_scale_ptr + offs_n, mask_n, other=0.0)
        v_scale = tl.load(v_scale_ptr + offs_n, mask_n, other=1.0)
    else:
        k_scale = tl.load(k_scale_ptr + offs_n)
        v_scale = tl.load(v_scale_ptr + offs_n)
    if V_BITS == 4:
        if CHECKED:
            upper_scale = tl.load(v_scale_ptr + capacity + offs_n, mask_n, other=1.0)
        else:
            upper_scale = tl.load(v_scale_ptr + capacity + offs_n)
    if MASK == 1:
        if CHECKED:
            added = tl.load(mask_ptr + offs_n, mask_n, other=0.0).to(tl.float32)
        else:
            added = tl.load(mask_ptr + offs_n).to(tl.float32)
        seen = added > _HIDES
        added = tl.where(seen, tl.where(seen, added, 0.0) * _LOG2E, float("-inf"))
        k_scale = tl.where(seen, k_scale, 0.0)  # a scale that is NaN must not reach the sums
        v_scale = tl.where(seen, v_scale, 1.0)
        if V_BITS == 4:
            upper_scale = tl.where(seen, upper_scale, 1.0)
    if V_BITS == 4:
        lower_scale = v_scale
        v_scale = tl.maximum(lower_scale, upper_scale)
    v_scale = tl.where(v_scale < _LEAST_SCALE, _LEAST_SCALE, v_scale)

    k_even, k_odd = _unpack_bytes(k, ASM)  # (BLOCK_N, BLOCK_D / 2) each
    scores = tl.dot(a_even, tl.trans(k_even))  # (BLOCK_M, BLOCK_N)
    scores = tl.dot(a_odd, tl.trans(k_odd), scores) * k_scale[None, :]
    exponent = _log2(v_scale, ASM)
    if MASK == 1:
        exponent += added
    scores = scores * row_scale[:, None] + exponent[None, :]
    if MASK == 2:
        at = mask_ptr + mask_rows[:, None] + offs_n[None, :]
        if CHECKED:
            added = tl.load(at, mask_n[None, :], other=0.0).to(tl.float32)
        else:
            added = tl.load(at).to(tl.float32)
        seen_by = added > _HIDES
        scores += tl.where(seen_by, added, 0.0) * _LOG2E
        scores = tl.where(seen_by, scores, float("-inf"))
    if CHECKED:
        if CAUSAL:
            scores = tl.where(offs_n[None, :] <= last_seen[:, None], scores, float("-inf"))
        scores = tl.where(mask_n[None, :], scores, float("-inf"))

    new_largest = tl.maximum(largest, tl.max(scores, 1))
    reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # nothing seen so far
    p = _exp2(scores - reference[:, None], ASM)  # times its v_scale, in units of the largest
    shrink = _exp2(largest - reference, ASM)
    inverse = _inverse(v_scale, ASM)
    total = total * shrink + tl.sum(p * inverse[None, :], 1)

    if V_BITS == 8:
        v = _load_pairs(v_ptr, offs_n, offs_k, mask_n, D // 2, BLOCK_D // 2, CHECKED)
        even, odd = _unpack_bytes(v, ASM)
        p16 = p.to(tl.float16)
        v0 = tl.dot(p16, even, v0 * shrink[:, None])  # (BLOCK_M, BLOCK_D / 2)
        v1 = tl.dot(p16, odd, v1 * shrink[:, None])
    else:
        offs_v = tl.arange(0, BLOCK_D // 4)
        v = _load_pairs(v_ptr, offs_n, offs_v, mask_n, D // 4, BLOCK_D // 4, CHECKED)
        lower_even, lower_odd, upper_even, upper_odd = _unpack_nibbles(v, ASM)
        p_lower = (p * (lower_scale * inverse)[None, :]).to(tl.float16)
        p_upper = (p * (upper_scale * inverse)[None, :]).to(tl.float16)
        v0 = tl.dot(p_lower, lower_even, v0 * shrink[:, None])  # (BLOCK_M, BLOCK_D / 4)
        v1 = tl.dot(p_lower, lower_odd, v1 * shrink[:, None])
        v2 = tl.dot(p_upper, upper_even, v2 * shrink[:, None])
        v3 = tl.dot(p_upper, upper_odd, v3 * shrink[:, None])
    return new_largest, total, v0, v1, v2, v3


# --- the kernels ------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["length", "tokens_per_split", "n_splits"])
def split_kernel(
    a_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, range_ptr, mask_ptr,
    out_ptr, part_ptr, largest_ptr, total_ptr,
    scaling, length, capacity, heads, tokens_per_split, n_splits,
    stride_ab, stride_ah, stride_aq, stride_ob, stride_oh, stride_oq,
    stride_mb, stride_mh, stride_mq,
    GROUP: tl.constexpr, N_QUERIES: tl.constexpr, D: tl.constexpr, V_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ROW_BLOCKS: tl.constexpr,
    RANGED: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Grid (batch x heads x row blocks, splits). Row g * N_QUERIES + i is query i of head g.

    SPLIT: write sums over this program's tokens, their total and largest exponent; else the result.
    """
    head_of_batch = tl.program_id(0) // ROW_BLOCKS  # neighbours read the same K and V
    batch = (head_of_batch // heads).to(tl.int64)
    head = head_of_batch % heads
    rows = tl.program_id(0) % ROW_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < GROUP * N_QUERIES
    query = rows % N_QUERIES
    query_head = head * GROUP + rows // N_QUERIES
    offs_p = tl.arange(0, BLOCK_D // 2)

    at = a_ptr + batch * stride_ab + query_head.to(tl.int64) * stride_ah + query * stride_aq
    mask_a = mask_m[:, None] & (2 * offs_p < D)[None, :]
    a_even = tl.load(at[:, None] + 2 * offs_p[None, :], mask_a, other=0.0).to(tl.float32)
    a_odd = tl.load(at[:, None] + 2 * offs_p[None, :] + 1, mask_a, other=0.0).to(tl.float32)
    if RANGED:
        at_range = range_ptr + head * D + 2 * offs_p
        a_even *= tl.load(at_range, 2 * offs_p < D, other=0.0)[None, :]
        a_odd *= tl.load(at_range + 1, 2 * offs_p < D, other=0.0)[None, :]
    height = tl.maximum(tl.max(tl.abs(a_even), 1), tl.max(tl.abs(a_odd), 1))
    height = tl.where(height > _LEAST_SCALE, height, 1.0)
    height = (height.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    a_even = (a_even / height[:, None]).to(tl.float16)  # a power of two: nothing is rounded
    a_odd = (a_odd / height[:, None]).to(tl.float16)
    row_scale = height * (scaling * _LOG2E)

    at_head = head_of_batch.to(tl.int64) * capacity
    k_ptr = (k_ptr + at_head * D).to(tl.pointer_type(tl.uint16))
    v_ptr = (v_ptr + at_head * (D * V_BITS // 8)).to(tl.pointer_type(tl.uint16))
    k_scale_ptr += at_head
    v_scale_ptr += at_head * (8 // V_BITS)
    mask_ptr += batch * stride_mb
    mask_rows = tl.where(mask_m, query_head * stride_mh + query * stride_mq, 0)
    last_seen = length - N_QUERIES + query

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    N_V: tl.constexpr = BLOCK_D // 2 if V_BITS == 8 else BLOCK_D // 4
    v0 = tl.zeros([BLOCK_M, N_V], tl.float32)
    v1 = tl.zeros([BLOCK_M, N_V], tl.float32)
    v2 = v0
    v3 = v1
    split = tl.program_id(1)
    start = split * tokens_per_split
    end = tl.minimum(start + tokens_per_split, length)
    seen_by_all = end
    if CAUSAL:
        seen_by_all = tl.minimum(end, length - N_QUERIES + 1)
    n_full = tl.maximum(seen_by_all - start, 0) // BLOCK_N
    full = start + n_full * BLOCK_N
    for n in range(start, full, BLOCK_N):
        largest, total, v0, v1, v2, v3 = _tile(
            k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, mask_ptr, mask_rows, last_seen,
            a_even, a_odd, row_scale, largest, total, v0, v1, v2, v3, n, end, capacity,
            D, BLOCK_D, BLOCK_N, V_BITS, MASK, CAUSAL, False, ASM,
        )  # fmt: skip
    for n in tl.range(full, end, BLOCK_N, num_stages=1):
        largest, total, v0, v1, v2, v3 = _tile(
            k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, mask_ptr, mask_rows, last_seen,
            a_even, a_odd, row_scale, largest, total, v0, v1, v2, v3, n, end, capacity,
            D, BLOCK_D, BLOCK_N, V_BITS, MASK, CAUSAL, True, ASM,
        )  # fmt: skip

    if SPLIT:
        to_row = (head_of_batch.to(tl.int64) * (GROUP * N_QUERIES) + rows) * n_splits + split
        tl.store(largest_ptr + to_row, largest, mask_m)
        tl.store(total_ptr + to_row, total, mask_m)
        to = part_ptr + to_row * D
    else:
        inverse = 1.0 / tl.where(total > 0.0, total, 1.0)
        inverse = tl.where(total == total, inverse, total)  # NaN stays
        v0 *= inverse[:, None]
        v1 *= inverse[:, None]
        if V_BITS == 4:
            v2 *= inverse[:, None]
            v3 *= inverse[:, None]
        to = out_ptr + batch * stride_ob + query_head.to(tl.int64) * stride_oh + query * stride_oq
    offs_v = tl.arange(0, 2 * N_V)
    mask_v = mask_m[:, None] & (offs_v < D * V_BITS // 8)[None, :]
    v = tl.interleave(v0, v1)
    tl.store(to[:, None] + offs_v[None, :], v.to(to.dtype.element_ty), mask_v)
    if V_BITS == 4:
        v = tl.interleave(v2, v3)
        tl.store(to[:, None] + D // 2 + offs_v[None, :], v.to(to.dtype.element_ty), mask_v)


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


BLOCK_M = 16
"""Rows of queries of a program: the least that tensor cores multiply. Where there are more, several
programs read the same K and V, one from memory and the others from the second-level cache."""

CONFIGS = {  # channels of a tile -> found by counting instructions: scripts/check_kernels.py
    64: Config(128, 2, 2, 6),
    128: Config(128, 4, 2, 3),
    256: Config(64, 4, 2, 3),
}


def block_d(head_size: int) -> int:
    """Channels of a tile: a power of two; halves of fewer than 32 are too narrow for two warps."""
    return max(64, triton.next_power_of_2(head_size))


OPTIONS = {"enable_fp_fusion": True}  # Triton 3.10 no longer fuses by itself

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
    """The mask as numbers to be added, its kind, and its strides over batch, heads and queries."""
    if mask is None:
        return any_pointer, MASK_NONE, (0, 0, 0)
    if mask.ndim == 2:
        mask = mask[:, None, None]
    if not mask.is_floating_point():
        mask = torch.where(mask.bool(), 0.0, -torch.inf)
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
    config = config or CONFIGS[block_d(head_size)]
    row_blocks = triton.cdiv(group * n_queries, BLOCK_M)
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
    mask_argument, mask_kind, mask_strides = _mask_arguments(mask, out)
    spread = kv.channels.range.contiguous() if kv.channels is not None else kv.k_scale
    with torch.cuda.device_of(a):
        split_kernel[(batch * heads * row_blocks, n_splits)](
            a, kv.k, kv.k_scale, kv.v, kv.v_scale, spread, mask_argument,
            out, parts, largest, total,
            scaling, kv.length, kv.capacity, heads, tokens_per_split, n_splits,
            *a.stride()[:3], *out.stride()[:3], *mask_strides,
            GROUP=group, N_QUERIES=n_queries, D=head_size, V_BITS=bits,
            BLOCK_M=BLOCK_M, BLOCK_N=config.block_n, BLOCK_D=block_d(head_size),
            ROW_BLOCKS=row_blocks,
            RANGED=kv.channels is not None, MASK=mask_kind,
            CAUSAL=n_queries > 1 and (mask is None or mask.ndim == 2),
            SPLIT=n_splits > 1, ASM=PTX,
            num_warps=config.num_warps, num_stages=config.num_stages, **OPTIONS,
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
