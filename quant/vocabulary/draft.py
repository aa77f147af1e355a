"""A vocabulary while it is being put together: pieces first, then added tokens, then special ids.

byte_level.py or sentencepiece.py begins a Draft with the model's own pieces; added_tokens.py and
special_tokens.py go on with it; vocabulary.py makes it the finished Vocabulary. On the way each
adds to `notes` what a GGUF file cannot say. Below the Draft stand the words that all of them use.
"""

from dataclasses import dataclass, field

from quant.display import printable
from quant.errors import BadInput

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's token types; SentencePiece numbers its pieces the same way.

CONTROL tokens are found in text only where special tokens are asked for, and print as nothing;
USER_DEFINED ones are found always and print as they are: Hugging Face's added tokens with `special`
true and false. UNUSED fill the rows of the embedding that no token has.
"""

UNLIKELY = -1e9
"""The score of a piece that must never be chosen to join two others."""


@dataclass
class Draft:
    """What is known of a vocabulary so far; rows that no token has are still missing."""

    model: str  # "gpt2" or "llama"
    pre: str
    ids: dict[str, int]  # text -> id
    types: dict[int, int]
    scores: dict[int, float] | None = None
    merges: list[str] | None = None
    flags: dict[str, bool] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)  # "eos" -> its text
    keeps_places: bool = False  # added tokens may take the place of a piece
    notes: list[str] = field(default_factory=list)


DAMAGED = (
    "The file is damaged, or was made by hand.",
    "Download it again, or save it with the program that made it.",
)
"""Why and what next, for a file that says what no program would write."""


def quoted(text: object) -> str:
    return f"'{printable(text)}'"


def some(items: list[str]) -> str:
    """The first three of a list, and how many more there are."""
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more + "."


def same_id(one: str, other: str, token: int) -> BadInput:
    return BadInput(
        f"Two tokens share the id {token}: {quoted(one)} and {quoted(other)}.",
        *DAMAGED,
    )
