"""Token sequences of one length, cut from a text."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quant.checkpoint import Checkpoint
from quant.display import printable
from quant.errors import BadInput, InputMissing, UsageError
from quant.hub import download_command
from quant.texts import Texts

PIECE = 1 << 18
"""Characters that are tokenized at once: the tokenizer takes some 200 bytes for each."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""What a tokenizer's words are read from."""

LEAST, CHARACTERS_A_TOKEN = 4_000_000, 32
"""Of a text longer than both say, not all is tokenized."""


@dataclass(frozen=True)
class Tokens:
    """Calibration tokens, and where they come from."""

    ids: np.ndarray  # int64 (n_sequences, seq_len)
    text_name: str
    text_sha256: str

    @property
    def seq_len(self) -> int:
        return self.ids.shape[1]

    @property
    def n_tokens(self) -> int:
        return self.ids.size


def read_tokenizer(folder: Path):
    """transformers' tokenizer of a model folder; never code from it.

    Raises BadInput, or InputMissing: transformers would make up a tokenizer that knows no words.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise InputMissing(
            f"{printable(folder)} holds no tokenizer.",
            f"One of these is needed: {', '.join(TOKENIZER_FILES)}.",
            f"Fetch it: {download_command(folder / TOKENIZER_FILES[0])}",
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise BadInput(
            f"The tokenizer in {printable(folder)} cannot be loaded.",
            f"transformers says: {printable(error)}.",
        ) from error


def cut_tokens(checkpoint: Checkpoint, texts: Texts, n_tokens: int, seq_len: int) -> Tokens:
    """Sequences of `seq_len` tokens from the whole of `texts`, about `n_tokens` in all.

    Each begins with the BOS token where the tokenizer puts one before a text. When there is more
    text than asked for, the sequences are spread evenly over it, so that all its kinds are seen.
    Raises BadInput if there is too little text for one sequence, or the model has no such context,
    and UsageError if so few tokens are no sequence.
    """
    check_sequences(checkpoint, n_tokens, seq_len)
    tokenizer = read_tokenizer(checkpoint.folder)
    start = _start_tokens(tokenizer)
    encoded = (
        tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
        for piece in _spread([p for r in texts.records for p in _pieces(r.text)], n_tokens)
    )
    stream = np.concatenate([np.asarray(ids, np.int32) for ids in encoded])
    payload = seq_len - len(start)
    n_there = len(stream) // payload
    if n_there == 0:
        raise BadInput(
            f"{printable(texts.name)} has only {len(stream)} tokens.",
            f"One sequence of {seq_len} is the least that can be used.",
            "Give a longer text, or a smaller --seq-len.",
        )
    n_wanted = min(n_there, n_tokens // seq_len)
    chosen = np.arange(n_wanted) * n_there // n_wanted
    pieces = stream[: n_there * payload].reshape(n_there, payload)[chosen].astype(np.int64)
    starts = np.broadcast_to(np.asarray(start, np.int64), (n_wanted, len(start)))
    return Tokens(np.concatenate([starts, pieces], axis=1), texts.name, texts.sha256)


def context_length(checkpoint: Checkpoint) -> float:
    """Tokens in the longest sequence that the model is made for; infinity if it does not say."""
    stated = checkpoint.config.get("max_position_embeddings")
    return stated if type(stated) is int and stated > 0 else math.inf


def check_sequences(checkpoint: Checkpoint, n_tokens: int, seq_len: int) -> None:
    """Raise BadInput for sequences that are longer than the model's context, UsageError for ones
    that are longer than all tokens together.
    """
    if seq_len > (longest := context_length(checkpoint)):
        raise BadInput(
            f"Sequences of {seq_len} tokens are too long for {printable(checkpoint.name)}.",
            f"Its config.json says max_position_embeddings {longest}.",
            f"Give --seq-len {longest}, or less.",
        )
    if n_tokens < seq_len:
        raise UsageError(
            f"--tokens {n_tokens} is less than one sequence of {seq_len}.",
            "Text is cut into whole sequences.",
            f"Give --seq-len {n_tokens} besides, or more tokens.",
        )


def _pieces(text: str) -> list[str]:
    """The text, cut behind line ends where it is long."""
    pieces, start = [], 0
    while len(text) - start > PIECE:
        stop = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def _spread(pieces: list[str], n_tokens: int) -> list[str]:
    """All pieces, or so many evenly spread ones that there is text in plenty for n_tokens."""
    n_enough = max(LEAST, CHARACTERS_A_TOKEN * n_tokens)
    n_characters = sum(map(len, pieces))
    if n_characters <= n_enough:
        return pieces
    n_kept = math.ceil(len(pieces) * n_enough / n_characters)
    return [pieces[i * len(pieces) // n_kept] for i in range(n_kept)]


def _start_tokens(tokenizer) -> list[int]:
    """[BOS] if the tokenizer puts it before every text, else nothing."""
    bos = tokenizer.bos_token_id
    first = tokenizer("a").input_ids[:1]
    return first if bos is not None and first == [bos] else []
