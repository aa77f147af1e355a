"""Faults on purpose: the n-th operation on a folder's files fails, ends the process, or the power.

    python tests/faults.py '{"folder": "/tmp/x", "jobs": [...], "kinds": ["kill", "EIO"]}'

runs each job undisturbed, then for every kind of fault and every n = 1, 2, ... until the job has no
n-th operation any more: once with the fault, once more without. A JSON line says what came of each.
Children are forked from this process, which has imported everything and started no thread.

Operations are what reaches the disk: opening to write, pwrite, fsync, ftruncate, rename, unlink, on
files below the folder. A write that a fault meets is half done. The disk is a model: fsync is not
carried out but noted, so that a power cut can take everything that was not flushed.
"""

import errno
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from pathlib import Path

POWER = ("power: cut", "power: zeros", "power: torn", "power: only the journal",
         "power: only the data")  # fmt: skip
"""What was not flushed is gone; or zeros; or there page by page at random; or gone from all files
but the journal; or from the journal alone. "power" is each of them in turn."""

KINDS = ("kill", "ENOSPC", "EIO", "dead disk", *POWER)
"""kill: SIGKILL there. ENOSPC: from there on nothing can be written. EIO: once. dead disk: EIO from
there on. There is also SIGTERM, which is no fault."""

PAGE = 512

TIMES = re.compile(rb'"time": "[^"]*"')
"""In manifests."""


class FaultyFolder:
    """Counts the operations on a folder's files, and lets the n-th fail."""

    def __init__(self, folder: Path, kind: str, at: int, report: int):
        self.folder, self.kind, self.at, self.report = folder, kind, at, report
        self.n, self.struck = 0, False
        self._lock = threading.RLock()
        self._honest = {
            name: getattr(os, name)
            for name in ("open", "pwrite", "fsync", "ftruncate", "replace", "rename", "unlink")
        }
        self._flushed = {p.stat().st_ino: p.read_bytes() for p in self._files()}

    def _files(self):
        return [p for p in self.folder.rglob("*") if p.is_file() and not p.is_symlink()]

    def install(self) -> None:
        """Put the counting functions in the place of os's own."""
        for name in self._honest:
            setattr(os, name, self._watched(name))

    def _watched(self, name: str):
        honest = self._honest[name]

        def operation(*args, **kwargs):
            place = self._place(name, args)
            if place is None:
                return honest(*args, **kwargs)
            with self._lock:
                return self._count(name, place, honest, args, kwargs)

        return operation

    def _place(self, name: str, args) -> str | None:
        """The file that an operation is on; None if it is none of ours, or only reads."""
        where = args[0]
        if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return None
        if isinstance(where, int):
            where = os.readlink(f"/proc/self/fd/{where}")
        path = Path(os.path.abspath(where))
        return path.name if self.folder in path.parents or path == self.folder else None

    def _count(self, name, place, honest, args, kwargs):
        self.n += 1
        if self.n == self.at:
            self.struck = True
            os.write(self.report, f"{name} {place}\n".encode())
            self._strike(name, honest, args)
        elif self.struck and self._fails_on(name, args):
            self._fail()
        if name == "fsync":
            self._note_flushed(args[0])
            return None
        return honest(*args, **kwargs)

    def _strike(self, name, honest, args) -> None:
        if name == "pwrite" and self.kind not in ("EIO", "SIGTERM"):
            honest(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
        if self.kind == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind.startswith("power: "):
            self._lose_power(self.kind.removeprefix("power: "))
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "ENOSPC" and not self._needs_room(name, args) and name != "fsync":
            return  # on a full disk, but needs no room
        self._fail()

    def _fails_on(self, name, args) -> bool:
        """Whether an operation after the n-th fails, too."""
        return self.kind == "dead disk" or (self.kind == "ENOSPC" and self._needs_room(name, args))

    def _needs_room(self, name, args) -> bool:
        return name == "pwrite" or (name == "open" and not os.path.exists(args[0]))

    def _fail(self):
        number = errno.ENOSPC if self.kind == "ENOSPC" else errno.EIO
        raise OSError(number, os.strerror(number))

    def _note_flushed(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_file():
            self._flushed[path.stat().st_ino] = path.read_bytes()

    def _lose_power(self, image: str) -> None:
        """Leave in the folder what the disk may have when the power comes back."""
        chance = random.Random(self.at)
        for path in self._files():
            now, disk = path.read_bytes(), self._flushed.get(path.stat().st_ino, b"")
            is_journal = path.suffix == ".journal"
            if image == "zeros":
                disk = disk.ljust(len(now), b"\0")
            elif image == "torn":
                disk = _torn(now, disk, chance)
            elif (image == "only the journal" and is_journal) or (
                image == "only the data" and not is_journal
            ):
                disk = now
            path.write_bytes(disk)


def _torn(now: bytes, disk: bytes, chance: random.Random) -> bytes:
    """Each page as it was written last, or as it was flushed last, or never written."""
    nbytes = chance.randint(*sorted([len(now), len(disk)]))
    nbytes = chance.choice([len(now), len(disk), nbytes])
    pages = []
    for start in range(0, nbytes, PAGE):
        end = min(start + PAGE, nbytes)
        new, old = now[start:end], disk[start:end]
        pages.append(chance.choice([new, new, new, old]).ljust(end - start, b"\0"))
    return b"".join(pages)


# --- children ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a run ended. `struck`: the operation that the fault met, "" if there was none."""

    code: int  # negative: killed by that signal
    error: str  # what was on stderr
    struck: str


def run(arguments: list[str], folder: Path, kind: str = "", at: int = 0) -> Ended:
    """The command line in a forked child, `folder` under a fault."""
    report, told = os.pipe()
    log = folder.with_name(f"{folder.name}.stderr")
    child = os.fork()
    if child == 0:
        _be_child(arguments, folder, kind, at, told, log)
    os.close(told)
    with os.fdopen(report) as opened:
        struck = opened.read().strip()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(code, log.read_text(), struck)


def _be_child(arguments, folder: Path, kind: str, at: int, told: int, log: Path):
    from quant.cli import cli

    code = 70
    try:
        opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(opened, stream)
        sys.argv = ["qwq-quant", *arguments]
        if kind:
            FaultyFolder(folder, kind, at, told).install()
        cli.main(arguments)
    except SystemExit as ending:
        code = ending.code
    finally:
        with suppress(ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def seen(folder: Path) -> dict[str, str]:
    """The files in a folder, each with the beginning of its sha256, and empty folders; of manifests
    all but their times."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() or not any(p.iterdir())):
        content = path.read_bytes() if path.is_file() else b""
        digest = sha256(TIMES.sub(b"", content)).hexdigest()[:16]
        name = path.relative_to(folder).as_posix()
        found[name] = digest
    return found


def cases(folder: Path, job: dict, kinds: list[str], every: int = 1):
    """What came of every fault in one job: its "name", "arguments", and those of an "older" run.

    every: unless the job says otherwise, only every so manieth operation is hit: of nine, the fifth
    and so on; by the next kind, the sixth and so on.
    """
    every = job.get("every", every)
    older, expected = {}, {}
    work = folder / "out"

    def begin_anew():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        if job.get("older"):
            ended = run(job["older"], work)
            assert ended.code == 0, ended.error

    def restore():
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder / "older", work)

    begin_anew()
    older = seen(work)
    shutil.rmtree(folder / "older", ignore_errors=True)
    shutil.copytree(work, folder / "older")
    ended = run(job["arguments"], work)
    assert ended.code == 0, ended.error
    expected = seen(work)
    for i, kind in enumerate(kinds):
        for n in count():
            at = (1 + every) // 2 + i % every + n * every
            restore()
            meant = POWER[at % len(POWER)] if kind == "power" else kind
            first = run(job["arguments"], work, meant, at)
            if not first.struck:
                break
            between, second = seen(work), None
            if first.code != 0:
                second = run(job["arguments"], work)
            yield {
                "job": job["name"], "kind": kind, "at": at, "struck": first.struck,
                "code": first.code, "error": first.error, "older": older, "expected": expected,
                "between": between, "after": seen(work),
                "second_code": second and second.code, "second_error": second and second.error,
            }  # fmt: skip


def campaign(folder: Path, jobs: list[dict], kinds: list[str], every: int = 1) -> list[dict]:
    """All cases, from a fresh process. Jobs work in out, in `folder` or in their "folder" there."""
    request = {"folder": str(folder), "jobs": jobs, "kinds": list(kinds), "every": every}
    request = json.dumps(request)
    done = subprocess.run(
        [sys.executable, __file__, request],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # torch's threads would not outlive the fork
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def what_is_wrong(case: dict) -> list[str]:
    """Every promise that a case broke, in words."""
    wrong = []
    older, expected, between, after = (case[k] for k in ("older", "expected", "between", "after"))
    for name, digest in between.items():
        if not name.startswith(".") and digest not in (older.get(name), expected.get(name)):
            wrong.append(f"{name} is neither the older file nor the new one")
    for name, digest in older.items():
        folder, _, rest = name.partition("/")  # an older folder is moved away before it is replaced
        if name not in between and between.get(f".{folder}.older/{rest}") != digest:
            wrong.append(f"{name} is gone")
    for error in (case["error"], case["second_error"] or ""):
        if "Traceback" in error or "Something went wrong inside" in error:
            wrong.append("a traceback")
    faults_exit = (0, 74) if case["code"] >= 0 else (-signal.SIGKILL,)
    if case["kind"] == "SIGTERM":
        faults_exit = (0, 75)
    if case["code"] not in faults_exit:
        wrong.append(f"exit code {case['code']}")
    if case["code"] == 74 and "Error: " not in case["error"]:
        wrong.append("no message")
    if case["code"] != 0 and case["second_code"] != 0:
        wrong.append(f"the second run ends with {case['second_code']}")
    left = [name for name in after if name.startswith(".")]
    if case["second_code"] == 0 and left:
        wrong.append(f"the second run leaves {left}")
    if {n: d for n, d in after.items() if not n.startswith(".")} != expected:
        wrong.append("the output is not the undisturbed one")
    return wrong


def gguf_jobs(model: Path, folder: Path) -> dict[str, dict]:
    """to-gguf to a new file, to a split one, and over an older one; under `folder`/NAME/out."""

    def job(name: str, *more: str) -> dict:
        output = folder.resolve() / name / "out" / "m.gguf"
        arguments = ["to-gguf", str(model), "-o", str(output), "--type", "BF16", *more]
        return {"name": name, "arguments": arguments}

    replacing = job("replacing", "--force")
    older = [a.replace("BF16", "F16") for a in replacing["arguments"]]
    return {
        "new": job("new"),
        "split": job("split", "--split-max-size", "280KB"),
        "replacing": {**replacing, "older": older},
    }


def folder_jobs(model: Path, folder: Path) -> dict[str, dict]:
    """dynamic-4bit and gptq, in the stages that they have; under `folder`/NAME/out."""

    def job(name: str, command: str, *words: str) -> dict:
        output = folder.resolve() / name / "out" / "m"
        arguments = [command, str(model), "-o", str(output), *words]
        return {"name": name, "arguments": arguments}

    plain = ("dynamic-4bit", "--budget", "0", "--no-check")
    few = ("--tokens", "256", "--seq-len", "64", "--device", "cpu")
    replacing = job("4bit replacing", *plain, "--force")
    older = [*replacing["arguments"], "--quant-type", "fp4"]
    return {
        "4bit": job("4bit", *plain),
        "4bit replacing": {**replacing, "older": older},
        "4bit feedback": job("4bit feedback", *plain, *few, "--gptq"),
        "4bit measured": job("4bit measured", "dynamic-4bit", "--budget", "2kB", *few),
        "gptq": job("gptq", "gptq", *few, "--group-size", "32", "--budget", "4kB"),
    }


def layer_jobs(model: Path, folder: Path) -> dict[str, dict]:
    """What runs the model layer by layer, to a new file; under `folder`/NAME/out."""

    def job(name: str, file: str, *more: str) -> dict:
        output = folder.resolve() / name / "out" / file
        few = ["--tokens", "256", "--seq-len", "64", "--device", "cpu"]
        return {"name": name, "arguments": [name, str(model), "-o", str(output), *few, *more]}

    metrics = [word for name in ("block", "gradient", "kld") for word in ("--metric", name)]
    return {
        "measure": job("measure", "s.json", *metrics),
        "imatrix": job("imatrix", "i.gguf"),
        "kv-calibrate": job("kv-calibrate", "k.safetensors"),
    }


def tiny_model(folder: Path) -> Path:
    """examples/tiny-qwq cut down to one layer of 32 columns: 15 tensors, half a megabyte."""
    from safetensors.torch import load_file, save_file

    source = Path(__file__).parent.parent / "examples" / "tiny-qwq"
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, folder)
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    (folder / "config.json").write_text(json.dumps(config))
    n_rows = {"embed_tokens": 4096, "lm_head": 4096, "gate_proj": 64, "up_proj": 64}
    n_rows |= {"k_proj": 16, "v_proj": 16}
    cut = {}
    for name, w in load_file(source / "model.safetensors").items():
        if ".layers." not in name or ".layers.0." in name:
            w = w[: n_rows.get(name.split(".")[-2], 32)]
            w = w if w.dim() == 1 else w[:, : 64 if "down_proj" in name else 32]
            cut[name] = w.contiguous()
    save_file(cut, folder / "model.safetensors", {"format": "pt"})
    return folder


class AtOnce:
    """An executor without a thread: the n-th operation is the same one every time."""

    def __init__(self, *args):
        pass

    def submit(self, work, *args) -> Future:
        future = Future()
        try:
            future.set_result(work(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self) -> None:
        pass


def remember(module, name: str) -> None:
    """Let a function of a module answer for ever what it answers now."""
    answer = getattr(module, name)()
    setattr(module, name, lambda: answer)


def main() -> None:
    request = json.loads(sys.argv[1])
    from click.testing import CliRunner

    from quant import journal, manifest
    from quant.cli import calibrating, cli

    remember(manifest, "package_versions")  # slow, and the same in every child
    journal.FLUSH_NBYTES, journal.FLUSH_SECONDS = 1 << 17, 1e9
    journal.ThreadPoolExecutor = AtOnce
    for job in request["jobs"]:
        folder = Path(request["folder"], job.get("folder", "")).resolve()
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "out").mkdir(parents=True)
        done = CliRunner().invoke(cli, job["arguments"])  # imports what children would each import
        assert done.exit_code == 0, done.output
        assert threading.active_count() == 1
        if passes := sys.modules.get("quant.calibration.passes"):
            passes.PATIENCE = 0  # a state behind every step
            calibrating.CHECKED_TOKENS = 512
        gc.freeze()  # what is never looked at again is never copied
        for case in cases(folder, job, request["kinds"], request.get("every", 1)):
            print(json.dumps(case), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
