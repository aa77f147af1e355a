"""Compiled encoders of IQ3_XXS and IQ3_S: 4 weights a codebook point, 32 weights a scale.

w ~ d (2 scale_code + 1) sign (2 level + 1), the levels 0 ... 7 of 4 weights a point of a codebook
of 256 (XXS) or 512 (S). # ref: ggml-quants.c, quantize_row_iq3_xxs_impl and quantize_row_iq3_s_impl
"""

import numpy as np

from quant.formats.compiled import kernel
from quant.formats.iq_grids import OFF_GRID, Grid
from quant.formats.iq_kernels_grid import (
    ALL_IF_ANY_OFF_GRID,
    SUPER_BLOCK,
    THOSE_OFF_GRID,
    TOO_LARGE,
    Workspace,
    encode_super_block,
    find_extremes,
    make_signs_even,
    mean_square,
    new_workspace,
    reach_to_top,
    split_signs,
    trials,
)
from quant.formats.iq_kernels_lanes import inlined
from quant.formats.lanes import LANES, load, sqrt, store

SHAPE = (32, 4, 3, 8)  # weights, weights of a point, bits and number of levels
TOP_LEVEL = np.float32(15)
TRIALS_XXS = trials(15, 0.2, 15)
TRIALS_S = trials(15, 0.2, 9)
TINY_XXS = np.float32(1e-8)  # ref: GROUP_MAX_EPS_IQ3_XXS
TINY_S = np.float32(2.0**-149)  # only a block of zeros


def new_work(grid: Grid) -> tuple[Workspace]:
    return (new_workspace(1, SHAPE, grid),)


@inlined
def load_super_block(w, start, importance, work):
    """Fill work.x, signs, weight and root; returns whether sums will be finite.

    An error counts by w * w, or with importance by importance * sqrt(2 mean(w * w) + w * w).
    """
    split_signs(w, start, 0, work)
    variance = np.float32(2) * mean_square(w, start)
    column = start % len(importance) if len(importance) else 0
    for i in range(0, SUPER_BLOCK, LANES):
        x = load(work.x, i)
        weight = x * x
        if len(importance):
            weight = load(importance, column + i) * sqrt(variance + weight)
        store(work.weight, i, weight)
        store(work.root, i, sqrt(weight))
    return variance < TOO_LARGE


@kernel
def encode_xxs(w, importance, grid, work, points, signs, scale_codes, d):
    """Fill points (n, 8, 8), signs (n, 8, 4) of 7 bits, scale codes (n, 8) and d (n,).

    `w` holds n super-blocks of 256, in rows as long as `importance`, which may be empty. The
    results must come zeroed. Returns False if weights are too large.
    """
    fits = True
    for s in range(len(d)):
        fits &= load_super_block(w, s * SUPER_BLOCK, importance, work)
        make_signs_even(0, work)
        find_extremes(0, SHAPE, work)
        reach_to_top(TOP_LEVEL, SHAPE, work)
        d[s], is_finite = encode_super_block(
            0, TRIALS_XXS, TINY_XXS, 0, THOSE_OFF_GRID, 127, SHAPE, grid, work,
            points[s], signs[s], scale_codes[s],
        )  # fmt: skip
        fits &= is_finite
    return fits


@kernel
def encode_s(w, importance, grid, work, points, signs, scale_codes, d):
    """As encode_xxs, signs of 8 bits."""
    fits = True
    for s in range(len(d)):
        fits &= load_super_block(w, s * SUPER_BLOCK, importance, work)
        find_extremes(0, SHAPE, work)
        reach_to_top(TOP_LEVEL, SHAPE, work)
        d[s], is_finite = encode_super_block(
            0, TRIALS_S, TINY_S, OFF_GRID, ALL_IF_ANY_OFF_GRID, 255, SHAPE, grid, work,
            points[s], signs[s], scale_codes[s],
        )  # fmt: skip
        fits &= is_finite
    return fits
