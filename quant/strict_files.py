"""Reading what strangers wrote: files that may be damaged, hostile, or no files at all.

Opening never waits on a FIFO, JSON is taken strictly, and what is refused is named for what it is.
"""

import errno
import gc
import json
import os
import re
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from quant.display import printable
from quant.errors import BadInput, InputMissing, NotPermitted, QwqQuantError
from quant.hub import download_command

MAX_DEPTH = 100
"""JSON nested deeper describes no model, and would overflow the stack of whoever walks it."""

_IMPOSTORS = [
    (rb"version https://git-lfs", "a git-LFS pointer, the file itself was not fetched"),
    (rb"\s*<(!doctype|html|\?xml)", "a web page, probably an error or login page"),
    (rb"GGUF", "a GGUF file; give it as the model under a name that ends in .gguf"),
    (rb"PK\x03\x04", "a zip archive, probably PyTorch's pickle format (.bin, .pt)"),
    (rb"\x80[\x02-\x05]", "a Python pickle, which can run code when it is opened"),
    (rb"\0{8}", "zeros where it should begin: the download is not whole"),
    (rb"\s*[{\[]", "a JSON text"),
]
"""What people find under a model file's name, by its first bytes."""


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """The file, open for reading; refuses folders, devices and FIFOs, and never waits on one.

    Raises InputMissing, NotPermitted or BadInput, also for a read that fails inside the block.
    """
    try:
        _check_regular(path, os.stat(path).st_mode)  # before opening: opening a device may act
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            _check_regular(path, os.fstat(descriptor).st_mode)  # it may have been swapped since
            yield file
    except OSError as error:
        raise explain_os_error(path, error) from error


def explain_os_error(path: Path, error: OSError) -> QwqQuantError:
    """Why `path` could not be read, as one of our errors."""
    where = printable(path)
    if isinstance(error, FileNotFoundError):
        if os.path.islink(path):
            return InputMissing(
                f"{where} is a link to a file that does not exist.",
                next_step=f"Fetch it again: {download_command(path)}",
            )
        return InputMissing(f"There is no file {where}.")
    if isinstance(error, PermissionError):
        return NotPermitted(
            f"{where} may not be read by this user.", next_step=f"See: ls -l {shlex.quote(where)}"
        )
    if error.errno == errno.ELOOP:
        return BadInput(f"{where} is a link that leads back to itself.")
    return BadInput(f"{where} cannot be read.", f"The system says: {error.strerror}.")


def _check_regular(path: Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = {
        stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    }  # fmt: skip
    kind = kinds.get(stat.S_IFMT(mode), "something else")
    raise BadInput(f"{printable(path)} is {kind}, not a regular file.")


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    """json's hook for one object: the format forbids a key twice, Python takes the last."""
    result = dict(pairs)
    if len(result) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _KeyTwice(f"The key {twice!r} is there twice")
    return result


class _KeyTwice(ValueError):
    """In one object of a JSON text."""


def parse_json(raw: bytes, path: Path, part: str = "") -> dict:
    """The JSON object in `raw`, strictly: UTF-8, no key twice, no depth that breaks a stack.

    `path` and `part` of it are for messages only.
    Raises BadInput with the file, and the line and column where they are known.
    """
    try:
        with without_garbage_collection():
            value = json.loads(raw.decode(), object_pairs_hook=_without_duplicates)
            _check_depth(value)
            _check_text(value, raw)
    except UnicodeDecodeError as error:
        reason = f"Byte {error.start} of it is not UTF-8"
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except RecursionError:
        reason = f"It is nested more than {MAX_DEPTH} levels deep"
    except UnicodeEncodeError:
        reason = "It holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    except _KeyTwice as error:
        reason = str(error)
    except ValueError:
        reason = "It holds a number of more than 4300 digits"
    else:
        if isinstance(value, dict):
            return value
        reason = f"It is a {type(value).__name__}"
    what = impostor(raw)
    if what and not raw.lstrip().startswith((b"{", b"[")):
        reason = f"It is {what}"
    raise BadInput(
        f"{part}{printable(path)} is no valid JSON object.",
        f"{printable(reason)}.",
        f"Fetch it again: {download_command(path)}",
    )


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """A vocabulary's 150,000 small lists are no cycles, and looking for some takes as long as
    reading them.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


_CONTAINERS = frozenset((dict, list))


def _check_depth(value: object) -> None:
    """Raise RecursionError below MAX_DEPTH."""
    level: list = [[value]]
    for _ in range(MAX_DEPTH):
        parts = [item.values() if type(item) is dict else item for item in level]
        if _CONTAINERS.isdisjoint(map(type, chain.from_iterable(parts))):
            return  # found out without a loop: a vocabulary has 150,000 lists of two texts
        level = [item for item in chain.from_iterable(parts) if type(item) in _CONTAINERS]
    raise RecursionError


def _check_text(value: object, raw: bytes) -> None:
    """Raise ValueError for strings that UTF-8 cannot hold.

    JSON may write half of a surrogate pair ("\\ud800"), and in no other way can one come here;
    Python keeps it until someone encodes it.
    """
    if rb"\ud" in raw or rb"\uD" in raw:
        json.dumps(value, ensure_ascii=False).encode()


def impostor(start: bytes) -> str | None:
    """What a file that begins so really is, if that is known."""
    known = (what for pattern, what in _IMPOSTORS if re.match(pattern, start, re.IGNORECASE))
    return next(known, None)
