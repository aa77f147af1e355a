"""evaluate that goes on after an interrupted run: the same bytes, nothing measured twice."""

import errno
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from evaluation_helpers import fill_disk, kill_itself, sleep_long, to_gguf

from quant.cli import cli
from quant.durable import journal_path
from quant.errors import BadInput, OutputFailed
from quant.evaluation import evaluate as evaluation_room
from quant.evaluation.answer_file import AnswerFile
from quant.evaluation.evaluate import PAGE, WORK
from quant.evaluation.isolation import run_isolated
from quant.evaluation.lm_eval_requests import Requests
from quant.journal import Stopped, StopRequest

ASKED = ("--context", 32, "--tokens", 2400)


@pytest.fixture(scope="module")
def models(tiny_qwq, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("resume models")
    names = ("F32", "F16", "Q4_0")
    return {name: to_gguf(tiny_qwq, name, folder / f"{name}.gguf") for name in names}


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory) -> Path:
    """A report of F16 and Q4_0."""
    output = tmp_path_factory.mktemp("undisturbed") / "r"
    done = run(models, "F16", "Q4_0", "-o", output, *ASKED)
    assert done.exit_code == 0, done.output
    return output


def arguments(models, *words) -> list[str]:
    return ["evaluate", *(str(models.get(word, word)) for word in ("F32", *words))]


def run(models, *words):
    """The command, in this process."""
    return CliRunner().invoke(cli, arguments(models, *words))


def started(words) -> subprocess.Popen:
    """The command, in a process that can be killed."""
    code = "from quant.cli import main; main()"
    command = [sys.executable, "-c", code, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_units(process: subprocess.Popen, output: Path, n: int) -> None:
    """Until so many are in the journal; they are behind its first line."""
    path, deadline = journal_path(output / PAGE), time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b'{"unit"') < n:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)


def files(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def interrupted(models, output, n_units, *words, monkeypatch):
    """The command, stopped after so many units as Ctrl-C would."""
    stop = StopRequest()
    hear = evaluation_room._hear

    def counting(listener, journal, unit):
        inner = hear(listener, journal, unit)

        def heard(kind, *rest):
            if kind == "advance" and journal._n_done + 1 == n_units:
                stop.make()
            inner(kind, *rest)

        return heard

    with monkeypatch.context() as patch:
        patch.setattr(evaluation_room, "_hear", counting)
        patch.setattr("quant.journal.StopRequest", lambda: stop)
        return run(models, *words, "-o", output, *ASKED)


# --- the same bytes, nothing twice ------------------------------------------------------------


def test_stopped_killed_and_stopped_again_it_gives_the_same_report(models, undisturbed, tmp_path):
    """SIGTERM in the reference, SIGKILL in the first candidate, SIGINT in the second."""
    output = tmp_path / "r"
    words = arguments(models, "F16", "Q4_0", "-o", output, *ASKED)
    n_windows = json.loads((undisturbed / "results.json").read_text())["text"]["n_windows"]
    for number, n_units in (
        (signal.SIGTERM, 5), (signal.SIGKILL, n_windows + 5), (signal.SIGINT, 2 * n_windows + 5)
    ):  # fmt: skip
        process = started(words)
        wait_for_units(process, output, n_units)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert "Traceback" not in error and not (output / PAGE).exists()
        if number == signal.SIGKILL:
            assert process.returncode == -number
            continue
        assert process.returncode == 75, error
        assert "Stopping when the step in hand is finished" in error
        assert "steps are finished and kept in hidden files beside" in error
        (command,) = [line for line in error.splitlines() if line.startswith("Go on with: ")]
        words = shlex.split(command.removeprefix("Go on with: qwq-quant "))
    done = CliRunner().invoke(cli, [*words, "--resume", "required"])
    assert done.exit_code == 0, done.output
    assert "Going on after" in done.stderr and "F32.gguf reads: " not in done.stderr
    assert files(output) == files(undisturbed)


def test_a_run_that_died_while_it_wrote_the_report(models, undisturbed, tmp_path, monkeypatch):
    """Some files have their names: the next run may replace them, without --force."""
    kept = tmp_path / "kept.kld"
    words = ("F16", "Q4_0", "-o", tmp_path / "r", "--base-file", kept, *ASKED)
    with monkeypatch.context() as patch:
        patch.setattr("quant.evaluation.report._check_json", stop_now)
        assert run(models, *words).exit_code == 75
    assert (tmp_path / "r" / PAGE).exists() and kept.exists()
    assert not (tmp_path / "r" / "results.json").exists()
    calls = []
    monkeypatch.setattr(
        evaluation_room, "_hear", lambda *rest: lambda *message: calls.append(message)
    )
    done = run(models, *words)
    assert done.exit_code == 0, done.output
    assert [m for m in calls if m[0] == "advance"] == []
    assert files(tmp_path / "r") == files(undisturbed)


def stop_now(folder, force):
    if (folder / PAGE).exists():
        raise Stopped("Stopped.")


# --- --resume ---------------------------------------------------------------------------------


def test_the_modes(models, tmp_path, monkeypatch):
    output = tmp_path / "r"
    nothing = run(models, "Q4_0", "-o", output, *ASKED, "--resume", "required")
    assert nothing.exit_code == 66 and "no interrupted run" in nothing.stderr
    assert not output.exists()
    stopped = interrupted(models, output, 7, "Q4_0", monkeypatch=monkeypatch)
    assert stopped.exit_code == 75 and "7 steps" in stopped.stderr
    before = files(output)
    (tmp_path / "t.txt").write_text("one and two and three " * 200)
    others = {
        ("--context", 64): "context was 32 and is 64",
        ("--tokens", 99): "tokens was 2400 and is 99",
        ("--text", tmp_path / "t.txt"): "content of the text",
        ("--loops",): "loops",
    }
    for words, difference in others.items():
        other = run(models, "Q4_0", "-o", output, *ASKED, *words, "--resume", "required")
        assert other.exit_code == 65 and difference in other.stderr, other.stderr
        assert "cannot be continued" in other.stderr and "--resume never" in other.stderr
    assert files(output) == before
    over = run(models, "Q4_0", "-o", output, *ASKED, "--tokens", 200)
    assert over.exit_code == 0 and "starts over" in " ".join(over.stderr.split())
    assert "tokens was 2400 and is 200" in " ".join(over.stderr.split())
    assert not [name for name in files(output) if name.startswith(".")]


def test_a_changed_model_is_another_job_and_a_changed_candidate_is_not(
    models, tmp_path, monkeypatch
):
    copies = {n: Path(shutil.copy(models[n], tmp_path / f"{n}.gguf")) for n in ("F32", "F16")}
    n_windows = 2400 // 32  # about: each category is cut by itself
    stopped = interrupted(copies, tmp_path / "r", n_windows + 9, "F16", monkeypatch=monkeypatch)
    assert stopped.exit_code == 75
    shutil.copy(models["Q4_0"], copies["F16"])
    done = run(copies, "F16", "-o", tmp_path / "r", *ASKED, "--resume", "required")
    assert done.exit_code == 0 and "is not as it was" in " ".join(done.stderr.split())
    klds = json.loads((tmp_path / "r" / "results.json").read_text())["candidates"]
    assert klds[0]["statistics"]["kld"]["value"] > 1e-3  # Q4_0's, not F16's
    stopped = interrupted(copies, tmp_path / "r2", 9, "F16", monkeypatch=monkeypatch)
    copies["F32"].touch()
    other = run(copies, "F16", "-o", tmp_path / "r2", *ASKED, "--resume", "required")
    assert other.exit_code == 65 and "files of the model" in other.stderr


def test_never_keeps_nothing_and_takes_nothing(models, tmp_path, monkeypatch):
    output = tmp_path / "r"
    interrupted(models, output, 7, "F16", monkeypatch=monkeypatch)
    calls = []
    hear = evaluation_room._hear

    def dying(listener, journal, unit):
        inner = hear(listener, journal, unit)

        def heard(kind, *rest):
            inner(kind, *rest)
            calls.append((kind, *rest))
            if kind == "advance":
                raise KeyboardInterrupt

        return heard

    monkeypatch.setattr(evaluation_room, "_hear", dying)
    ended = run(models, "F16", "-o", output, *ASKED, "--resume", "never")
    assert ended.exit_code == 130 and "Going on" not in ended.stderr
    assert [total for kind, *rest in calls if kind == "begin" for total in rest[1:]] == [75]
    assert not list(output.parent.glob("r/.*"))


# --- what failed ------------------------------------------------------------------------------


def test_a_candidate_that_was_left_out_can_be_mended(models, tmp_path, monkeypatch):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"no")
    words = ("F16", bad, "-o", tmp_path / "r", *ASKED)
    done = run(models, *words)
    said = " ".join(done.stderr.split())
    assert done.exit_code == 65 and "What was measured is kept" in said and WORK in said
    assert run(models, *words).exit_code == 73  # it does not replace the report by itself
    shutil.copy(models["Q4_0"], bad)
    begun = []
    hear = evaluation_room._hear

    def noting(listener, journal, unit):
        inner = hear(listener, journal, unit)

        def heard(kind, *rest):
            begun.extend(rest[:1] if kind == "begin" and rest[1] else [])
            inner(kind, *rest)

        return heard

    monkeypatch.setattr(evaluation_room, "_hear", noting)
    done = run(models, *words, "--force")
    assert done.exit_code == 0 and begun == ["bad.gguf reads"], done.output
    assert not [name for name in files(tmp_path / "r") if name.startswith(".")]


def test_a_full_disk_ends_the_run_and_keeps_what_is_measured(models, tmp_path, monkeypatch):
    """It is no fault of the candidate's."""
    isolated = run_isolated

    def full_at_last(work, arguments, *rest):
        if work is evaluation_room.measure_candidate and arguments[0] == models["Q4_0"]:
            work, arguments = fill_disk, ()
        return isolated(work, arguments, *rest)

    words = ("F16", "Q4_0", "-o", tmp_path / "r", *ASKED)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation_room, "run_isolated", full_at_last)
        full = run(models, *words)
    assert full.exit_code == 74 and "Go on with" in full.stderr and "left out" not in full.stderr
    assert (tmp_path / "r" / WORK).is_dir() and not (tmp_path / "r" / PAGE).exists()


def test_causes_survive_the_way_between_processes():
    with pytest.raises(OutputFailed) as caught:
        run_isolated(fill_disk, (), lambda *m: None)
    assert caught.value.__cause__.errno == errno.ENOSPC
    with pytest.raises(BadInput) as caught:
        run_isolated(kill_itself, (), lambda *m: None)
    assert isinstance(caught.value.__cause__, ChildProcessError)


def test_nobody_waits_for_a_process_when_the_user_wants_to_stop(tmp_path):
    file = tmp_path / "pid"

    def tick():
        if file.exists() and file.read_text():
            raise Stopped("Stopped.")

    with pytest.raises(Stopped):
        run_isolated(sleep_long, (file,), lambda *m: None, tick)
    assert not Path("/proc", file.read_text()).exists()


# --- answers on the disk ----------------------------------------------------------------------


def test_a_line_that_is_no_answer_ends_what_counts(tmp_path):
    path = tmp_path / "a.jsonl"
    with AnswerFile(path) as file:
        for answer in ("a", {"b": 1}, 3):
            file.append(answer)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\n\0\0\0\n" + b'"torn')
    with AnswerFile(path) as file:
        assert file.answers == ["a", {"b": 1}, 3]
        file.append(4)
    assert path.read_bytes() == whole + b"4\n"


def test_a_request_is_made_once(tmp_path):
    asked, said = [], []

    def answer(*each):
        asked.append(each)
        return sum(each) / 7

    for n_new in (2, 0):
        said.clear()
        with AnswerFile(tmp_path / "r.jsonl") as file:
            requests = Requests(file, lambda *message: said.append(message))
            found = requests.answers("sum", [(1, 2), (3, 4), (1, 2)], answer, "sums")
            assert found == [3 / 7, 1, 3 / 7] and asked == [(1, 2), (3, 4)]
            assert said == [("begin", "sums", n_new), *[("advance", 1)] * n_new]
            assert requests.answers(f"other {n_new}", [(1, 2)], lambda *each: 0, "") == [0]
