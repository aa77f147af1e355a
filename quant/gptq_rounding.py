"""Weights on the grid of a GPTQ format, as the format alone fits it: no inputs, no feedback."""

import torch

from quant.algorithms.gptq import IntegerGrid, round_to_nearest
from quant.formats.gptq import Gptq


def make_grid(format: Gptq, W: torch.Tensor) -> IntegerGrid:
    """The format's grid for a weight W (rows, columns), on its device."""
    group_size = format.columns_of_group(W.shape[1])
    return IntegerGrid(tuple(W.shape), format.bits, group_size, format.symmetric, W.device)


def plainly_rounded(format: Gptq, W: torch.Tensor) -> torch.Tensor:
    """W_hat, float32: every weight at the nearest point of its group's grid."""
    return round_to_nearest(W, make_grid(format, W)).W_hat
