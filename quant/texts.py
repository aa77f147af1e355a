"""Texts to calibrate on or to measure with: a plain file, or JSON lines with categories."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path

from quant.display import printable
from quant.errors import BadInput
from quant.strict_files import open_regular, parse_json

MAX_NBYTES = 1_000_000_000
"""Far more text than any calibration needs; all of it is held in memory."""


@dataclass(frozen=True)
class Record:
    """One text; its category is "" in a plain file."""

    text: str
    category: str = ""


@dataclass(frozen=True)
class Texts:
    """What a file holds, and a hash to know it by."""

    name: str
    sha256: str
    records: tuple[Record, ...]

    @property
    def categories(self) -> list[str]:
        """In order of first appearance."""
        return list(dict.fromkeys(record.category for record in self.records))


def built_in_texts() -> Texts:
    """What models are calibrated on unless the user gives a text: see recipes/calibration."""
    return _shipped("default.jsonl", "built-in")


def held_out_texts() -> Texts:
    """What models are checked on: of the same kinds, nothing of it in built_in_texts."""
    return _shipped("heldout.jsonl", "built-in held-out")


def _shipped(file: str, name: str) -> Texts:
    with as_file(files("qwq_recipes") / "calibration" / file) as path:
        return replace(read_texts(path), name=name)


def read_texts(path: Path) -> Texts:
    """The texts of `path`: of each line {"category", "text"} if it ends in .jsonl, else one.

    Raises InputMissing, NotPermitted, or BadInput if it is empty, or is no text.
    """
    with open_regular(path) as file:
        is_larger = os.fstat(file.fileno()).st_size > MAX_NBYTES
        raw = b"" if is_larger else file.read(MAX_NBYTES)
    if is_larger:
        raise BadInput(f"{printable(path)} is larger than 1 GB, so it is not read.")
    try:
        content = raw.decode("utf-8-sig")  # some editors put a mark before all text
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{printable(path)} is no UTF-8 text.",
            f"Byte {error.start} of it is not.",
            "Give a plain text file, or JSON lines with a text each.",
        ) from None
    if "\0" in content:
        raise BadInput(f"{printable(path)} is no text.", "It holds zero bytes.")
    records = _json_lines(path, content) if path.suffix == ".jsonl" else [Record(content)]
    records = tuple(record for record in records if record.text.strip())
    if not records:
        raise BadInput(f"{printable(path)} holds no text.")
    return Texts(path.name, hashlib.sha256(raw).hexdigest(), records)


def _json_lines(path: Path, content: str) -> Iterable[Record]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line.encode(), path)
        except BadInput as error:
            raise BadInput(f"Line {number} of {error.what}", error.why) from None
        text, category = record.get("text"), record.get("category", "")
        if not isinstance(text, str) or not isinstance(category, str):
            raise BadInput(
                f"Line {number} of {printable(path)} has no text.",
                'Each line must be an object such as {"category": "code", "text": "..."}.',
            )
        yield Record(text, category)
