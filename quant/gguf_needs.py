"""What to-gguf takes: disk, memory, and how long."""

from pathlib import Path

from quant.convert import WEIGHTS_AT_ONCE, worker_count
from quant.durable import own_leftovers
from quant.encoder_speeds import kernels_to_compile, weights_per_second
from quant.estimates import (
    Estimate,
    core_speed,
    encoding_seconds,
    reading_seconds,
    storing_seconds,
    writing_seconds,
)
from quant.formats import FORMATS
from quant.formats.format import Format
from quant.gguf_file import metadata_nbytes_at_most, padded, split_paths
from quant.journal import interrupted_job
from quant.plan import TENSOR_ENTRY_NBYTES, Assignment, Plan
from quant.preflight import SMALL_NBYTES, Needs, measure_needs
from quant.sinks.gguf import files_of_job
from quant.source import source_files
from quant.target_size import LADDER
from quant.to_gguf import Job

BASE_NBYTES = 240 << 20
"""Python, numpy, numba's compiler and the tokenizer's tables."""

COMPILING_NBYTES, COMPILING_REFINED_NBYTES = 18 << 20, 34 << 20
"""What the compiler takes for each format's encoder, the first time. Measured: 492 MB in all for
the 14 of a target size, 700 MB for their refined ones."""

COMPILING_SECONDS = 2.0
"""Of each kernel, on a core of the benchmarks' machine: 5 for Q4_K_M, 55 for all that a target
size with --refine tries."""

NBYTES_A_WORKER = 24 << 20
"""Stored, float32, scratch and encoded copies of the rows a thread works on, and those it waits
to hand over. Measured: 282 MB in all with 2 threads, 484 MB with 16."""


def gguf_needs(job: Job, output: Path) -> Needs:
    """What writing `job` to `output` needs. Raises CannotCreate if there is no such folder."""
    plan = job.plan
    left = files_of_job(output, interrupted_job(output))  # removed if they are of no use
    files = {*split_paths(output, len(plan.files)), *left}
    widest = max(a.source.n_columns for a in plan.assignments)
    nbytes_a_worker = NBYTES_A_WORKER * max(1, widest / WEIGHTS_AT_ONCE)
    return measure_needs(
        output,
        disk=sum(padded(a.nbytes, plan.alignment) for a in plan.assignments)
        + metadata_nbytes_at_most(job.metadata)
        + TENSOR_ENTRY_NBYTES * len(plan.assignments)
        + SMALL_NBYTES,
        memory=BASE_NBYTES + _compiling(plan) + round(nbytes_a_worker * worker_count()),
        reused=sum(own_leftovers(path) for path in files),
    )


def _compiling(plan: Plan) -> int:
    """Bytes for compiling the encoders that the plan needs, and those a target size tries."""
    used = {a.format.name: a.format for a in plan.assignments if a.format.block_size > 1}
    is_target = any(a.error is not None for a in plan.assignments)
    is_refined = any(format is not FORMATS[name] for name, format in used.items())
    n_encoders = len(LADDER[256]) if is_target else len(used)
    return n_encoders * (COMPILING_REFINED_NBYTES if is_refined else COMPILING_NBYTES)


def gguf_estimate(job: Job, output: Path, planning: float) -> Estimate:
    """How long it takes. planning: seconds that were taken to plan it, as a real run takes too.

    Reading and encoding go on while what is ready is flushed to the disk.
    """
    speed = core_speed()
    encoders = [(a, encoder_of(a)) for a in job.plan.assignments]
    work = [(a.source.n_weights, weights_per_second(*e)) for a, e in encoders if e]
    missing = kernels_to_compile(e for _, e in encoders if e)
    sources = source_files(job.source)
    reading = reading_seconds(sources, sum(path.stat().st_size for path in sources))
    nbytes = job.plan.nbytes
    writing = writing_seconds(output.parent, nbytes)
    busy = reading + encoding_seconds(work, speed) + storing_seconds(nbytes, speed)
    seconds = planning + max(busy, writing)
    return Estimate(seconds, len(missing), len(missing) * COMPILING_SECONDS / speed)


def encoder_of(assignment: Assignment) -> tuple[Format, bool] | None:
    """(format, has importance) of what encodes a tensor; None if it is written as it is."""
    if assignment.is_copy or assignment.format.name == assignment.source.dtype:
        return None
    return assignment.format, assignment.importance is not None
