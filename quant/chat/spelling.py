"""Tokens to text that can be shown while it comes: whole characters, thoughts apart from answers.

A token is a piece of bytes, and may end within a character; a tag may be several tokens. What a
model writes is untrusted: control characters, which a terminal would obey, are escaped.
"""

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from quant.evaluation.loops import CLOSE

OPEN = "<think>"

BROKEN = "\ufffd"
"""What decoders write for bytes that are no character, or not yet."""

LONGEST_CHARACTER = 4  # bytes in UTF-8, and so at most as many tokens

START, THOUGHT, ANSWER = "start", "thought", "answer"

HARMLESS = "\n\t\u200c\u200d"
"""Line ends, tabs, and the joiners that Persian, Hindi and emoji are written with."""


def visible(text: str) -> str:
    """Text for a terminal: control, format and broken characters escaped, all others as they are.

    Formats (category Cf) turn the direction of writing, or are invisible.
    """
    return "".join(
        c if c in HARMLESS or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else _escaped(c)
        for c in text
    )


def _escaped(c: str) -> str:
    return c.encode("unicode_escape").decode()


class TokenText:
    """What tokens spell, one after the other; a character is given when its last byte is there."""

    def __init__(self, spell: Callable[[list[int]], str]):
        """spell: the text of tokens in a row (quant.evaluation.runners.Runner.text)."""
        self._spell = spell
        self._before: list[int] = []  # spelled along, for some decoders drop a leading space
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """The text that is complete with this token; often "" within Chinese or emoji."""
        self._waiting.append(token)
        text = self._spelled()
        if text.endswith(BROKEN) and len(self._waiting) < LONGEST_CHARACTER:
            return ""
        # Bytes that never become a character must not be spelled along with those after them.
        self._before = [] if text.endswith(BROKEN) else self._waiting
        self._waiting = []
        return text

    def rest(self) -> str:
        """What is left when no token comes any more."""
        return self._spelled() if self._waiting else ""

    def _spelled(self) -> str:
        known = len(self._spell(self._before)) if self._before else 0
        return self._spell(self._before + self._waiting)[known:]


@dataclass(frozen=True)
class Piece:
    """Some text of an answer, never empty."""

    text: str
    is_thought: bool


class Thoughts:
    """Cuts an answer into its thought and what it says, while it comes.

    A thought is open from the start where the prompt ends in <think>, or when the answer begins
    with that tag; </think> ends it. Tags, and the line ends behind them, are left out.
    """

    def __init__(self, is_open: bool):
        self._place = THOUGHT if is_open else START
        self._behind_tag = False
        self._held = ""  # not given yet: it may be the beginning of a tag

    def add(self, text: str) -> Iterator[Piece]:
        self._held += text
        if self._place == START:
            self._begin()
        if self._place == THOUGHT:
            yield from self._think()
        if self._place == ANSWER and self._has_text():
            yield Piece(self._held, False)
            self._held = ""

    def rest(self) -> Iterator[Piece]:
        """What was held back and turned out to be no tag."""
        if self._held:
            yield Piece(self._held, self._place == THOUGHT)

    def _begin(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(OPEN):
            self._place, self._behind_tag, self._held = THOUGHT, True, begun[len(OPEN) :]
        elif not OPEN.startswith(begun):
            self._place = ANSWER

    def _think(self) -> Iterator[Piece]:
        if not self._has_text():
            return
        thought, closed, behind = self._held.partition(CLOSE)
        if not closed:
            thought, behind = _cut_off_beginning(thought, CLOSE)
        if thought:
            yield Piece(thought, True)
        self._held = behind
        if closed:
            self._place, self._behind_tag = ANSWER, True

    def _has_text(self) -> bool:
        """Whether there is more than line ends that follow a tag; those are dropped."""
        if self._behind_tag:
            self._held = self._held.lstrip("\n")
            self._behind_tag = not self._held
        return bool(self._held)


def _cut_off_beginning(text: str, tag: str) -> tuple[str, str]:
    """("why</th", "</think>") -> ("why", "</th")."""
    n = next(n for n in range(len(tag) - 1, -1, -1) if text.endswith(tag[:n]))
    return text[: len(text) - n], text[len(text) - n :]
