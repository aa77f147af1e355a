"""A tensor to be written, described as rows of stored tensors. Nothing is read to build one.

A GGUF tensor is seldom just a copy: the experts of a layer are stacked, a fused gate_up matrix is
cut in two, Llama's query and key rows are reordered. All of these are choices of rows, so one
description covers them, and any range of rows can be read on its own, in bounded memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from quant.tensors import TensorInfo, TensorReader


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a stored tensor (its leading dimensions flattened to rows)."""

    info: TensorInfo
    start: int
    stop: int

    @classmethod
    def whole(cls, info: TensorInfo) -> "Piece":
        return cls(info, 0, info.n_rows)


@dataclass(frozen=True)
class Assembly:
    """A tensor to be written: the rows of its pieces, one after the other.

    rotary_rows: when not 0, rows belong to heads of so many rows, and within each head the two
    rotary halves are interleaved. Hugging Face rotates row j together with row j + head_dim / 2;
    llama.cpp's `llama` graph rotates neighbours, 2 j and 2 j + 1. Biases are one row of columns, so
    their columns are reordered instead.
    constant: the values themselves, float32, for the rare tensor that no file stores.
    """

    name: str  # as it is written
    shape: tuple[int, ...]  # Hugging Face order: (out_features, in_features)
    pieces: tuple[Piece, ...] = ()
    rotary_rows: int = 0
    constant: np.ndarray | None = None

    @property
    def n_weights(self) -> int:
        return prod(self.shape)

    @property
    def n_columns(self) -> int:
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def dtype(self) -> str:
        """The stored type of its weights."""
        return self.pieces[0].info.dtype if self.pieces else "F32"

    @property
    def needs_scaling(self) -> bool:
        """Whether its stored values are no weights yet (FP8 with scales)."""
        return self.dtype == "F8_E4M3"

    @property
    def source_name(self) -> str:
        """The stored name, for messages: the first piece's if there are several."""
        return self.pieces[0].info.name if self.pieces else self.name

    def row_ranges(self, weights_at_once: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows to work on, about `weights_at_once` weights each.

        No range crosses a matrix of a stacked tensor, a piece, or the inside of a rotary head.
        """
        matrix_rows = self.shape[-2] if len(self.shape) > 1 else 1
        step = max(1, weights_at_once // self.n_columns)
        if self.rotary_rows:
            step = max(1, step // self.rotary_rows) * self.rotary_rows
        for first in range(0, self.n_rows, matrix_rows):
            for start in range(first, first + matrix_rows, step):
                yield start, min(start + step, first + matrix_rows)

    def read_stored(self, reader: TensorReader, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) in the stored type. Only where no scale must be applied."""
        return self._read(reader.read_stored, start, stop)

    def read_float32(self, reader: TensorReader, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as float32, scales applied."""
        return self._read(reader.read_float32, start, stop)

    def _read(self, read, start: int, stop: int) -> np.ndarray:
        if self.constant is not None:
            return self.constant.reshape(self.n_rows, self.n_columns)[start:stop]
        parts, at = [], 0
        for piece in self.pieces:
            n = piece.stop - piece.start
            lo, hi = max(start, at), min(stop, at + n)
            if lo < hi:
                parts.append(read(piece.info, piece.start + lo - at, piece.start + hi - at))
            at += n
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return interleave_rotary(rows, self.rotary_rows) if self.rotary_rows else rows


def interleave_rotary(rows: np.ndarray, head_rows: int) -> np.ndarray:
    """(n, columns) with the two halves of every head interleaved; a bias (1, n) likewise."""
    if rows.shape[0] == 1:
        return interleave_rotary(rows.reshape(-1, 1), head_rows).reshape(rows.shape)
    halves = rows.reshape(-1, 2, head_rows // 2, rows.shape[1])  # (heads, half, j, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
