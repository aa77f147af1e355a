"""The loop: read rows, encode them, write them. It decides nothing; the plan has.

Rows of all tensors flow through one queue, read and encoded by one thread a core (numpy, numba and
the kernel release the interpreter) and written in order by this thread. A few megabytes a thread
are in memory, whatever the size of the model; the bytes do not depend on the number of threads.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from quant.assembly import Assembly
from quant.display import printable
from quant.errors import BadInput
from quant.finite import count_nonfinite, zero_nonfinite
from quant.formats import FORMATS, Float16Overflow
from quant.plan import Assignment
from quant.sinks.gguf import GgufSink
from quant.sinks.written import WrittenTensor
from quant.tensors import WEIGHT_DTYPES, TensorReader, to_float32

WEIGHTS_AT_ONCE = 1 << 20
"""Weights in one piece of work: 4 MB as float32, so that a core's cache holds most of it."""

NAN_POLICIES = ("refuse", "keep-16bit", "zero")

DENSE = ("F32", "F16", "BF16")
"""Formats in which a NaN or an infinity harms nothing but itself."""

MOST_WORKERS = 16
"""More threads than this wait for the disk and only take memory."""

Progress = Callable[[int], None]
"""Called with the number of weights that were just written."""


class NonFinite(ValueError):
    """Rows hold NaN or infinite weights."""


@dataclass(frozen=True)
class Change:
    """What the weights themselves forced upon the plan; reported, never silent."""

    name: str
    format: str
    why: str


def worker_count() -> int:
    """Threads to encode with: the cores this process may use, a container's quota included."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(n, MOST_WORKERS, _quota() or n))


def _quota() -> int | None:
    """Whole cores of a cgroup's processor quota; None if there is none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no cgroup, or "max"
        return None


def convert(
    assignments: tuple[Assignment, ...],
    sink: GgufSink,
    reader: TensorReader,
    *,
    nan_policy: str = "refuse",
    progress: Progress = lambda n_weights: None,
) -> Iterator[tuple[WrittenTensor, list[Change]]]:
    """Encode and write every assignment, in order: each as it is written, and what its weights made
    us change.

    Raises BadInput for NaN or infinite weights under the policy "refuse".
    """
    with ThreadPoolExecutor(worker_count()) as pool:
        queue = _work_ahead(pool, assignments, reader, nan_policy)
        try:
            for assignment in assignments:
                yield _write_tensor(assignment, queue, sink, reader, nan_policy, progress)
        finally:
            pool.shutdown(cancel_futures=True)


def _work_ahead(
    pool: ThreadPoolExecutor,
    assignments: tuple[Assignment, ...],
    reader: TensorReader,
    nan_policy: str,
) -> Iterator[Future]:
    """Results of encode_rows for every range of every tensor, in order, a few ahead of use."""
    ahead: deque[Future] = deque()
    most_ahead = 2 * worker_count()
    for assignment in assignments:
        for start, stop in assignment.source.row_ranges(WEIGHTS_AT_ONCE):
            ahead.append(pool.submit(encode_rows, assignment, reader, start, stop, nan_policy))
            if len(ahead) > most_ahead:
                yield ahead.popleft()
    yield from ahead


@dataclass(frozen=True)
class EncodedRows:
    """Rows in their format (uint8), and what happened to NaN and infinite weights in them."""

    data: np.ndarray
    n_zeroed: int = 0
    n_kept: int = 0


def encode_rows(
    assignment: Assignment, reader: TensorReader, start: int, stop: int, nan_policy: str
) -> EncodedRows:
    """Rows [start, stop) in the assignment's format.

    Raises NonFinite or Float16Overflow if the format cannot hold them.
    """
    source, format = assignment.source, assignment.format
    if assignment.is_copy and source.dtype not in WEIGHT_DTYPES:
        return EncodedRows(_copy_rows(assignment, reader, start, stop))
    if source.needs_scaling:
        rows, dtype = source.read_float32(reader, start, stop), "F32"
    else:
        rows, dtype = source.read_stored(reader, start, stop), source.dtype
    n_bad = count_nonfinite(rows, dtype)
    if n_bad and nan_policy == "zero":
        zero_nonfinite(rows, dtype)
        n_bad, n_zeroed = 0, n_bad
    else:
        n_zeroed = 0
    keeps = nan_policy == "keep-16bit" or assignment.is_copy
    if n_bad and not (keeps and format.name in DENSE):
        raise NonFinite
    if dtype == format.name:
        return EncodedRows(rows.view(np.uint8), n_zeroed, n_bad)
    w = to_float32(rows, dtype)
    data = format.encode(w, assignment.importance_of(start))[""]
    return EncodedRows(data, n_zeroed, n_bad)


def _copy_rows(assignment: Assignment, reader: TensorReader, start: int, stop: int) -> np.ndarray:
    row_nbytes = assignment.format.row_nbytes(assignment.source.n_columns)
    (piece,) = assignment.source.pieces
    return reader.read_bytes(piece.info, start * row_nbytes, (stop - start) * row_nbytes)


def _write_tensor(
    assignment: Assignment,
    queue: Iterator[Future],
    sink: GgufSink,
    reader: TensorReader,
    nan_policy: str,
    progress: Progress,
) -> tuple[WrittenTensor, list[Change]]:
    """Write one tensor from its part of the queue; once more as BF16 if the format fails it."""
    source, problem, n_zeroed, n_kept = assignment.source, None, 0, 0
    sink.begin(source.name, source.shape, assignment.format.name)
    for start, stop in source.row_ranges(WEIGHTS_AT_ONCE):
        result = next(queue)
        if problem is not None:
            continue  # these rows are written again below
        try:
            encoded = result.result()
        except (NonFinite, Float16Overflow) as error:
            problem = error
            continue
        sink.append(encoded.data)
        n_zeroed, n_kept = n_zeroed + encoded.n_zeroed, n_kept + encoded.n_kept
        progress((stop - start) * source.n_columns)
    if problem is not None:
        change = _write_wider(assignment, problem, sink, reader, nan_policy, progress)
        return sink.end(), [change]
    if n_zeroed or n_kept:
        done = "were set to zero" if n_zeroed else "were kept"
        why = f"{n_zeroed or n_kept} NaN or infinite weights {done}"
        return sink.end(), [Change(source.name, assignment.format.name, why)]
    return sink.end(), []


def _write_wider(
    assignment: Assignment,
    problem: Exception,
    sink: GgufSink,
    reader: TensorReader,
    nan_policy: str,
    progress: Progress,
) -> Change:
    """Write a tensor that its format cannot hold in one that can: its own 16 bits, BF16, or F32."""
    source = assignment.source
    if isinstance(problem, NonFinite):
        if nan_policy == "refuse":
            raise _refusal(source, reader)
        why = "it holds NaN or infinite weights"
    else:
        why = f"its values are beyond the float16 range that {assignment.format.name} needs"
    own = ("F16",) if source.dtype == "F16" and assignment.format.name != "F16" else ()
    for format in (FORMATS[name] for name in (*own, "BF16", "F32")):
        sink.begin(source.name, source.shape, format.name)
        with contextlib.suppress(Float16Overflow):
            for start, stop in source.row_ranges(WEIGHTS_AT_ONCE):
                wider = replace(assignment, format=format)
                sink.append(encode_rows(wider, reader, start, stop, nan_policy).data)
                progress((stop - start) * source.n_columns)
            break
    return Change(source.name, format.name, f"written as {format.name}: {why}")


def _refusal(source: Assembly, reader: TensorReader) -> BadInput:
    """Count the bad weights of the whole tensor, so that the message is worth something."""
    n_bad, first = 0, None
    for start, stop in source.row_ranges(WEIGHTS_AT_ONCE):
        rows = source.read_float32(reader, start, stop)
        bad = ~np.isfinite(rows)
        if first is None and bad.any():
            row, column = np.argwhere(bad)[0]
            first = (start + int(row), int(column))
        n_bad += int(bad.sum())
    return BadInput(
        f"{printable(source.source_name)} has {n_bad} NaN or infinite weights of "
        f"{source.n_weights}, the first at row {first[0]}, column {first[1]}.",
        "One such weight would spoil the 32 to 256 weights of its block.",
        "Go on with --nan-policy keep-16bit (that tensor stays in 16 bits) or --nan-policy zero.",
    )
