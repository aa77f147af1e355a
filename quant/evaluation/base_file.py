"""llama.cpp's file of a reference's log-probabilities (--kl-divergence-base), read and written.

    "_logits_" | i32 n_ctx | i32 n_vocab | i32 n_chunks | i32 tokens[n_chunks * n_ctx]
    n_chunks x (n_ctx - 1 - n_ctx // 2) rows of one scored position each:
        f32 scale | f32 least | u16 q[n_vocab] | u16 0 if n_vocab is odd

    ln p_i ~ scale * q_i + least         least >= ln p_max - 16

Two bytes a token of the vocabulary: 304 kB a position of QwQ-32B, 42 GB for 550 windows of 512.
Rounding by half a step, 1.2e-4 at most, adds noise to the divergence of a position, and to the
mean of n positions less than 1e-4 / sqrt(n): 1e-6 for 10,000. Cut off is the tail: tokens below
ln p_max - 16 are all stored as `least`. So llama.cpp leaves tokens of ln p <= -16 out of the
divergence, and a reference's perplexity from this file is a little too good, by 0.1 % for the
example model, where such tokens really came next.
# ref: llama.cpp, tools/perplexity/perplexity.cpp, log_softmax and kl_divergence
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quant.display import printable
from quant.errors import BadInput
from quant.evaluation.chunks import SHORTEST, Chunks
from quant.evaluation.divergence import (
    BLOCK_SIZE,
    NEGLIGIBLE,
    PositionScores,
    compare_log_probs,
    require_finite,
)
from quant.strict_files import open_regular

MAGIC = b"_logits_"
HIGHEST = 65535
RANGE = 16  # nats below the likeliest token
_HEADER = struct.Struct("<8siii")


def row_length(n_vocab: int) -> int:
    """Numbers of 16 bits in a row: two float32, and n_vocab rounded up to even."""
    return 4 + 2 * ((n_vocab + 1) // 2)


def window_nbytes(n_ctx: int, n_vocab: int) -> int:
    return 2 * row_length(n_vocab) * (n_ctx - 1 - n_ctx // 2)


def encode_header(chunks: Chunks, n_vocab: int) -> bytes:
    counts = _HEADER.pack(MAGIC, chunks.n_ctx, n_vocab, len(chunks))
    return counts + chunks.tokens.astype("<i4").tobytes()


def base_file_nbytes(chunks: Chunks, n_vocab: int) -> int:
    """Bytes of the whole file."""
    rows = len(chunks) * window_nbytes(chunks.n_ctx, n_vocab)
    return _HEADER.size + chunks.tokens.size * 4 + rows


def encode_rows(logits: np.ndarray) -> np.ndarray:
    """Logits float32 (n, n_vocab) as rows uint16 (n, row_length), bit for bit as llama.cpp on x86.

    Everything is float32 but the sum of exponentials, which is double. Raises BadInput for NaN.
    """
    n, n_vocab = logits.shape
    rows = np.zeros((n, row_length(n_vocab)), np.uint16)
    n_at_once = max(1, BLOCK_SIZE // n_vocab)
    for start in range(0, n, n_at_once):
        part = slice(start, start + n_at_once)
        _encode_block(logits[part], rows[part])
    return rows


def _encode_block(logits: np.ndarray, rows: np.ndarray) -> None:
    require_finite(logits)
    highest = logits.max(axis=1, keepdims=True)  # (n, 1)
    lowest = np.maximum(logits.min(axis=1, keepdims=True), highest - np.float32(RANGE))
    # expf is float32's nearest to exp, nearly always; so is this.
    exponentials = np.exp((logits - highest).astype(np.float64)).astype(np.float32)
    log_sum = np.log(exponentials.sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    scale = (highest - lowest) / np.float32(HIGHEST)
    rows[:, :4] = np.hstack([scale, lowest - highest - log_sum]).view(np.uint16)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    q = np.rint(inverse * (logits - lowest))
    q[logits <= lowest] = 0
    rows[:, 4 : 4 + logits.shape[1]] = q


def decode_rows(rows: np.ndarray, n_vocab: int) -> np.ndarray:
    """Rows uint16 (n, row_length) as ln p, float32 (n, n_vocab). Raises BadInput."""
    numbers = np.ascontiguousarray(rows[:, :4]).view(np.float32)  # (n, 2)
    scale, least = numbers[:, :1], numbers[:, 1:]
    # NaN is neither. llama.cpp's own likeliest token may be off ln p = 0 by rounding.
    if not ((scale >= 0).all() and (least > -1e4).all() and (least + HIGHEST * scale < 1e-3).all()):
        raise BadInput("The base file is damaged: it holds what are no log-probabilities.")
    return scale * rows[:, 4 : 4 + n_vocab] + least


def compare_rows(rows: np.ndarray, candidate: np.ndarray, targets: np.ndarray) -> PositionScores:
    """A candidate's logits float32 (n, n_vocab) against stored rows, as llama-perplexity does."""
    n, n_vocab = candidate.shape
    n_at_once = max(1, BLOCK_SIZE // n_vocab)
    parts = [slice(start, start + n_at_once) for start in range(0, n, n_at_once)]
    return PositionScores.join(
        [
            compare_log_probs(
                decode_rows(rows[part], n_vocab).astype(np.float64),
                candidate[part],
                targets[part],
                least=NEGLIGIBLE,
            )
            for part in parts
        ]
    )


@dataclass(frozen=True)
class BaseFile:
    """A complete base file."""

    path: Path
    n_vocab: int
    tokens: np.ndarray  # int32 (n_chunks, n_ctx)

    @classmethod
    def open(cls, path: Path) -> "BaseFile":
        """Read the header and check everything against the file's size.

        Raises InputMissing, NotPermitted, or BadInput.
        """
        with open_regular(path) as file:
            nbytes = os.fstat(file.fileno()).st_size
            start = file.read(_HEADER.size)
            if len(start) < _HEADER.size or not start.startswith(MAGIC):
                raise BadInput(f"{printable(path)} is no file of llama.cpp's --kl-divergence-base.")
            _, n_ctx, n_vocab, n_chunks = _HEADER.unpack(start)
            fits = n_ctx >= SHORTEST and n_vocab > 0 and n_chunks > 0
            wanted = _HEADER.size + n_chunks * (4 * n_ctx + window_nbytes(n_ctx, n_vocab))
            if not fits or nbytes != wanted:
                raise BadInput(
                    f"{printable(path)} is damaged or incomplete.",
                    f"It has {nbytes} bytes; {n_chunks} windows of {n_ctx} tokens and a vocabulary "
                    f"of {n_vocab} need {wanted}.",
                    "Make it again.",
                )
            tokens = np.frombuffer(file.read(4 * n_ctx * n_chunks), "<i4").reshape(n_chunks, n_ctx)
        if tokens.min() < 0 or tokens.max() >= n_vocab:
            raise BadInput(f"{printable(path)} is damaged: its tokens are not in its vocabulary.")
        return cls(path, n_vocab, tokens)

    def chunks(self, bos: int | None) -> Chunks:
        """Its windows, for a model that begins them with `bos`."""
        return Chunks(self.tokens, ("",) * len(self.tokens), bos)

    def rows(self, window: int) -> np.ndarray:
        """Rows uint16 (n_scored, row_length) of one window."""
        n_ctx = self.tokens.shape[1]
        nbytes = window_nbytes(n_ctx, self.n_vocab)
        with open(self.path, "rb") as file:
            file.seek(_HEADER.size + 4 * self.tokens.size + window * nbytes)
            raw = file.read(nbytes)
        if len(raw) < nbytes:
            raise BadInput(f"{printable(self.path)} became shorter while it was read.")
        return np.frombuffer(raw, "<u2").reshape(-1, row_length(self.n_vocab))

    def nll(self, window: int, targets: np.ndarray) -> np.ndarray:
        """-ln p of the tokens that came next, float64 (n_scored,); too small in the tail."""
        log_p = decode_rows(self.rows(window), self.n_vocab)
        return -log_p[np.arange(len(targets)), targets].astype(np.float64)
