"""What faults are survived, counted: faults at every operation. Writes benchmarks/reliability.md.

    python scripts/check_reliability.py [--folder DIR]

Every job is run once for every kind of fault and every operation that the fault can hit, and once
more without a fault. What is promised is in tests/faults.py, `what_is_wrong`; a promise that is
broken is printed, and the exit code is 1. Takes about three minutes.
"""

import argparse
import datetime
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import faults  # noqa: E402

from quant import __version__  # noqa: E402

RESULT = ROOT / "benchmarks" / "reliability.md"

JOBS = {
    "new": "to-gguf",
    "split": "to-gguf, three files",
    "replacing": "to-gguf --force",
    "measure": "measure, five metrics",
    "imatrix": "imatrix",
    "kv-calibrate": "kv-calibrate",
    "4bit": "dynamic-4bit",
    "4bit replacing": "dynamic-4bit --force",
    "4bit feedback": "dynamic-4bit --gptq",
    "4bit measured": "dynamic-4bit, measured and checked",
    "gptq": "gptq, measured and checked",
}

KINDS = {
    "kill": "killed there",
    "ENOSPC": "disk full from there on",
    "EIO": "one input/output error",
    "dead disk": "input/output errors from there on",
    "power: cut": "power lost: what was not flushed is gone",
    "power: zeros": "... is zeros",
    "power: torn": "... is there page by page, at random",
    "power: only the journal": "... is gone, but for the journal's",
    "power: only the data": "... of the journal is gone",
}


def faults_table(folder: Path, wrong: list[str]) -> Iterator[str]:
    """A row for every job and kind of fault."""
    yield "| job | fault | operations hit | run ended | then went on | then began anew | lost |"
    yield "|---|---|---|---|---|---|---|"
    model = faults.tiny_model(folder / "model")
    jobs = faults.gguf_jobs(model, folder) | faults.layer_jobs(model, folder)
    jobs |= faults.folder_jobs(model, folder)
    for name, job in jobs.items():
        found = faults.campaign(folder / name, [job], list(faults.KINDS))
        for kind, shown in KINDS.items():
            cases = [case for case in found if case["kind"] == kind]
            broken = [(case, faults.what_is_wrong(case)) for case in cases]
            broken = [(case, what) for case, what in broken if what]
            wrong += [f"{name}, {kind} at {c['at']} ({c['struck']}): {what}" for c, what in broken]
            yield row(JOBS[name], shown, cases, len(broken))


def row(job: str, fault: str, cases: list[dict], n_broken: int) -> str:
    ended = Counter(ending(case["code"]) for case in cases)
    went_on = sum("Going on after" in (case["second_error"] or "") for case in cases)
    again = sum(case["second_code"] is not None for case in cases) - went_on
    endings = ", ".join(f"{n} {how}" for how, n in sorted(ended.items()))
    lost = f"{n_broken} outputs" if n_broken else "nothing"
    return f"| {job} | {fault} | {len(cases)} | {endings} | {went_on} | {again} | {lost} |"


def ending(code: int) -> str:
    if code == 0:
        return "done all the same"
    return "killed" if code < 0 else f"with {code}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="to work in, if not a temporary one")
    options = parser.parse_args()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = list(faults_table(Path(folder), wrong))
    today = datetime.date.today().isoformat()
    text = [
        "# What was done to it, and what was lost",
        "",
        f"By `scripts/check_reliability.py`, {today}, qwq-quant {__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}.",
        "",
        "## Faults at every operation",
        "",
        "Opening to write, writing, flushing, cutting, renaming, removing: each operation on the "
        "output's folder is hit once. After each fault: nothing half-made has a final name, an "
        "older output is whole, the message is no traceback; the same command, once more, gives "
        "the bytes of an undisturbed run and leaves nothing else. The job is `examples/tiny-qwq` "
        "cut down to 15 tensors. A run begins anew where no tensor was finished yet.",
        "",
        *rows,
        "",
    ]
    RESULT.write_text("\n".join(text))
    print(*rows, *wrong, sep="\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
