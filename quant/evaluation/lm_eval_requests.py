"""What lm-eval's tasks ask of a model: likelihoods and answers, each asked once."""

from collections.abc import Callable, Sequence
from hashlib import sha256

import numpy as np

from quant.evaluation.answer_file import AnswerFile
from quant.evaluation.divergence import log_softmax
from quant.evaluation.isolation import Say
from quant.evaluation.runners import Runner
from quant.evaluation.sampler import GREEDY, Sampler

LONGEST_ANSWER = 1024
"""Tokens drawn where a task does not say."""

ROLLING = 2048
"""Tokens in a window where a whole document is scored."""


class Requests:
    """What lm-eval wants to know of a model, each asked once: what an earlier run, or an earlier
    task, was answered is in the file.
    """

    def __init__(self, file: AnswerFile | None = None, say: Say = lambda *message: None):
        self._file, self._say = file, say
        self._known = {entry["request"]: entry["answer"] for entry in file.answers} if file else {}

    def answers(
        self, kind: str, asked: Sequence[tuple], answer: Callable[..., object], what: str
    ) -> list:
        """answer(*each) of all that is asked, as JSON gives it back. what: for the progress bar."""
        digests = [sha256(repr((kind, each)).encode()).hexdigest()[:24] for each in asked]
        self._say("begin", what, len(set(digests) - self._known.keys()))
        for digest, each in zip(digests, asked, strict=True):
            if digest not in self._known:
                self._known[digest] = answer(*each)
                if self._file is not None:
                    self._file.append({"request": digest, "answer": self._known[digest]})
                self._say("advance", 1)
        return [self._known[digest] for digest in digests]


def likelihood(runner: Runner, context: list[int], answer: list[int]) -> tuple[float, bool]:
    """(ln p of `answer` after `context`, whether greedy decoding would give it). Both not empty."""
    ids = np.array([*context, *answer], np.int32)[None]
    logits = next(iter(runner.logits(ids, len(context) - 1)))  # (len(answer), n_vocab)
    log_p = log_softmax(logits)
    found = log_p[np.arange(len(answer)), answer].sum()
    return float(found), bool((logits.argmax(axis=1) == answer).all())


def answer_until(runner: Runner, prompt: list[int], stops: Sequence[str], settings: dict) -> str:
    """An answer up to the first of `stops`, which is left out, or the model's own end.

    settings: lm-eval's generation settings.
    """
    temperature = float(settings.get("temperature") or 0.0)
    drawn = bool(settings.get("do_sample")) and temperature > 0
    chain = {"sequence": "temperature", "temp": temperature} if drawn else GREEDY
    limit = int(settings.get("max_gen_toks") or LONGEST_ANSWER)
    sampler = Sampler(chain, 0, runner.text)
    logits, tokens, text = runner.begin(np.array(prompt, np.int32), len(prompt) + limit), [], ""
    while len(tokens) < limit:
        token = sampler.draw(logits)
        if token in runner.eos:
            break
        tokens.append(token)
        text = runner.text(tokens)
        if any(stop in text for stop in stops):
            break
        if len(tokens) < limit:
            logits = runner.go_on(token)
    ends = [text.index(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text
