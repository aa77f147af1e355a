"""llama.cpp's chain of samplers over numpy arrays, so that every engine samples alike.

A profile (quant.recipe) names the samplers and their order; each one changes logits or forbids
tokens (-infinity), and the next token is drawn from the softmax of what is left. Settings that a
profile leaves out have llama.cpp's defaults. The draw comes from numpy, so a seed gives other texts
than in llama.cpp, but the same distribution, and the same text again on the same logits.
# ref: llama.cpp, src/llama-sampler.cpp; common/common.h, common_params_sampling
"""

from collections.abc import Callable, Mapping
from math import log

import numpy as np

from quant.errors import BadRecipe
from quant.sampling import DEFAULT_SEQUENCE

DEFAULTS = {
    "sequence": DEFAULT_SEQUENCE,
    "temp": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "penalty_last_n": 64,
    "penalty_repeat": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "dry_multiplier": 0.0,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": 64,
    "xtc_probability": 0.0,
    "xtc_threshold": 0.1,
}

DRY_BASE = 1.75
DRY_BREAKERS = '\n:"*'
LARGEST_EXPONENT = int(88.7228391 / log(DRY_BASE))  # of DRY_BASE, in float32

GREEDY = {"sequence": "temperature", "temp": 0.0}


class Sampler:
    """Draws tokens, with one seed and one history. settings: as a profile's `settings()`."""

    def __init__(
        self, settings: Mapping[str, object], seed: int, spell: Callable[[list[int]], str]
    ):
        """spell: what tokens look like; DRY's repetitions end at some characters.

        Raises BadRecipe for Mirostat, and for samplers without a setting in any profile.
        """
        if settings.get("mirostat"):
            raise BadRecipe(
                "This profile samples with Mirostat, which qwq-quant cannot.",
                next_step="Choose another profile.",
            )
        self._settings = {**DEFAULTS, **settings}
        self._chain = [_named(name) for name in str(self._settings["sequence"]).split(";")]
        self._draw = np.random.default_rng(seed)
        self._spell, self._breakers = spell, {}
        self._history: list[int] = []

    def accept(self, tokens: list[int]) -> None:
        """These tokens were read or drawn; penalties look back on them."""
        self._history += tokens

    def draw(self, logits: np.ndarray) -> int:
        """The next token after logits float (n_vocab,), accepted."""
        logits = logits.astype(np.float64)
        for apply in self._chain:
            apply(self, logits)
        p = softmax(logits)
        token = int(np.searchsorted(np.cumsum(p), self._draw.random() * p.sum(), side="right"))
        token = min(token, int(np.flatnonzero(p)[-1]))  # a sum may be rounded below the draw
        self.accept([token])
        return token

    # --- samplers: each changes logits in place, -infinity where a token is out ---

    def _penalties(self, logits: np.ndarray) -> None:
        s = self._settings
        recent = self._history[-s["penalty_last_n"] :] if s["penalty_last_n"] > 0 else []
        tokens, counts = np.unique(np.array(recent, np.int64), return_counts=True)
        x = logits[tokens]
        x = np.where(x <= 0, x * s["penalty_repeat"], x / s["penalty_repeat"])
        logits[tokens] = x - counts * s["frequency_penalty"] - s["presence_penalty"]

    def _dry(self, logits: np.ndarray) -> None:
        """Tokens that would make a repeated sequence longer lose multiplier * base^(its length -
        the allowed length)."""
        multiplier, allowed = self._settings["dry_multiplier"], self._settings["dry_allowed_length"]
        last_n = self._settings["dry_penalty_last_n"]
        recent = self._history[-last_n:] if last_n > 0 else []
        if multiplier == 0 or len(recent) <= allowed:
            return
        for token, length in self._repeats(recent).items():
            if length >= allowed and not self._is_breaker(token):
                exponent = min(length - allowed, LARGEST_EXPONENT)
                logits[token] -= multiplier * DRY_BASE**exponent

    def _repeats(self, recent: list[int]) -> dict[int, int]:
        """Token -> length of the longest end of `recent` that it once followed."""
        backwards = recent[::-1]
        breakers = (i for i, token in enumerate(backwards) if self._is_breaker(token))
        limit = next(breakers, len(recent))
        longest: dict[int, int] = {}
        for i, length in enumerate(_prefix_lengths(backwards)[1:]):
            token = backwards[i]  # what followed there
            longest[token] = max(longest.get(token, 0), min(length, limit))
        return longest

    def _is_breaker(self, token: int) -> bool:
        if token not in self._breakers:
            text = self._spell([token])
            self._breakers[token] = any(c in text for c in DRY_BREAKERS)
        return self._breakers[token]

    def _top_k(self, logits: np.ndarray) -> None:
        k = self._settings["top_k"]
        if 0 < k < len(logits):
            forbidden = np.argpartition(-logits, k - 1)[k:]
            logits[forbidden] = -np.inf

    def _top_p(self, logits: np.ndarray) -> None:
        if self._settings["top_p"] >= 1:
            return
        p = softmax(logits)
        order = np.argsort(-p, kind="stable")
        n = int(np.searchsorted(np.cumsum(p[order]), self._settings["top_p"])) + 1
        logits[order[n:]] = -np.inf

    def _min_p(self, logits: np.ndarray) -> None:
        if self._settings["min_p"] > 0:
            logits[logits < logits.max() + log(self._settings["min_p"])] = -np.inf

    def _xtc(self, logits: np.ndarray) -> None:
        """Now and then, of all tokens above a probability only the least likely one stays."""
        probability, threshold = self._settings["xtc_probability"], self._settings["xtc_threshold"]
        if probability <= 0 or threshold > 0.5 or self._draw.random() > probability:
            return
        p = softmax(logits)
        above = np.flatnonzero(p >= threshold)
        if len(above) > 1:
            logits[above[p[above] > p[above].min()]] = -np.inf

    def _temperature(self, logits: np.ndarray) -> None:
        if self._settings["temp"] > 0:
            logits /= self._settings["temp"]
        else:
            best = int(logits.argmax())
            logits[np.arange(len(logits)) != best] = -np.inf

    def _nothing(self, logits: np.ndarray) -> None:
        """A sampler that is off by default and that no profile can turn on."""


_SAMPLERS = {
    "penalties": Sampler._penalties,
    "dry": Sampler._dry,
    "top_k": Sampler._top_k,
    "top_p": Sampler._top_p,
    "min_p": Sampler._min_p,
    "xtc": Sampler._xtc,
    "temperature": Sampler._temperature,
    "top_n_sigma": Sampler._nothing,
    "typ_p": Sampler._nothing,
}


def _named(name: str) -> Callable[[Sampler, np.ndarray], None]:
    if name not in _SAMPLERS:
        raise BadRecipe(
            f"This profile samples with `{name}`, which qwq-quant cannot.",
            f"It knows {', '.join(_SAMPLERS)}.",
            "Choose another profile.",
        )
    return _SAMPLERS[name]


def _prefix_lengths(tokens: list[int]) -> list[int]:
    """At each place, how many tokens from there on are those the list begins with.

    In linear time, for a text that loops is where it matters.
    # ref: the Z algorithm; Gusfield, Algorithms on Strings, Trees and Sequences (1997), 1.3
    """
    n = len(tokens)
    lengths, start, end = [0] * n, 0, 0  # [start, end): the match that reaches farthest
    for i in range(1, n):
        length = min(end - i, lengths[i - start]) if i < end else 0
        while i + length < n and tokens[length] == tokens[i + length]:
            length += 1
        lengths[i] = length
        if i + length > end:
            start, end = i, i + length
    return lengths


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float64 (n_vocab,); 0 where the logit is -infinity."""
    p = np.exp(logits - logits.max())
    return p / p.sum()
