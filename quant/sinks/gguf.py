"""Writes GGUF files, one tensor after the other, and proves what it wrote.

The header comes last: its length is known from the plan, so its place is kept free, and a tensor
may still change its type while it is being encoded (a value too large for float16). Nothing has
its final name until every file was flushed, opened again, and compared with what was meant.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from xxhash import xxh3_128

from quant.display import printable
from quant.durable import PendingFile, temporary_path
from quant.errors import BadInput, OutputFailed
from quant.gguf_file import (
    GgufFile,
    Metadata,
    TensorEntry,
    Value,
    encode_header,
    encode_metadata,
    padded,
    split_paths,
    tensor_nbytes,
)
from quant.sinks.written import (
    Tick,
    WrittenFile,
    WrittenTensor,
    differs,
    hash_file,
    is_there,
)


def split_metadata(metadata: Metadata, index: int, n_files: int, n_tensors: int) -> Metadata:
    """The metadata of file `index`: all of it in the first, what a part needs in the others."""
    if n_files == 1:
        return metadata
    split = {
        "split.no": Value("u16", index),
        "split.count": Value("u16", n_files),
        "split.tensors.count": Value("i32", n_tensors),
    }
    if index == 0:
        return {**metadata, **split}
    return {k: v for k, v in metadata.items() if k == "general.alignment"} | split


def files_of_job(output: Path, fingerprint: dict | None) -> list[Path]:
    """The files that a run with this fingerprint was writing; `fingerprint` may say anything."""
    n_files = (fingerprint or {}).get("files")
    if not isinstance(n_files, int) or not 1 <= n_files < 100_000:
        return []
    return split_paths(output, n_files)


class GgufSink:
    """Writes one GGUF file: `open` or `take_up`, then `begin`, `append` ... for each tensor in
    order, then `finish`.

    Nothing but `publish` gives the file its name; what was not published is removed by `discard`,
    left for another run by `keep`.
    """

    def __init__(self, path: Path, metadata: Metadata, entries: list[TensorEntry], alignment: int):
        self.path = path
        self._metadata = metadata
        self._encoded_metadata = encode_metadata(metadata)
        self._alignment = alignment
        self.planned_header = self._header(entries)
        self._data_start = len(self.planned_header)
        self._written: list[WrittenTensor] = []
        self._entry: TensorEntry | None = None
        self._hash = xxh3_128()
        self._at = 0  # where the next byte of tensor data goes
        self._file: PendingFile | None = None

    def open(self) -> None:
        """Begin the file, unless it was taken up. Raises CannotCreate if another run writes it."""
        if self._file is None:
            self._file = PendingFile(self.path)

    def take_up(self, written: list[WrittenTensor], n_certain: int, tick: Tick) -> int:
        """Go on with the file of an earlier run that wrote these tensors; how many are there.

        The first `n_certain` outlived whatever ended it, unless the file is too short for them; the
        others are read and compared with their hashes.
        """
        self._file = PendingFile(self.path, taken_up=True)
        if self._file.nbytes < max([0, *map(self._end, written[:n_certain])]):
            n_certain = 0  # it is not the file that the earlier run left
        n = n_certain
        while n < len(written) and self._is_there(written[n], tick):
            n += 1
        self._written = written[:n]
        end = max([self._data_start, *map(self._end, self._written)])
        self._file.truncate(end)
        self._at = padded(end - self._data_start, self._alignment)
        return n

    def take_up_published(self, written: list[WrittenTensor], nbytes: int) -> bool:
        """Whether an earlier run gave the file, with these tensors and so long, its name."""
        there = self.path.is_file() and not temporary_path(self.path).exists()
        if there and self.path.stat().st_size == nbytes:
            self._written = written
            self._at = nbytes - self._data_start
            return True
        return False

    def _end(self, tensor: WrittenTensor) -> int:
        return self._data_start + tensor.entry.offset + _nbytes(tensor)

    def _is_there(self, tensor: WrittenTensor, tick: Tick) -> bool:
        offset = self._data_start + tensor.entry.offset
        return is_there(self._file, offset, _nbytes(tensor), tensor.xxh3_128, tick)

    def _header(self, entries: list[TensorEntry]) -> bytes:
        n_keys = len(self._metadata)
        return encode_header(self._encoded_metadata, n_keys, entries, self._alignment)

    def begin(self, name: str, shape: tuple[int, ...], type_name: str) -> None:
        """Start the next tensor; an unfinished one is dropped, so begin again to redo it."""
        if self._entry is not None:
            self._at = self._entry.offset
        self._entry = TensorEntry(name, shape, type_name, self._at)
        self._hash = xxh3_128()

    def append(self, encoded: np.ndarray) -> None:
        """The next bytes of the tensor begun: uint8, any shape, contiguous."""
        self._hash.update(encoded)
        self._file.write_at(self._data_start + self._at, encoded)
        self._at += encoded.nbytes

    def end(self) -> WrittenTensor:
        """The tensor begun is complete."""
        tensor = WrittenTensor(self._entry, self._hash.hexdigest())
        self._written.append(tensor)
        self._entry = None
        self._at = padded(self._at, self._alignment)
        return tensor

    def finish(self, tick: Tick = lambda: None) -> WrittenFile:
        """Write the header, flush to the disk, read everything back and compare.

        Raises OutputFailed if the disk or the read-back says otherwise.
        """
        header = self._header([tensor.entry for tensor in self._written])
        path = self.path
        if self._file is not None:
            self._file.write_at(0, header)
            self._file.truncate(self._data_start + self._at)
            self._file.flush()
            path = self._file.temporary
        written = WrittenFile(self.path, self._data_start + self._at, "", tuple(self._written))
        sha256 = verify_written(path, written, header, tick)
        return replace(written, sha256=sha256)

    def publish(self) -> None:
        """Give the file its name, unless it was taken up with it."""
        if self._file is not None:
            self._file.publish()

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    @property
    def flush_failed(self) -> bool:
        return self._file is not None and self._file.flush_failed

    def keep(self) -> None:
        if self._file is not None:
            self._file.keep()

    def discard(self) -> None:
        if self._file is not None:
            self._file.discard()


def _nbytes(tensor: WrittenTensor) -> int:
    return tensor_nbytes(tensor.entry.type, tensor.entry.shape)


def verify_written(
    path: Path, written: WrittenFile, header: bytes, tick: Tick = lambda: None
) -> str:
    """Open `path` again and compare with what was meant; returns the sha256 of the whole file.

    Checks the counts, all metadata, every name, shape, type, place and alignment, and the hash of
    every tensor's bytes. Raises OutputFailed naming what differs. (That special token ids lie below
    the vocabulary's size is known since the plan, see metadata_checks.)
    """
    try:
        again = GgufFile.open(path, texts=False)  # the header is compared as bytes
    except BadInput as error:
        raise OutputFailed(f"{printable(written.path)} cannot be read back.", str(error)) from error
    with open(path, "rb") as file:
        if file.read(len(header)) != header:
            raise differs(written, "the header")
    if len(again.tensors) != len(written.tensors):
        raise differs(written, "the number of tensors")
    hashes, sha256 = hash_file(path, again.tensors.values(), tick)
    for tensor, info in zip(written.tensors, again.tensors.values(), strict=True):
        entry = tensor.entry
        place = TensorEntry(info.name, info.shape, info.dtype, info.offset - again.data_start)
        if place != entry:
            raise differs(written, f"the header of {printable(entry.name)}")
        if hashes[entry.name] != tensor.xxh3_128:
            raise differs(written, f"the bytes of {printable(entry.name)}")
    return sha256
