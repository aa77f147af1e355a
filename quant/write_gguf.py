"""Carries out a planned job: writes the GGUF files, all or none, and records what was done."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from quant import manifest
from quant.convert import Change, Progress, convert
from quant.durable import undisturbed
from quant.gguf_file import MAGIC, TensorEntry, Value, split_paths
from quant.output_file import check_output_file
from quant.preflight import Needs
from quant.sinks.gguf import GgufSink, WrittenFile, split_metadata
from quant.source import check_unchanged, source_files
from quant.tensors import TensorReader
from quant.to_gguf import Job


@dataclass(frozen=True)
class Result:
    """What was written."""

    files: tuple[WrittenFile, ...]
    changes: tuple[Change, ...] = ()


def output_path(job: Job, output: Path) -> Path:
    """The file to write: `output` itself, or a file named after model and type in that folder."""
    if not output.is_dir():
        return output
    name = job.metadata.get("general.name", Value("str", "model")).data
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in str(name)).strip("-.")
    return output / f"{safe or 'model'}-{job.type_name}.gguf"


def check_output(job: Job, output: Path, force: bool) -> list[Path]:
    """The files that will be written. Raises CannotCreate if one must not be."""
    paths = split_paths(output, len(job.plan.files))
    sources = source_files(job.source)
    manifest.check_manifest(output.parent)
    for path in paths:
        check_output_file(path, force=force, sources=sources, starts_with=MAGIC, kind="GGUF file")
    return paths


def write_gguf(
    job: Job,
    output: Path,
    *,
    force: bool = False,
    nan_policy: str = "refuse",
    command: tuple[str, ...] = (),
    progress: Progress = lambda n_weights: None,
    verifying: Callable[[], None] = lambda: None,
) -> Result:
    """Carry out the job. The output appears whole and verified, or not at all.

    command: what the user typed, for the manifest; without secrets.
    Raises OutputFailed, CannotCreate, or BadInput if the weights hold NaN or the source changed.
    """
    paths = check_output(job, output, force)
    before = [manifest.SourceFile.of(path) for path in source_files(job.source)]
    n_files, n_tensors = len(paths), len(job.plan.assignments)
    sinks: list[GgufSink] = []
    changes: list[Change] = []
    try:
        with TensorReader() as reader:
            for index, (path, assignments) in enumerate(zip(paths, job.plan.files, strict=True)):
                metadata = split_metadata(job.metadata, index, n_files, n_tensors)
                entries = [
                    TensorEntry(a.name, a.source.shape, a.format.name, 0) for a in assignments
                ]
                sinks.append(GgufSink(path, metadata, entries, job.plan.alignment))
                changes += convert(
                    assignments, sinks[-1], reader, nan_policy=nan_policy, progress=progress
                )
        verifying()
        files = tuple(sink.finish() for sink in sinks)
        check_unchanged(job.source, before)
        with undisturbed():
            for sink in sinks:
                sink.publish()
    finally:
        for sink in sinks:
            sink.discard()
    result = Result(files, tuple(changes))
    _record(job, paths[0], result, before, command)
    return result


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
        "bits_per_weight": round(job.plan.bits_per_weight, 4),
        "files": [
            {"name": file.path.name, "nbytes": file.nbytes, "sha256": file.sha256}
            for file in result.files
        ],
        "changes": [asdict(change) for change in result.changes],
        "notes": list(job.notes),
    }


def describe_json(job: Job, needs: Needs) -> str:
    """The job as JSON, for `--dry-run --format json`."""
    plan = job.plan
    return json.dumps(
        {
            "type": job.type_name,
            "nbytes": plan.nbytes,
            "n_weights": plan.n_weights,
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "files": len(plan.files),
            "needs": {**asdict(needs), "fits": needs.fits},
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
