"""A .safetensors file's header: where each tensor lies, checked before any of them is read.

    8 bytes   n, little-endian
    n bytes   {"lm_head.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}
    the rest  the tensors end to end, without gap or overlap

The `safetensors` package would do, but of two tensors with one name it silently takes the last,
and its messages name neither the file nor the cause ("header too large" for a git-LFS pointer).

# ref: https://github.com/huggingface/safetensors#format
"""

import os
from math import prod
from pathlib import Path

from quant.display import human_bytes, printable
from quant.errors import BadInput
from quant.hub import download_command
from quant.strict_files import impostor, open_regular, parse_json
from quant.tensors import TensorInfo

MAX_HEADER_NBYTES = 100_000_000  # the limit of the safetensors package
MAX_DIMENSIONS = 64  # numpy's
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of one element of every dtype of the format, those that we cannot read too."""


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Every tensor's place, and the `__metadata__` strings. Reads the header and nothing else.

    Raises InputMissing, NotPermitted, or BadInput saying what is wrong with the file.
    """
    with open_regular(path) as file:
        n_file_bytes = os.fstat(file.fileno()).st_size
        start = file.read(64)
        n_header_bytes = int.from_bytes(start[:8], "little")
        if n_header_bytes > MAX_HEADER_NBYTES or start[8:9] != b"{":
            raise _not_safetensors(path, start, n_file_bytes, n_header_bytes)
        data_start = 8 + n_header_bytes
        if data_start > n_file_bytes:
            raise _truncated(path, n_file_bytes, f"its header alone needs {data_start}")
        file.seek(8)
        header = parse_json(file.read(n_header_bytes), path, part="The header of ")

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its __metadata__ is not an object of strings")
    tensors = {name: _tensor(path, data_start, name, entry) for name, entry in header.items()}
    _check_places(path, tensors, data_start, n_file_bytes)
    return tensors, metadata


def _tensor(path: Path, data_start: int, name: str, entry: object) -> TensorInfo:
    """One entry of the header, checked by itself: dtype, shape, and as many bytes as they need."""
    shown = printable(name)
    if not isinstance(entry, dict):
        raise _damaged(path, f"its entry for {shown} is not an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(path, f"{shown} has the unknown dtype {printable(dtype)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _damaged(path, f"{shown} has the impossible shape {printable(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{shown} has impossible data_offsets {printable(offsets)}")
    n_bits = prod(shape) * DTYPE_BITS[dtype]
    begin, end = offsets
    if n_bits != 8 * (end - begin):
        needed = f"{n_bits // 8} bytes" if n_bits % 8 == 0 else f"{n_bits} bits"
        shaped = f"{shown}, {printable(shape)} of {dtype},"
        raise _damaged(path, f"{shaped} needs {needed}, its place has {end - begin}")
    return TensorInfo(name, tuple(shape), dtype, path, data_start + begin, end - begin)


def _are_sizes(value: object) -> bool:
    """A list of whole numbers from 0 to 2^63 - 1 (True is an int to Python, not here)."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_places(
    path: Path, tensors: dict[str, TensorInfo], data_start: int, n_file_bytes: int
) -> None:
    """The tensors fill the file from the header's end to its own, end to end. Raises BadInput."""
    end, before = data_start, "the header"
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        shown = printable(info.name)
        if info.offset < end:
            raise _damaged(path, f"{shown} overlaps {before}")
        if info.offset > end:
            raise _damaged(
                path, f"{info.offset - end} bytes between {before} and {shown} are a hole"
            )
        end, before = info.offset + info.nbytes, shown
    if n_file_bytes < end:
        raise _truncated(path, n_file_bytes, f"its header needs {end}")
    if n_file_bytes > end:
        raise _damaged(path, f"{n_file_bytes - end} bytes after its last tensor belong to nothing")


def _not_safetensors(path: Path, start: bytes, n_file_bytes: int, n_header_bytes: int) -> BadInput:
    """What the file is instead, by its first bytes."""
    again = f"Fetch it again: {download_command(path)}"
    if n_file_bytes == 0:
        return BadInput(f"{printable(path)} is empty.", next_step=again)
    if what := impostor(start):
        return BadInput(f"{printable(path)} holds no safetensors.", f"It is {what}.", again)
    if n_file_bytes < 10:
        return _truncated(path, n_file_bytes, "the smallest file has 10")
    if n_header_bytes > MAX_HEADER_NBYTES:
        claim = f"{human_bytes(n_header_bytes)}, over the limit of {human_bytes(MAX_HEADER_NBYTES)}"
        return _damaged(path, f"its header claims {claim}")
    return _damaged(path, "its header does not begin with {")


def _truncated(path: Path, n_file_bytes: int, needs: str) -> BadInput:
    return BadInput(
        f"{printable(path)} is cut short.",
        f"It has {n_file_bytes} bytes, {needs}: the download is not whole.",
        f"Fetch it again: {download_command(path)}",
    )


def _damaged(path: Path, reason: str) -> BadInput:
    return BadInput(
        f"{printable(path)} is damaged: {reason}.",
        next_step=f"Fetch it again: {download_command(path)}",
    )
