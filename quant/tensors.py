"""Where a tensor lies in a file, and how to read some of its rows.

Both a safetensors shard and a GGUF file are, in the end, tensors at offsets. `TensorInfo` is
that fact; `TensorReader` reads rows with `pread`, so that no page of a 65 GB checkpoint counts
as this process's memory (pages of a mapped file would) and any thread may read at any time.

A tensor is read as rows: shape (a, b, n) is a * b rows of n columns, a vector is one row.
"""

import os
import threading
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from quant.display import printable
from quant.errors import BadInput

STORED_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,  # the upper half of a float32
    "F8_E4M3": np.uint8,  # decoded by table
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.uint8,
}
"""numpy's dtype for the stored bytes of each safetensors dtype that can be read."""

WEIGHT_DTYPES = ("F32", "F16", "BF16", "F8_E4M3")
"""What a weight may be stored as; anything else in a weight is an error at plan time."""


class Change(Protocol):
    """Other weights in place of the stored ones, same shape and type; made as they are read.

    An adapter is merged so (quant/lora.py), and whoever reads the tensor sees the merged weights.
    """

    @property
    def files(self) -> frozenset[Path]:
        """What is read besides the tensor's own file."""

    def read_stored(self, reader: "TensorReader", start: int, stop: int) -> np.ndarray:
        """What TensorReader.read_stored is to return for these rows."""


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor, as its file's header describes it. Nothing has been read."""

    name: str
    shape: tuple[int, ...]  # Hugging Face order: (out_features, in_features)
    dtype: str  # safetensors' spelling (F32 F16 BF16 F8_E4M3 ...) or a GGUF type (Q8_0 ...)
    path: Path
    offset: int  # of the first byte, from the start of the file
    nbytes: int
    scale: "TensorInfo | None" = None  # FP8: w = stored * scale, one scale a block
    scale_block: tuple[int, int] | None = None  # rows and columns that one scale covers
    change: Change | None = None

    @property
    def files(self) -> frozenset[Path]:
        """Every file that its weights come from."""
        parts = [part.files for part in (self.scale, self.change) if part is not None]
        return frozenset({self.path}).union(*parts)

    @property
    def n_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def n_columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def n_weights(self) -> int:
        return prod(self.shape)


@lru_cache(maxsize=1)
def e4m3_values() -> np.ndarray:
    """The 256 values of float8_e4m3fn: 4 exponent bits (bias 7), 3 mantissa bits, no infinity.

    # ref: FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433
    """
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    subnormal = mantissa * 2.0**-9
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    value = np.where(exponent == 0, subnormal, normal)
    value[byte & 127 == 127] = np.nan
    return np.where(byte & 128, -value, value).astype(np.float32)


def to_float32(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Stored values as float32, exactly; always a fresh array for F32 too."""
    if dtype == "BF16":
        bits = stored.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if dtype == "F8_E4M3":
        return e4m3_values()[stored]
    return stored.astype(np.float32)


class TensorReader:
    """Reads rows of tensors; keeps each file open once. Safe to use from several threads."""

    def __init__(self):
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            return self._descriptors[path]

    def read_bytes(self, info: TensorInfo, offset: int, nbytes: int) -> np.ndarray:
        """`nbytes` of the tensor from `offset` within it, as uint8 (nbytes,). Raises BadInput."""
        buffer = np.empty(nbytes, np.uint8)
        view, done = memoryview(buffer), 0
        where = f"{printable(info.path)} while {printable(info.name)} was being read"
        try:
            descriptor = self._descriptor(info.path)
            while done < nbytes:
                n = os.preadv(descriptor, [view[done:]], info.offset + offset + done)
                if n == 0:
                    raise BadInput(
                        f"End of {where}.",
                        "The file became shorter after its header was checked.",
                    )
                done += n
        except OSError as error:
            raise BadInput(
                f"Trouble with {where}.", f"The system says: {error.strerror}."
            ) from error
        return buffer

    def read_stored(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as stored, (stop - start, n_columns) of STORED_DTYPES[info.dtype].

        A change of the tensor is applied; read_bytes alone gives the file's own bytes.
        """
        if info.change is not None:
            return info.change.read_stored(self, start, stop)
        dtype = np.dtype(STORED_DTYPES[info.dtype])
        row_nbytes = info.n_columns * dtype.itemsize
        raw = self.read_bytes(info, start * row_nbytes, (stop - start) * row_nbytes)
        return raw.view(dtype).reshape(stop - start, info.n_columns)

    def read_float32(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as float32 (stop - start, n_columns); scales and changes applied."""
        w = to_float32(self.read_stored(info, start, stop), info.dtype)
        if info.scale is not None:
            with np.errstate(all="ignore"):  # a NaN or infinity is for the caller to find in w
                w *= self._scale_of_rows(info, start, stop)
        return w

    def _scale_of_rows(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        """The scale of every weight in rows [start, stop), broadcastable to them.

        DeepSeek and Qwen3-FP8 keep one scale for each 128x128 block in `weight_scale_inv`
        (w = stored * scale, in spite of the name); others one a row, or one in all.
        """
        scale = info.scale
        if scale.n_weights == 1:
            return self.read_float32(scale, 0, 1)
        block_rows, block_columns = info.scale_block or fp8_block(info.shape, scale.shape)
        first, last = start // block_rows, (stop - 1) // block_rows
        if len(scale.shape) == 1:
            scales = self.read_float32(scale, 0, 1)[0, first : last + 1, None]
        else:
            scales = self.read_float32(scale, first, last + 1)  # (row blocks, column blocks)
        by_row = np.repeat(scales, block_rows, axis=0)[start - first * block_rows :][: stop - start]
        return np.repeat(by_row, block_columns, axis=1)[:, : info.n_columns]


def fp8_block(
    shape: tuple[int, ...], scale_shape: tuple[int, ...], stated: tuple[int, int] | None = None
) -> tuple[int, int]:
    """(rows, columns) of the block that one of several FP8 scales covers.

    `stated` is what config.json says (weight_block_size); it must fit the shapes. Without it, the
    first of 128 (every release known), other powers of two, all or one for which ceil(n / b) scales
    cover n; the number of scales alone does not always tell b.
    Scales of shape (rows,) are one a row. Raises ValueError if weights and scales do not fit.
    """
    if len(shape) != 2 or len(scale_shape) not in (1, 2):
        raise ValueError("only a matrix has blocks")
    block = []
    for i, (n, n_scales) in enumerate(zip(shape, (*scale_shape, 1)[:2], strict=True)):
        sizes = [128, 64, 32, 16, 256, max(n, 1), 1]
        if stated is not None and len(scale_shape) == 2:
            sizes = [stated[i]]
        size = next((s for s in sizes if -(-n // s) == n_scales), None)
        if size is None:
            raise ValueError(f"{n_scales} scales do not cover {n} in blocks")
        block.append(size)
    return block[0], block[1]
