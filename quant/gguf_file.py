"""The GGUF container: typed metadata and tensor places, to bytes and back. No numerics.

gguf-py's writer puts the header on disk before the weights, so a tensor that overflows float16
could no longer change its type; it drops empty strings, and its reader builds two numpy views for
each of 150,000 tokens. The format is small, so it stands here whole, and the tests hold it
against gguf-py and llama.cpp.

Layout, little-endian (version 3):

    "GGUF" | u32 version | u64 n_tensors | u64 n_kv | n_kv x (key, type, value)
    n_tensors x (name, u32 n_dims, u64 dims[n_dims], u32 type, u64 offset) | padding | tensor data

# ref: docs/gguf.md in ggml; gguf_init_from_file in ggml/src/gguf.cpp
"""

import mmap
import os
import re
import stat
import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from quant.display import printable
from quant.errors import BadInput, InputMissing, NotPermitted
from quant.tensors import TensorInfo

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_NAME_BYTES = 63  # GGML_MAX_NAME - 1
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS

SCALAR_TYPES = {
    "u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5,
    "f32": 6, "bool": 7, "str": 8, "u64": 10, "i64": 11, "f64": 12,
}  # fmt: skip
"""GGUF's scalar types and their numbers (enum gguf_type). 9 is the array."""

ARRAY = 9
_TYPE_NAMES = {number: name for name, number in SCALAR_TYPES.items()}
_NUMPY = {
    "u8": "<u1", "i8": "<i1", "u16": "<u2", "i16": "<i2", "u32": "<u4", "i32": "<i4",
    "f32": "<f4", "bool": "<u1", "u64": "<u8", "i64": "<i8", "f64": "<f8",
}  # fmt: skip

INTEGER_TYPES = ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64")

GGML_TYPES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 2 + 16), "Q4_1": (3, 32, 2 + 2 + 16),
    "Q5_0": (6, 32, 2 + 4 + 16), "Q5_1": (7, 32, 2 + 2 + 4 + 16), "Q8_0": (8, 32, 2 + 32),
    "Q8_1": (9, 32, 2 + 2 + 32), "Q2_K": (10, 256, 2 + 2 + 16 + 64),
    "Q3_K": (11, 256, 2 + 64 + 32 + 12), "Q4_K": (12, 256, 2 + 2 + 12 + 128),
    "Q5_K": (13, 256, 2 + 2 + 12 + 32 + 128), "Q6_K": (14, 256, 2 + 128 + 64 + 16),
    "Q8_K": (15, 256, 4 + 256 + 32), "IQ2_XXS": (16, 256, 2 + 64), "IQ2_XS": (17, 256, 2 + 64 + 8),
    "IQ3_XXS": (18, 256, 2 + 64 + 32), "IQ1_S": (19, 256, 2 + 32 + 16), "IQ4_NL": (20, 32, 2 + 16),
    "IQ3_S": (21, 256, 2 + 64 + 8 + 32 + 4), "IQ2_S": (22, 256, 2 + 64 + 8 + 8),
    "IQ4_XS": (23, 256, 2 + 2 + 4 + 128), "I8": (24, 1, 1), "I16": (25, 1, 2), "I32": (26, 1, 4),
    "I64": (27, 1, 8), "F64": (28, 1, 8), "IQ1_M": (29, 256, 32 + 16 + 8), "BF16": (30, 1, 2),
    "TQ1_0": (34, 256, 48 + 4 + 2), "TQ2_0": (35, 256, 64 + 2), "MXFP4": (39, 32, 1 + 16),
    "NVFP4": (40, 64, 4 + 32),
}  # fmt: skip
"""Tensor types: name -> (enum ggml_type, weights in a block, bytes of a block)."""

_GGML_NAMES = {number: name for name, (number, _, _) in GGML_TYPES.items()}


_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Value:
    """One typed metadata value: Value("u32", 64), Value("str", "qwen2"), Value("arr[str]", [...]).

    Strings may be str (stored as UTF-8) or bytes; arrays are lists or one-dimensional numpy arrays.
    """

    type: str  # a key of SCALAR_TYPES, or "arr[<key>]"
    data: Any

    @property
    def element_type(self) -> str | None:
        """The type of an array's elements; None for a scalar."""
        return self.type[4:-1] if self.type.startswith("arr[") else None


Metadata = dict[str, Value]


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header names it. `offset` counts from the start of the data section."""

    name: str
    shape: tuple[int, ...]  # Hugging Face order; GGUF stores it reversed
    type: str  # a key of GGML_TYPES
    offset: int


def tensor_nbytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. Raises ValueError if its rows do not fill whole blocks."""
    _, block_size, block_nbytes = GGML_TYPES[type_name]
    if shape and shape[-1] % block_size:
        raise ValueError(f"rows of {shape[-1]} do not fill blocks of {block_size} ({type_name})")
    return prod(shape) // block_size * block_nbytes


def padded(n: int, alignment: int = DEFAULT_ALIGNMENT) -> int:
    """`n` rounded up to the alignment."""
    return -(-n // alignment) * alignment


# --- to bytes ---------------------------------------------------------------------------------


def encode_metadata(metadata: Metadata) -> bytes:
    """The key-value part of the header."""
    parts = []
    for key, value in metadata.items():
        parts += [_encode_string(key), _encode_value(value)]
    return b"".join(parts)


def metadata_nbytes_at_most(metadata: Metadata) -> int:
    """An upper bound of encode_metadata's length, without encoding 300,000 strings."""
    total = 0
    for key, value in metadata.items():
        is_text, n = value.type.endswith(("str", "str]")), 1
        if value.element_type is not None:
            n = len(value.data)
        texts = value.data if value.element_type else [value.data]
        total += 4 * len(key) + 64 + 8 * n + (4 * sum(map(len, texts)) if is_text else 0)
    return total


def encode_header(
    encoded_metadata: bytes, n_keys: int, tensors: list[TensorEntry], alignment: int
) -> bytes:
    """The whole header, padded up to where the data section starts."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), n_keys), encoded_metadata]
    for tensor in tensors:
        dims = tensor.shape[::-1]
        parts += [
            _encode_string(tensor.name),
            struct.pack(f"<I{len(dims)}Q", len(dims), *dims),
            struct.pack("<IQ", GGML_TYPES[tensor.type][0], tensor.offset),
        ]
    header = b"".join(parts)
    return header.ljust(padded(len(header), alignment), b"\0")


def _raw(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


def _raws(texts: list[str | bytes]) -> list[bytes]:
    """_raw of each; a vocabulary has 300,000, nearly always plain text."""
    try:
        return list(map(str.encode, texts))
    except (TypeError, UnicodeEncodeError):
        return list(map(_raw, texts))


def _encode_string(text: str | bytes) -> bytes:
    raw = _raw(text)
    return _LENGTH.pack(len(raw)) + raw


def _encode_value(value: Value) -> bytes:
    element = value.element_type
    if element is None:
        return struct.pack("<I", SCALAR_TYPES[value.type]) + _encode_scalar(value.type, value.data)
    head = struct.pack("<IIQ", ARRAY, SCALAR_TYPES[element], len(value.data))
    if element == "str":
        pack = _LENGTH.pack
        return head + b"".join([pack(len(raw)) + raw for raw in _raws(value.data)])
    return head + np.asarray(value.data, dtype=_NUMPY[element]).tobytes()


def _encode_scalar(type_name: str, data: Any) -> bytes:
    if type_name == "str":
        return _encode_string(data)
    return np.array(data, dtype=_NUMPY[type_name]).tobytes()


# --- from bytes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class GgufFile:
    """An opened and checked GGUF file: everything but the weights."""

    path: Path
    metadata: Metadata
    tensors: dict[str, TensorInfo]  # in file order; dtype is a GGML type name
    alignment: int
    data_start: int
    nbytes: int

    @classmethod
    def open(cls, path: Path, texts: bool = True) -> "GgufFile":
        """Read and check the header of `path`. texts: or leave lists of texts empty, whose 300,000
        pieces take longer than all the rest.

        Mirrors llama.cpp's own checks (counts against the file's size, unique keys and names,
        dimensions, offsets in order and inside the file).
        Raises InputMissing, NotPermitted or BadInput; never IndexError, never a huge allocation.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            raise InputMissing(f"There is no file {printable(path)}.") from None
        except OSError as error:
            raise NotPermitted(f"{printable(path)} cannot be opened: {error.strerror}.") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadInput(f"{printable(path)} is no regular file.")
            if status.st_size < 24:
                raise BadInput(
                    f"{printable(path)} is no GGUF file: it has only {status.st_size} bytes."
                )
            with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(path, data, texts))
        finally:
            os.close(descriptor)


class _Cursor:
    """Reads the header front to back; every length is checked against what is left."""

    def __init__(self, path: Path, data: mmap.mmap, texts: bool):
        self.path, self.data, self.at, self.end = path, data, 0, len(data)
        self._texts = texts  # whether lists of them are wanted

    def fail(self, why: str) -> BadInput:
        return BadInput(
            f"{printable(self.path)} is damaged or is no GGUF file.",
            f"At byte {self.at}: {why}.",
            "Download or convert it again.",
        )

    def take(self, n: int, what: str) -> int:
        """Move past `n` bytes; returns where they start."""
        start = self.at
        if n > self.end - start:
            raise self.fail(f"{what} needs {n} bytes, but only {self.end - start} are left")
        self.at = start + n
        return start

    def unpack(self, form: str, what: str) -> tuple:
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form), what))

    def string(self, what: str) -> bytes:
        (length,) = self.unpack("<Q", f"the length of {what}")
        start = self.take(length, what)
        return self.data[start : start + length]

    def text(self, what: str) -> str:
        return self.string(what).decode("utf-8", "surrogateescape")

    def value(self, key: str) -> Value:
        (number,) = self.unpack("<I", f"the type of {key}")
        if number != ARRAY:
            type_name = self._type_name(number, key)
            return Value(type_name, self._scalar(type_name, key))
        number, length = self.unpack("<IQ", f"the array head of {key}")
        type_name = self._type_name(number, key)
        if type_name == "str":
            if length > (self.end - self.at) // 8:
                raise self.fail(f"{key} claims {length} strings, more than the file can hold")
            return Value("arr[str]", self._strings(length, key))
        dtype = np.dtype(_NUMPY[type_name])
        start = self.take(length * dtype.itemsize, key)
        array = np.frombuffer(self.data, dtype, count=length, offset=start).copy()
        return Value(f"arr[{type_name}]", array)

    def _strings(self, n: int, key: str) -> list[str]:
        """`n` strings; a loop of its own, for vocabularies have 150,000 of them."""
        data, last, at, ends = self.data, self.end - 8, self.at, []
        read_length = _LENGTH.unpack_from
        for _ in range(n):
            if at > last:
                break
            at += 8 + read_length(data, at)[0]
            ends.append(at)
        if len(ends) < n or at > self.end:
            n_whole = sum(end <= self.end for end in ends)
            raise self.fail(f"{key} claims {n} strings, but only {n_whole} are whole")
        starts = [self.at, *ends]
        self.at = at
        if not self._texts:
            return []
        return [_decode(data[start + 8 : end]) for start, end in zip(starts, ends, strict=False)]

    def _type_name(self, number: int, key: str) -> str:
        if number not in _TYPE_NAMES:
            raise self.fail(f"{key} has the unknown value type {number}")
        return _TYPE_NAMES[number]

    def _scalar(self, type_name: str, key: str) -> Any:
        if type_name == "str":
            return _decode(self.string(key))
        dtype = np.dtype(_NUMPY[type_name])
        start = self.take(dtype.itemsize, key)
        number = np.frombuffer(self.data, dtype, count=1, offset=start)[0].item()
        return bool(number) if type_name == "bool" else number

    def tensor(self) -> TensorEntry:
        name = self.text("a tensor's name")
        shown = printable(name)
        if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
            raise self.fail(f"the tensor name {shown} is longer than {MAX_NAME_BYTES} bytes")
        (n_dims,) = self.unpack("<I", f"the dimensions of {shown}")
        if n_dims > MAX_DIMENSIONS:
            raise self.fail(f"{shown} has {n_dims} dimensions; {MAX_DIMENSIONS} are allowed")
        dims = self.unpack(f"<{n_dims}Q", f"the dimensions of {shown}")
        if not dims or 0 in dims:
            raise self.fail(f"{shown} is empty")
        number, offset = self.unpack("<IQ", f"the type of {shown}")
        if number not in _GGML_NAMES:
            raise self.fail(f"{shown} has the unknown tensor type {number}")
        return TensorEntry(name, tuple(reversed(dims)), _GGML_NAMES[number], offset)


def _decode(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _parse(cursor: _Cursor) -> GgufFile:
    path = cursor.path
    magic = cursor.data[:4]
    if magic != MAGIC:
        raise BadInput(
            f"{printable(path)} is no GGUF file.",
            f"It starts with {printable(magic.decode('latin-1'))!r} instead of 'GGUF'.",
        )
    cursor.at = 4
    version, n_tensors, n_kv = cursor.unpack("<IQQ", "the counts")
    if version not in (2, VERSION):
        big = struct.unpack("<I", struct.pack(">I", version))[0] in (2, VERSION)
        kind = "big-endian" if big else f"version {version}"
        raise BadInput(
            f"{printable(path)} is a {kind} GGUF file.",
            "Only little-endian files of version 2 and 3 are read.",
        )
    metadata = _parse_metadata(cursor, n_kv)
    if n_tensors > (cursor.end - cursor.at) // 24:
        raise cursor.fail(f"{n_tensors} tensors are claimed, more than the file can hold")
    entries = [cursor.tensor() for _ in range(n_tensors)]
    alignment = _alignment(cursor, metadata)
    data_start = padded(cursor.at, alignment)
    tensors = _place(cursor, entries, data_start, alignment)
    return GgufFile(path, metadata, tensors, alignment, data_start, cursor.end)


def _parse_metadata(cursor: _Cursor, n_kv: int) -> Metadata:
    if n_kv > (cursor.end - cursor.at) // 13:
        raise cursor.fail(f"{n_kv} metadata keys are claimed, more than the file can hold")
    metadata: Metadata = {}
    for _ in range(n_kv):
        key = cursor.text("a metadata key")
        if not key or key in metadata:
            raise cursor.fail(f"the metadata key {printable(key)!r} is empty or there twice")
        metadata[key] = cursor.value(printable(key))
    return metadata


def _alignment(cursor: _Cursor, metadata: Metadata) -> int:
    value = metadata.get("general.alignment", Value("u32", DEFAULT_ALIGNMENT))
    n = value.data
    if value.type != "u32" or n < 8 or n & (n - 1):
        raise cursor.fail("general.alignment is no u32 power of two of at least 8")
    return n


def _place(
    cursor: _Cursor, entries: list[TensorEntry], data_start: int, alignment: int
) -> dict[str, TensorInfo]:
    """Where each tensor lies; offsets must follow each other as llama.cpp demands."""
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for entry in entries:
        shown = printable(entry.name)
        if entry.name in tensors:
            raise cursor.fail(f"the tensor {shown} is there twice")
        try:
            nbytes = tensor_nbytes(entry.type, entry.shape)
        except ValueError as error:
            raise cursor.fail(f"{shown}: {error}") from None
        if entry.offset != expected:
            raise cursor.fail(f"{shown} lies at {entry.offset} instead of {expected}")
        if data_start + entry.offset + nbytes > cursor.end:
            raise BadInput(
                f"{printable(cursor.path)} is not whole.",
                f"It has {cursor.end} bytes, but {shown} ends at byte "
                f"{data_start + entry.offset + nbytes}.",
                "Download or convert it again.",
            )
        expected = padded(entry.offset + nbytes, alignment)
        tensors[entry.name] = TensorInfo(
            entry.name, entry.shape, entry.type, cursor.path, data_start + entry.offset, nbytes
        )
    return tensors


# --- split models -----------------------------------------------------------------------------

_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def split_paths(path: Path, n_files: int) -> list[Path]:
    """llama.cpp's names for a model in `n_files`: model-00001-of-00003.gguf (llama_split_path)."""
    if n_files == 1:
        return [path]
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.name.removesuffix(".gguf"))
    return [path.with_name(f"{stem}-{i + 1:05d}-of-{n_files:05d}.gguf") for i in range(n_files)]


def open_gguf(path: Path) -> GgufFile:
    """A GGUF model: one file, or all files of a split one when `path` is its first.

    The metadata is the first file's without the split.* keys; the tensors are those of all files.
    Raises InputMissing or BadInput if a file is missing or does not belong.
    """
    first = GgufFile.open(path)
    n_files = _whole_number(first, "split.count", 1)
    if n_files <= 1:
        return replace(first, metadata=without_split_keys(first.metadata))
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match.group(2)) != 1 or int(match.group(3)) != n_files:
        raise BadInput(
            f"{printable(path)} is one of {n_files} files of a split model.",
            "Its name must end in the form llama.cpp gives: "
            f"-00001-of-{n_files:05d}.gguf, and the first file must be named.",
        )
    tensors = dict(first.tensors)
    nbytes = first.nbytes
    for i, other in enumerate(split_paths(path.with_name(f"{match.group(1)}.gguf"), n_files)):
        if i == 0:
            continue
        part = GgufFile.open(other)
        if _whole_number(part, "split.no", -1) != i:
            raise BadInput(f"{printable(other)} is not file {i + 1} of this split model.")
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise BadInput(f"{printable(sorted(twice)[0])} is in two files of the split model.")
        tensors |= part.tensors
        nbytes += part.nbytes
    expected = _whole_number(first, "split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise BadInput(
            f"The {n_files} files hold {len(tensors)} tensors; the first one says {expected}."
        )
    metadata = without_split_keys(first.metadata)
    return replace(first, metadata=metadata, tensors=tensors, nbytes=nbytes)


def _whole_number(gguf: GgufFile, key: str, default: int) -> int:
    """An integer of the metadata. Raises BadInput if the key holds something else."""
    value = gguf.metadata.get(key, Value("i32", default))
    if value.type not in INTEGER_TYPES:
        raise BadInput(f"{printable(gguf.path)}: {key} is no whole number but {value.type}.")
    return value.data


def without_split_keys(metadata: Metadata) -> Metadata:
    return {key: value for key, value in metadata.items() if not key.startswith("split.")}
