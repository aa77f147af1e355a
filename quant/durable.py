"""Files that appear whole or not at all.

A file is written under a temporary name in its own folder, flushed to the disk, checked, and only
then given its final name. The temporary file is also the lock: a second run on the same output is
refused while the first one lives, and takes the file over if the first one was killed. A folder of
files is treated alike.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from quant.display import human_bytes, printable
from quant.errors import CannotCreate, OutputFailed, QwqQuantError

MANIFEST = "qwq-quant.json"
"""Names what a folder was filled with; written by quant.manifest."""


class PendingFile:
    """A file being written next to its final place. Published by `publish`, else removed."""

    def __init__(self, path: Path):
        self.path = path
        self.temporary = path.with_name(f".{path.name}.partial")
        self.descriptor = -1
        try:
            with translated_errors(path):
                with undisturbed():  # Ctrl-C must find it either absent or known
                    self.descriptor = self._open_alone()
                os.ftruncate(self.descriptor, 0)
        except BaseException:
            self.discard()
            raise

    def _open_alone(self) -> int:
        """Open the temporary file and lock it. Raises CannotCreate if another run holds it."""
        while True:
            descriptor = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            _lock_alone(descriptor, self.path)
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


class PendingFolder:
    """A folder being filled next to its final place, `.NAME.partial`: a whole output, or none.

    Files go into `temporary` by whatever means. `publish` flushes them all and gives the folder
    its name; else `discard` removes it. What a killed run left is emptied and taken over.
    """

    def __init__(self, path: Path, force: bool = False):
        """Raises CannotCreate if another run fills it, or if `path` must not be replaced."""
        self.path = path = Path(os.path.abspath(path))
        self.temporary = path.with_name(f".{path.name}.partial")
        self._older = path.with_name(f".{path.name}.older")
        self._force = force
        self._descriptor = -1
        try:
            with translated_errors(path):
                with undisturbed():
                    self._descriptor = self._open_alone()
                self._recover()
                check_replaceable_folder(path, force)
                _empty(self.temporary)
        except BaseException:
            self.discard()
            raise

    def _open_alone(self) -> int:
        """Make the temporary folder and lock it. Raises CannotCreate if another run holds it."""
        while True:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.temporary)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            try:
                descriptor = os.open(self.temporary, flags)
            except FileNotFoundError:  # the other run published it just now
                continue
            _lock_alone(descriptor, self.path)
            if _same_file(descriptor, self.temporary):
                return descriptor
            os.close(descriptor)

    def _recover(self) -> None:
        """Undo or complete the replacement in the middle of which a run was killed."""
        if not self._older.is_dir():
            return
        if self.path.exists():
            shutil.rmtree(self._older)
        else:
            os.rename(self._older, self.path)

    def publish(self) -> None:
        """Give the folder its final name and make that last. An older output is removed last."""
        with translated_errors(self.path):
            _flush_tree(self.temporary)
            check_replaceable_folder(self.path, self._force)
            with undisturbed():
                if self.path.is_dir() and any(self.path.iterdir()):
                    os.rename(self.path, self._older)
                try:
                    os.rename(self.temporary, self.path)
                except OSError:
                    self._recover()
                    raise
                flush_folder(self.path.parent)
            self._close()
            if self._older.is_dir():
                shutil.rmtree(self._older)

    def discard(self) -> None:
        """Remove it, if it was not published."""
        if self._descriptor >= 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self._close()

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1


def check_replaceable_folder(path: Path, force: bool) -> None:
    """Raise CannotCreate unless `path` is free, an empty folder, or ours and `force` is given.

    Ours is a folder whose manifest has the one entry "." and names every file in it
    ({"outputs": {".": {"files": [{"name": "figures/error.svg"}, ...]}}}): a folder that holds
    anything else, such as somebody's training run, is never removed.
    """
    shown = printable(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise CannotCreate(
            f"{shown} exists and is no folder.",
            "It is never replaced.",
            "Choose another name with -o.",
        )
    if not path.exists() or not any(path.iterdir()):
        return
    foreign = _foreign_files(path)
    if foreign:
        raise CannotCreate(
            f"{shown} exists and holds what qwq-quant did not write: {printable(foreign[0])}.",
            "Only folders that hold nothing else are replaced, even with --force.",
            "Remove it or choose another name with -o.",
        )
    if not force:
        raise CannotCreate(
            f"{shown} exists already.",
            "It is left as it is.",
            "Replace it with --force, or choose another name with -o.",
        )


def _foreign_files(folder: Path) -> list[str]:
    """Files below `folder` that its manifest does not name; all of them if it has none."""
    found = {
        place.relative_to(folder).as_posix()
        for place in folder.rglob("*")
        if place.is_symlink() or not place.is_dir()
    }
    try:
        outputs = json.loads((folder / MANIFEST).read_text("utf-8"))["outputs"]
        if list(outputs) == ["."]:
            found -= {MANIFEST, *(file["name"] for file in outputs["."]["files"])}
    except (OSError, ValueError, TypeError, KeyError):
        pass  # no manifest of ours
    return sorted(found)


def _empty(folder: Path) -> None:
    for place in folder.iterdir():
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink()


def _flush_tree(folder: Path) -> None:
    """Wait until every file and folder below `folder`, and itself, is on the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            flush_folder(Path(root, name))
        flush_folder(Path(root))


def _lock_alone(descriptor: int, path: Path) -> None:
    """Lock what is being written for `path`. Raises CannotCreate if another run holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CannotCreate(
            f"Another run is writing {printable(path)} just now.",
            "",
            "Wait for it, or choose another output with -o.",
        ) from None


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
    temporary = path.with_name(f".{path.name}.partial")
    nbytes = 0
    for place in (temporary, *temporary.rglob("*")):
        with contextlib.suppress(OSError):
            nbytes += place.lstat().st_blocks * 512
    return nbytes


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
