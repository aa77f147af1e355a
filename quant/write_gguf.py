"""Carries out a planned job: writes the GGUF files, all or none, and records what was done.

Every tensor that is written is noted in a journal, so that a run that was ended, by whatever, is
continued by the same command and gives the same bytes.
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from quant import manifest
from quant.convert import Change, Progress, convert
from quant.durable import PendingFile, check_place, temporary_path, undisturbed
from quant.estimates import Estimate
from quant.fingerprint import fingerprint
from quant.gguf_file import MAGIC, TensorEntry, Value, split_paths, tensor_nbytes
from quant.journal import Journal, Resume
from quant.output_file import check_output_file
from quant.preflight import Needs
from quant.sinks.gguf import GgufSink, WrittenFile, files_of_job, split_metadata
from quant.sinks.written import WrittenTensor
from quant.source import check_unchanged, source_files
from quant.tensors import TensorReader
from quant.to_gguf import Job


@dataclass(frozen=True)
class Result:
    """What was written."""

    files: tuple[WrittenFile, ...]
    changes: tuple[Change, ...] = ()

    @property
    def tensor_nbytes(self) -> int:
        """Of all tensors as they were written, padding not counted."""
        entries = (tensor.entry for file in self.files for tensor in file.tensors)
        return sum(tensor_nbytes(entry.type, entry.shape) for entry in entries)

    def bits_per_weight(self, job: Job) -> float:
        """What the plan said, unless weights would have it otherwise."""
        return 8 * self.tensor_nbytes / job.plan.n_weights


def output_path(job: Job, output: Path) -> Path:
    """The file to write: `output` itself, or a file named after model and type in that folder.

    Raises CannotCreate for a place that no output can have.
    """
    if not output.is_dir():
        check_place(output)
        return output
    name = job.metadata.get("general.name", Value("str", "model")).data
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in str(name)).strip("-.")
    return output / f"{safe or 'model'}-{job.type_name}.gguf"


def check_output(job: Job, paths: list[Path], force: bool) -> None:
    """Raise CannotCreate if one of the files must not be written, or the manifest beside them."""
    sources = source_files(job.source)
    for path in paths:
        manifest.check_manifest(path.parent)
        check_output_file(path, force=force, sources=sources, starts_with=MAGIC, kind="GGUF file")


def write_gguf(
    job: Job,
    output: Path,
    *,
    force: bool = False,
    nan_policy: str = "refuse",
    command: tuple[str, ...] = (),
    resume: Resume | None = None,
    progress: Progress = lambda n_weights: None,
    verifying: Callable[[], None] = lambda: None,
    recorded: Callable[[], object] = lambda: None,
) -> Result:
    """Carry out the job, or what an interrupted run left of it.

    The output appears whole and verified, or not at all; the files of a split one, one at once
    after the other. command: what the user typed, for the manifest; without secrets. recorded: is
    called when all is done; a run that is ended before that goes on with it.
    Raises OutputFailed, CannotCreate, BadInput if the weights hold NaN or the source changed, or
    Stopped.
    """
    paths = split_paths(output, len(job.plan.files))
    before = [manifest.SourceFile.of(path) for path in source_files(job.source)]
    sinks = _sinks(job, paths)
    decides = _fingerprint(job, sinks, nan_policy)
    resume = replace(resume or Resume(), command=command)
    n_tensors = len(job.plan.assignments)
    with Journal(output, decides, resume, "tensors", n_tensors) as journal:

        def advance(n_weights: int) -> None:
            progress(n_weights)
            journal.tick()

        units = _take_up(job, sinks, journal, force)
        advance(sum(a.source.n_weights for a in job.plan.assignments[: len(units)]))
        units += _write_rest(job, sinks, journal, len(units), nan_policy, advance)
        verifying()
        files = tuple(sink.finish(journal.tick) for sink in sinks)
        check_unchanged(job.source, before)
        journal.complete([file.nbytes for file in files])
        with undisturbed():
            for sink in sinks:
                sink.publish()
        result = Result(files, tuple(change for unit in units for change in unit.changes))
        _record(job, paths[0], result, before, command)
        recorded()
    return result


def _sinks(job: Job, paths: list[Path]) -> list[GgufSink]:
    """One for each file; nothing is opened yet."""
    n_files, n_tensors = len(paths), len(job.plan.assignments)
    sinks = []
    for index, (path, assignments) in enumerate(zip(paths, job.plan.files, strict=True)):
        metadata = split_metadata(job.metadata, index, n_files, n_tensors)
        entries = [TensorEntry(a.name, a.source.shape, a.format.name, 0) for a in assignments]
        sinks.append(GgufSink(path, metadata, entries, job.plan.alignment))
    return sinks


def _write_rest(
    job: Job,
    sinks: list[GgufSink],
    journal: Journal,
    n_done: int,
    nan_policy: str,
    progress: Progress,
) -> list["_Unit"]:
    """Encode and write all tensors behind the first n."""
    units, first = [], 0
    with TensorReader() as reader:
        for sink, assignments in zip(sinks, job.plan.files, strict=True):
            left = assignments[max(0, n_done - first) :]
            first += len(assignments)
            if not left:
                continue
            sink.open()
            written = convert(left, sink, reader, nan_policy=nan_policy, progress=progress)
            with contextlib.closing(written):
                for tensor, changes in written:
                    units.append(_Unit(tensor, tuple(changes)))
                    journal.append(
                        asdict(units[-1]), tensor_nbytes(tensor.entry.type, tensor.entry.shape)
                    )
    return units


# --- going on with an interrupted run ---------------------------------------------------------

CODE = (
    "formats", "sinks", "assembly.py", "convert.py", "finite.py", "gguf_file.py", "lora.py",
    "tensors.py",
)  # fmt: skip
"""What makes bytes of a plan."""


def _fingerprint(job: Job, sinks: list[GgufSink], nan_policy: str) -> dict:
    headers = [sink.planned_header for sink in sinks]
    return fingerprint(
        code=CODE,
        hashed={"metadata": headers, "tensors": job.plan.assignments},
        type=job.type_name,
        files=len(sinks),
        nan_policy=nan_policy,
    )


@dataclass(frozen=True)
class _Unit:
    """A line of the journal: a tensor as it was written, and what its weights made us change."""

    tensor: WrittenTensor
    changes: tuple[Change, ...]

    @classmethod
    def from_json(cls, unit: dict) -> "_Unit":
        """Raises KeyError, TypeError or ValueError for what is no unit."""
        changes = tuple(Change(**change) for change in unit["changes"])
        return cls(WrittenTensor.from_json(unit["tensor"]), changes)


def _take_up(job: Job, sinks: list[GgufSink], journal: Journal, force: bool) -> list[_Unit]:
    """What is finished already and still there, its files opened; the journal begins behind it.

    Raises CannotCreate if an output must not be written; nothing has changed then.
    """
    for sink in sinks:
        journal.hold(sink)
    units = _earlier_units(job, journal)
    parts, first = [], 0  # of each file: its tensors, and how many outlived even a power cut
    for assignments in job.plan.files:
        part = [unit.tensor for unit in units[first : first + len(assignments)]]
        parts.append((part, min(len(part), max(0, journal.n_on_disk - first))))
        first += len(assignments)
    has_name = [
        nbytes is not None and sink.take_up_published(part, nbytes)
        for sink, (part, _), nbytes in zip(
            sinks, parts, journal.completed or [None] * len(sinks), strict=True
        )
    ]
    unnamed = [sink.path for sink, named in zip(sinks, has_name, strict=True) if not named]
    check_output(job, unnamed, force)
    n_done = 0
    for sink, (part, n_certain), named in zip(sinks, parts, has_name, strict=True):
        n_there = len(part) if named or not part else sink.take_up(part, n_certain, journal.tick)
        n_done += n_there
        if n_there < len(part):
            break
    journal.begin(n_done)
    _remove_abandoned(journal)
    return units[:n_done]


def _earlier_units(job: Job, journal: Journal) -> list[_Unit]:
    """The units of an earlier run, as far as they are the plan's."""
    units = []
    with contextlib.suppress(KeyError, TypeError, ValueError):
        for found, assignment in zip(journal.units, job.plan.assignments, strict=False):
            unit = _Unit.from_json(found)
            entry = unit.tensor.entry
            if (entry.name, entry.shape) != (assignment.name, assignment.source.shape):
                break
            units.append(unit)
    return units


def _remove_abandoned(journal: Journal) -> None:
    """Remove the files of an interrupted run whose work is of no use here."""
    for path in files_of_job(journal.output, journal.abandoned):
        if temporary_path(path).exists():
            PendingFile(path).discard()


def _record(
    job: Job,
    path: Path,
    result: Result,
    sources: list[manifest.SourceFile],
    command: tuple[str, ...],
) -> None:
    """Write the output's entry in the manifest."""
    entry = {
        "command": list(command),
        "source": {
            "model": str(getattr(job.source, "name", None) or job.source.path),
            "revision": getattr(job.source, "revision", None),
            "files": [asdict(file) for file in sources],
        },
        **result_summary(job, result),
        "tensors": {
            t.entry.name: {"type": t.entry.type, "xxh3_128": t.xxh3_128}
            for file in result.files
            for t in file.tensors
        },
        **manifest.environment(),
    }
    manifest.add_entry(path.parent, path.name, entry)


def result_summary(job: Job, result: Result) -> dict:
    """What was written, for the manifest and `--format json`."""
    return {
        "type": job.type_name,
        "bits_per_weight": round(result.bits_per_weight(job), 4),
        "files": [
            {"name": file.path.name, "nbytes": file.nbytes, "sha256": file.sha256}
            for file in result.files
        ],
        "changes": [asdict(change) for change in result.changes],
        "notes": list(job.notes),
    }


def describe_json(job: Job, needs: Needs, estimate: Estimate) -> str:
    """The job as JSON, for `--dry-run --format json`."""
    plan = job.plan
    return json.dumps(
        {
            "type": job.type_name,
            "nbytes": plan.nbytes,
            "n_weights": plan.n_weights,
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "files": len(plan.files),
            "needs": {**needs.as_json(), **estimate.as_json()},
            "tensors": [
                {
                    "name": a.name,
                    "source": a.source.source_name,
                    "shape": list(a.source.shape),
                    "source_type": a.source.dtype,
                    "type": a.format.name,
                    "nbytes": a.nbytes,
                    "rule": a.rule,
                }
                for a in plan.assignments
            ],
            "notes": list(job.notes),
        },
        indent=1,
    )
