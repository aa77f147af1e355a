"""What is finished of a long job, one line a unit, so that another run can go on after it.

    .model.gguf.journal, beside .model.gguf.partial
    8d1c...  {"fingerprint": {...}}      what decides the bytes: only the same job goes on
    02f7...  {"unit": {...}}             a tensor was handed to the system
    77aa...  {"on_disk": 1}              so many units outlive a power cut
    c31e...  {"complete": {...}}         all is written and verified; now files get their names

A line begins with a hash of itself and of the first line, and counts if all before it are whole: a
torn end is dropped, and lines of an older journal below are no lines of this one. Data is flushed
every FLUSH_NBYTES or FLUSH_SECONDS by a thread of its own, while more is made, and only then
`on_disk` says so. A run that was merely killed has lost nothing even behind that line, one that
lost its power may have: units behind it are for the next run to check by their hashes.

The journal is also the lock of its output, from before the first byte until all is recorded.
"""

import contextlib
import errno
import json
import os
import shlex
import stat
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from xxhash import xxh3_64_hexdigest

from quant.display import printable
from quant.durable import (
    flush_folder,
    journal_path,
    no_regular_file,
    open_alone,
    own_leftovers,
    translated_errors,
    undisturbed,
)
from quant.errors import (
    BadInput,
    BadRecipe,
    CannotCreate,
    InputMissing,
    OutputFailed,
    QwqQuantError,
    UsageError,
)
from quant.fingerprint import differences

MODES = ("auto", "required", "never")
"""Go on with an interrupted run if there is one; or fail; begin anew, and keep nothing oneself."""

FLUSH_NBYTES = 256 << 20
FLUSH_SECONDS = 5.0
"""Data is flushed to the disk after so much of it or so long, whichever is first."""

GRACE_SECONDS = 3.0
"""A unit that takes longer once the user wants to stop is given up: the next run begins it anew."""

MOST_NBYTES = 256 << 20
"""A longer journal is none of ours."""

HASH_NBYTES = 16
"""The hash that begins a line: xxh3_64 in hexadecimal."""


class Stopped(QwqQuantError):
    """The user ended the run; what is finished is kept for another."""

    exit_code = 75


class StopRequest:
    """Whether the user wants the run to end, once what is in hand is finished, or at once."""

    def __init__(self):
        self._since: float | None = None
        self.is_urgent = False

    def make(self) -> None:
        """The first time, it is noted. After that: raises Stopped, wherever the program is."""
        if self._since is not None:
            self.is_urgent = True
            raise Stopped("Stopped at once.")
        self._since = time.monotonic()

    @property
    def made(self) -> bool:
        return self._since is not None

    @property
    def overdue(self) -> bool:
        return self._since is not None and time.monotonic() > self._since + GRACE_SECONDS


@dataclass(frozen=True)
class Resume:
    """How a command is continued: --resume, what to type for it, whom to tell, and when to stop."""

    mode: str = "auto"
    command: tuple[str, ...] = ()  # as typed, without secrets
    say: Callable[[str], None] = lambda note: None
    stop: StopRequest = field(default_factory=StopRequest)


class Held(Protocol):
    """Data that units are in: a PendingFile, a PendingFolder, or a sink."""

    flush_failed: bool

    def flush(self) -> None: ...
    def keep(self) -> None: ...
    def discard(self) -> None: ...


class Journal:
    """The journal of one output. Use as a context manager around the whole job:

        with Journal(output, fingerprint(...), resume, "tensors", 75) as journal:
            n = ...                             # of journal.units, those whose data is there
            journal.begin(n)
            file = journal.hold(PendingFile(output, taken_up=n > 0))
            for each unit behind n:
                write its data; journal.append({...}, nbytes)
            journal.complete({...})             # after that, files get their names

    At the end it is removed. After a failure that another run may get over, it is kept, and what it
    holds with it, and the error says so and what to type; after one that it cannot, such as NaN
    weights, or where nothing is finished, all is removed. Before `begin`, nothing changes at all.
    """

    def __init__(
        self, output: Path, fingerprint: dict, resume: Resume, unit_name: str, n_units: int | None
    ):
        """Lock and read it. Raises CannotCreate if another run writes `output`.

        n_units: of the whole job; None if that is not known beforehand.

        With mode "required": InputMissing if there is nothing to go on with, BadInput if it was
        another job's; nothing is changed then.
        """
        self.output, self._fingerprint, self._resume = output, fingerprint, resume
        self._unit_name, self._n_units = unit_name, n_units
        self._held: list[Held] = []
        self._begun, self._is_left = False, False
        self._n_done = 0
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flushing: tuple[Future, int] | None = None  # and the units that will be on the disk
        self._nbytes_unflushed, self._last_flush = 0, time.monotonic()
        self._folder_flushed = False
        with translated_errors(output):
            with undisturbed():
                self._descriptor = open_alone(journal_path(output), output)
            try:
                self._read_earlier()
            except BaseException:
                self._leave_as_found()
                raise

    def _read_earlier(self) -> None:
        """Decide what of an earlier run counts."""
        earlier = _read(self._descriptor, self.output)
        same = earlier.fingerprint == self._fingerprint and self._resume.mode != "never"
        self.units: list = earlier.units if same else []
        """What an earlier run finished of this very job, in order."""
        self.n_on_disk = earlier.n_on_disk if same else 0
        """So many of them outlived even a power cut; the data of others has to be checked."""
        self.completed: object = earlier.completed if same else None
        """What it said when all was written: some files may have their names already."""
        self.abandoned: dict | None = None if same else earlier.fingerprint
        """The job of an earlier run whose work is of no use; its data is to be removed."""
        self._ends = earlier.ends if same else []  # of the first line and of each unit's
        self._salt = ""
        if self._resume.mode == "required" and not self.units:
            raise self._nothing_to_go_on_with()

    def _nothing_to_go_on_with(self) -> QwqQuantError:
        shown = printable(self.output)
        if self.abandoned is None:
            return InputMissing(
                f"There is no interrupted run on {shown} to go on with.",
                "Nothing is finished of it, and --resume required was given.",
                "Leave --resume out to begin.",
            )
        return BadInput(
            f"The interrupted run on {shown} cannot be continued.",
            f"Not as it was: {self._what_differs()}.",
            "Type it as it was typed then, or begin anew with --resume never.",
        )

    # --- the job ------------------------------------------------------------------------------

    def begin(self, n_units: int = 0) -> None:
        """Go on behind the first n of `units`, or anew; from here on failures change what is there.

        Raises OutputFailed, or InputMissing if mode "required" would have to begin anew.
        """
        if self._resume.mode == "required" and n_units == 0:
            raise self._nothing_to_go_on_with()
        self._say_what_begins(n_units)
        self._begun, self._n_done = True, n_units
        if n_units < len(self.units):
            self.completed = None
        with translated_errors(self.output):
            if n_units:
                self._salt = os.pread(self._descriptor, HASH_NBYTES, 0).decode()
                self._cut(n_units)
                self._note_on_disk(self.n_on_disk)  # the cut may have taken the line that says so
                return
            os.ftruncate(self._descriptor, 0)
            if self._resume.mode != "never":
                self._write_line({"fingerprint": self._fingerprint})
            self._ends, self.n_on_disk = [self._size()], 0

    def _say_what_begins(self, n_units: int) -> None:
        shown = printable(self.output)
        if n_units:
            done = self._amount(n_units)
            self._resume.say(f"Going on after {done} of an interrupted run on {shown}.")
        elif self._resume.mode != "never" and (self.abandoned is not None or self.units):
            why = "what it wrote is no longer there"
            if self.abandoned is not None:
                why = f"not as it was: {self._what_differs()}"
            self._resume.say(
                f"An interrupted run on {shown} cannot be continued, so it starts over; {why}."
            )

    def _amount(self, n_units: int) -> str:
        of = "" if self._n_units is None else f" of {self._n_units}"
        return f"{n_units}{of} {self._unit_name}"

    def _what_differs(self) -> str:
        found = differences(self.abandoned, self._fingerprint)
        more = [f"and {len(found) - 5} more"] if len(found) > 5 else []
        return "; ".join(found[:5] + more)

    def hold(self, data: Held) -> Held:
        """Data that is flushed before units count as on the disk, and kept or removed with them."""
        self._held.append(data)
        return data

    @property
    def keeps_work(self) -> bool:
        """Whether anything is noted for another run: not so with mode "never"."""
        return self._resume.mode != "never"

    @property
    def stopping(self) -> bool:
        """Whether the next append raises Stopped: what that unit needs must be written then."""
        return self._resume.stop.made

    def append(self, unit: object, nbytes: int = 0, may_stop: bool = True) -> None:
        """A unit is finished: as JSON, with all that the next run needs to know of it.

        nbytes: of its data in what is held. may_stop: not so between units that are of no use
        without one another. Raises OutputFailed, and Stopped if the user wants it.
        """
        with translated_errors(self.output):
            if self._resume.mode != "never":
                self._write_line({"unit": unit})
                self._ends.append(self._size())
                self._n_done += 1
                self._nbytes_unflushed += nbytes
                self._flush_now_and_then()
        if may_stop and self._resume.stop.made:
            raise Stopped("Stopped.")

    def tick(self) -> None:
        """Within a unit, now and then: Stopped if the user has waited long enough."""
        if self._resume.stop.overdue:
            raise Stopped("Stopped.")

    def complete(self, facts: object) -> None:
        """All is written, flushed and verified: from here on files get their names."""
        with translated_errors(self.output):
            if self._resume.mode != "never":
                self._settle()
                self._write_line({"complete": facts})
                os.fsync(self._descriptor)
        self.completed = facts

    def leave(self) -> None:
        """The job is done, but part of it failed and may be mended: keep all for a run that goes on
        with it, unless the mode is "never".
        """
        if self._resume.mode == "never" or self._n_done == 0:
            return
        with translated_errors(self.output):
            self._write_line({"complete": None})  # the next run has to ask before it replaces files
            os.fsync(self._descriptor)
        self.completed, self._is_left = None, True

    # --- flushing -----------------------------------------------------------------------------

    def flush(self) -> None:
        """Wait until all units so far are on the disk with their data. Raises OutputFailed."""
        with translated_errors(self.output):
            if self._flushing is not None:
                self._note_flushed()
            self._flush(tuple(self._held), self._folder_flushed)
            self._folder_flushed = True
            self._nbytes_unflushed, self._last_flush = 0, time.monotonic()
            self._note_on_disk(self._n_done)

    def _flush_now_and_then(self) -> None:
        """Begin to flush what there is, if it is time; note what was flushed meanwhile."""
        if self._flushing is not None and self._flushing[0].done():
            self._note_flushed()
        waited = time.monotonic() - self._last_flush
        is_time = self._nbytes_unflushed >= FLUSH_NBYTES or waited >= FLUSH_SECONDS
        if is_time and self._flushing is None:
            flushed = self._flusher.submit(self._flush, tuple(self._held), self._folder_flushed)
            self._flushing, self._folder_flushed = (flushed, self._n_done), True
            self._nbytes_unflushed, self._last_flush = 0, time.monotonic()

    def _flush(self, held: tuple[Held, ...], folder_flushed: bool) -> None:
        """In the other thread: data first, then the lines that tell of it."""
        for data in held:
            data.flush()
        os.fsync(self._descriptor)
        if not folder_flushed:  # else a power cut may take the files' names
            flush_folder(self.output.parent)

    def _note_flushed(self) -> None:
        """Wait for the flush that was begun, and note it. Raises what it raised."""
        (flushed, n_units), self._flushing = self._flushing, None
        flushed.result()
        self._note_on_disk(n_units)

    def _note_on_disk(self, n_units: int) -> None:
        self.n_on_disk = n_units
        self._write_line({"on_disk": n_units})

    def _settle(self) -> None:
        """Flush all there is."""
        if self._flushing is not None:
            self._note_flushed()
        for data in self._held:
            data.flush()
        self._note_on_disk(self._n_done)

    # --- the file -----------------------------------------------------------------------------

    def _size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def _write_line(self, content: dict) -> None:
        text = json.dumps(content, separators=(",", ":"))
        line = f"{_hash(self._salt + text)} {text}\n".encode()
        self._salt = self._salt or line[:HASH_NBYTES].decode()
        view, offset = memoryview(line), self._size()
        while view:
            n = os.pwrite(self._descriptor, view, offset)
            view, offset = view[n:], offset + n

    def _cut(self, n_units: int) -> None:
        """Forget the units behind the first n."""
        os.ftruncate(self._descriptor, self._ends[n_units])
        self._ends = self._ends[: n_units + 1]
        self._n_done, self.n_on_disk = n_units, min(n_units, self.n_on_disk)

    # --- the end ------------------------------------------------------------------------------

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if error is None and self._is_left:
            self._leave_as_found()
        elif error is None:
            self._remove()
        elif not self._begun:
            self._leave_as_found()
            if isinstance(error, Stopped) and self.units:
                self._n_done = len(self.units)
                self._tell_what_is_kept(error)
        elif _may_be_got_over(error) and self._keep(error):
            self._tell_what_is_kept(error)
        else:
            self._remove()
            self._tell_that_nothing_is_kept(error)

    def _keep(self, error: BaseException) -> bool:
        """Close all files and leave them, if that is worth it and can be trusted.

        Who stops safely may switch off next: all is flushed then. Else the system writes it when it
        likes, and the next run checks what is behind the last mark.
        """
        if isinstance(error, Stopped) and self._n_done and not self._resume.stop.is_urgent:
            with contextlib.suppress(OSError, OutputFailed):
                self._settle()
                os.fsync(self._descriptor)
        self._flusher.shutdown()
        try:
            self._forget_what_failed_to_flush()
        except OSError:
            return False
        if self._n_done == 0:
            return False
        for data in self._held:
            data.keep()
        self._close()
        return True

    def _forget_what_failed_to_flush(self) -> None:
        """After a failed flush the system may pretend that the data is on the disk, and give back
        from its memory what the disk does not have: those units cannot be checked any more.
        """
        failed = self._flushing is not None and self._flushing[0].exception() is not None
        if failed or any(data.flush_failed for data in self._held):
            self._cut(self.n_on_disk)
            with contextlib.suppress(OSError):  # without that line, the next run checks them all
                self._note_on_disk(self.n_on_disk)

    def _remove(self) -> None:
        """Remove the journal, and what it holds unless it got its name."""
        self._flusher.shutdown()
        with undisturbed():
            for data in self._held:
                data.discard()
            with contextlib.suppress(OSError):
                os.unlink(journal_path(self.output))
            self._close()

    def _leave_as_found(self) -> None:
        """Before anything was changed; an empty journal is what opening it made."""
        self._flusher.shutdown()
        for data in self._held:
            data.keep()
        with contextlib.suppress(OSError):
            status = os.fstat(self._descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_size == 0:
                os.unlink(journal_path(self.output))
        self._close()

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    # --- what is said -------------------------------------------------------------------------

    def _command(self) -> str:
        typed = self._resume.command
        if not typed:
            return "the same call"
        return shlex.join(["qwq-quant", *(printable(word, 4096) for word in typed)])

    def _tell_what_is_kept(self, error: BaseException) -> None:
        kept = (
            f"{self._amount(self._n_done)} are finished and kept in hidden files beside "
            f"{printable(self.output)}."
        )
        if self.completed is not None:
            kept = "All is written and verified, but not all has its name or is recorded."
        if isinstance(error, QwqQuantError):
            error.why = f"{error.why} {kept}".lstrip()
            error.next_step = f"{error.next_step}\nGo on with: {self._command()}".lstrip()
        else:
            self._resume.say(f"{kept} Go on with: {self._command()}")

    def _tell_that_nothing_is_kept(self, error: BaseException) -> None:
        is_true = self.completed is None and own_leftovers(self.output) == 0
        if is_true and isinstance(error, (OutputFailed, Stopped)):
            error.why = f"{error.why} Nothing was left behind.".lstrip()
        if isinstance(error, Stopped):
            error.next_step = f"Begin again with: {self._command()}"


def _may_be_got_over(error: BaseException) -> bool:
    """Whether the same command could succeed where it failed: the disk can get room, a server come
    back, but NaN weights stay, a file may not become larger than its file system allows, and what
    the program finds wrong with its own work is made no better by going on with it.
    """
    cause = error.__cause__
    if isinstance(cause, OSError):
        return cause.errno != errno.EFBIG
    if type(error) is QwqQuantError:
        return False
    return not isinstance(error, (BadInput, BadRecipe, UsageError, OutputFailed))


# --- reading ----------------------------------------------------------------------------------


def interrupted_job(output: Path) -> dict | None:
    """The fingerprint of an interrupted run on `output`; not locked, so for estimates only."""
    try:
        descriptor = os.open(journal_path(output), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return _read(descriptor, output).fingerprint
    except (OSError, CannotCreate):
        return None
    finally:
        os.close(descriptor)


@dataclass
class _Earlier:
    """What a journal says, as far as it is whole."""

    fingerprint: dict | None = None
    units: list = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # of the first line, and of each unit's
    n_on_disk: int = 0
    completed: object = None


def _read(descriptor: int, output: Path) -> _Earlier:
    """Raises CannotCreate for what is no file; whatever else is wrong ends what counts."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise no_regular_file(journal_path(output))
    earlier, salt, position = _Earlier(), "", 0
    if status.st_size > MOST_NBYTES:
        return earlier
    for line in os.pread(descriptor, status.st_size, 0).splitlines(keepends=True):
        content = _content(line, salt)
        if content is None:
            break
        position += len(line)
        if earlier.fingerprint is None:
            if not isinstance(content.get("fingerprint"), dict):
                break
            earlier.fingerprint, salt = content["fingerprint"], line[:HASH_NBYTES].decode()
            earlier.ends.append(position)
        elif "unit" in content:
            earlier.units.append(content["unit"])
            earlier.ends.append(position)
        elif "on_disk" in content:
            earlier.n_on_disk = content["on_disk"]
        elif "complete" in content:
            earlier.completed = content["complete"]
    if earlier.ends:
        earlier.ends[-1] = position
    return earlier


def _hash(text: str) -> str:
    return xxh3_64_hexdigest(text.encode())


def _content(line: bytes, salt: str) -> dict | None:
    """What a line says; None if it is not whole."""
    try:
        digest, _, text = line.decode().partition(" ")
        if not text.endswith("\n") or digest != _hash(salt + text[:-1]):
            return None
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
