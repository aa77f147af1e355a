"""What a run will need against what there is, known before the first byte is written."""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from quant.convert import WEIGHTS_AT_ONCE, worker_count
from quant.display import human_bytes, printable
from quant.durable import own_leftovers
from quant.errors import CannotCreate, OutputFailed, Unavailable
from quant.formats import FORMATS
from quant.gguf_file import Metadata, metadata_nbytes_at_most, padded, split_paths
from quant.journal import interrupted_job
from quant.plan import TENSOR_ENTRY_NBYTES, Plan
from quant.sinks.gguf import files_of_job
from quant.target_size import LADDER

BASE_NBYTES = 240 << 20
"""Python, numpy, numba's compiler and the tokenizer's tables."""

COMPILING_NBYTES, COMPILING_REFINED_NBYTES = 18 << 20, 34 << 20
"""What the compiler takes for each format's encoder, the first time. Measured: 492 MB in all for
the 14 of a target size, 700 MB for their refined ones."""

NBYTES_A_WORKER = 24 << 20
"""Stored, float32, scratch and encoded copies of the rows a thread works on, and those it waits
to hand over. Measured: 282 MB in all with 2 threads, 484 MB with 16."""


@dataclass(frozen=True)
class Needs:
    """Bytes needed and there, for one run."""

    disk: int
    disk_free: int
    memory: int
    memory_free: int

    @property
    def fits(self) -> bool:
        return self.disk <= self.disk_free and self.memory <= self.memory_free

    @property
    def exit_code(self) -> int:
        """0 if it fits, else the code `require` would fail with."""
        if self.disk > self.disk_free:
            return OutputFailed.exit_code
        return Unavailable.exit_code if self.memory > self.memory_free else 0


def measure_needs(plan: Plan, metadata: Metadata, output: Path) -> Needs:
    """What writing `plan` to `output` needs. Raises CannotCreate if there is no such folder."""
    folder = output.parent
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
    status = os.statvfs(folder)
    left = files_of_job(output, interrupted_job(output))  # removed if they are of no use
    files = {*split_paths(output, len(plan.files)), *left}
    leftovers = sum(own_leftovers(path) for path in files)
    widest = max(a.source.n_columns for a in plan.assignments)
    nbytes_a_worker = NBYTES_A_WORKER * max(1, widest / WEIGHTS_AT_ONCE)
    return Needs(
        disk=sum(padded(a.nbytes, plan.alignment) for a in plan.assignments)
        + metadata_nbytes_at_most(metadata)
        + TENSOR_ENTRY_NBYTES * len(plan.assignments)
        + (1 << 20),  # the manifest, and what the file system itself takes
        disk_free=status.f_bavail * status.f_frsize + leftovers,
        memory=BASE_NBYTES + _compiling(plan) + round(nbytes_a_worker * worker_count()),
        memory_free=available_memory(),
    )


def _compiling(plan: Plan) -> int:
    """Bytes for compiling the encoders that the plan needs, and those a target size tries."""
    used = {a.format.name: a.format for a in plan.assignments if a.format.block_size > 1}
    is_target = any(a.error is not None for a in plan.assignments)
    is_refined = any(format is not FORMATS[name] for name, format in used.items())
    n_encoders = len(LADDER[256]) if is_target else len(used)
    return n_encoders * (COMPILING_REFINED_NBYTES if is_refined else COMPILING_NBYTES)


def available_memory() -> int:
    """Bytes this process may still take: the machine's, or less if a cgroup allows less."""
    free = psutil.virtual_memory().available
    limit, used = (_read_int(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    return free if limit is None or used is None else min(free, max(0, limit - used))


def _read_int(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no cgroup, or "max"
        return None


def require(needs: Needs, folder: Path) -> None:
    """Refuse a run that cannot fit. Raises OutputFailed (disk) or Unavailable (memory)."""
    if needs.disk > needs.disk_free:
        raise OutputFailed(
            f"The output needs {human_bytes(needs.disk)}, but {printable(folder)} has only "
            f"{human_bytes(needs.disk_free)} free: {human_bytes(needs.disk - needs.disk_free)} "
            "too little.",
            "Nothing was written.",
            "Free some space, choose a smaller --type, or another folder with -o.",
        )
    if needs.memory > needs.memory_free:
        raise Unavailable(
            f"The run needs about {human_bytes(needs.memory)} of memory, and only "
            f"{human_bytes(needs.memory_free)} are free.",
            "Nothing was written.",
            "Close other programs, or run it on a machine or in a container with more.",
        )
