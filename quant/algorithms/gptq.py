"""GPTQ: columns are rounded one after the other, and those that follow make good each one's error.

A linear layer multiplies weights W (rows, columns) with inputs x; its output is to change least:

    |W X - W_hat X|^2 = tr(dW H dW^T)        H = X X^T, the sum of x x^T over calibration tokens

    for each column j:                        Hinv upper triangular, Hinv^T Hinv = H^-1
        w_hat_j = the grid's nearest to w_j
        e       = (w_j - w_hat_j) / Hinv_jj
        w_k    -= e Hinv_jk                   for every column k that is still to come

W_hat is farther from W than plain rounding's, and W_hat X nearer to W X. A row of Hinv holds all
that the inverse would be reduced to after the columns before it (the paper's step 3), so nothing
is inverted twice. Columns go in blocks: within one, errors spread at once; to the columns behind
it, as one matrix product (step 2). What is given up against rounding to the nearest: calibration
text, n^2 memory for H, n^3 time.

Where a weight may go is the grid's to say: the loop serves integers with a scale and a zero point
for each group of columns, and the sixteen NF4 levels under scales that are fixed already.

# ref: Frantar and others, GPTQ, arXiv 2210.17323, Algorithm 1
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

BLOCK_SIZE = 128
"""Columns whose errors are spread at once; the paper's B."""

DAMP = 0.01
"""What is added to H's diagonal, as a share of its mean."""

SMALLEST_SCALE = 2.0**-24
"""The least positive float16."""


class NotFinite(ValueError):
    """There is a NaN or an infinity among the inputs."""


class Hessian:
    """H = sum of x x^T over all tokens seen, float32 (n_columns, n_columns), and their number.

    QwQ-32B's largest, of 27648 columns, is 3.06 GB.
    """

    def __init__(self, n_columns: int, device: torch.device | str = "cpu"):
        self.H = torch.zeros(n_columns, n_columns, device=device)
        self.n_tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Inputs (..., n_columns) in any floating type."""
        X = x.reshape(-1, x.shape[-1]).float()
        self.H.addmm_(X.T, X)
        self.n_tokens += len(X)


# --- grids ------------------------------------------------------------------------------------


class Grid(Protocol):
    """The values that weights may have. Columns are counted as in the weight, whatever the order
    in which they are rounded."""

    group_size: int
    """Columns that share their parameters."""

    def fit(self, W: torch.Tensor, first: int) -> None:
        """Choose the parameters of whole groups: those of columns W, which begin with `first`."""

    def round(self, w: torch.Tensor, j: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Column j (rows,): the nearest codes, uint8, and their values, in w's type."""


class IntegerGrid:
    """w ~ scale * (q - zero), q of `bits` bits; one scale and zero for each row and group.

    Symmetric: zero = 2^(bits - 1), and 2^bits - 1 steps span twice the largest magnitude. Else
    they span from the least weight to the largest, zero among them.
    Scales have 8 significant bits, so that readers that hold them as float16 and those that hold
    them as bfloat16 (vLLM, in models of that type) see the same weights.
    # ref: AutoGPTQ 0.7.1, quantization/quantizer.py, Quantizer.find_params. There, a symmetric
    # group without negative weights gets half the range it needs.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        bits: int,
        group_size: int,
        symmetric: bool = True,
        device: torch.device | str = "cpu",
    ):
        rows, n_columns = shape
        if n_columns % group_size:
            raise ValueError(f"groups of {group_size} do not divide rows of {n_columns} weights")
        self.bits, self.symmetric, self.group_size = bits, symmetric, group_size
        self.scale = torch.ones(n_columns // group_size, rows, device=device)
        self.zero = torch.full_like(self.scale, 2 ** (bits - 1))

    @property
    def largest(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def fit(self, W: torch.Tensor, first: int = 0) -> None:
        groups = W.reshape(len(W), -1, self.group_size)  # (rows, n_groups, group_size)
        low = groups.amin(2).T.float().clamp(max=0)  # (n_groups, rows)
        high = groups.amax(2).T.float().clamp(min=0)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale = _stored((high - low) / self.largest)
        scale = torch.where(high > low, scale.clamp(min=SMALLEST_SCALE), 1.0)
        part = slice(first // self.group_size, first // self.group_size + len(scale))
        self.scale[part] = scale
        if not self.symmetric:
            self.zero[part] = (-low / scale).round().clamp(0, self.largest)

    def round(self, w: torch.Tensor, j: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.scale[j // self.group_size].to(w.dtype)
        zero = self.zero[j // self.group_size].to(w.dtype)
        q = (w / scale + zero).round().clamp(0, self.largest)
        return q.to(torch.uint8), (q - zero) * scale


def _stored(scale: torch.Tensor) -> torch.Tensor:
    """The nearest that both bfloat16 and float16 can hold; infinite beyond float16's 65504."""
    return scale.bfloat16().half().float()


class LevelGrid:
    """w ~ levels[q] * scale, scales fixed: NF4 or FP4 as bitsandbytes decodes them.

    levels: float32 (16,), ascending; q counts them. scales: float32 (n_blocks,), one for each
    `blocksize` weights along the flattened weight. dtype: what the values are rounded to in the
    end. There is nothing to fit.
    """

    group_size = 1

    def __init__(
        self,
        shape: tuple[int, int],
        levels: torch.Tensor,
        scales: torch.Tensor,
        blocksize: int,
        dtype: torch.dtype,
    ):
        rows, n_columns = shape
        if len(scales) != -(-rows * n_columns // blocksize):
            raise ValueError(f"{len(scales)} scales for {shape} in blocks of {blocksize}")
        self.levels, self.scales = levels, scales
        self.bounds = (levels[:-1] + levels[1:]) / 2
        self.blocksize, self.dtype = blocksize, dtype
        self._starts = torch.arange(rows, device=scales.device) * n_columns

    def fit(self, W: torch.Tensor, first: int) -> None:
        pass

    def round(self, w: torch.Tensor, j: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.scales[(self._starts + j) // self.blocksize]
        x = torch.where(scale == 0, 0, w.float() / scale)
        q = torch.bucketize(x, self.bounds)  # a tie goes to the lower level
        return q.to(torch.uint8), (self.levels[q] * scale).to(self.dtype).to(w.dtype)


# --- the algorithm ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounded:
    """A weight on its grid."""

    Q: torch.Tensor  # uint8 (rows, columns), the grid's codes
    W_hat: torch.Tensor  # (rows, columns), their values
    damp: float  # that H needed


def round_to_nearest(W: torch.Tensor, grid: Grid) -> Rounded:
    """Plain rounding on the same grid, without inputs or feedback."""
    W = W.float()
    grid.fit(W, 0)
    Q, W_hat = _empty_columns(W, torch.uint8), _empty_columns(W, W.dtype)
    for j in range(W.shape[1]):
        Q[:, j], W_hat[:, j] = grid.round(W[:, j], j)
    return Rounded(Q, W_hat, 0.0)


def gptq(
    W: torch.Tensor,
    H: torch.Tensor,
    grid: Grid,
    damp: float = DAMP,
    static_groups: bool = True,
    block_size: int = BLOCK_SIZE,
) -> Rounded:
    """W (rows, columns) on `grid`, so that |W X - W_hat X|^2 is small. Computes in H's type.

    static_groups: the grid is fitted to W before anything is rounded, and columns go in the order
    of their inputs' squares, so that the largest errors have most columns left to be made good in.
    Without it, they go from left to right, and each group is fitted to what errors before it have
    left there. Groups are of neighbouring columns either way.
    A column that no input ever reached is rounded to the nearest: nothing is known about it.
    Raises NotFinite if H or W has NaN or infinite values.
    """
    if not torch.isfinite(W).all():
        raise NotFinite("the weights are not finite")
    n = W.shape[1]
    order = torch.arange(n, device=H.device)
    if static_groups:
        grid.fit(W, 0)
        order = H.diagonal().argsort(descending=True, stable=True)
    Hinv, damp = inverse_factor(H[order][:, order], damp)
    W = W.to(H.dtype)[:, order].T.contiguous().T  # a copy whose columns are contiguous
    Q, W_hat = _empty_columns(W, torch.uint8), _empty_columns(W, W.dtype)
    columns = order.tolist()
    for i1, i2 in _blocks(n, block_size, None if static_groups else grid.group_size):
        W1, Hinv1 = W[:, i1:i2], Hinv[i1:i2, i1:i2]
        E = _empty_columns(W1, W.dtype)
        for i, j in enumerate(columns[i1:i2]):
            if not static_groups and j % grid.group_size == 0:
                grid.fit(W[:, j : j + grid.group_size], j)
            Q[:, j], w_hat = grid.round(W1[:, i], j)
            W_hat[:, j] = w_hat
            E[:, i] = (W1[:, i] - w_hat) / Hinv1[i, i]
            W1[:, i + 1 :].addr_(E[:, i], Hinv1[i, i + 1 :], alpha=-1)
        W[:, i2:].addmm_(E, Hinv[i1:i2, i2:], alpha=-1)
    return Rounded(Q, W_hat, damp)


def inverse_factor(H: torch.Tensor, damp: float = DAMP) -> tuple[torch.Tensor, float]:
    """Upper triangular Hinv with Hinv^T Hinv = (H + damp * mean of H's diagonal)^-1; and damp.

    With J the reversal of the order, J H J = L L^T gives Hinv = J L^-1 J: one decomposition and one
    triangular system. Where H is singular still, ten times the damping is tried, and so on; it
    ends, since H is positive semidefinite. A column without inputs counts as independent of
    all others. Raises NotFinite, also for inputs so large that H overflows once it is damped.
    """
    diagonal = H.diagonal()
    if not torch.isfinite(diagonal).all():
        raise NotFinite("the inputs are not finite")
    alive = diagonal > 0
    mean = float(diagonal[alive].mean()) if alive.any() else 1.0
    reversed_H = H.flip(0, 1)
    reversed_alive = alive.flip(0)
    while True:
        damped = reversed_H.clone()
        damped.diagonal().copy_(torch.where(reversed_alive, damped.diagonal(), mean) + damp * mean)
        if not torch.isfinite(damped.diagonal()).all():  # and no damping would mend it
            raise NotFinite("the inputs' squares overflow")
        L, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed and torch.isfinite(L.diagonal()).all():
            break
        damp = max(10 * damp, 1e-6)
    identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
    return torch.linalg.solve_triangular(L, identity, upper=False).flip(0, 1), damp


def output_error(dW: torch.Tensor, H: torch.Tensor) -> float:
    """|dW X|^2 = tr(dW H dW^T)."""
    return float(((dW.to(H.dtype) @ H) * dW).sum())


def _empty_columns(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(rows, columns) whose columns are contiguous."""
    rows, n = like.shape
    return torch.empty(n, rows, dtype=dtype, device=like.device).T


def _blocks(n: int, block_size: int, group_size: int | None) -> Iterator[tuple[int, int]]:
    """Ranges of at most `block_size` columns. Given a group size, each group that is fitted on the
    way begins where all errors before it have arrived: larger groups at the start of a block,
    smaller ones whole within one."""
    span = n
    if group_size is not None:
        span = group_size * max(1, block_size // group_size)
    for start in range(0, n, span):
        for i1 in range(start, min(start + span, n), block_size):
            yield i1, min(i1 + block_size, start + span, n)
