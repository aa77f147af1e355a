"""Files that appear whole or not at all.

A file is written under a temporary name in its own folder, flushed to the disk, checked, and only
then given its final name. The temporary file is also the lock: a second run on the same output is
refused while the first one lives, and takes the file over if the first one was killed. A folder of
files is treated alike.

What is not published is removed, or kept for a run that goes on with it: quant.journal says which.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

from quant.display import human_bytes, printable
from quant.errors import CannotCreate, OutputFailed, QwqQuantError
from quant.hub import snapshot_root
from quant.strict_files import open_regular, parse_json

NAME_MAX = 255
"""Bytes of a file's name, on every file system that Linux is installed on."""

MANIFEST = "qwq-quant.json"
"""Names what a folder was filled with; written by quant.manifest."""


class PendingFile:
    """A file being written next to its final place, and what becomes of it: `publish` gives it its
    name, `discard` removes it, `keep` leaves it for a run that goes on with it.
    """

    def __init__(self, path: Path, taken_up: bool = False):
        """taken_up: keep the bytes that an earlier run left, instead of beginning anew.

        Raises CannotCreate if another run writes it.
        """
        self.path = path
        self.temporary = temporary_path(path)
        self.descriptor = -1
        self.flush_failed = False
        """What was written since the flush before may be lost, whatever the next flush says."""
        self._unflushed = True
        try:
            with translated_errors(path):
                with undisturbed():  # Ctrl-C must find it either absent or known
                    self.descriptor = open_alone(self.temporary, path)
                if not taken_up:
                    os.ftruncate(self.descriptor, 0)
        except BaseException:
            self.keep() if taken_up else self.discard()
            raise

    def write_at(self, offset: int, data) -> None:
        """All of `data` (any contiguous buffer) at `offset`. Raises OutputFailed."""
        view = memoryview(data).cast("B")
        with translated_errors(self.path):
            while view:
                n = os.pwrite(self.descriptor, view, offset)
                view, offset = view[n:], offset + n
        self._unflushed = True

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """At most `nbytes` from `offset`: fewer where the file ends."""
        with translated_errors(self.path):
            return os.pread(self.descriptor, nbytes, offset)

    @property
    def nbytes(self) -> int:
        return os.fstat(self.descriptor).st_size

    def truncate(self, nbytes: int) -> None:
        with translated_errors(self.path):
            os.ftruncate(self.descriptor, nbytes)
        self._unflushed = True

    def flush(self) -> None:
        """Wait until the bytes are on the disk. Another thread may be writing meanwhile."""
        if not self._unflushed:
            return
        self._unflushed = False  # before: what is written during the flush is for the next one
        with translated_errors(self.path):
            try:
                os.fsync(self.descriptor)
            except OSError:
                self.flush_failed = True
                raise

    def publish(self) -> None:
        """Give the file its final name, replacing an older one, and make that last."""
        with translated_errors(self.path):
            os.replace(self.temporary, self.path)
        with translated_errors(self.path, replaced=True):
            flush_folder(self.path.parent)
        self.keep()

    def discard(self) -> None:
        """Remove it, if it was not published and the disk lets us."""
        if self.descriptor >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self.temporary)
            self.keep()

    def keep(self) -> None:
        """Leave it under its temporary name, if it was not published."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class PendingFolder:
    """A folder being filled next to its final place, `.NAME.partial`: a whole output, or none.

    Files go into `temporary` by whatever means. `publish` flushes them all and gives the folder
    its name; else `discard` removes it, or `keep` leaves it for a run that goes on with it. What a
    killed run left is emptied and taken over.
    """

    def __init__(self, path: Path, force: bool = False, taken_up: bool = False):
        """taken_up: keep the weights that an earlier run left; small files are made anew.

        Raises CannotCreate if another run fills it, or if `path` must not be replaced.
        """
        self.path = path = Path(os.path.abspath(path))
        self.temporary = temporary_path(path)
        self._older = path.with_name(f".{path.name}.older")
        self._force = force
        self._descriptor = -1
        self.flush_failed = False
        try:
            with translated_errors(path):
                with undisturbed():
                    self._descriptor = self._open_alone()
                self._recover()
                check_replaceable_folder(path, force)
                _empty(self.temporary, but_weights=taken_up)
        except BaseException:
            self.keep() if taken_up else self.discard()
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
            except NotADirectoryError:
                _remove_other_kind(self.temporary, self.path)
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

    @staticmethod
    def was_published(path: Path) -> bool:
        """Whether a run that completed the folder gave it its name before it was ended."""
        path = Path(os.path.abspath(path))
        if not path.is_dir() or temporary_path(path).exists():
            return False
        shutil.rmtree(path.with_name(f".{path.name}.older"), ignore_errors=True)
        return True

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
            self.keep()
            if self._older.is_dir():
                shutil.rmtree(self._older)

    def flush(self) -> None:
        """Make the names of the files in it last; their bytes are for who writes them."""
        if self._descriptor < 0:
            return
        with translated_errors(self.path):
            try:
                os.fsync(self._descriptor)
            except OSError:
                self.flush_failed = True
                raise

    def discard(self) -> None:
        """Remove it, if it was not published."""
        if self._descriptor >= 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.keep()

    def keep(self) -> None:
        """Leave it under its temporary name, if it was not published."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def check_place(path: Path) -> None:
    """Raise CannotCreate where nothing of ours belongs, or where no temporary file fits beside."""
    path = Path(os.path.abspath(path))
    if snapshot_root(path) is not None:
        raise CannotCreate(
            f"{printable(path)} lies in the hub's download cache.",
            "What is there is shared, and may be removed by whoever clears the cache.",
            "Choose another folder with -o.",
        )
    if len(os.fsencode(journal_path(path).name)) > NAME_MAX:
        raise _name_too_long(path)


def _name_too_long(path: Path) -> CannotCreate:
    return CannotCreate(
        f"The file name {printable(path.name, 60)} is too long.",
        "While it is written, the file has a name that is 9 bytes longer.",
        "Choose a shorter name with -o.",
    )


def check_replaceable_folder(path: Path, force: bool) -> None:
    """Raise CannotCreate unless `path` is free, an empty folder, or ours and `force` is given.

    Ours is a folder whose manifest has the one entry "." and names every file in it
    ({"outputs": {".": {"files": [{"name": "figures/error.svg"}, ...]}}}): a folder that holds
    anything else, such as somebody's training run, is never removed. Nor is one made within a
    model's folder, whose files would be taken for the model's.
    """
    shown = printable(path)
    check_place(path)
    if (Path(os.path.abspath(path)).parent / "config.json").is_file():
        raise CannotCreate(
            f"{shown} would lie inside a model's folder.",
            "Its files would be taken for that model's.",
            "Choose another folder with -o.",
        )
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise CannotCreate(
            f"{shown} exists and is no folder.",
            "It is never replaced.",
            "Choose another name with -o.",
        )
    if not path.exists() or not any(path.iterdir()):
        return
    foreign = foreign_files(path)
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


def foreign_files(folder: Path) -> list[str]:
    """Files below `folder` that its manifest does not name; all of them if it has none."""
    found = {
        place.relative_to(folder).as_posix()
        for place in folder.rglob("*")
        if place.is_symlink() or not place.is_dir()
    }
    try:
        with open_regular(folder / MANIFEST) as file:
            outputs = parse_json(file.read(), folder / MANIFEST)["outputs"]
        if list(outputs) == ["."]:
            found -= {MANIFEST, *(file["name"] for file in outputs["."]["files"])}
    except (QwqQuantError, TypeError, KeyError):
        pass  # no manifest of ours
    return sorted(found)


WEIGHTS = re.compile(r"[\w.-]+\.safetensors|\.[\w.-]+\.safetensors\.partial")
"""Names of weight files, published within their folder or not."""


def _empty(folder: Path, but_weights: bool) -> None:
    for place in folder.iterdir():
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        elif place.is_symlink() or not (but_weights and WEIGHTS.fullmatch(place.name)):
            place.unlink()


def _flush_tree(folder: Path) -> None:
    """Wait until every file and folder below `folder`, and itself, is on the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            flush_folder(Path(root, name))
        flush_folder(Path(root))


def temporary_path(path: Path) -> Path:
    """Where `path` is while it is being written."""
    return path.with_name(f".{path.name}.partial")


def journal_path(path: Path) -> Path:
    """Where it stands what is finished of `path`, see quant.journal."""
    return path.with_name(f".{path.name}.journal")


def states_folder(path: Path) -> Path:
    """Where states are kept that `path` is computed from, see quant.calibration.passes."""
    return path.with_name(f".{path.name}.states")


def open_alone(place: Path, path: Path) -> int:
    """Open or make the file `place`, and lock it while `path` is being written.

    Raises CannotCreate if another run holds it, or if it is nothing that a run leaves.
    """
    while True:
        if place == temporary_path(path) and place.is_dir() and not place.is_symlink():
            _remove_other_kind(place, path)
        try:
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno in (errno.EISDIR, errno.ELOOP):
                raise no_regular_file(place) from None
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise no_regular_file(place)
        _lock_alone(descriptor, path)
        if _same_file(descriptor, place):
            return descriptor
        os.close(descriptor)  # the other run published or removed it between our open and our lock


def no_regular_file(place: Path) -> CannotCreate:
    """The refusal of a hidden name that somebody uses for something else."""
    return CannotCreate(
        f"{printable(place)} is no regular file.",
        "It has a name under which unfinished work is kept.",
        "Remove it or choose another name with -o.",
    )


def _remove_other_kind(place: Path, path: Path) -> None:
    """Remove what a killed run of another command left for an output of that name: a folder where
    a file is to be, or a file where a folder is. Raises CannotCreate if that run lives.
    """
    with contextlib.suppress(FileNotFoundError):  # gone just now
        descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        _lock_alone(descriptor, path)
        try:
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        finally:
            os.close(descriptor)


def _lock_alone(descriptor: int, path: Path) -> None:
    """Lock what is being written for `path`. Raises CannotCreate if another run holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise being_written(path) from None


def is_locked(place: Path) -> bool:
    """Whether a run holds `place`, a file or folder, just now. Nothing is taken or made: a shared
    lock is let go of at once.
    """
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # there is none, or it is not for us to see
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def locks_of(path: Path) -> tuple[Path, Path]:
    """What is locked while `path` is being written: either of them, or both."""
    return journal_path(path), temporary_path(path)


def being_written(path: Path) -> CannotCreate:
    """The refusal of a run whose output another one is writing."""
    return CannotCreate(
        f"Another run is writing {printable(path)} just now.",
        "",
        "Wait for it, or choose another output with -o.",
    )


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
    """Bytes that an unfinished run on this output left under hidden names; they are reused."""
    temporary, states = temporary_path(path), states_folder(path)
    nbytes = 0
    for place in (journal_path(path), temporary, *temporary.rglob("*"), *states.rglob("*")):
        with contextlib.suppress(OSError):
            nbytes += place.lstat().st_blocks * 512
    return nbytes


@contextlib.contextmanager
def translated_errors(path: Path, replaced: bool = False) -> Iterator[None]:
    """Operating system errors about `path` as messages for the user.

    replaced: what had that name before is gone by now.
    """
    try:
        yield
    except OSError as error:
        raise _explain(error, path, replaced) from error


def _explain(error: OSError, path: Path, replaced: bool) -> QwqQuantError:
    shown = printable(path)
    older = "" if replaced else "An older file of that name is untouched."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = human_bytes(os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize)
        return OutputFailed(
            f"The disk became full while {shown} was being written ({free} free now).",
            older,
            "Free some space or choose another folder with -o, then run the same command again.",
        )
    if error.errno == errno.EFBIG:
        return OutputFailed(
            f"{shown} is larger than this file system or a limit allows.",
            older,
            "Write smaller files with --split-max-size 4GB."
            if path.suffix == ".gguf"
            else "Choose another folder with -o.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return CannotCreate(
            f"{shown} cannot be written: {error.strerror}.", "", "Choose another folder with -o."
        )
    if error.errno == errno.ENAMETOOLONG:
        return _name_too_long(path)
    if error.errno == errno.ENOTDIR:
        return CannotCreate(
            f"{shown} cannot be created: {printable(path.parent)} is not a folder.",
            "",
            "Choose another folder with -o.",
        )
    if error.errno == errno.ENOENT and not path.parent.is_dir():
        return CannotCreate(
            f"{shown} cannot be created: there is no folder {printable(path.parent)}.",
            "",
            f"Make it first: mkdir -p {printable(path.parent)}",
        )
    return OutputFailed(f"Writing {shown} failed: {error.strerror}.", older)
