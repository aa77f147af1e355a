"""Runs the real command line on a broken input, and says what was lost or badly said.

A case (tests/hostile_inputs.py) damages a copy of a tiny model. Before it runs, everything there
is noted: source, earlier outputs, whatever else. After a refusal all of it must still be there,
byte for byte, and nothing besides.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import faults
from click.testing import CliRunner
from xxhash import xxh3_128_hexdigest

ROOT = Path(__file__).parent.parent
RUN = "from quant.cli import main; main()"
TOO_LONG_SECONDS = 60
"""A refusal takes a few hundredths of a second; what takes longer than this hangs."""

FEW = ("--tokens", "256", "--seq-len", "64")
COMMANDS = {
    "to-gguf": ("m.gguf", "--type", "Q8_0"),
    "dynamic-4bit": ("nf4", *FEW, "--no-check", "--budget", "0.5%"),
    "gptq": ("int4", *FEW, "--no-check", "--group-size", "32"),
    "measure": ("sensitivity.json", *FEW, "--metric", "activation"),
    "imatrix": ("imatrix.gguf", *FEW),
    "kv-calibrate": ("kv.safetensors", *FEW),
    "fix": ("mended", "--yarn", "4"),
    "evaluate": ("report", "--tokens", "64", "--context", "32"),
}
"""Commands that write: the output's name, and options under which a tiny model is done at once."""

CALIBRATING = ("dynamic-4bit", "gptq", "measure", "imatrix", "kv-calibrate")
FOLDERS = ("dynamic-4bit", "gptq", "fix", "evaluate")


@dataclass
class Place:
    """Where a case runs. `make` damages the model, or says with what else to run."""

    folder: Path
    command: str = "to-gguf"
    model: str = ""
    output: str = ""
    options: list[str] = field(default_factory=list)
    usual: bool = True
    """Whether the options of COMMANDS are given."""

    @property
    def source(self) -> Path:
        """The copy of the tiny model."""
        return self.folder / "model"

    @property
    def out(self) -> Path:
        """Where the earlier output of every command lies."""
        return self.folder / "out"

    @property
    def shard(self) -> Path:
        return self.source / "model.safetensors"

    def arguments(self, force: bool) -> list[str]:
        name, *usual = COMMANDS.get(self.command, ("",))
        words = [self.command, self.model or str(self.source)]
        words += [*(usual if self.usual else ()), *self.options]
        if name:
            words += ["-o", self.output or str(self.out / name), *(["--force"] if force else [])]
        return words


@dataclass(frozen=True)
class Case:
    """One broken input, the commands it is given to, and what they must answer."""

    row: int
    name: str
    make: Callable[[Place], object]
    code: int = 65
    words: tuple[str, ...] = ()
    commands: tuple[str, ...] = ("to-gguf", "dynamic-4bit")
    force: bool = True
    """Over an earlier output, which must survive; without, it is refused for being there."""
    under: Callable[[Place], contextlib.AbstractContextManager] = lambda p: contextlib.nullcontext()
    """Circumstances: a full disk, little memory."""
    shell: str = ""
    """Run by bash in a process of its own: `{command}` and what goes around it."""
    check: Callable[[Place], list[str]] = lambda p: []
    """What is wrong with the output, where there is one."""
    needs: tuple[str, ...] = ()
    """Earlier outputs of other commands than this one."""


@dataclass(frozen=True)
class Ended:
    code: int
    said: str
    wrong: list[str]


def prepare(folder: Path) -> Path:
    """A tiny model, and an output of each command that writes. Returns the folder."""
    faults.tiny_model(folder / "model")
    (folder / "out").mkdir()
    for command in COMMANDS:
        words = Place(folder, command).arguments(force=False)
        # What `evaluate` made is only kept or lost here: an empty folder of its name will do.
        result = CliRunner().invoke(_cli(), words) if command != "evaluate" else None
        assert result is None or result.exit_code == 0, result.output
    shutil.rmtree(folder / "out" / "nf4" / "figures")  # many files, and none of them is looked at
    return folder


def _cli():
    from quant.cli import cli

    return cli


def run_case(case: Case, command: str, prepared: Path, folder: Path) -> Ended:
    """The case under one command, in a fresh `folder`; `wrong` says what promise was broken."""
    place = Place(folder, command)
    shutil.copytree(prepared / "model", place.source)
    place.out.mkdir()
    for name in {COMMANDS.get(command, ("m.gguf",))[0], "m.gguf", "qwq-quant.json", *case.needs}:
        if (prepared / "out" / name).is_dir():
            shutil.copytree(prepared / "out" / name, place.out / name)
        elif (prepared / "out" / name).exists():
            shutil.copy2(prepared / "out" / name, place.out)
    try:
        case.make(place)
        before = seen(folder)
        with case.under(place):
            run = _in_a_shell if case.shell else _in_this_process
            code, said = run(case, place)
        wrong = [*_badly_said(case, code, said), *_lost(case, place, before, code)]
        return Ended(code, said, wrong)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _in_this_process(case: Case, place: Place) -> tuple[int, str]:
    with _time_limit():
        result = CliRunner().invoke(_cli(), place.arguments(case.force))
    if not isinstance(result.exception, SystemExit | None):
        return 70, f"Traceback: {result.exception!r}\n{result.output}"
    return result.exit_code, result.output


def _in_a_shell(case: Case, place: Place) -> tuple[int, str]:
    command = [sys.executable, "-c", RUN, *place.arguments(case.force)]
    quoted = " ".join(quote(os.fsencode(word)) for word in command)
    done = subprocess.run(
        ["bash", "-c", case.shell.format(command=quoted)],
        cwd=ROOT,
        capture_output=True,
        timeout=TOO_LONG_SECONDS,
    )
    return done.returncode, (done.stdout + done.stderr).decode("utf-8", "replace")


def quote(word: bytes) -> str:
    """A word for bash in ASCII, whatever bytes it holds."""
    return "$'" + "".join(f"\\x{byte:02x}" for byte in word) + "'"


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    class Hangs(BaseException):
        """Not an Exception, so that nobody takes it for an error of the input."""

    def end(number, frame):
        raise Hangs(f"no answer after {TOO_LONG_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(TOO_LONG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _badly_said(case: Case, code: int, said: str) -> list[str]:
    wrong = [] if code == case.code else [f"exit code {code}, not {case.code}: {said[-600:]}"]
    flat = " ".join(said.split())
    wrong += [f"{word!r} is not in: {flat}" for word in case.words if word not in flat]
    for sign in ("Traceback", "Something went wrong inside", "nobody foresaw", "\x1b", "RuntimeW"):
        if sign in said:
            wrong.append(f"{sign!r} is in: {flat}")
    return wrong


def _lost(case: Case, place: Place, before: dict[str, str], code: int) -> list[str]:
    """Everything that was there and is not any more, or is there and should not be."""
    after = seen(place.folder)
    meant = _may_change(place) if code == case.code == 0 else ()
    wrong = [
        f"{name} was {'changed' if name in after else 'removed'}"
        for name, what in before.items()
        if after.get(name) != what and not name.startswith(meant)
    ]
    wrong += [
        f"{name} was left behind"
        for name in after
        if name not in before and (not name.startswith(meant) or Path(name).name.startswith("."))
    ]
    return wrong + (case.check(place) if code == case.code == 0 else [])


def _may_change(place: Place) -> tuple[str, ...]:
    """What a run that ends well writes."""
    name = COMMANDS.get(place.command, ("?",))[0]
    written = Path(place.output or place.out / name)
    unfinished = written.with_name(f".{written.name}.")
    changed = (written, unfinished, place.out / "qwq-quant.json")
    return tuple(str(path.relative_to(place.folder)) for path in changed)


def seen(folder: Path) -> dict[str, str]:
    """Every name below `folder`, with what it is and a hash of what it holds."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            found[os.path.relpath(path, folder)] = _what(path)
    return found


def _what(path: Path) -> str:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    status = path.lstat()
    if not path.is_file():
        return f"mode {status.st_mode:o}"
    if status.st_size > 10_000_000:  # a file of holes; reading it would take long
        return f"{status.st_size} bytes of {status.st_mtime_ns}"
    return f"{status.st_mtime_ns} {xxh3_128_hexdigest(path.read_bytes())}"


# --- in the middle of a run -------------------------------------------------------------------

STOPPING = """
import os, signal, sys
from {module} import {owner} as owner
whole, n = owner.{name}, 0
def stops(*args, **options):
    global n
    n += 1
    if n == {at}:
        os.kill(os.getpid(), signal.SIGSTOP)
    return whole(*args, **options)
owner.{name} = stops
sys.argv = ["qwq-quant", *{arguments}]
from quant.cli import main
main()
"""

MIDWAY = {
    "to-gguf": ("quant.sinks.gguf", "GgufSink", "begin"),
    "dynamic-4bit": ("quant.sinks.safetensors", "ShardedSink", "write"),
}
"""Command -> where a tensor's rows are handed over to be written."""


@contextlib.contextmanager
def stopped_midway(place: Place, at: int = 5) -> Iterator[subprocess.Popen]:
    """The command in a process of its own, stopped when it writes for the `at`-th time."""
    module, owner, name = MIDWAY[place.command]
    code = STOPPING.format(
        module=module, owner=owner, name=name, at=at, arguments=json.dumps(place.arguments(True))
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), process.stdout.read()
        yield process
    finally:
        process.kill()
        process.wait()


def go_on(process: subprocess.Popen) -> tuple[int, str]:
    """Let it run to its end: its exit code and what it said."""
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate(timeout=TOO_LONG_SECONDS)
    return process.returncode, said
