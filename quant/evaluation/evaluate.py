"""Many candidates against one reference: `evaluate`, and what it finds, as data.

The reference reads the text first and its distributions are kept on the disk; then each candidate
is measured in a process of its own, so one that does not load, or crashes, or is killed, is named
and left out, and the others' figures stand.

    report/.report.html.journal     what was asked, and a line for each window, answer or request
    report/.evaluate.partial/       what they gave, in files named by a hash of what it hangs on

So the same command goes on where it was interrupted. Candidates are no part of what was asked: one
that was added or mended meanwhile is measured, the others' figures stand. Both are removed when
the report is there, unless a candidate was left out and may be mended.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from quant import __version__
from quant.display import printable
from quant.durable import PendingFile, flush_folder, translated_errors
from quant.errors import CannotCreate, OutputFailed, QwqQuantError
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
    identity,
    key_of,
    measure_candidate,
    measure_reference,
    model_files,
    read_nll,
    read_scores,
)
from quant.fingerprint import fingerprint
from quant.journal import Journal, Resume, Stopped
from quant.manifest import package_versions

COPIED_NBYTES = 8 << 20

PAGE = "report.html"
"""In the report's folder; a journal of this output says what is finished."""

WORK = ".evaluate.partial"
"""The folder of unfinished work, in the report's."""

CODE = ("evaluation", "calibration", "gguf_file.py", "texts.py")
"""What makes figures of models."""

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
            "versions": package_versions(),
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
    resume: Resume | None = None,
    check: Callable[[bool], object] = lambda again: None,
    publish: Callable[[Evaluation], object] = lambda evaluation: None,
) -> Evaluation:
    """Measure all of them, or what an interrupted run left to measure.

    output: the report's folder, which is made if need be. missing: candidates that were not even
    found; they are in `failed` too, like those that cannot be measured. base_file: where to keep
    the reference's distributions, as llama-perplexity's --kl-divergence-base does.
    check(again) is called before any work: it raises if the files that publish(evaluation) is going
    to write must not be; again: an earlier run of the job has begun to write them.
    Raises what is wrong with the reference, the text or the disk, or Stopped.
    """
    resume = resume or Resume()
    asked = _fingerprint(reference, wishes)
    with (
        _made_folder(output),
        Journal(output / PAGE, asked, resume, "steps", None) as journal,
    ):
        check(journal.completed is not None)
        units = {model.name: _unit(model, wishes) for model in (*candidates, reference)}
        work = _take_up(journal, output / WORK, units, listener)
        measured, failed = [], list(missing)
        for each in missing:
            listener.note(_left_out(each))

        def run(model: Model, *call):
            hear = _hear(listener, journal, units[model.name])
            return run_isolated(*call, hear, journal.tick)

        known, answers = _run_reference(reference, wishes, work, run)
        for candidate in candidates:
            try:
                call = measure_candidate, (candidate.path, known, wishes, work)
                measured.append(_measured(candidate, known, *run(candidate, *call)))
            except (Stopped, OutputFailed, CannotCreate):  # no fault of the candidate's
                raise
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
        journal.complete(True)
        if base_file is not None:
            _copy_whole(known.base, base_file)
        publish(evaluation)
        if failed:
            journal.leave()
    return evaluation


@contextlib.contextmanager
def _made_folder(output: Path) -> Iterator[None]:
    """The report's folder; gone at the end if it is new and still empty. Raises CannotCreate."""
    is_new = not output.exists()
    if not is_new and not output.is_dir():
        raise CannotCreate(
            f"{printable(output)} is not a folder.", "", "Choose another folder with -o."
        )
    with translated_errors(output):
        output.mkdir(exist_ok=True)
    try:
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                output.rmdir()


# --- going on with an interrupted run ---------------------------------------------------------


def _fingerprint(reference: Model, wishes: Wishes) -> dict:
    """What all figures hang on."""
    if is_base_file(reference.path):
        status = reference.path.stat()
        files = status.st_size, status.st_mtime_ns
    else:
        _, files = identity(reference.path, wishes)[0]
    facts = {
        "context": wishes.n_ctx,
        "tokens": wishes.n_tokens or "all",
        "tasks": ", ".join(wishes.tasks) or "none",
        "task limit": wishes.task_limit or "none",
        "files of the model": {"files": files},
    }
    return fingerprint(
        code=CODE,
        hashed={
            "content of the text": wishes.texts.sha256,
            "loops": wishes.loops,
            "questions": wishes.questions,
        },
        model=str(reference.path.resolve()),
        text=wishes.texts.name,
        device=wishes.device,
        **package_versions(),
        **facts,
    )


def _unit(model: Model, wishes: Wishes) -> dict:
    """The journal's line for anything that is done with a model as it is now."""
    try:
        files = identity(model.path, wishes)
    except QwqQuantError as error:  # its turn comes; a base file gives no unit
        files = error.what
    return {"model": model.name, "files": key_of(files)}


class _Work:
    """The folder of what was measured, as the journal holds it; files in it are flushed already."""

    flush_failed = False

    def __init__(self, path: Path):
        self._path = path

    def begin(self, taken_up: bool) -> Path:
        """The folder, with what an earlier run left in it or empty."""
        with translated_errors(self._path):
            if not taken_up and self._path.exists():
                shutil.rmtree(self._path)
            self._path.mkdir(exist_ok=True)
            os.close(os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW))
        return self._path

    def flush(self) -> None:
        """Make the names of the files in it last."""
        with translated_errors(self._path):
            flush_folder(self._path)

    def keep(self) -> None:
        pass

    def discard(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


def _take_up(journal: Journal, path: Path, units: dict[str, dict], listener: Listener) -> Path:
    """The folder of work, with what an earlier run finished for models that are still as they were.

    units: of each model's name, its line in the journal.
    """
    work = journal.hold(_Work(path))
    is_there = path.is_dir() and any(unit in journal.units for unit in units.values())
    n_units = len(journal.units) if is_there else 0
    journal.begin(n_units)
    done = [unit.get("model") for unit in journal.units[:n_units] if isinstance(unit, dict)]
    for name, unit in units.items():
        if name in done and unit not in journal.units:
            listener.note(f"{printable(name)} is not as it was, so it is measured anew.")
    return work.begin(taken_up=n_units > 0)


def _hear(listener: Listener, journal: Journal, unit: dict) -> Callable:
    """What is done with a process's words: each advance is a unit, on the disk by now."""

    def hear(kind: str, *rest) -> None:
        if kind == "advance":
            journal.append(unit)
        getattr(listener, kind)(*rest)

    return hear


def kept_nbytes(output: Path) -> int:
    """What a run on this folder left for another, in bytes."""
    return sum(file.stat().st_size for file in (output / WORK).glob("*"))


# --- models -----------------------------------------------------------------------------------


def _run_reference(
    reference: Model, wishes: Wishes, work: Path, run: Callable
) -> tuple[Reference, Answers]:
    if is_base_file(reference.path):
        n_windows = len(BaseFile.open(reference.path).tokens)
        return Reference(reference.path.resolve(), None, ("",) * n_windows), Answers()
    return run(reference, measure_reference, (reference.path, wishes, work))


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
