"""What a storage format is: how many bytes a row takes, and how to encode and decode it."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

Encoded = dict[str, np.ndarray]
"""An encoded weight: named arrays. GGUF types have the single part "", NF4 and GPTQ several."""


class Float16Overflow(ValueError):
    """A value or a block scale is beyond the largest finite number of its 16-bit float.

    65504 for float16, which every GGUF block scale is; 3.39e38 for bfloat16.
    """


@dataclass(frozen=True)
class Format:
    """One way to store a weight of shape (rows, columns).

    `encode(w, importance=None)` takes float32 (rows, columns), finite, columns a multiple of
    `block_size`, and returns the named parts; `importance` is float32 (columns,), the imatrix's
    mean squared activation of each input column, or None. It raises Float16Overflow rather
    than store an infinite scale. `decode(parts, shape)` gives float32 of `shape` back.
    Both are pure functions of their arguments and safe to call from several threads at once.
    """

    name: str  # as GGUF prints it: "Q8_0"
    ggml_type: int  # enum ggml_type, ggml.h
    block_size: int  # weights in a block, along a row
    block_nbytes: int
    encode: Callable[..., Encoded]
    decode: Callable[[Encoded, tuple[int, ...]], np.ndarray]

    def row_nbytes(self, n_columns: int) -> int:
        """Bytes of one row of `n_columns` weights. Raises ValueError if they do not fill blocks."""
        if n_columns % self.block_size:
            raise ValueError(f"{self.name}: {n_columns} is no multiple of {self.block_size}")
        return n_columns // self.block_size * self.block_nbytes

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape; the last dimension is the row."""
        return prod(shape[:-1]) * self.row_nbytes(shape[-1])

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_nbytes / self.block_size


def check_arguments(w: np.ndarray, importance: np.ndarray | None) -> None:
    """Raise ValueError unless `w` is float32 (rows, columns) and `importance` float32 (columns,).

    Kernels check no bounds: an array of another type or length would be read past its end.
    """
    if w.dtype != np.float32 or w.ndim != 2:
        raise ValueError(f"weights must be float32 (rows, columns), not {w.dtype} {w.shape}")
    if importance is not None and (
        importance.dtype != np.float32 or importance.shape != w.shape[1:]
    ):
        raise ValueError(
            f"importance must be float32 {w.shape[1:]}, not {importance.dtype} {importance.shape}"
        )


def gguf_decoder(ggml_type: int) -> Callable[[Encoded, tuple[int, ...]], np.ndarray]:
    """The decoder of a GGUF type: gguf-py's, which is the format's second implementation."""

    def decode(parts: Encoded, shape: tuple[int, ...]) -> np.ndarray:
        from gguf.constants import GGMLQuantizationType  # 0.1 s: only where something is decoded
        from gguf.quants import dequantize

        return dequantize(parts[""], GGMLQuantizationType(ggml_type)).reshape(shape)

    return decode


Run = Callable[[np.ndarray, np.ndarray, np.ndarray], bool]
"""A kernel: (weights, importance, out), all flat; importance is empty if there is none. It writes
the blocks into `out` (uint8) and returns False if a scale is infinite in float16."""


def kernel_format(
    name: str, ggml_type: int, block_size: int, block_nbytes: int, run: Run
) -> Format:
    """A GGUF type whose blocks a compiled kernel writes."""

    def encode(w: np.ndarray, importance: np.ndarray | None = None) -> Encoded:
        check_arguments(w, importance)
        rows = np.empty((len(w), this.row_nbytes(w.shape[1])), np.uint8)
        if importance is None:
            importance = np.empty(0, np.float32)
        # A read-only array is another type to numba, and would be compiled for again.
        flat, importance = (np.require(a, requirements="CAW") for a in (w, importance))
        if not run(flat.reshape(-1), importance, rows.reshape(-1)):
            raise Float16Overflow(f"{name}: a block's scale or minimum is beyond float16's 65504")
        return {"": rows}

    this = Format(name, ggml_type, block_size, block_nbytes, encode, gguf_decoder(ggml_type))
    return this
