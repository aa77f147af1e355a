"""What decides the bytes of an output, as a small table: runs that agree in it write the same.

    {"qwq-quant": "0.1.0", "type": "Q8_0", "tensors": "xxh3:5e1c...", "source files": {...}, ...}

An interrupted run is continued only by one with the same table; else `differences` says in words
what is not as it was. Sources are told by name, size, time and header, for to hash 65 GB of them
would take longer than much of what is saved.
"""

import json
import platform
from dataclasses import astuple, fields, is_dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path, PurePath

import numpy as np
from xxhash import xxh3_128

from quant import __version__
from quant.display import printable
from quant.manifest import SourceFile
from quant.tensors import TensorInfo

HASHED = "xxh3:"
"""Begins every value that is a hash, of which only that it differs can be said."""


def fingerprint(*, code: tuple[str, ...], hashed: dict[str, object], **facts: object) -> dict:
    """The table, as JSON would give it back.

    code: files and folders below quant/ whose statements decide bytes, beside the version's number.
    hashed: name -> whatever decides bytes and is too long to tell: numbers, text, arrays, functions
    (by name), dataclasses and containers of all these. Every file that a TensorInfo among them lies
    in is a source. facts: short values, told when they differ; `_` in their names becomes a space.
    """
    table: dict = {"qwq-quant": __version__, "processor": platform.machine()}
    table |= {"numpy": np.__version__, "numba": metadata.version("numba")}
    table |= {name.replace("_", " "): value for name, value in facts.items()}
    table["program"] = code_digest(code)
    paths: dict[Path, int] = {}
    for name, value in hashed.items():
        digest = xxh3_128()
        _feed(digest, value, paths)
        table[name] = HASHED + digest.hexdigest()
    table["source files"] = {}
    for path, header_nbytes in paths.items():
        name = path.name if path.name not in table["source files"] else str(path)
        table["source files"][name] = _source_facts(path, header_nbytes)
    return json.loads(json.dumps(table))


def differences(old: dict, new: dict) -> list[str]:
    """What is not as it was, in words: 'type was Q8_0 and is Q4_K_M', 'source file a.safetensors'.

    `old` was read from a file: anything may be in it.
    """
    found = []
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if was == now:
            continue
        if name == "source files" and isinstance(was, dict) and isinstance(now, dict):
            changed = sorted(f for f in was.keys() | now.keys() if was.get(f) != now.get(f))
            found += [f"source file {printable(f)}" for f in changed]
        elif any(isinstance(v, dict) or str(v).startswith(HASHED) for v in (was, now)):
            found.append(printable(name))
        else:
            found.append(f"{printable(name)} was {printable(was)} and is {printable(now)}")
    return found


@lru_cache
def code_digest(code: tuple[str, ...]) -> str:
    """A hash over Python files below quant/: between two releases, the version stays as it is."""
    package, digest = Path(__file__).parent, xxh3_128()
    for name in code:
        place = package / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.read_bytes())
    return HASHED + digest.hexdigest()


def _source_facts(path: Path, header_nbytes: int) -> list:
    """[bytes, time, hash of its content if it is an adapter's, hash of its header]"""
    _, *facts = astuple(SourceFile.of(path))
    with open(path, "rb") as opened:
        header = xxh3_128(opened.read(header_nbytes)).hexdigest()
    return [*facts, header]


def _feed(digest, value: object, paths: dict[Path, int]) -> None:
    """Hash a value; collect the files of tensors in it, each with where its first tensor begins."""
    if isinstance(value, TensorInfo):
        paths[value.path] = min(value.offset, paths.get(value.path, value.offset))
    if value is None or isinstance(value, (bool, int, float, str)):
        digest.update(f"{type(value).__name__}{value!r};".encode("utf-8", "surrogatepass"))
    elif isinstance(value, bytes):
        digest.update(f"bytes{len(value)}:".encode())
        digest.update(value)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value))
    elif isinstance(value, PurePath):
        _feed(digest, value.name, paths)  # a folder may be moved
    elif isinstance(value, (list, tuple, dict)):
        items = [x for item in value.items() for x in item] if isinstance(value, dict) else value
        digest.update(f"{type(value).__name__}{len(items)}:".encode())
        for item in items:
            _feed(digest, item, paths)
    elif is_dataclass(value) and not isinstance(value, type):
        digest.update(f"{type(value).__qualname__}:".encode())
        for field in fields(value):
            _feed(digest, getattr(value, field.name), paths)
    elif hasattr(value, "__qualname__"):
        digest.update(f"{value.__module__}.{value.__qualname__};".encode())
    else:
        raise TypeError(f"a {type(value).__name__} cannot be part of a fingerprint")
