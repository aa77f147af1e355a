"""IQ1 to IQ3 with less error: points, scales and d, all measured with what is decoded.

A block of these types is a float16 d times small scales times points of a codebook. First the
search of `refined_kernels_codebook` finds better points and scales than those of `start`; then d
follows by least squares and is stretched (see `refined_search`), each block by its own factor.
ggml multiplies every block's d by a constant of the type instead, 0.9875 to 1.125.

`start` was encoded with importance or, without, with all columns weighing the same, where ggml
counts an error in proportion to the square of its weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from quant.formats.format import Format
from quant.formats.i_quants import _join, _low_bytes

SUPER_BLOCK = 256
BLOCKS_AT_ONCE = 256
"""Few enough for the arrays, in float64, to stay in the processor's cache."""

ONE_AS_FLOAT16 = 0x3C00
STRETCHES = (0, 0.25, 0.5, 0.75, 1)
"""Parts of the full stretch, in the order they are tried: the last that fits is taken."""


def refine(
    format: Format, w: np.ndarray, importance: np.ndarray, start: np.ndarray, blocks: np.ndarray
) -> None:
    """Improve `blocks` in place; see `refined.Refine`."""
    layout = LAYOUTS[format.name]
    n = w.size // SUPER_BLOCK
    x = w.reshape(n, SUPER_BLOCK)
    out = blocks.reshape(n + 1, -1)[:-1]
    weights = importance.reshape(-1, SUPER_BLOCK) if importance.size else np.ones((1, 1))
    found = _search(layout, w, importance, start.reshape(n, -1))
    for first in range(0, n, BLOCKS_AT_ONCE):
        some = np.arange(first, min(first + BLOCKS_AT_ONCE, n))
        codes = [each[some] for each in found]
        _fit_d(format, layout, x[some], weights[some % len(weights)], codes, out[first:])


def _search(
    layout: "Layout", w: np.ndarray, importance: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Codes of scales (n, n_blocks), points, signs and shifts (n, any) better than those of start.

    start is uint8 (n, block_nbytes).
    """
    from quant.formats.refined_kernels_codebook import new_work, search  # numba: 0.15 s

    n, n_points = len(start), SUPER_BLOCK // layout.n_dims
    d = layout.d(start).view(np.float16).astype(np.float32)
    codes, points = layout.codes(start), np.zeros((n, n_points), np.uint16)
    signs, shifts = np.zeros((n, SUPER_BLOCK // 8), np.uint8), np.zeros((n, n_points), np.uint8)
    search(w, importance, layout.codebook(), new_work(), d, codes, points, signs, shifts)
    return codes, points, signs, shifts


def _fit_d(
    format: Format,
    layout: "Layout",
    x: np.ndarray,
    weights: np.ndarray,
    codes: list[np.ndarray],
    out: np.ndarray,
) -> None:
    """Write the blocks of `codes` with the d that suits them, where they are better than out's.

    x is (n, 256), weights (n, 256) or (n, 1), out (n or more, block_nbytes).
    """
    x, weights, out = x.astype(np.float64), weights.astype(np.float64), out[: len(x)]

    def decode(blocks: np.ndarray) -> np.ndarray:
        return format.decode({"": blocks}, x.shape).astype(np.float64)

    def error(w_hat: np.ndarray) -> np.ndarray:
        return (weights * (w_hat - x) ** 2).sum(axis=1)

    xx = (weights * x**2).sum(axis=1)
    # Beyond this, the rounding of w_hat to float32 cannot make an improvement a loss.
    limit = np.sqrt(error(decode(out))) - np.sqrt(xx) * 2.0**-21
    y = decode(layout.blocks(np.ones(len(x), np.float16), *codes))
    xy, yy = (weights * x * y).sum(axis=1), (weights * y**2).sum(axis=1)
    with np.errstate(all="ignore"):  # blocks of zeros; they stay as they are
        least_squares, full = xy / yy, xx * yy / xy**2 - 1
        for part in STRETCHES:
            d = (least_squares * (1 + part * full)).astype(np.float16)
            better = np.sqrt(error(y * d.astype(np.float64)[:, None])) < limit
            better &= np.isfinite(d)
            out[better] = layout.blocks(d, *codes)[better]


# --- where the fields are ------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """A type's codebook, and its fields as functions of blocks uint8 (n, block_nbytes)."""

    grid: str  # the codebook, by gguf's name of the type that has it
    codes: Callable[[np.ndarray], np.ndarray]  # of the scales, uint8 (n, n_blocks)
    fields: Callable[..., list[np.ndarray]]  # of (d's bits, codes, points, signs, shifts)
    offset: float  # w ~ d * (offset + step * code) * value
    step: float
    n_codes: int
    n_blocks: int
    even_signs: bool = False  # stored as 7 bits
    shift: float = 0
    n_shifted: int = 1  # points that share a shift
    d: Callable[[np.ndarray], np.ndarray] = lambda blocks: blocks[:, :2].copy().view("<u2")[:, 0]

    @property
    def n_dims(self) -> int:
        return 4 if self.grid.startswith("IQ3") else 8

    def codebook(self):
        """As the kernel wants it."""
        return _codebook(self)

    def blocks(self, d: np.ndarray, *codes: np.ndarray) -> np.ndarray:
        """uint8 (n, block_nbytes) with float16 d (n,) and what `_search` returns."""
        fields = self.fields(d.view("<u2"), *codes)
        return np.concatenate([np.ascontiguousarray(f).view(np.uint8) for f in fields], axis=1)


@cache
def _codebook(layout: Layout):
    import gguf.quants

    from quant.formats.iq_grids import grid_of
    from quant.formats.refined_kernels_codebook import Codebook

    values = np.array(getattr(gguf.quants, layout.grid).grid_map, np.float32)
    levels = grid_of(layout.grid).levels.reshape(-1, layout.n_dims)
    digits = len(values) ** np.arange(layout.n_dims // 2)
    halves = (levels.reshape(len(levels), 2, -1) * digits).sum(axis=2)  # (n_points, 2)
    return Codebook(
        np.ascontiguousarray(levels), halves.astype(np.int32), values,
        np.float32(layout.offset), np.float32(layout.step), layout.n_codes, layout.n_blocks,
        layout.even_signs, np.float32(layout.shift), layout.n_shifted,
    )  # fmt: skip


def _nibbles(field: np.ndarray) -> np.ndarray:
    """(n, any) bytes to (n, 2 * any) numbers, low halves first."""
    return np.stack([field & 15, field >> 4], axis=2).reshape(len(field), -1)


def _words(field: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(field).view(dtype)


def _fields_of_iq1_s(d, codes, points, signs, shifts):
    scales_and_shifts = codes | shifts[:, ::4] << 3
    qh = _join(points >> 8, 4, 3, "<u2") | scales_and_shifts.astype("<u2") << 12
    return [d[:, None], _low_bytes(points), qh]


def _fields_of_iq1_m(d, codes, points, signs, shifts):
    quarters = d[:, None] >> np.array([0, 4, 8, 12], "<u2") & 15
    scales = _join(codes, 4, 3, "<u2") | quarters << 12
    return [_low_bytes(points), _join(points >> 8 | shifts << 3, 2, 4, "u1"), scales]


def _fields_of_iq2_xxs(d, codes, points, signs, shifts):
    signs_and_scales = _join(signs & 127, 4, 7, "<u4") | codes.astype("<u4") << 28
    words = np.stack([_join(points, 4, 8, "<u4"), signs_and_scales], axis=2)  # (n, 8, 2)
    return [d[:, None], words.reshape(len(d), -1)]


def _fields_of_iq2_xs(d, codes, points, signs, shifts):
    words = points.astype("<u2") | (signs & 127).astype("<u2") << 9
    return [d[:, None], words, _join(codes, 2, 4, "u1")]


def _fields_of_iq2_s(d, codes, points, signs, shifts):
    high = _join(points >> 8, 4, 2, "u1")
    return [d[:, None], _low_bytes(points), signs, high, _join(codes, 2, 4, "u1")]


def _fields_of_iq3_xxs(d, codes, points, signs, shifts):
    signs_and_scales = _join(signs & 127, 4, 7, "<u4") | codes.astype("<u4") << 28
    return [d[:, None], _low_bytes(points), signs_and_scales]


def _fields_of_iq3_s(d, codes, points, signs, shifts):
    high = _join(points >> 8, 8, 1, "u1")
    return [d[:, None], _low_bytes(points), high, signs, _join(codes, 2, 4, "u1")]


def _codes_of_iq1_m(blocks: np.ndarray) -> np.ndarray:
    fours = _words(blocks[:, -8:], "<u2")[:, :, None] >> np.array([0, 3, 6, 9], "<u2") & 7
    return fours.reshape(len(blocks), -1).astype(np.uint8)


def _d_of_iq1_m(blocks: np.ndarray) -> np.ndarray:
    """It has no field of its own: a quarter of it tops each word of four scales."""
    quarters = _words(blocks[:, -8:], "<u2") >> 12
    return _join(quarters, 4, 4, "<u2")[:, 0]


LAYOUTS = {
    "IQ1_S": Layout(
        "IQ1_S", lambda b: (_words(b[:, -16:], "<u2") >> 12 & 7).astype(np.uint8), _fields_of_iq1_s,
        offset=1, step=2, n_codes=8, n_blocks=8, shift=0.125, n_shifted=4,
    ),
    "IQ1_M": Layout(
        "IQ1_S",
        _codes_of_iq1_m,
        _fields_of_iq1_m, offset=1, step=2, n_codes=8, n_blocks=16, shift=0.125, d=_d_of_iq1_m,
    ),
    "IQ2_XXS": Layout(
        "IQ2_XXS", lambda b: (_words(b[:, 2:], "<u4")[:, 1::2] >> 28).astype(np.uint8),
        _fields_of_iq2_xxs, offset=0.125, step=0.25, n_codes=16, n_blocks=8, even_signs=True,
    ),
    "IQ2_XS": Layout(
        "IQ2_XS", lambda b: _nibbles(b[:, -8:]), _fields_of_iq2_xs,
        offset=0.125, step=0.25, n_codes=16, n_blocks=16, even_signs=True,
    ),
    "IQ2_S": Layout(
        "IQ2_S", lambda b: _nibbles(b[:, -8:]), _fields_of_iq2_s,
        offset=0.125, step=0.25, n_codes=16, n_blocks=16,
    ),
    "IQ3_XXS": Layout(
        "IQ3_XXS", lambda b: (_words(b[:, -32:], "<u4") >> 28).astype(np.uint8), _fields_of_iq3_xxs,
        offset=0.25, step=0.5, n_codes=16, n_blocks=8, even_signs=True,
    ),
    "IQ3_S": Layout(
        "IQ3_S", lambda b: _nibbles(b[:, -4:]), _fields_of_iq3_s,
        offset=1, step=2, n_codes=16, n_blocks=8,
    ),
}  # fmt: skip
