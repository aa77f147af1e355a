"""What is run: the sizes of Qwen's tables, or others.

Speed and memory are those of generating from a prompt of one token, and of encoding a prompt and
generating one token after it. # ref: github.com/QwenLM/Qwen, README, "Profiling" and
"Quantization of KV cache"
"""

from collections.abc import Sequence
from dataclasses import dataclass

ENCODED = 2048
"""Tokens of the prompt whose encoding is measured, if no length that is asked for is nearer."""

IN_BATCHES = 1024
"""Tokens that are generated in each batch size, likewise."""

LENGTHS = {"cuda": (512, 1024, 2048, 4096, 8192), "cpu": (32, 128)}
BATCHES = {"cuda": (1, 4, 16, 32, 64, 100), "cpu": (1, 4)}
"""By device. Qwen's; on a CPU what a model of a billion weights does in a minute."""


@dataclass(frozen=True)
class Case:
    """`batch` sequences of n_prompt tokens each, and n_generated more."""

    batch: int
    n_prompt: int
    n_generated: int

    @property
    def is_encoding(self) -> bool:
        return self.n_generated == 1

    @property
    def length(self) -> int:
        """Tokens of the long part."""
        return self.n_prompt if self.is_encoding else self.n_generated

    @property
    def n_counted(self) -> int:
        """The tokens that its tokens per second are of."""
        return self.batch * self.length

    @property
    def n_cached(self) -> int:
        """Tokens of each sequence in the cache at the end; the last one is never fed back."""
        return self.n_prompt + self.n_generated - 1

    def __str__(self) -> str:
        what = "encoding" if self.is_encoding else "generating"
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{what} {self.length:,} tokens{batch}"


def make_cases(lengths: Sequence[int], batches: Sequence[int]) -> list[Case]:
    """Every length at batch 1, every batch at one length, and one prompt; lengths are above 1."""
    one_by_one = [Case(1, 1, n) for n in sorted(set(lengths))]
    batched = [Case(b, 1, nearest(lengths, IN_BATCHES)) for b in sorted(set(batches) - {1})]
    return [Case(1, nearest(lengths, ENCODED), 1), *one_by_one, *batched]


def nearest(lengths: Sequence[int], wanted: int) -> int:
    """The longest that is not above `wanted`, or the shortest."""
    return max((n for n in lengths if n <= wanted), default=min(lengths))
