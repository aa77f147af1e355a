"""Texts cut into windows of tokens, exactly as llama-perplexity does it.

A text is tokenized as one, and cut into windows of n_ctx tokens; what is left over is not used.
Of each window the second half is scored, so that every prediction has something to go by:

    positions   0 ... first ... n_ctx - 2   n_ctx - 1         first = n_ctx // 2
    scored                predict the next      -

A model that wants a BOS token gets it in place of a window's first token. In a plain text special
tokens such as <|im_start|> are spelled out, as llama-perplexity does; with categories they are
real tokens, for those texts may be chats. There, the texts of a category are one text.
# ref: llama.cpp, tools/perplexity/perplexity.cpp, perplexity; common/arg.cpp, "--file"
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from quant.display import printable
from quant.errors import BadInput
from quant.texts import Texts

BETWEEN_TEXTS = "\n\n"
SHORTEST = 8
"""Tokens in a window, at least; of such a one three are scored."""


class Tokenizer(Protocol):
    """What every runner can do with text."""

    bos: int | None  # put before every text by this model; None if it puts none

    def tokenize(self, text: str, special: bool) -> np.ndarray:
        """Token ids, int32 (n,), the BOS not among them. special: <|im_start|> is one token."""


@dataclass(frozen=True)
class Chunks:
    """Windows of tokens to be scored."""

    tokens: np.ndarray  # int32 (n_chunks, n_ctx), as in the text
    categories: tuple[str, ...]  # of each window; "" in a plain text
    bos: int | None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_ctx(self) -> int:
        return self.tokens.shape[1]

    @property
    def first(self) -> int:
        """The first scored position of a window."""
        return self.n_ctx // 2

    @property
    def n_scored(self) -> int:
        """Positions scored of one window: first ... n_ctx - 2."""
        return self.n_ctx - 1 - self.first

    @property
    def n_positions(self) -> int:
        return len(self) * self.n_scored

    @property
    def inputs(self) -> np.ndarray:
        """What a model is given, int32 (n_chunks, n_ctx): the windows, each begun with BOS."""
        if self.bos is None:
            return self.tokens
        inputs = self.tokens.copy()
        inputs[:, 0] = self.bos
        return inputs

    @property
    def targets(self) -> np.ndarray:
        """The tokens that came next, int32 (n_chunks, n_scored)."""
        return self.tokens[:, self.first + 1 :]

    def part(self, start: int, stop: int | None = None) -> "Chunks":
        """Windows start ... stop - 1."""
        categories = self.categories[start:stop]
        return replace(self, tokens=self.tokens[start:stop], categories=categories)


def cut_chunks(
    tokenizer: Tokenizer, texts: Texts, n_ctx: int = 512, n_tokens: int | None = None
) -> Chunks:
    """All windows of `texts`, or the first of each category, about n_tokens in all.

    n_tokens is shared out among the categories in proportion to what they have, each gets one
    window at least. Raises BadInput if there is less than a window; a category of less is left out.
    """
    if n_ctx < SHORTEST:
        raise ValueError(f"a window of {n_ctx} tokens is too short")
    windows, n_seen = {}, 0
    for category, ids in _tokens_of_categories(tokenizer, texts):
        n_seen += len(ids)
        if len(ids) >= n_ctx:
            windows[category] = ids[: len(ids) // n_ctx * n_ctx].reshape(-1, n_ctx)
    if not windows:
        raise BadInput(
            f"{printable(texts.name)} is too short to measure with.",
            f"It has {n_seen} tokens, and no category of it the {n_ctx} of one window.",
            "Give a longer text with --text, or a shorter window with --context.",
        )
    if n_tokens is not None:
        share = min(1.0, n_tokens / sum(w.size for w in windows.values()))
        windows = {c: w[: max(1, round(share * len(w)))] for c, w in windows.items()}
    categories = [category for category, w in windows.items() for _ in w]
    return Chunks(np.concatenate(list(windows.values())), tuple(categories), tokenizer.bos)


def _tokens_of_categories(tokenizer: Tokenizer, texts: Texts) -> Iterator[tuple[str, np.ndarray]]:
    """(category, ids int32 (n,)) in order of first appearance."""
    special = texts.categories != [""]
    for category in texts.categories:
        joined = BETWEEN_TEXTS.join(r.text for r in texts.records if r.category == category)
        ids = tokenizer.tokenize(joined.removesuffix("\n"), special)
        if tokenizer.bos is not None:
            ids = np.concatenate([np.array([tokenizer.bos], np.int32), ids])
        yield category, ids
