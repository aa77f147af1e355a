"""All cases of all variants of a model: measured, or by arithmetic where they cannot be run."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from quant.display import human_bytes
from quant.errors import QwqQuantError
from quant.evaluation.isolation import run_isolated
from quant.preflight import available_memory
from quant.profiling.cases import Case
from quant.profiling.measure import Job, Measured, measure
from quant.profiling.planned import Bytes, Shape, read_shape


@dataclass(frozen=True)
class Variant:
    """A model to run: a folder, with transformers' cache or ours."""

    name: str
    folder: Path
    is_int8: bool = False  # the KV cache


@dataclass(frozen=True)
class Machine:
    """What it is run on."""

    device: str  # "cpu", "cuda:0"
    name: str
    memory_free: int


@dataclass(frozen=True)
class Row:
    """One variant in one case. Without `measured` its bytes are planned, and `why` says why.

    notes: what was warned of while it ran.
    """

    variant: str
    case: Case
    planned: Bytes
    measured: Measured | None = None
    why: str = ""
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> Bytes:
        """Of weights and cache, measured if they were."""
        m = self.measured
        return self.planned if m is None else Bytes(m.model_nbytes, m.cache_nbytes)

    @property
    def peak_nbytes(self) -> int | None:
        """Of a planned row the sum of weights and cache, which is less than a peak would be."""
        return self.planned.total if self.measured is None else self.measured.peak_nbytes

    @property
    def tokens_per_s(self) -> list[float]:
        """Of each repetition, all sequences together."""
        return [self.case.n_counted / s for s in self.measured.seconds] if self.measured else []

    @property
    def speed(self) -> tuple[float, float] | None:
        """Median tokens a second, and half of what lies between the slowest and the fastest."""
        speeds = self.tokens_per_s
        return (median(speeds), (max(speeds) - min(speeds)) / 2) if speeds else None


@dataclass(frozen=True)
class Failed:
    """A variant that could not be run, or not to the end."""

    variant: str
    error: QwqQuantError


@dataclass(frozen=True)
class LeftOut:
    """A variant that there cannot be."""

    variant: str
    why: str


@dataclass(frozen=True)
class Profile:
    """What was found, by case and then in the order of the variants."""

    machine: Machine
    n_repeats: int
    rows: tuple[Row, ...]
    failed: tuple[Failed, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


def describe_machine(device: str) -> Machine:
    """Of a device that torch can use."""
    import torch

    if device.startswith("cuda"):
        name, free = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0]
        return Machine(device, name, free)
    n = torch.get_num_threads()
    name = f"{_cpu_name()}, {n} thread{'s' if n > 1 else ''}"
    return Machine(device, name, available_memory())


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, os.uname().machine)


def plan_profile(variants: Sequence[Variant], cases: Sequence[Case], machine: Machine) -> Profile:
    """All of it by arithmetic. Raises BadInput or InputMissing for a folder that is no model."""
    shapes, left_out = _shapes(variants)
    rows = [
        Row(variant.name, case, shape.planned(case, variant.is_int8), why="dry run")
        for case in cases
        for variant, shape in shapes.items()
    ]
    return Profile(machine, 0, tuple(rows), left_out=left_out)


def _shapes(variants: Sequence[Variant]) -> tuple[dict[Variant, Shape], tuple[LeftOut, ...]]:
    """Of those that can be, in their order; and the others."""
    shapes = {variant: read_shape(variant.folder) for variant in variants}
    why = {x: shape.why_no_int8 for x, shape in shapes.items() if x.is_int8 and shape.why_no_int8}
    possible = {variant: shape for variant, shape in shapes.items() if variant not in why}
    return possible, tuple(LeftOut(variant.name, why[variant]) for variant in why)


def profile(
    variants: Sequence[Variant],
    cases: Sequence[Case],
    machine: Machine,
    n_repeats: int,
    advance: Callable[[int], None] = lambda n: None,
) -> Profile:
    """Each case in a process of its own; those that do not fit, or fail, are planned.

    A variant that fails for another reason than memory is not tried again. Calls advance(1) after
    each repetition, done or left out. Raises BadInput or InputMissing for a folder that is no
    model.
    """
    shapes, left_out = _shapes(variants)
    rows: dict[tuple[Case, str], Row] = {}
    failed = []
    for variant, shape in shapes.items():
        error = None
        for row in _smallest_first(variant, shape, cases):
            listener = _Listener(n_repeats, advance)
            if error is None:
                try:
                    row = _measured(row, variant, machine, n_repeats, listener.hear)
                except QwqQuantError as caught:
                    error = caught
                    failed.append(Failed(variant.name, error))
            listener.finish()
            if error is not None:
                row = _because(row, "failed")
            rows[row.case, row.variant] = replace(row, notes=tuple(listener.notes))
    advance(len(left_out) * len(cases) * n_repeats)
    ordered = tuple(rows[case, variant.name] for case in cases for variant in shapes)
    return Profile(machine, n_repeats, ordered, tuple(failed), left_out)


class _Listener:
    """Hears what a case says: its notes, and repetitions, of which those that were not reached
    count as done when it is over."""

    def __init__(self, n: int, advance: Callable[[int], None]):
        self.notes: list[str] = []
        self._left, self._advance = n, advance

    def hear(self, kind: str, what: str | int) -> None:
        if kind == "note":
            self.notes.append(what)
        else:
            self._count(what)

    def finish(self) -> None:
        self._count(self._left)

    def _count(self, n: int) -> None:
        self._left -= n
        self._advance(n)


def _smallest_first(variant: Variant, shape: Shape, cases: Sequence[Case]) -> list[Row]:
    """So that what fails at last is what was the least likely to fit."""
    rows = [Row(variant.name, case, shape.planned(case, variant.is_int8)) for case in cases]
    return sorted(rows, key=lambda row: row.planned.total)


def _measured(
    row: Row, variant: Variant, machine: Machine, n_repeats: int, on_message: Callable
) -> Row:
    if row.planned.total > machine.memory_free:
        return _because(row, f"does not fit: {human_bytes(machine.memory_free)} are free")
    job = Job(variant.folder, variant.is_int8, row.case, machine.device, n_repeats)
    measured = run_isolated(measure, (job,), on_message)
    if measured is None:
        return _because(row, "out of memory")
    return Row(row.variant, row.case, row.planned, measured)


def _because(row: Row, why: str) -> Row:
    return Row(row.variant, row.case, row.planned, None, why)
