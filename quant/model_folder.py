"""What every folder of a quantized model has, whatever its format: the weights of the source in 16
bits, its tokenizer and other small files, config.json, a manifest with all hashes.

The folder is filled under a temporary name and read back; it appears whole or not at all. What is
finished of it is noted in a journal, so that a run that was ended is continued by the same command
and gives the same bytes; small files are made anew.
"""

import hashlib
import json
import os
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
from quant.checkpoint import CONFIG, INDEX, Checkpoint
from quant.convert import WEIGHTS_AT_ONCE
from quant.display import human_bytes, printable
from quant.durable import (
    PendingFolder,
    check_replaceable_folder,
    own_leftovers,
    states_folder,
    temporary_path,
    translated_errors,
    write_whole,
)
from quant.errors import BadInput, OutputFailed
from quant.fingerprint import fingerprint
from quant.finite import count_nonfinite
from quant.fix import MendedCheckpoint
from quant.formats import FORMATS, Float16Overflow
from quant.journal import Journal, Resume
from quant.report.choice import Result
from quant.safetensors_file import DTYPE_BITS
from quant.sinks.safetensors import ShardedSink, entry_nbytes
from quant.sinks.written import Tick, WrittenFile, WrittenTensor
from quant.source import check_unchanged, source_files
from quant.tensors import TensorInfo, TensorReader, to_float32

if TYPE_CHECKING:
    from quant.calibration.passes import Passes

STORED = {"bfloat16": "BF16", "float16": "F16"}

Blocks = np.ndarray | Iterable[np.ndarray]
"""A tensor, whole or as blocks of rows."""

OTHER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "*.tiktoken")
"""Small files of a model folder that go along: tokenizer, templates, settings, licences."""

MEASURED = "measured"
"""Among the passes of an output: what a plan is made from."""

NOT_COPIED = {CONFIG, INDEX, manifest.NAME, "sensitivity.json", "quantize_config.json"}
"""What is made anew, or is of no use with other weights."""


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
        n_units, sink, there = len(units), None, []
        while sink is None:
            n_units, places = self._usable(units[:n_units], n_alone)
            there = [units[place] for place in places]
            if there and pending is None:
                pending = self.journal.hold(PendingFolder(self.output, self.force, taken_up=True))
            sink = ShardedSink(temporary_path(self.output), planned)
            n_certain = sum(place < self.journal.n_on_disk for place in places)
            n_there = _take_up(sink, there, n_certain, self.journal.tick)
            if n_there < len(there):
                sink.keep()
                n_units, sink = places[n_there], None
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
        facts = {**facts, **manifest.library_versions(), "calibration": _described(tokens)}
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
    _write_manifest(run.checkpoint, folder, run.sources, files, facts, run.command)
    run.journal.complete(written.to_json())
    pending.publish()
    return written


def check_room(output: Path, nbytes: int, force: bool) -> None:
    """Raise CannotCreate or OutputFailed if a folder of `nbytes` cannot be written there."""
    check_replaceable_folder(output, force)
    with translated_errors(output):
        status = os.statvfs(Path(os.path.abspath(output)).parent)
    free = status.f_bavail * status.f_frsize + own_leftovers(output)
    if nbytes > free:
        raise OutputFailed(
            f"The output needs {human_bytes(nbytes)}, but only {human_bytes(free)} are free "
            f"where {printable(output)} would be.",
            "Nothing was written.",
            "Free some space, or choose another folder with -o.",
        )


# --- weights ----------------------------------------------------------------------------------


def ticking(blocks: Iterable[np.ndarray], tick: Tick) -> Iterator[np.ndarray]:
    """The same blocks; what `tick` raises between two ends them."""
    for block in blocks:
        tick()
        yield block


@dataclass(frozen=True)
class Source:
    """A stored tensor, read as the output's 16-bit type: what quantizing on load would see."""

    info: TensorInfo
    reader: TensorReader
    dtype: str

    def read_float32(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), finite. Raises BadInput."""
        return to_float32(self.read_16bit(start, stop), STORED[self.dtype])

    def read_16bit(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop): bfloat16 as its bits in uint16, or float16. Raises BadInput."""
        stored = STORED[self.dtype]
        if self.info.dtype == stored:
            rows = self.reader.read_stored(self.info, start, stop)
        else:
            w = self.reader.read_float32(self.info, start, stop)
            try:
                rows = FORMATS[stored].encode(w)[""].view(np.uint16).reshape(w.shape)
            except Float16Overflow:
                raise BadInput(
                    f"{printable(self.info.name)} has weights that float16 cannot hold.",
                    'They are beyond 65504, but config.json says "float16".',
                    'Set "dtype": "bfloat16" in a copy of the model\'s config.json.',
                ) from None
            rows = rows.view(np.float16) if stored == "F16" else rows
        if n_bad := count_nonfinite(rows, stored):
            raise BadInput(
                f"{printable(self.info.name)} has {n_bad} NaN or infinite weights, the first in "
                f"rows {start} to {stop - 1}.",
                "A model with such weights gives NaN for every text.",
                "Download the checkpoint again, or ask its maker.",
            )
        return rows

    def blocks(self) -> Iterator[np.ndarray]:
        """The whole tensor, a few rows at a time."""
        n_rows = max(1, 4 * WEIGHTS_AT_ONCE // self.info.n_columns)
        for start in range(0, self.info.n_rows, n_rows):
            yield self.read_16bit(start, min(start + n_rows, self.info.n_rows))


# --- everything else --------------------------------------------------------------------------


def copy_other_files(checkpoint: Checkpoint, folder: Path) -> None:
    """The tokenizer and whatever else is small; not the weights, their index or the card."""
    names = {p.name for pattern in OTHER_FILES for p in checkpoint.folder.glob(pattern)}
    if isinstance(checkpoint, MendedCheckpoint):
        names |= checkpoint.contents.keys()  # a mend may add a file
    for name in sorted(names - NOT_COPIED):
        if not (folder / name).exists() and (content := checkpoint.read_bytes(name)) is not None:
            write_whole(folder / name, content)


def write_model_config(
    checkpoint: Checkpoint, dtype: str, quantization: dict | None, folder: Path
) -> None:
    """config.json of the source with the quantization added; the type under both its names."""
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    config |= {"dtype": dtype, "torch_dtype": dtype}  # transformers 5 reads one, 4 both
    if quantization is not None:
        config["quantization_config"] = quantization
    write_json(folder / CONFIG, config)


def write_json(path: Path, content: dict) -> None:
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def _write_manifest(
    checkpoint: Checkpoint,
    folder: Path,
    sources: list[manifest.SourceFile],
    files: list[WrittenFile],
    facts: dict,
    command: tuple[str, ...],
) -> None:
    tensors = {t.entry.name: t for file in files for t in file.tensors}
    entry = {
        "command": list(command),
        "source": {
            "model": checkpoint.name,
            "revision": checkpoint.revision,
            "files": [asdict(file) for file in sources],
        },
        **facts,
        "files": list(_hashed(folder, {file.path.name: file for file in files})),
        "tensors": {
            name: {"type": t.entry.type, "xxh3_128": t.xxh3_128} for name, t in tensors.items()
        },
        **manifest.environment(),
    }
    manifest.write_for_folder(folder, entry)


def _hashed(folder: Path, weights: dict[str, WrittenFile]) -> Iterator[dict]:
    """Every file with its sha256; that of the weights is known already."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in weights:
            yield {"name": name, "nbytes": weights[name].nbytes, "sha256": weights[name].sha256}
        else:
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            yield {"name": name, "nbytes": len(content), "sha256": digest}
