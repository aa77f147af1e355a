"""How long a run will take: arithmetic on its plan, and speeds found out here, in a moment.

An estimate is worth a factor of two: what else the machine does meanwhile is not known, nor what
of the source is in the system's memory, but for a few samples of it.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quant.convert import worker_count

PROBE_NBYTES, N_PROBES = 1 << 20, 8
"""What is read of the source, in pieces all over it, and written to a file without a name."""

REFERENCE_SECONDS = 15e-6
"""Of one round of `_round` on a core of the machine that encoder_speeds' figures are of."""

CONVERTED_A_SECOND = 2e9
"""Weights from 16 bits to float32, on such a core."""

STORED_A_SECOND = 8.5e8
"""Bytes of the output handed to the system, hashed, read back and hashed, on such a core."""

STARTING_SECONDS = 0.5
"""Before anything is planned, on such a core."""

OF_A_CORE = 0.6
"""What each of several threads gets: virtual cores are halves of real ones."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of a run, and what is needed besides where code has to be compiled first."""

    seconds: float
    n_to_compile: int = 0  # encoders whose machine code is not kept yet
    compiling: float = 0.0  # seconds for them

    def __str__(self) -> str:
        if not self.n_to_compile:
            return about(self.seconds)
        encoders = "1 encoder" if self.n_to_compile == 1 else f"{self.n_to_compile} encoders"
        more = about(self.compiling)
        return f"{about(self.seconds)}; first run compiles {encoders}: {more} more"

    def as_json(self) -> dict:
        return {"seconds": round(self.seconds + self.compiling, 1)}


def about(seconds: float) -> str:
    """In one or two figures: "about 3 min"."""
    if seconds < 1:
        return "under a second"
    for name, length, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        n = seconds / length
        if n < 9.5:
            return f"about {n:.1f} h" if name == "h" else f"about {max(1, round(n))} {name}"
        if n < most:
            return f"about {5 * round(n / 5)} {name}"
    return f"about {seconds / 86400:.0f} days"


def core_speed() -> float:
    """How fast one core is just now, against that of the benchmarks."""
    x = np.linspace(-1, 1, 1 << 15, dtype=np.float32)
    return REFERENCE_SECONDS / seconds_of(lambda: _round(x), 0.005)


def _round(x: np.ndarray) -> float:
    """Arithmetic as encoders do it, on what a core's cache holds."""
    error = np.rint(x * np.float32(3)) * np.float32(0.3) - x
    return float((error * error).sum())


def seconds_of(work: Callable[[], object], at_least: float) -> float:
    """The shortest of as many times as so many seconds have room for, and more where other programs
    want the processor too: a trial so short is seldom interrupted, hours of work always are."""
    ends, shortest = time.perf_counter() + at_least, float("inf")
    work()  # the first time takes longer: threads are started, memory is fetched
    while shortest == float("inf") or time.perf_counter() < ends:
        began = time.perf_counter()
        work()
        shortest = min(shortest, time.perf_counter() - began)
    return shortest / _share_of_processor()


def _share_of_processor() -> float:
    """What is left for a program more, if all that wanted a core of late go on to."""
    try:
        wanted = os.getloadavg()[0]
    except OSError:
        return 1.0
    return min(1.0, (os.cpu_count() or 1) / (wanted + 1))


def reading_seconds(files: Sequence[Path], nbytes: int) -> float:
    """For so many bytes of these files, from the disk or from what the system keeps of them."""
    sizes = [(path, path.stat().st_size) for path in files]
    total = sum(size for _, size in sizes)
    taken, n_read = 0.0, 0
    for i in range(N_PROBES):
        at = i * total // N_PROBES
        for path, size in sizes:
            if at < size:
                began = time.perf_counter()
                with open(path, "rb", buffering=0) as file:
                    file.seek(at)
                    n_read += len(file.read(PROBE_NBYTES))
                taken += time.perf_counter() - began
                break
            at -= size
    return nbytes * taken / n_read if n_read else 0.0


def writing_seconds(folder: Path, nbytes: int) -> float:
    """For so many bytes, onto the disk; 0 where none can be written, which is told elsewhere."""
    data = os.urandom(PROBE_NBYTES)
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            began = time.perf_counter()
            for _ in range(N_PROBES):
                file.write(data)
            os.fsync(file.fileno())
            taken = time.perf_counter() - began
    except OSError:
        return 0.0
    return nbytes * taken / (N_PROBES * PROBE_NBYTES)


def storing_seconds(nbytes: int, speed: float) -> float:
    """What so many bytes of output keep a core busy. speed: `core_speed`."""
    return (STARTING_SECONDS + nbytes / STORED_A_SECOND) / speed


def encoding_seconds(work: Iterable[tuple[int, float]], speed: float) -> float:
    """work: numbers of weights, each with what one of the benchmarks' cores encodes in a second."""
    seconds = sum(n / CONVERTED_A_SECOND + n / rate for n, rate in work)
    return seconds / speed / max(1.0, OF_A_CORE * worker_count())
