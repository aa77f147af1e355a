"""Fills the folder of a quantized model, by as many runs as it takes: whole, or not at all.

It is filled under a temporary name and read back. What is finished of it is noted in a journal, so
that a run that was ended is continued by the same command and gives the same bytes; small files
are made anew.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quant import manifest
from quant.calibration.tokens import Tokens
from quant.checkpoint import Checkpoint
from quant.durable import PendingFolder, states_folder, temporary_path
from quant.fingerprint import fingerprint
from quant.journal import Journal, Resume
from quant.model_folder import check_room, copy_other_files, write_manifest
from quant.report.choice import Result
from quant.safetensors_file import DTYPE_BITS
from quant.sinks.safetensors import ShardedSink, entry_nbytes
from quant.sinks.written import Tick, WrittenFile, WrittenTensor
from quant.source import check_unchanged, source_files

if TYPE_CHECKING:
    from quant.calibration.passes import Passes

MEASURED = "measured"
"""Among the passes of an output: what a plan is made from."""

Blocks = np.ndarray | Iterable[np.ndarray]
"""A tensor, whole or as blocks of rows."""


@dataclass(frozen=True)
class WrittenFolder:
    """What was written."""

    folder: Path
    nbytes: int  # of all weight files
    results: tuple[Result, ...] = ()
    damped: dict[str, float] = field(default_factory=dict)
    """With feedback: linears whose H was singular, and the damping that made it regular."""

    def to_json(self) -> dict:
        """Without the folder's path."""
        results = [asdict(result) for result in self.results]
        return {"nbytes": self.nbytes, "results": results, "damped": self.damped}

    @classmethod
    def from_json(cls, folder: Path, found: dict) -> "WrittenFolder":
        results = tuple(Result(**result) for result in found["results"])
        return cls(folder, found["nbytes"], results, found["damped"])


class FolderRun:
    """The run that has an output folder to itself, in stages that one journal tells of.

    What is measured before there is a plan; the weights, a unit {"tensors": [...]} for each tensor
    of the source; what is found out about them. Measuring and checking are passes over a model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        output: Path,
        force: bool,
        command: tuple[str, ...],
        journal: Journal,
        passes: "Passes | None",
    ):
        self.checkpoint, self.output, self.force = checkpoint, output, force
        self.command, self.journal, self.passes = command, journal, passes
        self.sources = [manifest.SourceFile.of(path) for path in source_files(checkpoint)]
        self.done: WrittenFolder | None = None
        """What an earlier run wrote, if it gave the folder its name before it was ended."""
        self._begun = False

    def measure(self, make: Callable[["Passes"], object]) -> object:
        """What `make` finds out, as JSON, by whichever run that makes these bytes."""
        n_units = self.passes.take_up(len(self.journal.units))
        if not any(_is_finished(unit, MEASURED) for unit in self.journal.units[:n_units]):
            self._begin(n_units)
        return self.passes.once(MEASURED, lambda: make(self.passes))

    def open(
        self, planned: Sequence[tuple[str, str, tuple[int, ...]]], n_alone: int
    ) -> tuple[PendingFolder, ShardedSink, list[dict]]:
        """The folder and its weights as an earlier run left them, and that run's units of weights.

        planned: as for ShardedSink. n_alone: of the units of weights, the first that count without
        any pass behind them. From here on the journal has begun.
        """
        pending, units = None, [] if self._begun else self.journal.units
        while True:
            n_units, places = self._usable(units, n_alone)
            there = [units[place] for place in places]
            if there and pending is None:
                pending = self.journal.hold(PendingFolder(self.output, self.force, taken_up=True))
            sink = ShardedSink(temporary_path(self.output), planned)
            n_certain = sum(place < self.journal.n_on_disk for place in places)
            n_there = _take_up(sink, there, n_certain, self.journal.tick)
            if n_there == len(there):
                break
            sink.keep()
            units = units[: places[n_there]]  # its bytes are lost, and all that came after it
        self.journal.hold(sink)
        self._begin(n_units)
        if self.passes is None:  # else they know what is needed
            shutil.rmtree(states_folder(self.output), ignore_errors=True)
        if pending is None:
            pending = self.journal.hold(PendingFolder(self.output, self.force))
        return pending, sink, there

    def write(
        self, sink: ShardedSink, parts: Mapping[str, Blocks], may_stop: bool = True, **facts: object
    ) -> None:
        """A unit: all that a tensor of the source becomes, by name, and facts about it."""
        written = [sink.write(name, part) for name, part in parts.items()]
        nbytes = sum(entry_nbytes(tensor.entry) for tensor in written)
        unit = {"tensors": [asdict(tensor) for tensor in written], **facts}
        self.journal.append(unit, nbytes, may_stop)

    def _begin(self, n_units: int) -> None:
        if not self._begun:
            self.journal.begin(n_units)
            self._begun = True

    def _usable(self, units: list, n_alone: int) -> tuple[int, list[int]]:
        """How many of the units passes can go on behind, and which of these are of weights."""
        n_units = self.passes.take_up(len(units)) if self.passes else len(units)
        places = [i for i, unit in enumerate(units[:n_units]) if _is_of_weights(unit)]
        while len(places) > n_alone and places[-1] == n_units - 1:
            n_units = places.pop()
        if self.passes is None:
            n_units = places[-1] + 1 if places else 0
        return n_units, places


def _is_of_weights(unit: object) -> bool:
    return isinstance(unit, dict) and isinstance(unit.get("tensors"), list)


def _is_finished(unit: object, name: str) -> bool:
    """Whether a unit is that of a thing which passes do once."""
    return isinstance(unit, dict) and unit.get("pass") == name


def _take_up(sink: ShardedSink, units: list[dict], n_certain: int, tick: Tick) -> int:
    """How many of these units are in the sink's files; it goes on behind them."""
    parsed = []
    with suppress(KeyError, TypeError, ValueError):
        for unit in units:
            parsed.append([WrittenTensor.from_json(tensor) for tensor in unit["tensors"]])
    try:
        return sink.take_up(parsed, n_certain, tick)
    except BaseException:
        sink.keep()
        raise


@contextmanager
def folder_run(
    checkpoint: Checkpoint,
    output: Path,
    force: bool,
    command: tuple[str, ...],
    resume: Resume | None,
    *,
    code: tuple[str, ...],
    hashed: dict[str, object],
    facts: dict[str, object],
    tokens: Tokens | None,
    held_out: Tokens | None,
    device: str,
    nbytes: int,
) -> Iterator[FolderRun]:
    """Lock the output, and see what an interrupted run left of it.

    code, hashed, facts: what decides the bytes besides the model's tensors, see quant.fingerprint;
    tokens, held_out: what the model is run on while weights are made, and to check them, on
    `device`. nbytes: of the weights. Raises CannotCreate or OutputFailed if it cannot be written,
    and what Journal raises.
    """
    hashed = {"tensors": checkpoint.tensors, **hashed}
    unit_name, n_units = "tensors", len(checkpoint.tensors)
    runs_model = tokens is not None or held_out is not None
    if runs_model:
        # Only here: torch takes a second to import, and plain rounding needs none of it.
        import torch

        from quant.calibration.computed import device_name
        from quant.calibration.passes import Passes

        code, unit_name, n_units = (*code, *RUNNING), "steps", None
        hashed |= {"config.json": checkpoint.config, "held-out text": held_out}
        hashed["calibration text"] = tokens
        facts = {**facts, **manifest.package_versions(), "calibration": _described(tokens)}
        facts |= {"model": checkpoint.public_name, "device": device_name(torch.device(device))}
    decides = fingerprint(code=code, hashed=hashed, **facts)
    resume = replace(resume or Resume(), command=command)
    with Journal(output, decides, resume, unit_name, n_units) as journal:
        passes = journal.hold(Passes(journal)) if runs_model else None
        run = FolderRun(checkpoint, output, force, command, journal, passes)
        if journal.completed is not None and PendingFolder.was_published(output):
            journal.begin(len(journal.units))
            run.done = WrittenFolder.from_json(output, journal.completed)
        else:
            check_room(output, nbytes, force)
        yield run


RUNNING = (
    "algorithms", "calibration", "evaluation", "measuring", "budget.py", "check_4bit.py",
    "check_weights.py", "feedback_4bit.py", "gptq_rounding.py", "selection.py", "texts.py",
    "write_with_feedback.py", "write_gptq.py",
)  # fmt: skip
"""What runs a model, and decides by what it finds."""


def _described(tokens: Tokens | None) -> str:
    if tokens is None:
        return "nothing"
    return f"{tokens.n_tokens} tokens in sequences of {tokens.seq_len}"


def write_folder(
    run: FolderRun,
    planned: Sequence[tuple[str, str, tuple[int, ...]]],
    n_alone: int,
    fill: Callable[[Path, ShardedSink, list[dict]], None],
    finish: Callable[[Path, list[WrittenFile]], tuple[WrittenFolder, dict]],
) -> WrittenFolder:
    """Fill a folder that appears whole and verified, or not at all.

    planned, n_alone: see FolderRun.open. fill: writes the weights behind those that the given units
    tell of. finish: writes config.json, looks at what is there, writes the card and whatever else,
    and also returns what the manifest is to say besides command, source, files.
    Raises BadInput for a source that changed meanwhile, CannotCreate, OutputFailed or Stopped.
    """
    if run.done is not None:
        return run.done
    nbytes = sum(prod(shape) * DTYPE_BITS[dtype] // 8 for _, dtype, shape in planned)
    check_room(run.output, nbytes, run.force)
    pending, sink, there = run.open(planned, n_alone)
    folder = pending.temporary
    fill(folder, sink, there)
    files = sink.finish(run.journal.tick)
    copy_other_files(run.checkpoint, folder)
    check_unchanged(run.checkpoint, run.sources)
    written, facts = finish(folder, files)
    write_manifest(run.checkpoint, folder, run.sources, files, facts, run.command)
    run.journal.complete(written.to_json())
    pending.publish()
    return written


def ticking(blocks: Iterable[np.ndarray], tick: Tick) -> Iterator[np.ndarray]:
    """The same blocks; what `tick` raises between two ends them."""
    for block in blocks:
        tick()
        yield block
