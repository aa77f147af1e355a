"""A fact: one thing known about a model, with a value for programs and a text for people.

Values are what JSON can hold, in one spelling for both containers, so that two models' facts can
be compared with `==`. Texts come from files that somebody published: whoever prints one escapes it
(quant.display.printable).
"""

import math
from dataclasses import dataclass

import numpy as np

from quant.errors import QwqQuantError
from quant.gguf_file import Metadata


@dataclass(frozen=True)
class Fact:
    """One thing known about a model: ("rope_theta", 1000000.0, "1,000,000").

    own: only models of this container can have it, so that its absence from a model of the other
    container is no difference.
    """

    key: str  # for programs
    value: object  # what JSON can hold; None if it is not known
    text: str  # untrusted
    label: str = ""  # for people; untrusted
    own: bool = False


@dataclass(frozen=True)
class Section:
    """Facts of one kind. problem: why they, or some of them, could not be read."""

    title: str
    facts: tuple[Fact, ...]
    problem: str = ""

    @property
    def key(self) -> str:
        return self.title.lower().replace(" ", "_")


def plain_fact(key: str, value: object, label: str = "", own: bool = False) -> Fact:
    """A fact printed in the plain way for its type."""
    value = plain(value)
    return Fact(key, value, show(value), label, own)


def plain(value: object) -> object:
    """`value` as JSON holds it: no numpy, no NaN, a number for all layers once if all are equal.

    A float is rounded to float32 and back to its shortest spelling: GGUF stores 1e-05 in float32,
    and config.json says 1e-05.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        items = [plain(item) for item in value]
        return items[0] if items and all(item == items[0] for item in items) else items
    if isinstance(value, float):
        with np.errstate(over="ignore"):
            value = float(str(np.float32(value)))
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def show(value: object) -> str:
    """A value as people read it: 152064 -> "152,064", True -> "yes", None -> "not stated"."""
    if value is None:
        return "not stated"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.7g}"
    if isinstance(value, list):
        numbers = [item for item in value if _is_number(item)]
        if numbers and len(numbers) == len(value):
            return f"{show(min(numbers))} to {show(max(numbers))}, by layer"
        return ", ".join(map(str, value[:8]))
    return str(value)


def human_count(n: int) -> str:
    """A number of weights: 32763876352 -> "32.8 B", 6822144 -> "6.82 M"."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= 0.9995 * scale:
            return f"{n / scale:#.3g} {unit}".replace(". ", " ")
    return str(n)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def is_count(value: object) -> bool:
    """Whether it can be a size: a whole number above 0, and no true."""
    return isinstance(value, int) and _is_number(value) and value > 0


def as_object(value: object) -> dict:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def text_at(metadata: Metadata, key: str) -> str | None:
    """The text under this key; None if there is none or something else."""
    value = metadata.get(key)
    return value.data if value is not None and isinstance(value.data, str) else None


def texts_at(metadata: Metadata, key: str) -> list[str]:
    """The list of texts under this key; empty if there is none or something else."""
    value = metadata.get(key)
    return value.data if value is not None and value.type == "arr[str]" else []


def reason(error: QwqQuantError) -> str:
    """What went wrong and why, in one line."""
    return " ".join(line for line in (error.what, error.why) if line)
