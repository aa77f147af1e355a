"""What was done to the program, and what was lost: writes benchmarks/reliability.md.

    python scripts/check_reliability.py [--fuzz-minutes 10] [--seed 1] [--only PART] [--folder DIR]

Faults at every operation on the disk (tests/faults.py), every broken input with every command it
is meant for (tests/hostile_inputs.py), and a fuzz campaign over every reader of strangers' files
(tests/fuzz_targets.py). A promise that is broken is printed, and the exit code is 1. With --only,
one part is run and printed, and nothing is written. Faults and inputs take about 15 minutes on
two cores.
"""

import argparse
import datetime
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import faults  # noqa: E402
import fuzz_targets  # noqa: E402
import hostile_inputs  # noqa: E402
import hostile_runs  # noqa: E402
import hypothesis  # noqa: E402

from quant import __version__  # noqa: E402

RESULT = ROOT / "benchmarks" / "reliability.md"

JOB_MAKERS = (faults.gguf_jobs, faults.layer_jobs, faults.folder_jobs)
"""Functions of tests/faults.py: (model, folder) -> name -> job."""

JOBS = {
    "new": ("to-gguf", 1),
    "split": ("to-gguf, three files", 1),
    "replacing": ("to-gguf --force", 1),
    "measure": ("measure, five metrics", 3),
    "imatrix": ("imatrix", 2),
    "kv-calibrate": ("kv-calibrate", 2),
    "4bit": ("dynamic-4bit", 3),
    "4bit replacing": ("dynamic-4bit --force", 5),
    "4bit feedback": ("dynamic-4bit --gptq", 9),
    "4bit measured": ("dynamic-4bit, measured and checked", 23),
    "gptq": ("gptq, measured and checked", 17),
}
"""What each job is, and that every so manieth operation is hit; runs of a model take seconds."""

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


@dataclass
class Part:
    """One section: its lines, a word for the summary, and every promise that was broken."""

    lines: list[str] = field(default_factory=list)
    counted: str = ""
    wrong: list[str] = field(default_factory=list)


# --- faults -----------------------------------------------------------------------------------


def check_faults(folder: Path, options) -> Part:
    part = Part([
        "## Faults at every operation",
        "",
        "Opening to write, writing, flushing, cutting, renaming, removing: each operation on the "
        "output's folder is hit once. After each fault: nothing half-made has a final name, an "
        "older output is whole, the message is no traceback; the same command, once more, gives "
        "the bytes of an undisturbed run and leaves nothing else. The job is `examples/tiny-qwq` "
        "cut down to 15 tensors. A run begins anew where nothing was finished yet. Where a job "
        "takes long, every so manieth operation is hit, other ones by each kind of fault.",
        "",
        "| job | every | fault | operations | run ended | then went on | then began anew | lost |",
        "|---|---|---|---|---|---|---|---|",
    ])  # fmt: skip
    model, n = faults.tiny_model(folder / "model"), 0
    jobs = {name: job for make in JOB_MAKERS for name, job in make(model, folder).items()}

    def campaign(name: str) -> list[dict]:
        job = {**jobs[name], "every": JOBS[name][1]}
        return faults.campaign(folder / name, [job], list(faults.KINDS))

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each is a process of its own
        all_found = dict(zip(jobs, pool.map(campaign, jobs), strict=True))
    for name, found in all_found.items():
        n += len(found)
        for kind, shown in KINDS.items():
            cases = [case for case in found if case["kind"] == kind]
            broken = [(case, faults.what_is_wrong(case)) for case in cases]
            broken = [(case, what) for case, what in broken if what]
            part.wrong += [f"{name}, {kind} at {c['at']} ({c['struck']}): {w}" for c, w in broken]
            part.lines.append(faults_row(*JOBS[name], shown, cases, len(broken)))
    part.counted = f"{n:,} faults"
    return part


def faults_row(job: str, every: int, fault: str, cases: list[dict], n_broken: int) -> str:
    ended = Counter(ending(case["code"]) for case in cases)
    went_on = sum("Going on after" in (case["second_error"] or "") for case in cases)
    again = sum(case["second_code"] is not None for case in cases) - went_on
    endings = ", ".join(f"{n} {how}" for how, n in sorted(ended.items()))
    lost = f"{n_broken} outputs" if n_broken else "nothing"
    return (
        f"| {job} | {every} | {fault} | {len(cases)} | {endings} | {went_on} | {again} | {lost} |"
    )


def ending(code: int) -> str:
    if code == 0:
        return "done all the same"
    return "killed" if code < 0 else f"with {code}"


# --- inputs -----------------------------------------------------------------------------------


def check_inputs(folder: Path, options) -> Part:
    part = Part([
        "## Broken, hostile and unlucky inputs",
        "",
        "Each input is given to each command it is meant for, over an older output and with "
        "`--force`. The exit code must be the right one and the message must name what is wrong; "
        "source and older output must be what they were, byte for byte, and nothing may be left "
        "behind. Refused: with its exit code. Taken: the run is right to go on, and the output was "
        "looked at, or a note must be there. Some rows are shown by tests of their own.",
        "",
        "| row | input | inputs | runs | refused | taken | wrong | more in tests |",
        "|---|---|---|---|---|---|---|---|",
    ])  # fmt: skip
    prepared, n_inputs, n_runs = hostile_runs.prepare(folder / "prepared"), 0, 0
    for row, title in hostile_inputs.ROWS.items():
        cases = [case for case in hostile_inputs.CASES if case.row == row]
        runs = [(case, command) for case in cases for command in case.commands]
        wrong = []
        for case, command in runs:
            ended = hostile_runs.run_case(case, command, prepared, folder / "case")
            wrong += [f"row {row}, {case.name}, {command}: {w}" for w in ended.wrong[:1]]
        refused = sum(case.code != 0 for case, _ in runs)
        elsewhere = len(hostile_inputs.ELSEWHERE.get(row, ()))
        part.lines.append(
            f"| {row} | {title} | {len(cases)} | {len(runs)} | {refused} | {len(runs) - refused} "
            f"| {len(wrong) or 'nothing'} | {elsewhere or ''} |"
        )
        part.wrong += wrong
        n_inputs, n_runs = n_inputs + len(cases), n_runs + len(runs)
    part.lines += ["", "Not shown here:", ""]
    part.lines += [f"- row {row}: {why}" for row, why in hostile_inputs.NOT_SHOWN.items()]
    part.counted = f"{n_inputs} broken inputs in {n_runs} runs"
    return part


# --- fuzz -------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What came of one target's executions."""

    outcomes: Counter = field(default_factory=Counter)
    slowest: float = 0.0
    seconds: float = 0.0
    peak_nbytes: int = 0
    faults: list[str] = field(default_factory=list)


def check_fuzz(folder: Path, options) -> Part:
    seconds = 60 * options.fuzz_minutes
    part = Part([
        "## Fuzzing",
        "",
        "Valid files with bits flipped, lengths that lie, pieces removed, repeated and spliced; "
        "documents with values replaced, keys doubled, a thousand levels, numbers of 5,000 digits. "
        f"Each execution may take {fuzz_targets.SECONDS:.0f} s and "
        f"{fuzz_targets.MEMORY_NBYTES >> 20} MiB, and must end in an answer or in an error of "
        f"ours. Hypothesis, seed {options.seed}, {options.fuzz_minutes:g} minutes of one core, "
        "shared out evenly.",
        "",
        "| reader | executions | a second | accepted | refused | places that refuse | slowest "
        "| memory taken | faults |",
        "|---|---|---|---|---|---|---|---|---|",
    ])  # fmt: skip
    targets, n = fuzz_targets.targets(folder), 0
    for name, target in targets.items():
        tally = fuzz(target, seconds / len(targets), options.seed)
        total, accepted = tally.outcomes.total(), tally.outcomes["accepted"]
        part.lines.append(
            f"| {name} | {total:,} | {total / tally.seconds:,.0f} | {accepted:,} "
            f"| {total - accepted:,} | {len(tally.outcomes) - (accepted > 0)} "
            f"| {1000 * tally.slowest:.0f} ms | {tally.peak_nbytes / 1e6:.0f} MB "
            f"| {len(tally.faults) or 'none'} |"
        )
        print(part.lines[-1], flush=True)
        part.wrong += tally.faults
        n += total
    part.counted = f"{n:,} fuzz executions"
    return part


AT_ONCE = 250
"""Examples of a round of hypothesis, which remembers what it has tried in a round."""


def fuzz(target, seconds: float, seed: int) -> Tally:
    """Rounds of examples until the time is over, or a fault is found."""
    tally, draw = Tally(), random.Random(f"{seed} {target.name}")
    reset_peak()
    base, began = resident("VmRSS"), time.monotonic()

    @hypothesis.settings(
        max_examples=AT_ONCE,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(target.inputs)
    def one_round(drawn):
        started = time.perf_counter()
        try:
            outcome = fuzz_targets.execute(target, drawn)
        except fuzz_targets.Fault as fault:
            tally.faults.append(f"{fault} for {drawn!r:.600}")
            raise
        tally.slowest = max(tally.slowest, time.perf_counter() - started)
        tally.outcomes[outcome] += 1

    while time.monotonic() - began < seconds and not tally.faults:
        try:
            hypothesis.seed(draw.getrandbits(64))(one_round)()
        except fuzz_targets.Fault:
            break
    tally.seconds = time.monotonic() - began
    tally.peak_nbytes = max(0, resident("VmHWM") - base)
    return tally


def reset_peak() -> None:
    """Forget what the process had at most until now."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(name: str) -> int:
    """Bytes of memory that the process has (VmRSS) or had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


# --- the report -------------------------------------------------------------------------------

PARTS = {"faults": check_faults, "inputs": check_inputs, "fuzz": check_fuzz}


def heading(parts: list[Part]) -> Iterator[str]:
    today, n_wrong = datetime.date.today().isoformat(), sum(len(part.wrong) for part in parts)
    yield "# What was done to it, and what was lost"
    yield ""
    counted = ", ".join(part.counted for part in parts)
    yield f"**{counted}: {f'{n_wrong} promises broken' if n_wrong else 'nothing was lost'}.**"
    yield ""
    yield (
        f"By `scripts/check_reliability.py`, {today}, qwq-quant {__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fuzz-minutes", type=float, default=10, help="of the fuzz campaign")
    parser.add_argument("--seed", type=int, default=1, help="of the fuzz campaign")
    parser.add_argument("--only", choices=PARTS, help="run this part alone; write nothing")
    parser.add_argument("--folder", type=Path, help="to work in, if not a temporary one")
    options = parser.parse_args()
    parts = []
    for name, check in PARTS.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                parts.append(check(Path(folder), options))
    lines = [*heading(parts), ""]
    for part in parts:
        lines += [*part.lines, ""]
    print(*lines, *(w for part in parts for w in part.wrong), sep="\n")
    if options.only is None:
        RESULT.write_text("\n".join(lines))
    sys.exit(1 if any(part.wrong for part in parts) else 0)


if __name__ == "__main__":
    main()
