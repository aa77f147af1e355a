"""A benchmark's results as a table in benchmarks/, with the date, machine and versions."""

import csv
import datetime
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


def circumstances(*packages: str, one_core: bool = False) -> dict[str, str]:
    """When, on what, and with which versions of Python and `packages`."""
    cores = "one core" if one_core else f"{os.cpu_count()} cores"
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{_processor()}, {cores}",
        "python": platform.python_version(),
        **{name.replace("-", "_"): version(name) for name in packages},
    }


def write_results(
    path: Path, rows: list[dict], replaces: Callable[[dict], bool] = lambda older: True
) -> None:
    """Write the table; older rows that these do not replace stay, before them."""
    others = []
    if path.exists():
        with open(path, newline="") as file:
            others = [row for row in csv.DictReader(file) if not replaces(row)]
    columns = dict.fromkeys(key for row in (*rows, *others) for key in row)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows([*others, *rows])
    print(f"written to {os.path.relpath(path)}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
