"""One small interface to every engine that can run a model: tokens in, logits out.

A runner is a context manager, so that a 20 GB model leaves memory before the next one comes.
An engine is one file here, and one line in `open_runner`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Runner(Protocol):
    """A loaded model."""

    name: str
    n_vocab: int  # rows of the output matrix
    bos: int | None  # put before every text by this model; None if it puts none
    eos: tuple[int, ...]  # tokens that end an answer; the tokenizer's own first
    n_ctx_trained: int | None  # the longest text it was made for, as its config says
    can_answer: bool  # else `begin` raises Unavailable

    def tokenize(self, text: str, special: bool) -> np.ndarray:
        """Token ids, int32 (n,), the BOS not among them. special: <|im_start|> is one token."""

    def prompts(self, messages: Sequence[str]) -> list[str]:
        """What users' messages become by the model's chat template, each alone, up to where the
        answer begins; the messages themselves if it has none. Raises BadInput if it fails."""

    def text(self, tokens: list[int]) -> str:
        """What the tokens spell, special ones too."""

    def logits(self, inputs: np.ndarray, first: int) -> Iterator[np.ndarray]:
        """For each window of inputs, int32 (n_windows, n_ctx), in order: what is predicted at
        positions first ... n_ctx - 2, float32 (n_ctx - 1 - first, n_vocab). An array is valid until
        the next is asked for."""

    def begin(self, tokens: np.ndarray, n_ctx: int) -> np.ndarray:
        """Forget everything, read a prompt int32 (n,), and return the next token's logits, float32
        (n_vocab,). At most n_ctx tokens can follow in all."""

    def go_on(self, token: int) -> np.ndarray:
        """Read one more token and return the next one's logits, float32 (n_vocab,)."""

    def __enter__(self) -> "Runner": ...

    def __exit__(self, *exc) -> None: ...


def open_runner(path: Path, device: str = "auto") -> Runner:
    """The model at `path`, loaded: a GGUF file or a folder that transformers can load.

    device: for folders, "auto" takes a GPU if there is one; llama.cpp uses what it was built for.

    Raises InputMissing, BadInput for what does not load, Unavailable if its engine is missing.
    """
    if path.is_dir():
        from quant.evaluation.runners.folder import open_folder

        return open_folder(path, device)
    from quant.evaluation.runners.gguf import GgufRunner

    return GgufRunner(path)
