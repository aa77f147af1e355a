"""Writes safetensors shards, one tensor after the other, and proves what it wrote.

    8 bytes   n, little-endian
    n bytes   {"__metadata__": {...}, "lm_head.weight": {"dtype": ..., "shape": ...,
              "data_offsets": [begin, end]}, ...} and spaces
    the rest  the tensors end to end

`safetensors.save_file` wants all tensors of a file in memory at once. Here only the plan is: every
tensor's place is known before the first byte, in the order that save_file chooses (wide types
first, so that each is aligned to its own width), and the header comes last, into a place that was
kept free. Tensors whose length only their bytes tell, such as bitsandbytes' JSON, stand at the end
of their shard.

# ref: https://github.com/huggingface/safetensors#format
"""

import json
import os
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path

import numpy as np
from xxhash import xxh3_128

from quant.display import printable
from quant.durable import PendingFile, temporary_path, write_whole
from quant.errors import BadInput, OutputFailed
from quant.gguf_file import TensorEntry
from quant.safetensors_file import DTYPE_BITS, read_header
from quant.sinks.written import (
    Tick,
    WrittenFile,
    WrittenTensor,
    differs,
    hash_file,
    is_there,
)
from quant.tensors import STORED_DTYPES

DEFAULT_SHARD_NBYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
PT_METADATA = {"format": "pt"}
"""Older releases of transformers refuse a file that does not say so."""


@dataclass(frozen=True)
class _Planned:
    name: str
    dtype: str  # safetensors' spelling
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def may_be_shorter(self) -> bool:
        return self.dtype == "U8" and len(self.shape) == 1


class ShardedSink:
    """Writes a model's tensors into `folder`: `write` each in the planned order, then `finish`.

    The files are model.safetensors, or model-00001-of-0000N.safetensors with their index, each
    filled in the planned order up to `max_shard_nbytes` (a larger tensor has one to itself).
    planned: (name, dtype in safetensors' spelling, shape); that of a one-dimensional U8 tensor is
    an upper bound. What was not finished is removed by `discard`, and left by `keep` for another
    run's `take_up`; what becomes of the folder is for its PendingFolder to say.
    """

    def __init__(
        self,
        folder: Path,
        planned: Iterable[tuple[str, str, Sequence[int]]],
        max_shard_nbytes: int = DEFAULT_SHARD_NBYTES,
        metadata: dict[str, str] = PT_METADATA,
    ):
        tensors = [_Planned(name, dtype, tuple(shape)) for name, dtype, shape in planned]
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise ValueError("two tensors have one name")
        self._folder = folder
        parts = _split(tensors, max_shard_nbytes)
        names = _file_names(len(parts))
        self._shards = [
            _Shard(folder / name, part, metadata) for name, part in zip(names, parts, strict=True)
        ]
        queue = [(shard, tensor) for shard in self._shards for tensor in shard.tensors]
        self._queue = deque(queue)

    def take_up(
        self,
        units: Iterable[Sequence[WrittenTensor]],
        n_certain: int,
        tick: Tick = lambda: None,
    ) -> int:
        """Before the first `write`: go on with the files of an earlier run that wrote these units,
        one or more tensors each; how many of them are there. The plan goes on after them.

        The first `n_certain` outlived whatever ended it; others are compared with their hashes.
        """
        n_there = 0
        for unit in units:
            places = list(islice(self._queue, len(unit)))
            if [tensor.entry.name for tensor in unit] != [planned.name for _, planned in places]:
                break
            pairs = list(zip(places, unit, strict=True))
            if not all(s.is_there(t, n_there < n_certain, tick) for (s, _), t in pairs):
                break
            for (shard, planned), tensor in pairs:
                shard.add(planned, tensor)
                self._queue.popleft()
            n_there += 1
        return n_there

    def write(self, name: str, data: np.ndarray | Iterable[np.ndarray]) -> WrittenTensor:
        """The next tensor, whole or as blocks of rows; bfloat16 as its bits in uint16.

        Raises OutputFailed, or ValueError for what is not in the plan.
        """
        shard, planned = self._queue.popleft() if self._queue else (None, None)
        if planned is None or name != planned.name:
            expected = "the end" if planned is None else planned.name
            raise ValueError(f"{name} was written where the plan has {expected}")
        return shard.write(planned, [data] if isinstance(data, np.ndarray) else data)

    def finish(self, tick: Tick = lambda: None) -> list[WrittenFile]:
        """Flush every file to the disk, read it back, compare, and write the index if it is needed.

        Raises OutputFailed if the disk or the read-back says otherwise.
        """
        left = [planned.name for _, planned in self._queue]
        if left:
            raise ValueError(f"{len(left)} planned tensors were not written, first {left[0]}")
        files = [shard.finish(tick) for shard in self._shards]
        if len(files) > 1:
            write_whole(self._folder / INDEX, _index(files))
        return files

    @property
    def _files(self) -> list[PendingFile]:
        return [shard.file for shard in self._shards if shard.file is not None]

    def flush(self) -> None:
        for file in self._files:
            file.flush()

    @property
    def flush_failed(self) -> bool:
        return any(file.flush_failed for file in self._files)

    def keep(self) -> None:
        for file in self._files:
            file.keep()

    def discard(self) -> None:
        for file in self._files:
            file.discard()


def _split(tensors: list[_Planned], max_nbytes: int) -> list[list[_Planned]]:
    parts, filled = [[]], 0
    for tensor in tensors:
        if parts[-1] and filled + tensor.nbytes > max_nbytes:
            parts.append([])
            filled = 0
        parts[-1].append(tensor)
        filled += tensor.nbytes
    return parts


def _file_names(n_files: int) -> list[str]:
    if n_files == 1:
        return ["model.safetensors"]
    return [f"model-{i:05}-of-{n_files:05}.safetensors" for i in range(1, n_files + 1)]


def _index(files: list[WrittenFile]) -> bytes:
    """Which tensor is in which file, in transformers' spelling."""
    tensors = [(tensor.entry, file.path.name) for file in files for tensor in file.tensors]
    total = sum(entry_nbytes(entry) for entry, _ in tensors)
    content = {
        "metadata": {"total_size": total},
        "weight_map": {entry.name: file_name for entry, file_name in tensors},
    }
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


class _Shard:
    """One file: its places are given out at once, its bytes come as they are made."""

    def __init__(self, path: Path, tensors: list[_Planned], metadata: dict[str, str]):
        self.path, self.tensors, self._metadata = path, tensors, metadata
        self._places, self._end = {}, 0
        fixed = [tensor for tensor in tensors if not tensor.may_be_shorter]
        for tensor in sorted(fixed, key=lambda tensor: -DTYPE_BITS[tensor.dtype]):
            self._places[tensor.name] = self._end
            self._end += tensor.nbytes
        most = sum(tensor.nbytes for tensor in tensors)  # no offset is larger, nor longer
        longest = [TensorEntry(t.name, t.shape, t.dtype, most) for t in tensors]
        self._header_nbytes = -(-len(_header(metadata, longest)) // 8) * 8
        self._written: list[WrittenTensor] = []
        self.file: PendingFile | None = None

    def _entry(self, tensor: _Planned, shape: tuple[int, ...]) -> TensorEntry:
        place = self._places.get(tensor.name, self._end)
        return TensorEntry(tensor.name, shape, tensor.dtype, place)

    @property
    def _data_start(self) -> int:
        return 8 + self._header_nbytes

    def is_there(self, tensor: WrittenTensor, is_certain: bool, tick: Tick) -> bool:
        """Whether an earlier run's file has the tensor: looked at, unless it is certain."""
        if self.file is None:
            if self.path.exists():  # it was ended while the files were given their names
                os.replace(self.path, temporary_path(self.path))
            self.file = PendingFile(self.path, taken_up=True)
        offset, nbytes = self._data_start + tensor.entry.offset, entry_nbytes(tensor.entry)
        if is_certain and offset + nbytes <= self.file.nbytes:
            return True
        return is_there(self.file, offset, nbytes, tensor.xxh3_128, tick)

    def add(self, planned: _Planned, tensor: WrittenTensor) -> WrittenTensor:
        """The tensor is in the file."""
        if planned.may_be_shorter:
            self._end += entry_nbytes(tensor.entry)
        self._written.append(tensor)
        return tensor

    def write(self, tensor: _Planned, blocks: Iterable[np.ndarray]) -> WrittenTensor:
        if self.file is None:
            self.file = PendingFile(self.path)
        entry, digest, nbytes = self._entry(tensor, tensor.shape), xxh3_128(), 0
        for block in blocks:
            if block.dtype != STORED_DTYPES[tensor.dtype]:
                raise ValueError(f"{tensor.name} is {tensor.dtype}, not {block.dtype}")
            if nbytes + block.nbytes > tensor.nbytes:
                raise ValueError(f"{tensor.name} has more than its {tensor.nbytes} bytes")
            if block.nbytes:
                block = np.ascontiguousarray(block)
                digest.update(block)
                self.file.write_at(self._data_start + entry.offset + nbytes, block)
            nbytes += block.nbytes
        if tensor.may_be_shorter:
            entry = self._entry(tensor, (nbytes,))
        elif nbytes < tensor.nbytes:
            raise ValueError(f"{tensor.name} has {nbytes} bytes instead of {tensor.nbytes}")
        return self.add(tensor, WrittenTensor(entry, digest.hexdigest()))

    def finish(self, tick: Tick) -> WrittenFile:
        """Write the header, flush, read everything back and compare, then name the file."""
        if self.file is None:
            self.file = PendingFile(self.path)
        header = _header(self._metadata, [tensor.entry for tensor in self._written])
        header = header.ljust(self._header_nbytes)
        nbytes = self._data_start + self._end
        self.file.write_at(0, len(header).to_bytes(8, "little") + header)
        self.file.truncate(nbytes)
        self.file.flush()
        written = WrittenFile(self.path, nbytes, "", tuple(self._written))
        sha256 = _verify(self.file.temporary, written, self._metadata, self._data_start, tick)
        self.file.publish()
        return WrittenFile(self.path, nbytes, sha256, written.tensors)


def entry_nbytes(entry: TensorEntry) -> int:
    """What a tensor takes in its file."""
    return _Planned(entry.name, entry.type, entry.shape).nbytes


def _header(metadata: dict[str, str], entries: list[TensorEntry]) -> bytes:
    content = {"__metadata__": metadata}
    for entry in entries:
        end = entry.offset + entry_nbytes(entry)
        content[entry.name] = {
            "dtype": entry.type,
            "shape": list(entry.shape),
            "data_offsets": [entry.offset, end],
        }
    return json.dumps(content, separators=(",", ":")).encode()


def _verify(
    path: Path, written: WrittenFile, metadata: dict[str, str], data_start: int, tick: Tick
) -> str:
    """Compare the file with what was meant, byte for byte; returns its sha256.

    Raises OutputFailed naming what differs.
    """
    try:
        tensors, metadata_again = read_header(path)
    except BadInput as error:
        raise OutputFailed(f"{printable(written.path)} cannot be read back.", str(error)) from error
    if metadata_again != metadata or len(tensors) != len(written.tensors):
        raise differs(written, "its metadata or the number of its tensors")
    hashes, sha256 = hash_file(
        path, sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)), tick
    )
    for tensor in written.tensors:
        info = tensors.get(tensor.entry.name)
        if info is None or tensor.entry != TensorEntry(
            info.name, info.shape, info.dtype, info.offset - data_start
        ):
            raise differs(written, f"the header of {printable(tensor.entry.name)}")
        if hashes[info.name] != tensor.xxh3_128:
            raise differs(written, f"the bytes of {printable(info.name)}")
    return sha256
