"""What is done with one model, in a process of its own: scores of every window, answers, tasks.

A reference's scores are its rows of the base file, kept on the disk for all candidates, and its
exact nll, which the base file's 16 bits would cut off (see base_file). A candidate's are
PositionScores. Both are written window by window, answers one by one, and an interrupted run goes
on: each is on the disk before `say("advance", 1)` tells of it.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from quant import __version__
from quant.display import human_bytes, printable
from quant.durable import locked_folder, write_whole
from quant.errors import BadInput, OutputFailed
from quant.evaluation.answer_file import AnswerFile
from quant.evaluation.base_file import (
    BaseFile,
    base_file_nbytes,
    compare_rows,
    encode_header,
    encode_rows,
    window_nbytes,
)
from quant.evaluation.chunks import Chunks, cut_chunks
from quant.evaluation.divergence import PositionScores, nll_of
from quant.evaluation.isolation import Say
from quant.evaluation.loops import Answer, Prompt, answer_prompts, sum_up
from quant.evaluation.questions import Question, ask, grade
from quant.evaluation.runners import Runner, open_runner
from quant.evaluation.window_file import WindowFile
from quant.texts import Texts

SCORES = np.dtype(
    [("nll_reference", "<f8"), ("nll_candidate", "<f8"), ("kld", "<f8"), ("same_top", "u1")]
)
"""A position's scores on the disk: 25 bytes."""


@dataclass(frozen=True)
class Loops:
    """How answers are drawn: every prompt with every profile and seed."""

    prompts: tuple[Prompt, ...]
    profiles: dict[str, dict]  # name -> sampling settings
    seeds: tuple[int, ...]
    limit: int  # tokens of an answer

    @property
    def n_answers(self) -> int:
        """With one profile."""
        return len(self.prompts) * len(self.seeds)


@dataclass(frozen=True)
class Wishes:
    """What is measured, the same for every model."""

    texts: Texts
    n_ctx: int = 512
    n_tokens: int | None = None
    loops: Loops | None = None
    questions: tuple[Question, ...] = ()
    tasks: tuple[str, ...] = ()  # lm-eval's names
    task_limit: int | None = None  # documents of each
    run_code: bool = False  # of tasks that run what a model writes
    device: str = "auto"  # of folders; llama.cpp uses what it was built for


@dataclass(frozen=True)
class Reference:
    """A reference that was measured: what candidates are held against."""

    base: Path
    nll: Path | None  # float64 of every position; None where there is only a base file
    categories: tuple[str, ...]  # of each window
    n_weights: int | None = None  # None where there is only a base file


@dataclass
class Answers:
    """What a model answered, as plain data: in sum, and each text for the report's JSON."""

    loops: list[dict] = field(default_factory=list)  # LoopReport, one a profile
    texts: list[dict] = field(default_factory=list)  # Answer, and its profile
    questions: dict = field(default_factory=dict)  # QuestionReport
    tasks: dict = field(default_factory=dict)  # lm-eval's task -> metric -> {"value", "error"}


# --- keys -------------------------------------------------------------------------------------


def model_files(path: Path) -> list[Path]:
    """The files of a model: all of a folder, or of a split GGUF."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    from quant.gguf_file import open_gguf

    return sorted({tensor.path for tensor in open_gguf(path).tensors.values()})


def key_of(*facts: object) -> str:
    """A name for results that holds as long as none of the facts changes."""
    return hashlib.sha256(repr((__version__, *facts)).encode()).hexdigest()[:24]


def fingerprint(path: Path) -> tuple:
    """Names, sizes and times of a model's files."""
    status = [(file.name, file.stat()) for file in model_files(path)]
    return str(path.resolve()), tuple((name, s.st_size, s.st_mtime_ns) for name, s in status)


def identity(path: Path, wishes: Wishes) -> tuple:
    """What a model's figures hang on, besides what it is asked. Raises BadInput or InputMissing."""
    return fingerprint(path), wishes.device if path.is_dir() else ""


# --- the reference ----------------------------------------------------------------------------


def measure_reference(
    path: Path, wishes: Wishes, folder: Path, say: Say
) -> tuple[Reference, Answers]:
    """The base file and the nll of the reference, made or finished in `folder`, and its answers.

    Raises BadInput, Unavailable, OutputFailed if the disk has too little room.
    """
    with locked_folder(folder), open_runner(path, wishes.device, folder, say) as runner:
        chunks = cut_chunks(runner, wishes.texts, wishes.n_ctx, wishes.n_tokens)
        _warn_of_long_windows(runner, wishes.n_ctx, say)
        _try_answering(runner, wishes)
        key = key_of(identity(path, wishes), hashlib.sha256(chunks.inputs.tobytes()).hexdigest())
        reference = Reference(
            folder / f"{key}.kld", folder / f"{key}.nll", chunks.categories, _n_weights(path)
        )
        _announce(reference.base, base_file_nbytes(chunks, runner.n_vocab), say)
        with (
            WindowFile(
                reference.base,
                encode_header(chunks, runner.n_vocab),
                window_nbytes(chunks.n_ctx, runner.n_vocab),
            ) as rows,
            WindowFile(reference.nll, b"", 8 * chunks.n_scored) as nll,
        ):
            n_done = min(rows.n_records, nll.n_records)
            rows.cut(n_done)
            nll.cut(n_done)
            for targets, logits in _rest(runner, chunks, n_done, say):
                nll.append(nll_of(logits, targets).tobytes())
                rows.append(encode_rows(logits).tobytes())
        return reference, _answers(runner, path, wishes, folder, say)


def _warn_of_long_windows(runner: Runner, n_ctx: int, say: Say) -> None:
    if runner.n_ctx_trained is not None and n_ctx > runner.n_ctx_trained:
        say(
            "note",
            f"Windows of {n_ctx} tokens are longer than the {runner.n_ctx_trained} that "
            f"{printable(runner.name)} was made for: it reads their ends badly.",
        )


def _n_weights(path: Path) -> int:
    """Of a model that has been opened."""
    if path.is_dir():
        from quant.evaluation.runners.stored import count_weights, find_weights

        weights = find_weights(path)
        return 0 if weights is None else count_weights(weights)
    from quant.gguf_file import open_gguf

    return sum(tensor.n_weights for tensor in open_gguf(path).tensors.values())


def _announce(base: Path, nbytes: int, say: Say) -> None:
    """Say what the base file will take. Raises OutputFailed if there is too little room."""
    there = base.stat().st_size if base.exists() else 0
    free = shutil.disk_usage(base.parent).free
    shown = printable(base.parent.parent)
    say("note", f"The reference's distributions take {human_bytes(nbytes)} in {shown} meanwhile.")
    if nbytes - there > free:
        raise OutputFailed(
            f"The reference's distributions need {human_bytes(nbytes)}, but {shown} has only "
            f"{human_bytes(free)} free.",
            "They are two bytes for each token of the vocabulary at every scored position.",
            "Measure on less text with --tokens, or choose another folder with -o.",
        ) from OSError(errno.ENOSPC, "")


def _rest(
    runner: Runner, chunks: Chunks, n_done: int, say: Say
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(targets, logits) of the windows that are not done yet."""
    n_left = len(chunks) - n_done
    say("begin", f"{printable(runner.name)} reads", n_left)
    if n_left:
        logits = runner.logits(chunks.inputs, chunks.first, n_done)
        for pair in zip(chunks.targets[n_done:], logits, strict=True):
            yield pair
            say("advance", 1)


# --- candidates -------------------------------------------------------------------------------


def measure_candidate(
    path: Path, reference: Reference, wishes: Wishes, folder: Path, say: Say
) -> tuple[Path, Answers]:
    """The file of a candidate's scores, made or finished in `folder`, and its answers.

    Raises BadInput if it does not load, or reads the text as other tokens than the reference.
    """
    base = BaseFile.open(reference.base)
    n_scored = base.chunks(None).n_scored
    key = key_of(identity(path, wishes), _reference_identity(reference))
    scores = folder / f"{key}.scores"
    answers = _answers_path(path, wishes, folder)
    n_bytes = SCORES.itemsize * n_scored * len(base.tokens)
    if scores.exists() and scores.stat().st_size == n_bytes and answers.exists():
        return scores, _read_answers(answers)
    with locked_folder(folder), open_runner(path, wishes.device, folder, say) as runner:
        _check_vocabulary(runner, base, reference, wishes)
        _try_answering(runner, wishes)
        chunks = base.chunks(runner.bos)
        with WindowFile(scores, b"", SCORES.itemsize * n_scored) as done:
            first = done.n_records
            for i, (targets, logits) in enumerate(_rest(runner, chunks, first, say), first):
                found = compare_rows(base.rows(i), logits, targets)
                done.append(_pack(found, reference, i))
        return scores, _answers(runner, path, wishes, folder, say)


def _reference_identity(reference: Reference) -> tuple:
    """What tells one reference from another: our own base file is named by a hash of it."""
    if reference.nll is not None:
        return (reference.base.stem,)
    status = reference.base.stat()
    return str(reference.base), status.st_size, status.st_mtime_ns


def _check_vocabulary(runner: Runner, base: BaseFile, reference: Reference, wishes: Wishes) -> None:
    """Raise BadInput unless the model has the reference's tokens, as far as the text shows it."""
    if runner.n_vocab != base.n_vocab:
        raise BadInput(
            f"Its vocabulary has {runner.n_vocab} tokens instead of {base.n_vocab}.",
            "Only models with the same vocabulary can be held against each other.",
        )
    if reference.nll is None:  # only a base file: its text is not known
        return
    own = cut_chunks(runner, wishes.texts, wishes.n_ctx, wishes.n_tokens).tokens
    if not np.array_equal(own, base.tokens):
        raise BadInput(
            "It cuts the text into other tokens than the reference does.",
            "Its vocabulary is another one of the same size, or its tokenizer was changed.",
            "Compare models that were made from the same one.",
        )


def _pack(scores: PositionScores, reference: Reference, window: int) -> bytes:
    """One window's record, with the reference's exact nll where it is known."""
    packed = np.empty(len(scores), SCORES)
    for name in SCORES.names:
        packed[name] = getattr(scores, name)
    if reference.nll is not None:
        packed["nll_reference"] = read_nll(reference.nll, len(scores))[window]
    return packed.tobytes()


def read_nll(path: Path, n_scored: int) -> np.ndarray:
    """The reference's exact nll, float64 (n_windows, n_scored)."""
    return np.fromfile(path, "<f8").reshape(-1, n_scored)


def read_scores(path: Path, n_scored: int) -> list[PositionScores]:
    """A candidate's scores of every window."""
    packed = np.fromfile(path, SCORES).reshape(-1, n_scored)
    return [
        PositionScores(*(w[n].copy() for n in SCORES.names[:3]), w["same_top"].astype(bool))
        for w in packed
    ]


# --- answers ----------------------------------------------------------------------------------


def _answers_path(path: Path, wishes: Wishes, folder: Path) -> Path:
    asked = wishes.loops, wishes.questions, wishes.tasks, wishes.task_limit
    return folder / f"{key_of(identity(path, wishes), asked)}.answers.json"


def _try_answering(runner: Runner, wishes: Wishes) -> None:
    """Before hours of reading: raise BadInput for a chat template that fails, Unavailable for a
    model that cannot answer.
    """
    if not runner.can_answer and (wishes.loops or wishes.questions or wishes.tasks):
        runner.begin(np.zeros(1, np.int32), 1)
    prompts = wishes.loops.prompts if wishes.loops else ()
    asked = [*(p.text for p in prompts), *(q.question for q in wishes.questions)]
    runner.prompts(asked)


def _answers(runner: Runner, path: Path, wishes: Wishes, folder: Path, say: Say) -> Answers:
    """What the model answers, or answered in a run before."""
    kept = _answers_path(path, wishes, folder)
    if kept.exists():
        return _read_answers(kept)
    answers = Answers()

    def given(
        what: str, n: int, about: tuple, draw: Callable[[int], Iterator[Answer]]
    ) -> list[Answer]:
        """All n answers; those of a run before are on the disk, draw(first) draws the others."""
        key = key_of(identity(path, wishes), about)
        with AnswerFile(folder / f"{key}.answers.jsonl") as file:
            say("begin", f"{printable(runner.name)} {what}", n - len(file.answers))
            for answer in draw(len(file.answers)):
                file.append(asdict(answer))
                say("advance", 1)
        return [Answer(**answer) for answer in file.answers]

    if loops := wishes.loops:
        for name, settings in loops.profiles.items():
            asked = runner, loops.prompts, settings, loops.seeds, loops.limit
            found = given("answers", loops.n_answers, asked[1:], partial(answer_prompts, *asked))
            answers.loops.append(asdict(sum_up(found, name, loops.limit)))
            answers.texts += [{"profile": name, **asdict(answer)} for answer in found]
    if questions := wishes.questions:
        found = given("is asked", len(questions), questions, partial(ask, runner, questions))
        report = grade(questions, found)
        match = report.exact_match
        answers.questions = {
            **asdict(report), "exact_match": {"value": match.value, "error": match.error}
        }  # fmt: skip
    if wishes.tasks:
        from quant.evaluation.lm_eval_bridge import run_tasks
        from quant.evaluation.lm_eval_requests import Requests

        say("note", f"{printable(runner.name)} does {', '.join(wishes.tasks)} in lm-eval.")
        key = key_of(identity(path, wishes), "tasks")
        with AnswerFile(folder / f"{key}.answers.jsonl") as file:
            requests = Requests(file, say)
            answers.tasks = run_tasks(
                runner, wishes.tasks, wishes.task_limit, wishes.run_code, requests
            )
    write_whole(kept, json.dumps(asdict(answers)).encode())
    return _read_answers(kept)  # as a run that goes on has them: JSON's keys are text


def _read_answers(path: Path) -> Answers:
    return Answers(**json.loads(path.read_text()))
