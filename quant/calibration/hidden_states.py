"""The residual stream of all calibration tokens between two layers, in memory or in a file."""

import mmap
import os
import tempfile
import weakref
from pathlib import Path
from typing import Protocol

import torch

from quant.display import human_bytes, printable
from quant.durable import PendingFile, translated_errors
from quant.errors import OutputFailed
from quant.preflight import available_memory

SHARE_OF_MEMORY = 0.25
"""Of the free memory, for all hidden states together; what is beyond it goes to files. A layer, its
activations and the system need the rest."""

_held: dict[int, int] = {}
"""id -> bytes of the hidden states that are in memory now."""


class States(Protocol):
    """What a layer can be run on."""

    n_sequences: int

    def read(self, part: slice) -> torch.Tensor:
        """Those sequences, (n, seq_len, hidden), on the CPU."""


class HiddenStates:
    """(n_sequences, seq_len, hidden) in the compute type, on the CPU.

    64k tokens of QwQ-32B in float32 are 1.3 GB. Where all of them together would take more than a
    quarter of the free memory, the next is mapped from a temporary file in `folder`, which the
    system writes out when it needs the memory. Raises OutputFailed if the disk has no room for it.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, folder: Path | None = None):
        nbytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
        self.in_file = False
        if sum(_held.values()) + nbytes <= SHARE_OF_MEMORY * available_memory():
            self.tensor = torch.empty(shape, dtype=dtype)
            _held[id(self)] = nbytes
            weakref.finalize(self, _held.pop, id(self))
        else:
            with _temporary_file(nbytes, folder) as file:
                mapped = mmap.mmap(file.fileno(), nbytes)  # keeps the file's blocks, not its name
            self.tensor = torch.frombuffer(mapped, dtype=dtype).view(shape)
            self.in_file = True

    @property
    def n_sequences(self) -> int:
        return len(self.tensor)

    def read(self, part: slice) -> torch.Tensor:
        return self.tensor[part]

    def like(self) -> "HiddenStates":
        """Another one of the same shape, its values undefined."""
        return HiddenStates(tuple(self.tensor.shape), self.tensor.dtype)


class StatesFile:
    """Hidden states of one shape behind one another in a file, for a way back.

    A backward pass needs the input of every layer again: 11 GB for 8192 tokens of QwQ-32B. Each is
    written once and read once. They are not mapped: the pages of a map are the process's memory,
    those of a file that is read are the system's, which drops them when it likes.
    Raises OutputFailed if the disk has no room for all.
    """

    def __init__(
        self,
        n: int,
        like: HiddenStates,
        folder: Path | None = None,
        kept: PendingFile | None = None,
    ):
        """kept: the file, if a later run may go on with it; else a temporary one in `folder`."""
        self.shape, self.dtype = tuple(like.tensor.shape), like.tensor.dtype
        self.nbytes = like.tensor.nbytes
        self.kept = kept
        if kept is None:
            self._file = _temporary_file(n * self.nbytes, folder)
            self._descriptor = self._file.fileno()
        else:
            self._descriptor = kept.descriptor
            less = "Give fewer --tokens, choose another folder with -o, or give --resume never."
            _allocate(self._descriptor, n * self.nbytes, kept.path.parent, less)

    def write(self, i: int, states: HiddenStates) -> None:
        """Make them the i-th."""
        view, at = bytes_of(states.tensor), i * self.nbytes
        if self.kept is not None:
            self.kept.write_at(at, view)
            return
        with translated_errors(Path(tempfile.gettempdir()) / "hidden states"):
            while view:  # the system takes 2 GB at a time
                n = os.pwrite(self._descriptor, view, at)
                view, at = view[n:], at + n

    def __getitem__(self, i: int) -> "StoredStates":
        return StoredStates(self, i)

    def read(self, i: int, part: slice) -> torch.Tensor:
        """Sequences `part` of the i-th."""
        first, last, _ = part.indices(self.shape[0])
        found = torch.empty((last - first, *self.shape[1:]), dtype=self.dtype)
        view, at = bytes_of(found), i * self.nbytes + first * self.nbytes // self.shape[0]
        while view:
            n = os.preadv(self._descriptor, [view], at)
            if not n:
                raise EOFError("hidden states are read that were not written")
            view, at = view[n:], at + n
        return found


class StoredStates:
    """One of a StatesFile."""

    def __init__(self, file: StatesFile, i: int):
        self._file, self._i = file, i
        self.n_sequences = file.shape[0]

    def read(self, part: slice) -> torch.Tensor:
        return self._file.read(self._i, part)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _temporary_file(nbytes: int, folder: Path | None):
    """An open file without a name, which goes when it is closed, or when we die."""
    folder = Path(folder or tempfile.gettempdir())
    with translated_errors(folder / "hidden states"):
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed with its owner
        try:
            less = "Set TMPDIR to a folder on a larger disk, or give fewer --tokens."
            _allocate(file.fileno(), nbytes, folder, less)
        except OutputFailed:
            file.close()
            raise
    return file


def _allocate(descriptor: int, nbytes: int, folder: Path, advice: str) -> None:
    """Blocks on the disk for the whole file. Raises OutputFailed if there is no room.

    Without them a full disk would be seen only hours later, and by a store to a map not even as an
    error.
    """
    try:
        if allocate := getattr(os, "posix_fallocate", None):  # macOS has none
            allocate(descriptor, 0, nbytes)
    except OSError as error:
        raise OutputFailed(
            f"The hidden states of the calibration text need {human_bytes(nbytes)} in "
            f"{printable(folder)} for a while, and there is no room for them.",
            f"The system says: {error.strerror}.",
            advice,
        ) from error
