"""May this file be written? Answered before any work is done."""

from collections.abc import Iterable
from pathlib import Path

from quant import manifest
from quant.display import printable
from quant.durable import check_place, translated_errors
from quant.errors import CannotCreate, UsageError

ELSEWHERE = "Choose another name with -o."


def check_output_file(
    path: Path, *, force: bool, sources: Iterable[Path], starts_with: bytes, kind: str
) -> None:
    """Refuse a place that must not be written to.

    A file that is there is replaced only with `force`, and only if it is empty or begins with
    `starts_with`: it is a `kind` ("GGUF file") then, and not something else under a mistyped name.
    sources: the files that are read, never written over.
    Raises CannotCreate or UsageError.
    """
    check_place(path)
    if path.name == manifest.NAME:
        raise CannotCreate(
            f"{manifest.NAME} is the name of the manifest that is written beside the output.",
            "",
            ELSEWHERE,
        )
    if path.is_symlink():
        raise CannotCreate(
            f"{printable(path)} is a symbolic link.",
            "Writing through it could reach a file that others share.",
            "Remove it or choose another name with -o.",
        )
    if not path.exists():
        return
    if any(path.samefile(source) for source in sources):
        raise UsageError(
            f"{printable(path)} is the source itself.",
            "It would be gone before it was read to its end.",
            ELSEWHERE,
        )
    if not path.is_file():
        raise CannotCreate(
            f"{printable(path)} is a folder or a device, not a file.",
            "It is never replaced.",
            ELSEWHERE,
        )
    with translated_errors(path), open(path, "rb") as file:
        start = file.read(len(starts_with))
    if start not in (starts_with, b""):
        raise CannotCreate(
            f"{printable(path)} exists and is no {kind}.",
            f"Only a {kind} is replaced, even with --force.",
            "Remove it or choose another name with -o.",
        )
    if not force:
        raise CannotCreate(
            f"{printable(path)} exists already.",
            "It is left as it is.",
            "Replace it with --force, or choose another name with -o.",
        )
