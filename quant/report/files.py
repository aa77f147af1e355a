"""Putting a report's files into a folder."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from quant.display import printable
from quant.durable import translated_errors, write_whole
from quant.errors import CannotCreate
from quant.output_file import check_output_file
from quant.preflight import Needs, measure_needs

_KINDS = {".html": "page", ".png": "picture", ".svg": "picture", ".csv": "table of this report"}


REPORT_NBYTES, DRAWING_NBYTES = 4 << 20, 320 << 20
"""A page and its figures, at most; Python, numpy and matplotlib."""


def report_needs(folder: Path) -> Needs:
    """What a report in `folder` takes. Raises CannotCreate if it cannot be made there."""
    return measure_needs(folder, disk=REPORT_NBYTES, memory=DRAWING_NBYTES, in_place=True)


def write_files(
    folder: Path, files: Mapping[str, bytes], *, force: bool = False, sources: Iterable[Path] = ()
) -> None:
    """Write name -> content, each file whole; the folder is made if need be.

    All places are checked before the first is written: without `force` no file is replaced, with it
    only one that begins as ours does. Raises CannotCreate or OutputFailed.
    """
    if folder.exists() and not folder.is_dir():
        raise CannotCreate(
            f"{printable(folder)} is not a folder.", "", "Choose another folder with -o."
        )
    for name, data in files.items():
        path = folder / name
        kind = _KINDS[path.suffix]
        check_output_file(path, force=force, sources=sources, starts_with=data[:5], kind=kind)
    with translated_errors(folder):
        folder.mkdir(exist_ok=True)
    for name, data in files.items():
        write_whole(folder / name, data)
