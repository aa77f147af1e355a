"""Files that appear whole or not at all.

A file is written under a temporary name in its own folder, flushed to the disk, checked, and only
then given its final name. The temporary file is also the lock: a second run on the same output is
refused while the first one lives, and takes the file over if the first one was killed.
"""

import contextlib
import errno
import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from quant.display import human_bytes, printable
from quant.errors import CannotCreate, OutputFailed, QwqQuantError


class PendingFile:
    """A file being written next to its final place. Published by `publish`, else removed."""

    def __init__(self, path: Path):
        self.path = path
        self.temporary = path.with_name(f".{path.name}.partial")
        with translated_errors(path):
            self.descriptor = self._open_alone()
            os.ftruncate(self.descriptor, 0)

    def _open_alone(self) -> int:
        """Open the temporary file and lock it. Raises CannotCreate if another run holds it."""
        while True:
            descriptor = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise CannotCreate(
                    f"Another run is writing {printable(self.path)} just now.",
                    "",
                    "Wait for it, or choose another output with -o.",
                ) from None
            if _same_file(descriptor, self.temporary):
                return descriptor
            os.close(descriptor)  # the other run published it between our open and our lock

    def write_at(self, offset: int, data) -> None:
        """All of `data` (any contiguous buffer) at `offset`. Raises OutputFailed."""
        view = memoryview(data).cast("B")
        with translated_errors(self.path):
            while view:
                n = os.pwrite(self.descriptor, view, offset)
                view, offset = view[n:], offset + n

    def truncate(self, nbytes: int) -> None:
        with translated_errors(self.path):
            os.ftruncate(self.descriptor, nbytes)

    def flush(self) -> None:
        """Wait until the bytes are on the disk."""
        with translated_errors(self.path):
            os.fsync(self.descriptor)

    def publish(self) -> None:
        """Give the file its final name, replacing an older one, and make that last."""
        with translated_errors(self.path):
            os.replace(self.temporary, self.path)
            flush_folder(self.path.parent)
            os.close(self.descriptor)
            self.descriptor = -1

    def discard(self) -> None:
        """Remove it, if it was not published."""
        if self.descriptor >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.temporary)
            os.close(self.descriptor)
            self.descriptor = -1


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Wait for, and hold, the lock on a folder: for short read-change-write steps."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """A small file, whole or not at all."""
    pending = PendingFile(path)
    try:
        pending.write_at(0, data)
        pending.flush()
        pending.publish()
    finally:
        pending.discard()


def flush_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Hold back the signals that would end the program between two renames of one output."""
    ending = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def own_leftovers(path: Path) -> int:
    """Bytes that a killed run on this output left under its temporary name; they are reused."""
    try:
        return path.with_name(f".{path.name}.partial").stat().st_blocks * 512
    except OSError:
        return 0


@contextlib.contextmanager
def translated_errors(path: Path) -> Iterator[None]:
    """Operating system errors about `path` as messages for the user."""
    try:
        yield
    except OSError as error:
        raise _explain(error, path) from error


def _explain(error: OSError, path: Path) -> QwqQuantError:
    shown = printable(path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = human_bytes(os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize)
        return OutputFailed(
            f"The disk became full while {shown} was being written ({free} free now).",
            "Nothing was left behind, and an older file of that name is untouched.",
            "Free some space or choose another folder with -o, then run the same command again.",
        )
    if error.errno == errno.EFBIG:
        return OutputFailed(
            f"{shown} is larger than this file system or a limit allows.",
            "Nothing was left behind.",
            "Write smaller files with --split-max-size 4GB.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return CannotCreate(
            f"{shown} cannot be written: {error.strerror}.", "", "Choose another folder with -o."
        )
    if error.errno == errno.ENAMETOOLONG:
        return CannotCreate(
            f"The file name {printable(path.name, 60)} is too long.",
            "While it is written, the file has a name that is 9 bytes longer.",
            "Choose a shorter name with -o.",
        )
    if error.errno == errno.ENOTDIR:
        return CannotCreate(
            f"{shown} cannot be created: {printable(path.parent)} is not a folder.",
            "",
            "Choose another folder with -o.",
        )
    if error.errno == errno.ENOENT:
        return CannotCreate(
            f"{shown} cannot be created: there is no folder {printable(path.parent)}.",
            "",
            f"Make it first: mkdir -p {printable(path.parent)}",
        )
    return OutputFailed(f"Writing {shown} failed: {error.strerror}.", "Nothing was left behind.")
