"""What a run will need against what there is, known before the first byte is written.

Each command knows its own needs, by arithmetic on its plan; here they are held against the disks,
the memory and the rights of this process. Nothing is left behind, and no lock is taken.
"""

import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from quant.display import human_bytes, printable
from quant.durable import (
    being_written,
    check_place,
    is_locked,
    locks_of,
    own_leftovers,
    translated_errors,
)
from quant.errors import CannotCreate, OutputFailed, QwqQuantError, Unavailable

CGROUPS = Path("/sys/fs/cgroup")

SMALL_NBYTES = 1 << 20
"""What the file system itself takes for an output, and a manifest."""


@dataclass(frozen=True)
class Needs:
    """Bytes needed and there, for one run, and who stands in its way whatever there is room for."""

    output: Path
    disk: int
    disk_free: int
    memory: int
    memory_free: int
    temporary: int = 0  # in the folder for temporary files, while it runs
    temporary_free: int = 0  # what the output leaves of it, where both are on one disk
    obstacle: QwqQuantError | None = None

    @property
    def problem(self) -> QwqQuantError | None:
        """Why the run cannot be made: CannotCreate, OutputFailed (disk) or Unavailable (memory)."""
        if self.obstacle is not None:
            return self.obstacle
        if self.disk > self.disk_free:
            return self._too_little_disk()
        if self.temporary > self.temporary_free:
            return self._too_little_room_for_files()
        return self._too_little_memory() if self.memory > self.memory_free else None

    @property
    def fits(self) -> bool:
        return self.problem is None

    @property
    def exit_code(self) -> int:
        """0 if it fits, else the code `require` would fail with."""
        return 0 if self.problem is None else self.problem.exit_code

    def require(self) -> None:
        """Refuse a run that cannot be made. Raises `problem`."""
        if self.problem is not None:
            raise self.problem

    def as_json(self) -> dict:
        numbers = {k: v for k, v in asdict(self).items() if k not in ("output", "obstacle")}
        what = None if self.obstacle is None else self.obstacle.what
        return {**numbers, "obstacle": what, "fits": self.fits}

    def _too_little_disk(self) -> OutputFailed:
        return OutputFailed(
            f"The output needs {human_bytes(self.disk)}, but only {human_bytes(self.disk_free)} "
            f"are free where {printable(self.output)} would be: "
            f"{human_bytes(self.disk - self.disk_free)} too little.",
            "Nothing was written.",
            "Free some space, ask for a smaller output, or choose another folder with -o.",
        )

    def _too_little_room_for_files(self) -> OutputFailed:
        free, folder = self.temporary_free, printable(tempfile.gettempdir())
        return OutputFailed(
            f"The run needs {human_bytes(self.temporary)} for temporary files, but {folder} has "
            f"only {human_bytes(free)} free: {human_bytes(self.temporary - free)} too little.",
            "Nothing was written.",
            "Set TMPDIR to a folder on a larger disk, or give fewer --tokens.",
        )

    def _too_little_memory(self) -> Unavailable:
        return Unavailable(
            f"The run needs about {human_bytes(self.memory)} of memory, and only "
            f"{human_bytes(self.memory_free)} are free: "
            f"{human_bytes(self.memory - self.memory_free)} too little.",
            "Nothing was written.",
            "Close other programs, or run it on a machine or in a container with more.",
        )


def measure_needs(
    output: Path,
    *,
    disk: int,
    memory: int,
    temporary: int = 0,
    in_place: bool = False,
    reused: int | None = None,
    locks: tuple[Path, ...] = (),
) -> Needs:
    """`disk`, `memory` and `temporary` bytes for a run that writes `output`, and what there is.

    in_place: `output` is a folder that is filled as it stands, and made if it is not there.
    reused: bytes of an unfinished run there, which are freed or taken up, and locks: what such a
    run holds; both are known by the output's name unless they are given.
    Raises CannotCreate if there is no such folder, or no output can lie there.
    """
    check_place(output)
    place = Path(os.path.abspath(output))
    folder = _existing(place if in_place and place.exists() else place.parent)
    reused = own_leftovers(output) if reused is None else reused
    disk_free = _free_bytes(folder) + reused
    temporary_free = 0
    if temporary:
        place = tempfile.gettempdir()
        same = os.stat(place).st_dev == os.stat(folder).st_dev
        temporary_free = disk_free - disk if same else _free_bytes(place)
    return Needs(
        output=output,
        disk=disk,
        disk_free=disk_free,
        memory=memory,
        memory_free=available_memory(),
        temporary=temporary,
        temporary_free=max(0, temporary_free),
        obstacle=_find_obstacle(output, folder, locks or locks_of(output)),
    )


def _existing(folder: Path) -> Path:
    """The folder, which must be there. Raises CannotCreate."""
    if folder.exists() and not folder.is_dir():
        raise CannotCreate(
            f"{printable(folder)} is not a folder.", "", "Choose another folder with -o."
        )
    if not folder.is_dir():
        raise CannotCreate(
            f"There is no folder {printable(folder)} to write into.",
            "",
            f"Make it first: mkdir -p {printable(folder)}",
        )
    return folder


def _free_bytes(folder: Path | str) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _find_obstacle(output: Path, folder: Path, locks: tuple[Path, ...]) -> QwqQuantError | None:
    """Whether another run writes the output, or this one may not write in the folder at all.

    Only an attempt tells of a read-only file system, a quota of files, or a user without rights:
    a file without a name, which leaves nothing.
    """
    if any(map(is_locked, locks)):
        return being_written(output)
    try:
        with translated_errors(output), tempfile.TemporaryFile(dir=folder):
            return None
    except QwqQuantError as error:
        return error


# --- memory -----------------------------------------------------------------------------------


def available_memory() -> int:
    """Bytes this process may still take: the machine's, or less if a cgroup allows less."""
    return min([psutil.virtual_memory().available, *_cgroup_rooms()])


def _cgroup_rooms() -> list[int]:
    """What the limits of this process's cgroup, and of those around it, leave of each.

    Files that were read lately count as used there, but the system drops them when it needs the
    memory: of 65 GB of weights, all that the limit has room for.
    """
    rooms = []
    for group in _cgroups():
        limit, used = (_read_int(group / f"memory.{name}") for name in ("max", "current"))
        if limit is not None and used is not None:
            rooms.append(max(0, limit - used + _droppable(group)))
    return rooms


def _cgroups() -> list[Path]:
    """The process's own cgroup (version 2) and all around it, as far as they can be seen."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    inner = CGROUPS / own.lstrip("/")
    return [group for group in (inner, *inner.parents) if group.is_relative_to(CGROUPS)]


def _droppable(group: Path) -> int:
    """Bytes of the group's page cache that are nobody's memory."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    found = dict(line.split(" ", 1) for line in lines if " " in line)
    return sum(int(found.get(name, 0)) for name in ("active_file", "inactive_file"))


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no cgroup, or "max"
        return None
