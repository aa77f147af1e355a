"""Many candidates against one reference: `evaluate`, and what it finds, as data.

The reference reads the text first and its distributions are kept on the disk; then each candidate
is measured in a process of its own, so one that does not load, or crashes, or is killed, is named
and left out, and the others' figures stand. What is done is kept in a folder beside the report
until everything is, so that the same command goes on where it was interrupted.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from quant import __version__
from quant.display import printable
from quant.durable import PendingFile, translated_errors
from quant.errors import CannotCreate, QwqQuantError
from quant.evaluation.base_file import MAGIC, BaseFile
from quant.evaluation.divergence import (
    Accumulator,
    Estimate,
    PositionScores,
    Statistics,
    perplexity,
)
from quant.evaluation.isolation import run_isolated
from quant.evaluation.measuring import (
    Answers,
    Reference,
    Wishes,
    measure_candidate,
    measure_reference,
    model_files,
    read_nll,
    read_scores,
)
from quant.manifest import library_versions

COPIED_NBYTES = 8 << 20

WORK = ".evaluate.partial"
"""The folder of unfinished work, in the report's."""

DP_EDGES = (
    -1, -0.5, -0.2, -0.1, -0.05, -0.02, -0.01, -0.005, -0.002, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1,
    0.2, 0.5, 1,
)  # fmt: skip
"""Of the histogram of dp; the middle bin holds what hardly changed."""


class Listener(Protocol):
    """Who wants to know how far it is."""

    def begin(self, label: str, total: int) -> None: ...

    def advance(self, n: int) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Model:
    """A model to measure, as it was named and where it was found."""

    name: str
    path: Path


@dataclass(frozen=True)
class Measured:
    """A model's figures."""

    name: str
    nbytes: int
    bits_per_weight: float | None  # 8 * nbytes / weights of the reference
    ppl: Estimate
    statistics: Statistics | None  # None: it is the reference
    dp_histogram: tuple[int, ...]  # positions in the bins of DP_EDGES
    answers: Answers

    def as_json(self) -> dict:
        return {
            "name": self.name,
            "nbytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "ppl": asdict(self.ppl),
            "statistics": self.statistics and self.statistics.as_json(),
            "dp_histogram": list(self.dp_histogram),
            **asdict(self.answers),
        }


@dataclass(frozen=True)
class Failed:
    """A candidate that could not be measured."""

    name: str
    error: QwqQuantError


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found."""

    reference: Measured
    candidates: tuple[Measured, ...]
    failed: tuple[Failed, ...]
    text: dict  # name, sha256, n_ctx, n_windows, n_positions, categories: windows of each
    settings: dict  # of loops, questions and tasks

    def as_json(self) -> dict:
        return {
            "qwq_quant": __version__,
            "format": 1,
            "text": self.text,
            "settings": self.settings,
            "dp_edges": list(DP_EDGES),
            "reference": self.reference.as_json(),
            "candidates": [candidate.as_json() for candidate in self.candidates],
            "failed": [
                {"name": f.name, "what": f.error.what, "why": f.error.why} for f in self.failed
            ],
            "versions": library_versions(),
        }


def is_base_file(path: Path) -> bool:
    """Whether it is a reference's stored distributions instead of a model."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def evaluate(
    reference: Model,
    candidates: Sequence[Model],
    wishes: Wishes,
    output: Path,
    listener: Listener,
    missing: Sequence[Failed] = (),
    base_file: Path | None = None,
) -> Evaluation:
    """Measure all of them. output: the report's folder, which is made if need be.

    missing: candidates that were not even found; they are in `failed` too, like those that cannot
    be measured. base_file: where to keep the reference's distributions, as llama-perplexity's
    --kl-divergence-base does. Raises what is wrong with the reference, the text or the disk.
    """
    with _work_folder(output) as work:
        measured, failed = [], list(missing)
        for each in missing:
            listener.note(_left_out(each))
        known, answers = _run_reference(reference, wishes, work, listener)
        if base_file is not None:
            _copy_whole(known.base, base_file)
        for candidate in candidates:
            try:
                scores, found = run_isolated(
                    measure_candidate, (candidate.path, known, wishes, work), _hear(listener)
                )
                measured.append(_measured(candidate, known, scores, found))
            except QwqQuantError as error:
                failed.append(Failed(candidate.name, error))
                listener.note(_left_out(failed[-1]))
        evaluation = Evaluation(
            _measured_reference(reference, known, answers),
            tuple(measured),
            tuple(failed),
            _about_text(known, wishes),
            _about_settings(wishes),
        )
        if not failed:
            shutil.rmtree(work)
    return evaluation


@contextlib.contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """The folder for unfinished work, locked; gone at the end if nothing is in it.

    Raises CannotCreate if another run has it.
    """
    work = output / WORK
    is_new = not output.exists()
    with translated_errors(work):
        output.mkdir(exist_ok=True)
        work.mkdir(exist_ok=True)
        descriptor = os.open(work, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        _lock(descriptor, output)
        try:
            yield work
        finally:
            with contextlib.suppress(OSError):  # there is something in it, or it is gone
                work.rmdir()
            with contextlib.suppress(OSError):
                if is_new:
                    output.rmdir()
    finally:
        os.close(descriptor)


def _lock(descriptor: int, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CannotCreate(
            f"Another run is writing {printable(output)} just now.",
            "",
            "Wait for it, or choose another folder with -o.",
        ) from None


def _run_reference(
    reference: Model, wishes: Wishes, work: Path, listener: Listener
) -> tuple[Reference, Answers]:
    if is_base_file(reference.path):
        n_windows = len(BaseFile.open(reference.path).tokens)
        return Reference(reference.path.resolve(), None, ("",) * n_windows), Answers()
    return run_isolated(measure_reference, (reference.path, wishes, work), _hear(listener))


def _copy_whole(source: Path, path: Path) -> None:
    """A file that appears whole or not at all. Raises CannotCreate or OutputFailed."""
    pending, at = PendingFile(path), 0
    try:
        with open(source, "rb", buffering=0) as file:
            while block := file.read(COPIED_NBYTES):
                pending.write_at(at, block)
                at += len(block)
        pending.flush()
        pending.publish()
    finally:
        pending.discard()


def _left_out(failed: Failed) -> str:
    return f"{printable(failed.name)} is left out. {failed.error.what} {failed.error.why}"


def _hear(listener: Listener) -> Callable:
    return lambda kind, *rest: getattr(listener, kind)(*rest)


# --- figures ----------------------------------------------------------------------------------


def _measured(candidate: Model, known: Reference, scores: Path, answers: Answers) -> Measured:
    n_scored = BaseFile.open(known.base).chunks(None).n_scored
    accumulator = Accumulator()
    for category, window in zip(known.categories, read_scores(scores, n_scored), strict=True):
        accumulator.add(window, category)
    statistics = accumulator.statistics()
    nbytes = _model_nbytes(candidate.path)
    return Measured(
        name=candidate.name,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / known.n_weights if known.n_weights else None,
        ppl=statistics.ppl,
        statistics=statistics,
        dp_histogram=_histogram(accumulator.scores()),
        answers=answers,
    )


def _measured_reference(reference: Model, known: Reference, answers: Answers) -> Measured:
    nbytes = _model_nbytes(reference.path)
    return Measured(
        name=reference.name,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / known.n_weights if known.n_weights else None,
        ppl=perplexity(_reference_nll(known)),
        statistics=None,
        dp_histogram=(),
        answers=answers,
    )


def _reference_nll(known: Reference) -> np.ndarray:
    """Of every position, float64 (n,): exact, or from the base file where there is nothing else."""
    base = BaseFile.open(known.base)
    chunks = base.chunks(None)
    if known.nll is not None:
        return read_nll(known.nll, chunks.n_scored).ravel()
    return np.concatenate([base.nll(i, targets) for i, targets in enumerate(chunks.targets)])


def _histogram(scores: PositionScores) -> tuple[int, ...]:
    counts, _ = np.histogram(scores.p_candidate - scores.p_reference, DP_EDGES)
    return tuple(counts.tolist())


def _model_nbytes(path: Path) -> int:
    """Bytes of the files that hold weights."""
    if is_base_file(path):
        return path.stat().st_size
    files = model_files(path)
    return sum(f.stat().st_size for f in files if f.suffix == ".safetensors" or path.is_file())


def _about_text(known: Reference, wishes: Wishes) -> dict:
    chunks = BaseFile.open(known.base).chunks(None)
    counts = {c: known.categories.count(c) for c in dict.fromkeys(known.categories)}
    by_name = {"name": wishes.texts.name, "sha256": wishes.texts.sha256}
    if known.nll is None:
        by_name = {"name": known.base.name, "sha256": None}
    return {
        **by_name,
        "n_ctx": chunks.n_ctx,
        "n_windows": len(chunks),
        "n_positions": chunks.n_positions,
        "categories": counts,
    }


def _about_settings(wishes: Wishes) -> dict:
    return {
        "device": wishes.device,
        "loops": wishes.loops and asdict(wishes.loops),
        "n_questions": len(wishes.questions),
        "tasks": list(wishes.tasks),
        "task_limit": wishes.task_limit,
    }
