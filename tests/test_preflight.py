"""What every writing command checks before it begins: room, rights, locks; and how long it says it
takes. Disks are real: file systems of a megabyte in memory, where the tests may mount them."""

import json
import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from quant import preflight
from quant.cli import cli
from quant.durable import is_locked, locks_of
from quant.encoder_speeds import SPEEDS, kernels_of
from quant.estimates import Estimate, about
from quant.formats import FORMATS

FORMATS_FOLDER = Path(preflight.__file__).parent / "formats"

COMMANDS = {
    "to-gguf": ["{model}", "-o", "{folder}/m.gguf", "--type", "Q8_0"],
    "imatrix": ["{model}", "-o", "{folder}/i.gguf"],
    "measure": ["{model}", "-o", "{folder}/s.json"],
    "kv-calibrate": ["{model}", "-o", "{folder}/kv.safetensors"],
    "dynamic-4bit": ["{model}", "-o", "{folder}/m"],
    "gptq": ["{model}", "-o", "{folder}/m", "--group-size", "64", "--budget", "10%"],
    "evaluate": ["{model}", "{model}", "-o", "{folder}/report"],
    "fix": ["{model}", "-o", "{folder}/m", "--yarn", "4"],
}
"""Every command that writes and has --dry-run."""


def run(name, model, folder, *more):
    words = [word.format(model=model, folder=folder) for word in COMMANDS[name]]
    return CliRunner().invoke(cli, [name, *words, *more])


def mounted(place: Path, options: str) -> None:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A file system of a megabyte."""
    place = tmp_path_factory.mktemp("small")
    mounted(place, "size=1m")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="module")
def read_only(tmp_path_factory):
    """A file system that takes no writes, from anyone; or a folder that takes none from us."""
    place = tmp_path_factory.mktemp("read-only")
    if os.geteuid():
        place.chmod(0o555)
        yield place
    else:
        mounted(place, "size=999m,ro")
        yield place
        subprocess.run(["umount", str(place)], check=True)


# --- room, rights ---


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_refused_before_any_work(name, tiny_qwq, small_disk):
    real = run(name, tiny_qwq, small_disk)
    assert real.exit_code == 74 and "too little" in real.stderr
    assert "Nothing was written" in real.stderr and "1.0 MB" in real.stderr
    assert "Measuring" not in real.stderr
    planned = run(name, tiny_qwq, small_disk, "--dry-run")
    assert planned.exit_code == 74 and os.listdir(small_disk) == []
    if name not in ("dynamic-4bit", "gptq"):  # which are not measured then
        assert "DOES NOT FIT" in planned.stdout and "Time:   " in planned.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_a_read_only_file_system_is_refused_before_any_work(name, tiny_qwq, read_only):
    real = run(name, tiny_qwq, read_only)
    assert real.exit_code == 73 and "cannot be written" in real.stderr
    planned = run(name, tiny_qwq, read_only, "--dry-run")
    assert planned.exit_code == 73
    if name not in ("dynamic-4bit", "gptq"):
        said = " ".join(planned.stdout.split())
        assert "Output: CANNOT BE WRITTEN." in said and str(read_only) in said
    assert os.listdir(read_only) == []


def test_too_little_room_for_temporary_files(tiny_qwq, small_disk, tmp_path, monkeypatch):
    """With --resume never: else they are kept beside the output."""
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    asked = "measure", tiny_qwq, tmp_path, "--tokens", "8192", "--resume", "never"
    planned = run(*asked, "--dry-run")
    (line,) = [line for line in planned.stdout.splitlines() if line.startswith("Files:")]
    # the input of each of 6 layers: 8192 tokens x 256 x 4 bytes
    assert "needs 50.3 MB, 1.0 MB free" in line and "DOES NOT FIT, 49.3 MB too little" in line
    real = run(*asked)
    assert real.exit_code == planned.exit_code == 74 and "Set TMPDIR" in real.stderr
    assert os.listdir(tmp_path) == os.listdir(small_disk) == []


def test_output_and_temporary_files_on_one_disk_must_fit_together(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    free = preflight.measure_needs(tmp_path / "x", disk=0, memory=0).disk_free

    def needs(disk, temporary):
        return preflight.measure_needs(
            tmp_path / "x", disk=disk, memory=0, temporary=temporary
        ).exit_code

    share = free * 2 // 5
    assert needs(share, share) == 0 and needs(2 * share, 0) == 0
    assert needs(2 * share, share) == 74


@pytest.mark.parametrize("name", COMMANDS)
def test_too_little_memory_is_refused_before_any_work(name, tiny_qwq, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "available_memory", lambda: 100_000_000)
    real = run(name, tiny_qwq, tmp_path)
    assert real.exit_code == 69 and "only 100.0 MB are free" in real.stderr
    assert "MB too little" in real.stderr or "GB too little" in real.stderr
    assert run(name, tiny_qwq, tmp_path, "--dry-run").exit_code == 69
    assert os.listdir(tmp_path) == []


def test_a_cgroup_s_limit_counts_without_what_is_only_cached(tmp_path, monkeypatch):
    """As in a container whose limit is filled by the files that a run before has read."""
    monkeypatch.setattr(preflight, "CGROUPS", tmp_path)
    machine = preflight.available_memory()
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4900000\n")
    assert preflight.available_memory() == 100_000
    (tmp_path / "memory.stat").write_text("anon 500000\nactive_file 400000\ninactive_file 7\n")
    assert preflight.available_memory() == 500_007
    (tmp_path / "memory.max").write_text("max\n")
    assert preflight.available_memory() > 0.5 * machine


# --- locks ---

HOLD = """
import sys, time
from pathlib import Path
from quant.durable import PendingFile, PendingFolder
pending = {kind}(Path({path!r}))
print("held", flush=True)
sys.stdin.readline()
pending.discard()
"""


@pytest.mark.parametrize(
    ("name", "kind", "path"),
    [
        ("to-gguf", "PendingFile", "m.gguf"),
        ("measure", "PendingFile", "s.json"),
        ("fix", "PendingFolder", "m"),
        ("evaluate", "PendingFile", "report/report.html"),
    ],
)
def test_another_run_s_output_is_only_looked_at(name, kind, path, tiny_qwq, tmp_path):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    code = HOLD.format(kind=kind, path=str(tmp_path / path))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        before = sorted(tmp_path.rglob("*"))
        planned = run(name, tiny_qwq, tmp_path, "--dry-run")
        assert planned.exit_code == 73 and "Another run is writing" in planned.stdout
        real = run(name, tiny_qwq, tmp_path)
        assert real.exit_code == 73 and "Another run is writing" in real.stderr
        assert sorted(tmp_path.rglob("*")) == before
        other.communicate("\n")
    assert run(name, tiny_qwq, tmp_path, "--dry-run").exit_code == 0


def test_a_killed_run_s_files_are_not_locked(tmp_path):
    for place in locks_of(tmp_path / "m.gguf"):
        place.write_bytes(b"x")
        assert not is_locked(place)
    assert not is_locked(tmp_path / "none")


# --- plans ---


@pytest.mark.parametrize("name", COMMANDS)
def test_a_dry_run_says_what_it_takes_and_leaves_nothing(name, tiny_qwq, tmp_path):
    few = {"dynamic-4bit": ["--budget", "0"], "gptq": ["--budget", "0"]}.get(name, [])
    planned = run(name, tiny_qwq, tmp_path, "--dry-run", *few)
    assert planned.exit_code == 0, planned.output
    lines = planned.stdout.splitlines()
    for label in ("Disk:   needs ", "Memory: needs ", "Time:   "):
        assert sum(line.startswith(label) for line in lines) == 1
    assert max(map(len, lines)) <= 80 and os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["to-gguf", "evaluate", "fix", "dynamic-4bit", "gptq"])
def test_needs_in_json(name, tiny_qwq, tmp_path):
    few = {"dynamic-4bit": ["--budget", "0"], "gptq": ["--budget", "0"]}.get(name, [])
    planned = run(name, tiny_qwq, tmp_path, "--dry-run", "--format", "json", *few)
    needs = json.loads(planned.stdout)["needs"]
    assert needs["fits"] is True and needs["obstacle"] is None
    assert 0 < needs["disk"] < needs["disk_free"] and 0 < needs["memory"] < needs["memory_free"]
    assert needs["seconds"] > 0


def test_the_distributions_of_a_reference_have_the_size_that_is_said(tiny_qwq, tmp_path):
    from quant.evaluation.base_file import base_file_nbytes
    from quant.evaluation.chunks import cut_chunks
    from quant.evaluation.evaluate import Model
    from quant.evaluation.measuring import Wishes
    from quant.evaluation.needs import EvaluationRun
    from quant.evaluation.runners.folder import Talker
    from quant.texts import held_out_texts

    model, wishes = Model("m", tiny_qwq), Wishes(held_out_texts(), 256)
    disk = EvaluationRun(model, [], wishes, tmp_path / "report", "cpu").needs().disk
    real = base_file_nbytes(cut_chunks(Talker(tiny_qwq), wishes.texts, 256), 4096)
    assert real < disk < 1.3 * real


# --- time ---


def test_seconds_are_said_in_one_or_two_figures():
    said = {0.2: "under a second", 1.2: "about 1 s", 7: "about 7 s", 23: "about 25 s"}
    said |= {100: "about 2 min", 180: "about 3 min", 2000: "about 35 min", 9000: "about 2.5 h"}
    said |= {40_000: "about 10 h", 260_000: "about 3 days"}
    assert {seconds: about(seconds) for seconds in said} == said
    assert str(Estimate(7, 2, 4)) == "about 7 s; first run compiles 2 encoders: about 4 s more"


def test_every_format_has_a_speed_and_a_kernel_of_that_name():
    assert set(SPEEDS) == set(FORMATS) - {"F32"}
    for name, speed in SPEEDS.items():
        kernels = {*kernels_of(FORMATS[name], False), *kernels_of(FORMATS[name], True)}
        for kernel in kernels | ({speed.refiner} - {""}):
            file, function = kernel.split(".")
            assert f"\ndef {function}(" in (FORMATS_FOLDER / f"{file}.py").read_text(), kernel


def test_a_first_run_is_told_of(tiny_qwq, tmp_path, monkeypatch):
    """With the compiler's own files: none, those of a run, and those of other sources."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))

    def told() -> bool:
        planned = run("to-gguf", tiny_qwq, tmp_path, "--dry-run").stdout
        assert "Time:   " in planned
        return "first run compiles 1 encoder:" in planned

    def seen() -> str:
        """What a run shows on a terminal."""
        words = [word.format(model=tiny_qwq, folder=tmp_path) for word in COMMANDS["to-gguf"]]
        code = "from quant.cli import main; main()"
        ours, its = pty.openpty()
        command = [sys.executable, "-c", code, "to-gguf", *words, "--force"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=its)
        os.close(its)
        with open(ours, "rb", buffering=0) as terminal:
            return terminal.read(1 << 16).decode()

    assert told() and "Compiling encoders" in seen()
    assert not told() and "Compiling encoders" not in seen()
    from quant import encoder_speeds

    monkeypatch.setattr(encoder_speeds, "sources_digest", lambda: "of other sources")
    assert told()


def test_states_for_a_run_that_goes_on_lie_beside_the_output(tiny_qwq, tmp_path):
    from quant.calibration.needs import LayerwiseRun, of_metrics
    from quant.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(tiny_qwq)
    works = tuple(of_metrics({"gradient"}, checkpoint))
    facts = (checkpoint, works, 8192, 256, "cpu", tmp_path / "s.json", 1000)
    temporary, saved = (LayerwiseRun(*facts, saves=saves).needs() for saves in (False, True))
    one = 8192 * 256 * 4
    assert temporary.temporary == 6 * one and temporary.disk < one
    assert saved.temporary == 0 and saved.disk == temporary.disk + (6 + 3) * one


def test_a_folder_that_takes_no_files_is_not_called_missing():
    problem = preflight.measure_needs(Path("/proc/m.gguf"), disk=0, memory=0).problem
    assert "/proc/m.gguf" in problem.what and "no folder" not in problem.what
