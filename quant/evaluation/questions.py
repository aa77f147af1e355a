"""Questions with one right answer: what a model can still do, without a network.

JSON lines of {"question", "answer"}. Each is asked through the model's chat template, answered
greedily, and right if what stands behind </think> is the answer to the letter. The example model's
are in examples/tiny-qwq/questions.jsonl: sums, differences, counting letters, maxima, sorting.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quant.display import printable
from quant.errors import BadInput
from quant.evaluation.divergence import Estimate
from quant.evaluation.loops import CLOSE, Answer, Prompt, answer_prompts
from quant.evaluation.runners import Runner
from quant.evaluation.sampler import GREEDY
from quant.strict_files import open_regular, parse_json

LIMIT = 512
"""Tokens of an answer; whoever needs more has gone astray."""

MAX_NBYTES = 50_000_000


@dataclass(frozen=True)
class Question:
    question: str
    answer: str


@dataclass(frozen=True)
class QuestionReport:
    """How many questions were answered right."""

    n_questions: int
    n_right: int
    n_endless: int  # not done at LIMIT

    @property
    def exact_match(self) -> Estimate:
        share = self.n_right / self.n_questions
        return Estimate(share, float(np.sqrt(share * (1 - share) / max(self.n_questions - 1, 1))))


def read_questions(path: Path) -> list[Question]:
    """Raises InputMissing, NotPermitted, or BadInput."""
    with open_regular(path) as file:
        raw = file.read(MAX_NBYTES + 1)
    if len(raw) > MAX_NBYTES:
        raise BadInput(f"{printable(path)} is larger than 50 MB, so it is not read.")
    found = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line, path)
        except BadInput as error:
            raise BadInput(f"Line {number} of {error.what}", error.why) from None
        question, answer = entry.get("question"), entry.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise BadInput(
                f"Line {number} of {printable(path)} is no question.",
                'Each line must be an object such as {"question": "What is 1 + 1?", '
                '"answer": "1 + 1 = 2"}.',
            )
        found.append(Question(question, answer))
    if not found:
        raise BadInput(f"{printable(path)} holds no questions.")
    return found


def ask(runner: Runner, questions: Sequence[Question], first: int = 0) -> Iterator[Answer]:
    """Answers to the questions from the `first`-th on, drawn greedily."""
    prompts = [Prompt("", question.question) for question in questions]
    return answer_prompts(runner, prompts, GREEDY, [0], LIMIT, first)


def grade(questions: Sequence[Question], answers: Sequence[Answer]) -> QuestionReport:
    """How many of the answers, one to each question, are right."""
    right = sum(
        final_text(answer.text) == question.answer.strip()
        for answer, question in zip(answers, questions, strict=True)
    )
    return QuestionReport(len(questions), right, sum(answer.endless for answer in answers))


def final_text(answer: str) -> str:
    """What stands behind the last thought."""
    return answer.rpartition(CLOSE)[2].strip()
