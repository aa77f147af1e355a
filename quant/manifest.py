"""qwq-quant.json: what was written, from what, by which version, with hashes to check it by.

One manifest stands in a folder and has an entry for each output there, since a publisher writes
many sizes of a model side by side. It is written last: an output without an entry is not finished.
"""

import hashlib
import json
import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from quant import __version__
from quant.display import printable
from quant.durable import MANIFEST, locked_folder, translated_errors, write_whole
from quant.errors import BadInput, CannotCreate, InputMissing, NotPermitted
from quant.strict_files import open_regular, parse_json

NAME = MANIFEST
LIBRARIES = ("numpy", "numba", "gguf", "safetensors", "transformers", "torch")

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""A LoRA adapter's, as PEFT names them: small, and of one size for all fine-tunes of a model."""


@dataclass(frozen=True)
class SourceFile:
    """An input file, identified well enough to notice that it changed."""

    name: str
    nbytes: int
    mtime_ns: int

    @staticmethod
    def of(path: Path) -> "SourceFile":
        """Hashed if it belongs to an adapter."""
        status = path.stat()
        facts = path.name, status.st_size, status.st_mtime_ns
        if path.name not in ADAPTER_FILES:
            return SourceFile(*facts)
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return HashedFile(*facts, digest.hexdigest())


@dataclass(frozen=True)
class HashedFile(SourceFile):
    """An input file that is identified by its content."""

    sha256: str


def package_versions() -> dict[str, str]:
    """Versions of what can change the result, without importing any of it."""
    return {name: metadata.version(name) for name in LIBRARIES if _installed(name)}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def read_manifest(folder: Path) -> dict:
    """The manifest of a folder; an empty one if there is none.

    Raises CannotCreate if something else has its name: it is not ours to overwrite.
    """
    try:
        with open_regular(folder / NAME) as file:
            content = parse_json(file.read(), folder / NAME)
    except InputMissing:
        return {"outputs": {}}
    except (BadInput, NotPermitted):
        content = {}
    if not isinstance(content.get("outputs"), dict):
        raise CannotCreate(
            f"{printable(folder / NAME)} is no manifest of qwq-quant's, or is damaged.",
            "It would have to be replaced, and what it says be lost.",
            "Move it away or choose another folder with -o.",
        )
    return content


def check_manifest(folder: Path) -> None:
    """Raise CannotCreate, before any work, if the manifest of `folder` cannot be added to."""
    if folder.is_dir():
        read_manifest(folder)


def add_entry(folder: Path, output_name: str, entry: dict) -> None:
    """Add or replace one output's entry, keeping the others."""
    with translated_errors(folder / NAME), locked_folder(folder):
        _write(folder, {**read_manifest(folder)["outputs"], output_name: entry})


def write_for_folder(folder: Path, entry: dict) -> None:
    """The manifest of an output that is a folder of its own, being filled by this run alone.

    Not locked: whoever fills a PendingFolder holds its lock already.
    """
    _write(folder, {".": entry})


def _write(folder: Path, outputs: dict) -> None:
    content = {"qwq_quant": __version__, "outputs": outputs}
    text = json.dumps(content, indent=1, ensure_ascii=True) + "\n"
    write_whole(folder / NAME, text.encode())


def environment() -> dict:
    """Who wrote it: versions, machine and time."""
    return {
        "qwq_quant": __version__,
        "python": platform.python_version(),
        "libraries": package_versions(),
        "platform": platform.platform(terse=True),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
