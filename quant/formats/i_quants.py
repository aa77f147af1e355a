"""llama.cpp's I types: the smallest formats, 1.6 to 4.5 bits per weight, most of them by codebooks.

Below 4 bits, a level for every weight wastes bits: most rows of levels hardly occur. IQ1 to IQ3
store, for 8 weights (4 in IQ3), which row of a fixed codebook of 256 to 2048 they are rounded to:

    IQ2 IQ3         w ~ d * (2 * scale + 1) * sign * (2 * level + 1)
    IQ1             w ~ d * (2 * scale + 1) * (level - 1 + delta), delta = +-1/8
    IQ4_NL IQ4_XS   w ~ d * scale * value[q], 16 uneven values, no codebook

At equal size their error is well below a K type's; they pay for it in encoding time, and in speed
on processors where table look-ups are slow. Where 8 weights have 7 bits of signs (IQ2_XXS, IQ2_XS,
IQ3_XXS) their minus signs are even in number: an odd one is mended by flipping the weight that
matters least. Without an importance matrix, errors of large weights count more; IQ2_XXS, IQ2_XS
and IQ1_S are not to be had without one.

Bytes are those of llama.cpp's library on x86-64.
# ref: ggml/src/ggml-common.h of llama.cpp for the layouts
"""

from collections.abc import Callable

import numpy as np

from quant.formats.format import Float16Overflow, Format, kernel_format

SUPER_BLOCK = 256

REFUSES_WITHOUT_IMPORTANCE = frozenset({"IQ1_S", "IQ2_XXS", "IQ2_XS"})
"""Types that ggml encodes only with an importance matrix. # ref: ggml_quantize_requires_imatrix"""

Fields = list[np.ndarray]
"""The fields of all blocks in their order in a block: integers or float16 (n_blocks, any)."""


def _format(
    name: str,
    ggml_type: int,
    block_size: int,
    block_nbytes: int,
    fields: Callable[[np.ndarray, np.ndarray], Fields],
) -> Format:
    """`fields` takes flat weights and importance (empty if there is none)."""

    def run(w: np.ndarray, importance: np.ndarray, out: np.ndarray) -> bool:
        if name in REFUSES_WITHOUT_IMPORTANCE and not len(importance):
            raise ValueError(f"{name} needs an importance matrix")
        if not len(w):
            return True
        try:
            parts = fields(w, importance)
        except Float16Overflow:
            return False
        blocks = [np.ascontiguousarray(part).view(np.uint8) for part in parts]
        np.concatenate(blocks, axis=1, out=out.reshape(-1, block_nbytes))
        return True

    return kernel_format(name, ggml_type, block_size, block_nbytes, run)


# --- fields from numbers -------------------------------------------------------------------------


def _float16(d: np.ndarray) -> np.ndarray:
    """d (n,) as float16 (n, 1). Raises Float16Overflow if one becomes infinite."""
    with np.errstate(over="ignore"):
        half = d.astype("<f2")
    if not np.isfinite(half).all():
        raise Float16Overflow
    return half[:, None]


def _join(values: np.ndarray, n: int, width: int, dtype: str) -> np.ndarray:
    """Every n consecutive numbers of `width` bits as one integer, first lowest: (n_blocks, any)."""
    values = values.reshape(len(values), -1, n).astype(dtype)
    return np.bitwise_or.reduce(values << (width * np.arange(n)).astype(dtype), axis=2)


def _low_bytes(points: np.ndarray) -> np.ndarray:
    return (points & 255).astype(np.uint8).reshape(len(points), -1)


# --- 4 bits: 16 values ---------------------------------------------------------------------------


def _search_values(w: np.ndarray, importance: np.ndarray, n_blocks: int) -> tuple[np.ndarray, ...]:
    """d (n,), scale codes (n, n_blocks) and pairs of levels (n, n_blocks * 16)."""
    from quant.formats.iq_kernels_iq4 import encode, new_work

    n = w.size // (32 * n_blocks)
    d = np.empty(n, np.float32)
    scale_codes = np.empty((n, n_blocks), np.uint8)
    qs = np.empty((n, n_blocks, 16), np.uint8)
    if not encode(w, importance, new_work(n_blocks), d, scale_codes, qs):
        raise Float16Overflow
    return d, scale_codes, qs.reshape(n, -1)


def _iq4_nl(w: np.ndarray, importance: np.ndarray) -> Fields:
    d, _, qs = _search_values(w, importance, 1)
    return [_float16(d), qs]


def _iq4_xs(w: np.ndarray, importance: np.ndarray) -> Fields:
    d, codes, qs = _search_values(w, importance, 8)
    return [_float16(d), _join(codes >> 4, 8, 2, "<u2"), _join(codes & 15, 2, 4, "u1"), qs]


# --- 1 to 3 bits: codebooks ----------------------------------------------------------------------


def _search_points(
    grid_name: str,
    kernel: Callable[..., bool],
    new_work: Callable[..., tuple],
    shape: tuple[int, int, int],
    w: np.ndarray,
    importance: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """Points, signs (or shifts of IQ1), scale codes (n, n_blocks) and d (n,).

    `shape` is (n_blocks, points of a block, signs of a block).
    """
    from quant.formats.iq_grids import grid_of

    grid = grid_of(grid_name)
    n = w.size // SUPER_BLOCK
    n_blocks, n_points, n_signs = shape
    points = np.zeros((n, n_blocks, n_points), np.uint16)
    signs = np.zeros((n, n_blocks, n_signs), np.uint8)
    scale_codes = np.zeros((n, n_blocks), np.uint8)
    d = np.empty(n, np.float32)
    if not kernel(w, importance, grid, *new_work(grid), points, signs, scale_codes, d):
        raise Float16Overflow
    return points, signs, scale_codes, d


def _iq3_xxs(w: np.ndarray, importance: np.ndarray) -> Fields:
    from quant.formats.iq_kernels_iq3 import encode_xxs, new_work

    points, signs, codes, d = _search_points(
        "IQ3_XXS", encode_xxs, new_work, (8, 8, 4), w, importance
    )
    signs_and_scales = _join(signs, 4, 7, "<u4") | codes.astype("<u4") << 28
    return [_float16(d * np.float32(1.0125)), _low_bytes(points), signs_and_scales]


def _iq3_s(w: np.ndarray, importance: np.ndarray) -> Fields:
    from quant.formats.iq_kernels_iq3 import encode_s, new_work

    points, signs, codes, d = _search_points("IQ3_S", encode_s, new_work, (8, 8, 4), w, importance)
    return [
        _float16(d * np.float32(1.033)),
        _low_bytes(points),
        _join(points >> 8, 8, 1, "u1"),
        signs.reshape(len(d), -1),
        _join(codes, 2, 4, "u1"),
    ]


def _iq2_xxs(w: np.ndarray, importance: np.ndarray) -> Fields:
    from quant.formats.iq_kernels_iq2 import encode_xxs, new_work_xxs

    points, signs, codes, d = _search_points(
        "IQ2_XXS", encode_xxs, new_work_xxs, (8, 4, 4), w, importance
    )
    signs_and_scales = _join(signs, 4, 7, "<u4") | codes.astype("<u4") << 28
    words = np.stack([_join(points, 4, 8, "<u4"), signs_and_scales], axis=2)  # (n, 8, 2)
    return [_float16(d), words.reshape(len(d), -1)]


def _iq2_xs(w: np.ndarray, importance: np.ndarray) -> Fields:
    from quant.formats.iq_kernels_iq2 import encode_xs, new_work

    points, signs, codes, d = _search_points(
        "IQ2_XS", encode_xs, new_work, (16, 2, 2), w, importance
    )
    words = points.astype("<u2") | signs.astype("<u2") << 9
    return [_float16(d), words.reshape(len(d), -1), _join(codes, 2, 4, "u1")]


def _iq2_s(w: np.ndarray, importance: np.ndarray) -> Fields:
    from quant.formats.iq_kernels_iq2 import encode_s, new_work

    points, signs, codes, d = _search_points("IQ2_S", encode_s, new_work, (16, 2, 2), w, importance)
    return [
        _float16(d * np.float32(0.9875)),
        _low_bytes(points),
        signs.reshape(len(d), -1),
        _join(points >> 8, 4, 2, "u1"),
        _join(codes, 2, 4, "u1"),
    ]


def _iq1_s(w: np.ndarray, importance: np.ndarray) -> Fields:
    from quant.formats.iq_kernels_iq1 import encode_s, new_work_s

    points, shifts, codes, d = _search_points(
        "IQ1_S", encode_s, new_work_s, (8, 4, 1), w, importance
    )
    scales_and_shifts = codes | shifts[:, :, 0] << 3
    qh = _join(points >> 8, 4, 3, "<u2") | scales_and_shifts.astype("<u2") << 12
    return [_float16(d * np.float32(1.125)), _low_bytes(points), qh]


def _iq1_m(w: np.ndarray, importance: np.ndarray) -> Fields:
    from quant.formats.iq_kernels_iq1 import encode_m, new_work_m

    points, shifts, codes, d = _search_points(
        "IQ1_S", encode_m, new_work_m, (16, 2, 2), w, importance
    )
    high_bits = (points >> 8) | shifts << 3  # (n, 16, 2), 4 bits each
    # d has no field of its own: a quarter of it tops each word of four 3-bit scales.
    quarters = _float16(d * np.float32(1.1125)).view("<u2") >> np.array([0, 4, 8, 12], "<u2") & 15
    scales = _join(codes, 4, 3, "<u2") | quarters << 12
    return [_low_bytes(points), _join(high_bits, 2, 4, "u1"), scales]


I_QUANTS = (
    _format("IQ2_XXS", 16, 256, 2 + 64, _iq2_xxs),  # d, words of points, signs and scales
    _format("IQ2_XS", 17, 256, 2 + 64 + 8, _iq2_xs),  # d, points and signs, scales
    _format("IQ3_XXS", 18, 256, 2 + 64 + 32, _iq3_xxs),  # d, points, signs and scales
    _format("IQ1_S", 19, 256, 2 + 32 + 16, _iq1_s),  # d, points, their high bits and scales
    _format("IQ4_NL", 20, 32, 2 + 16, _iq4_nl),  # d, levels
    _format("IQ3_S", 21, 256, 2 + 64 + 8 + 32 + 4, _iq3_s),  # d, points, high bits, signs, scales
    _format("IQ2_S", 22, 256, 2 + 32 + 32 + 8 + 8, _iq2_s),  # d, points, signs, high bits, scales
    _format("IQ4_XS", 23, 256, 2 + 2 + 4 + 128, _iq4_xs),  # d, scales' high and low bits, levels
    _format("IQ1_M", 29, 256, 32 + 16 + 8, _iq1_m),  # points, high bits and shifts, scales and d
)
