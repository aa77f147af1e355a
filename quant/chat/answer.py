"""One answer, token by token, until the model stops, goes round in circles, or has no room left."""

from collections.abc import Iterator, Mapping

import numpy as np

from quant.chat.spelling import Piece, Thoughts, TokenText
from quant.chat.voice import Voice
from quant.display import printable
from quant.errors import BadInput
from quant.evaluation.loops import loop_period
from quant.evaluation.sampler import Sampler

STOPPED, LOOPS, FULL = "stopped", "loops", "full"

LOOK_EVERY = 32
"""Tokens between two looks for a loop."""

LOOK_BACK = 8192
"""Tokens that are looked at: a loop of up to 2048 tokens shows in four copies."""


class Answer:
    """Iterate over it once for its pieces as they are drawn; then `ending` says why it ended.

    The same prompt, settings and seed give the same answer. settings: a profile's `settings()`.
    """

    def __init__(self, voice: Voice, prompt: np.ndarray, settings: Mapping, seed: int):
        self.ending: str | None = None  # None: it was not drawn to its end
        self.period: int | None = None  # tokens of the piece that it repeated
        self.text = ""  # with its tags, but the one that the prompt ends with
        self._voice, self._prompt = voice, prompt
        self._sampler = Sampler(settings, seed, voice.runner.text)
        self._sampler.accept(prompt.tolist())

    def __iter__(self) -> Iterator[Piece]:
        """Raises BadInput for logits that are not finite, or if the engine fails."""
        spelled, thoughts = TokenText(self._voice.runner.text), Thoughts(self._voice.opens_think)
        for token in self._draw():
            text = spelled.add(token)
            self.text += text
            yield from thoughts.add(text)
        rest = spelled.rest()
        self.text += rest
        yield from thoughts.add(rest)
        yield from thoughts.rest()

    def _draw(self) -> Iterator[int]:
        runner, tokens = self._voice.runner, []
        logits = runner.begin(self._prompt, self._voice.context)
        while True:
            if not np.isfinite(logits).all():
                raise BadInput(f"{printable(runner.name)} gives logits that are not finite.")
            token = self._sampler.draw(logits)
            if token in runner.eos:
                self.ending = STOPPED
                return
            tokens.append(token)
            yield token
            if len(tokens) % LOOK_EVERY == 0:
                self.period = loop_period(tokens[-LOOK_BACK:])
            if self.period is not None:
                self.ending = LOOPS
                return
            if len(self._prompt) + len(tokens) >= self._voice.context:
                self.ending = FULL
                return
            logits = runner.go_on(token)
