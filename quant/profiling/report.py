"""A profile as JSON, and as a figure with all of its numbers as CSV."""

from datetime import datetime, timezone
from pathlib import Path

from quant import __version__
from quant.display import printable
from quant.errors import CannotCreate
from quant.manifest import package_versions
from quant.output_file import check_output_file
from quant.profiling.figure import memory_and_speed
from quant.profiling.profile import Profile, Row
from quant.report.files import write_files

STARTS = {
    "profile.png": b"\x89PNG\r",
    "profile.svg": b"<?xml",
    "profile.csv": b"model",
}
"""The files of a report, and what they begin with."""


def check_places(folder: Path, *, force: bool) -> None:
    """Refuse before any work what could not be written after it. Raises CannotCreate."""
    parent = folder.absolute().parent
    if folder.exists() and not folder.is_dir():
        raise CannotCreate(
            f"{printable(folder)} is not a folder.", "", "Choose another folder with -o."
        )
    if not parent.is_dir():
        raise CannotCreate(
            f"There is no folder {printable(parent)} to write into.",
            "",
            f"Make it first: mkdir -p {printable(parent)}",
        )
    for name, start in STARTS.items():
        check_output_file(
            folder / name, force=force, sources=(), starts_with=start, kind="file of a report"
        )


def write_report(profile: Profile, model_name: str, folder: Path, *, force: bool) -> list[Path]:
    """The figure and the CSV. Raises CannotCreate or OutputFailed."""
    header = list(_numbers(profile.rows[0]) | _about(profile))
    numbers = [list((_numbers(row) | _about(profile)).values()) for row in profile.rows]
    title = f"{model_name} on {profile.machine.name}"
    files = memory_and_speed(title, profile.rows, header, numbers).files()
    write_files(folder, files, force=force)
    return [folder / name for name in files]


def as_json(profile: Profile) -> dict:
    """Everything, as numbers."""
    return {
        "qwq_quant": __version__,
        "about": _about(profile),
        "n_repeats": profile.n_repeats,
        "rows": [_numbers(row) | {"seconds": _seconds(row)} for row in profile.rows],
        "failed": [
            {"model": f.variant, "what": f.error.what, "why": f.error.why} for f in profile.failed
        ],
        "left_out": [{"model": x.variant, "why": x.why} for x in profile.left_out],
    }


def _seconds(row: Row) -> list[float]:
    return list(row.measured.seconds) if row.measured else []


def _numbers(row: Row) -> dict:
    """One row's, by column; None where nothing was measured."""
    case, speeds = row.case, row.tokens_per_s
    return {
        "model": row.variant,
        "task": "encode" if case.is_encoding else "generate",
        "batch": case.batch,
        "prompt_tokens": case.n_prompt,
        "generated_tokens": case.n_generated,
        "status": "measured" if row.measured else "planned",
        "why": row.why,
        "note": "; ".join(row.notes),
        "model_nbytes": row.bytes.model_nbytes,
        "cache_nbytes": row.bytes.cache_nbytes,
        "peak_nbytes": row.peak_nbytes if row.measured else None,
        "tokens_per_s": row.speed[0] if speeds else None,
        "slowest_tokens_per_s": min(speeds, default=None),
        "fastest_tokens_per_s": max(speeds, default=None),
        "repeats": len(speeds),
    }


def _about(profile: Profile) -> dict:
    """The machine, the versions and the day, as they stand in every line of the CSV."""
    versions = package_versions()
    return {
        "device": profile.machine.device,
        "machine": profile.machine.name,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": versions["torch"],
        "transformers": versions["transformers"],
    }
