"""What a sink wrote, and the proof: every byte is read back from the disk and compared."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_128

from quant.display import printable
from quant.durable import PendingFile
from quant.errors import OutputFailed
from quant.gguf_file import TensorEntry
from quant.tensors import TensorInfo

READ_BACK_NBYTES = 4 << 20

Tick = Callable[[], None]
"""Called now and then while bytes are read; what it raises ends that."""


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor as it was handed to the disk."""

    entry: TensorEntry
    xxh3_128: str

    @classmethod
    def from_json(cls, found: dict) -> "WrittenTensor":
        """One that dataclasses.asdict and JSON gave away.

        Raises KeyError, TypeError or ValueError for what is none.
        """
        entry = {**found["entry"], "shape": tuple(found["entry"]["shape"])}
        return cls(TensorEntry(**entry), found["xxh3_128"])


@dataclass(frozen=True)
class WrittenFile:
    """A finished file, as the manifest names it."""

    path: Path
    nbytes: int
    sha256: str
    tensors: tuple[WrittenTensor, ...]


def hash_file(
    path: Path, tensors: Iterable[TensorInfo], tick: Tick = lambda: None
) -> tuple[dict[str, str], str]:
    """xxh3_128 of each tensor and sha256 of the whole file, in one pass and two threads.

    The one is compared with what was written, and costs next to nothing; the other is what the
    hub and sha256sum show. `tensors` are in the order of their places.
    """
    whole, hashes, at = hashlib.sha256(), {}, 0
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(1) as other_core:
        behind: deque[Future] = deque()

        def read(nbytes: int) -> bytes:
            """The next bytes, at most so many; the other core is at most one block behind."""
            block = file.read(nbytes)
            behind.append(other_core.submit(whole.update, block))
            if len(behind) > 1:
                behind.popleft().result()
            return block

        for info in tensors:
            while at < info.offset and (block := read(info.offset - at)):
                at += len(block)  # the header, or padding
            end, tensor_hash = info.offset + info.nbytes, xxh3_128()
            while at < end and (block := read(min(READ_BACK_NBYTES, end - at))):
                tensor_hash.update(block)
                at += len(block)
                tick()
            hashes[info.name] = tensor_hash.hexdigest()
        while read(READ_BACK_NBYTES):
            pass
    return hashes, whole.hexdigest()


def is_there(file: PendingFile, offset: int, nbytes: int, xxh3: str, tick: Tick) -> bool:
    """Whether a file that was taken up holds at `offset` the bytes with that xxh3_128."""
    digest, end = xxh3_128(), offset + nbytes
    while offset < end:
        block = file.read_at(offset, min(READ_BACK_NBYTES, end - offset))
        if not block:
            return False
        digest.update(block)
        offset += len(block)
        tick()
    return digest.hexdigest() == xxh3


def differs(written: WrittenFile, what: str) -> OutputFailed:
    """The error for a file that was read back otherwise than written."""
    return OutputFailed(
        f"{printable(written.path)} was read back and {what} differ from what was written.",
        "The disk or the memory of this machine may be failing.",
        "Nothing was published. Run the command again, with -o on another disk.",
    )
