"""measure, imatrix and kv-calibrate that go on after an interrupted run: the same bytes, no layer
run twice."""

import os
import re
import shlex
import signal
import subprocess
import sys

import faults
import pytest
import torch
from click.testing import CliRunner
from faults import tiny_model

from quant.calibration import passes
from quant.calibration.needs import IMPORTANCE, LayerwiseRun, of_metrics
from quant.calibration.passes import Passes
from quant.calibration.streamed_model import StreamedModel
from quant.checkpoint import Checkpoint
from quant.cli import cli

FEW = ("--tokens", "256", "--seq-len", "64", "--device", "cpu")
ALL_METRICS = [w for m in ("activation", "block", "gradient", "kld") for w in ("--metric", m)]
COMMANDS = {"measure": ALL_METRICS, "imatrix": [], "kv-calibrate": []}
N_LAYERS = 3
N_STEPS = {"measure": 3 + 3 + 4 + 1 + 4, "imatrix": 3, "kv-calibrate": 3}
"""measure: local errors, there, back with the head, the number of sweeps, one with comparison."""


@pytest.fixture(scope="module")
def model(made_models):
    return made_models("qwen2")[0]


@pytest.fixture(autouse=True)
def always_saving(monkeypatch):
    monkeypatch.setattr(passes, "PATIENCE", 0)


@pytest.fixture
def loaded(monkeypatch) -> list[int]:
    """The layers that were loaded, one after the other."""
    load, indices = StreamedModel._load, []
    monkeypatch.setattr(
        StreamedModel, "_load", lambda self, i, n: indices.append(i) or load(self, i, n)
    )
    return indices


def words(command, model, output, *more) -> list[str]:
    return [command, str(model), "-o", str(output), *FEW, *COMMANDS[command], *more]


def invoke(*arguments, code=0) -> str:
    """What the command says on both streams, without line breaks."""
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return " ".join(done.output.split())


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    """The output of a command that kept nothing, and the layers it loaded."""
    made = {}

    def get(command) -> tuple[bytes, list[int]]:
        if command not in made:
            output = tmp_path_factory.mktemp("undisturbed") / "out"
            load, indices = StreamedModel._load, []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    StreamedModel, "_load", lambda s, i, n: indices.append(i) or load(s, i, n)
                )
                invoke(*words(command, model, output, "--resume", "never"))
            assert os.listdir(output.parent) == ["out"]
            made[command] = output.read_bytes(), indices
        return made[command]

    return get


def stopping_after(n: int):
    """In the place of Passes.note: the user wants to stop within the n-th step."""
    note = Passes.note

    def noting(self, units):
        if self._journal._n_done + len(units) >= n:
            self._journal._resume.stop.make()
        note(self, units)

    return noting


def stopped(command, model, output, at: int, *more) -> str:
    """Ended by the user behind that step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Passes, "note", stopping_after(at))
        return invoke(*words(command, model, output, *more), code=75)


@pytest.mark.parametrize("command", COMMANDS)
def test_stopped_behind_every_step(command, model, undisturbed, loaded, tmp_path, monkeypatch):
    expected, layers = undisturbed(command)
    loaded.clear()
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["qwq-quant", *words(command, model, output)])
    for n in range(1, N_STEPS[command] + 1):
        said = stopped(command, model, output, n)
        assert f"{n} of {N_STEPS[command]} steps are finished and kept" in said
        assert f"Go on with: {shlex.join(sys.argv)}" in said
        assert sorted(os.listdir(tmp_path)) == [".out.journal", ".out.states"]
    said = invoke(*words(command, model, output))
    assert f"Going on after {n} of {n} steps" in said
    assert output.read_bytes() == expected and os.listdir(tmp_path) == ["out"]
    assert loaded == layers


@pytest.mark.parametrize("command", COMMANDS)
def test_a_state_is_saved_only_when_it_is_time(command, model, undisturbed, tmp_path, monkeypatch):
    """A pass that is finished is always noted, with all of its steps."""
    expected, _ = undisturbed(command)
    monkeypatch.setattr(passes, "PATIENCE", 1e9)
    saved = []
    save = Passes.save
    monkeypatch.setattr(Passes, "save", lambda s, f, a: saved.append(list(a)) or save(s, f, a))
    invoke(*words(command, model, tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == expected
    if command == "measure":  # the first of a run, for nobody knows yet how long one takes
        assert saved == [["hidden"]]
    else:
        assert len(saved) == (2 if command == "imatrix" else 1)
        assert "hidden" in saved[0] and all("hidden" not in state for state in saved[1:])


@pytest.mark.parametrize(
    "metrics", [("activation",), ("gradient",), ("block", "kld"), ("imatrix",)]
)
def test_what_is_kept_is_known_beforehand(metrics, model, tmp_path, monkeypatch):
    seen, note = [], Passes.note

    def noting(self, units):
        seen.append(sum(p.stat().st_size for p in (tmp_path / ".out.states").iterdir()))
        note(self, units)

    monkeypatch.setattr(Passes, "note", noting)
    checkpoint = Checkpoint.open(model)
    if metrics == ("imatrix",):
        works = [IMPORTANCE]
        invoke("imatrix", model, "-o", tmp_path / "out", *FEW)
    else:
        works = of_metrics(metrics, checkpoint)
        asked = [word for metric in metrics for word in ("--metric", metric)]
        invoke("measure", model, "-o", tmp_path / "out", *FEW, *asked)
    facts = checkpoint, tuple(works), 256, 64, "cpu", tmp_path / "out", 0
    none, kept = (LayerwiseRun(*facts, saves=saves).needs().disk for saves in (False, True))
    assert 0.7 * (kept - none) < max(seen) <= kept - none


def test_a_damaged_state_is_not_taken_up(model, undisturbed, loaded, tmp_path):
    stopped("imatrix", model, tmp_path / "out", 2)
    state = tmp_path / ".out.states" / ".imatrix.1.partial"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    loaded.clear()
    said = invoke(*words("imatrix", model, tmp_path / "out"))
    assert "Going on after 1 of 3 steps" in said and loaded == [1, 2]
    assert (tmp_path / "out").read_bytes() == undisturbed("imatrix")[0]


def test_another_job_says_what_differs(model, undisturbed, tmp_path):
    """Refused with --resume required, begun anew without."""
    stopped("measure", model, tmp_path / "out", 2)
    before = files(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("Other words, over and over again. " * 200)
    other = words("measure", model, tmp_path / "out", "--calibration", text)
    said = invoke(*other, "--resume", "required", code=65)
    assert "cannot be continued" in said
    assert "calibration text was built-in and is text.txt" in said, said
    assert files(tmp_path) == {**before, "text.txt": text.read_bytes()}
    fp4 = words("measure", model, tmp_path / "out", "--quant-type", "fp4")
    said = invoke(*fp4, "--resume", "required", code=65)
    assert "quant type was nf4 and is fp4" in said
    assert "it starts over; not as it was: calibration t" in invoke(*other)
    assert sorted(os.listdir(tmp_path)) == ["out", "text.txt"]
    assert (tmp_path / "out").read_bytes() != undisturbed("measure")[0]


def files(folder) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_required_without_anything_to_go_on_with(model, tmp_path):
    said = invoke(*words("imatrix", model, tmp_path / "out", "--resume", "required"), code=66)
    assert "There is no interrupted run on" in said and not os.listdir(tmp_path)


def test_never_removes_what_there_is(model, undisturbed, loaded, tmp_path):
    stopped("imatrix", model, tmp_path / "out", 2)
    loaded.clear()
    invoke(*words("imatrix", model, tmp_path / "out", "--resume", "never"))
    assert os.listdir(tmp_path) == ["out"] and loaded == [0, 1, 2]


def test_an_older_output_stays_without_force(model, tmp_path):
    """Whether it was there before or came while the run was interrupted."""
    output = tmp_path / "out"
    invoke(*words("imatrix", model, output))
    older = output.read_bytes()
    assert "exists already" in invoke(*words("imatrix", model, output), code=73)
    stopped("imatrix", model, output, 1, "--force")
    before = files(tmp_path)
    assert "exists already" in invoke(*words("imatrix", model, output), code=73)
    assert files(tmp_path) == before
    assert "Going on after 1 of 3" in invoke(*words("imatrix", model, output, "--force"))
    assert output.read_bytes() == older and os.listdir(tmp_path) == ["out"]


def test_a_source_that_changes_meanwhile_is_not_measured(tmp_path, monkeypatch):
    model = tiny_model(tmp_path / "model")
    done = Passes.note

    def changing(self, units):
        os.utime(model / "model.safetensors", (1, 1))
        done(self, units)

    monkeypatch.setattr(Passes, "note", changing)
    (tmp_path / "to").mkdir()
    said = invoke(*words("imatrix", model, tmp_path / "to" / "out"), code=65)
    assert "changed while it was being read" in said and not os.listdir(tmp_path / "to")


def test_faults_at_some_operations(tmp_path):
    """Of some fifty; scripts/check_reliability.py has all of them, and all faults."""
    job = faults.layer_jobs(tiny_model(tmp_path / "model"), tmp_path)["measure"]
    found = faults.campaign(tmp_path / "measure", [job], ["kill", "EIO", "power", "ENOSPC"], 18)
    assert len(found) > 8 and len({c["struck"].split()[0] for c in found}) >= 4
    wrong = {(c["kind"], c["at"], c["struck"]): faults.what_is_wrong(c) for c in found}
    assert not {where: what for where, what in wrong.items() if what}
    assert sum("Going on after" in (c["second_error"] or "") for c in found) > len(found) // 2


# --- signals, to the command as it is -----------------------------------------------------------

CHILD = """
import sys, time
from quant.calibration import passes
from quant.calibration.streamed_model import StreamedModel
from quant.cli import cli
passes.PATIENCE = 0
load = StreamedModel._load
def slow(self, i, n):
    print("layer", i, flush=True)
    time.sleep(0.2)
    return load(self, i, n)
StreamedModel._load = slow
cli.main(sys.argv[1:])
"""


def started(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip


def signalled(number: int, n_layers: int, *arguments) -> tuple[int, int, str]:
    """The command with a signal when that layer is loaded: exit code, layers loaded, messages."""
    with started(*arguments) as child:
        n = 0
        for line in child.stdout:
            n += line.startswith("layer")
            if line.startswith("layer") and n == n_layers:
                child.send_signal(number)
        said = child.stderr.read()
    assert "Traceback" not in said
    return child.returncode, n, said


def test_killed_it_goes_on(model, undisturbed, loaded, tmp_path):
    """Twice, in other passes; the third run ends it."""
    expected, layers = undisturbed("measure")
    loaded.clear()
    arguments = words("measure", model, tmp_path / "out")
    n_loaded = []
    for n in (5, 7):
        code, n_seen, _ = signalled(signal.SIGKILL, n, *arguments)
        assert code == -signal.SIGKILL
        n_loaded.append(n_seen)
    said = invoke(*arguments)
    assert (tmp_path / "out").read_bytes() == expected and os.listdir(tmp_path) == ["out"]
    assert re.search(r"Going on after \d+ of 15 steps", said)
    assert sum(n_loaded) + len(loaded) <= len(layers) + 2  # those in hand when it was killed


def test_sigterm_finishes_the_layer_and_prints_the_command(model, undisturbed, loaded, tmp_path):
    expected, layers = undisturbed("measure")
    loaded.clear()
    arguments = words("measure", model, tmp_path / "out")
    code, n_loaded, said = signalled(signal.SIGTERM, 8, *arguments)
    assert code == 75 and n_loaded == 8, said
    assert "Stopping when the layer in hand is finished" in said
    command = re.search("Go on with: qwq-quant (.*)", said)[1]
    assert shlex.split(command) == arguments
    invoke(*arguments)
    assert (tmp_path / "out").read_bytes() == expected
    assert loaded == layers[8:]
