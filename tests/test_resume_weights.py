"""dynamic-4bit and gptq that go on after an interruption: the same bytes, nothing done twice."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from quant import journal, model_folder, write_4bit, write_gptq
from quant.calibration import passes
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens
from quant.checkpoint import Checkpoint
from quant.cli import cli
from quant.cli.progress import Progress
from quant.durable import PendingFolder
from quant.dynamic_4bit import Budget, plan_4bit
from quant.errors import BadInput, CannotCreate, InputMissing
from quant.formats.gptq import Gptq
from quant.formats.nf4 import Bnb4bit
from quant.gptq_model import plan_gptq
from quant.journal import Resume, Stopped
from quant.report.choice import Result

PLAIN = Budget("share", 0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return faults.tiny_model(tmp_path_factory.mktemp("resume") / "model")


# --- whatever happens, at any operation -------------------------------------------------------

SAMPLES = {
    ("4bit", "4bit replacing"): (("kill", "SIGTERM", "power", "ENOSPC"), 30),
    ("4bit feedback", "gptq"): (("kill", "SIGTERM"), 45),
}
"""Jobs, the faults they meet, and at every so manieth operation; scripts/check_reliability.py has
more of them."""

CASES = [(job, kind) for jobs, (kinds, _) in SAMPLES.items() for job in jobs for kind in kinds]


@pytest.fixture(scope="module")
def cases(model, tmp_path_factory):
    """(job, kind) -> what came of it; in two processes."""
    folder = tmp_path_factory.mktemp("faults")
    jobs = faults.folder_jobs(model, folder)

    def of(names: tuple[str, ...]) -> list[dict]:
        kinds, every = SAMPLES[names]
        chosen = [{**jobs[name], "folder": name, "every": every} for name in names]
        return faults.campaign(folder, chosen, kinds)

    with ThreadPoolExecutor(2) as pool:
        found = [case for part in pool.map(of, SAMPLES) for case in part]
    return {key: [c for c in found if (c["job"], c["kind"]) == key] for key in CASES}


@pytest.mark.parametrize(("job", "kind"), CASES)
def test_nothing_is_lost(job, kind, cases):
    found = cases[job, kind]
    assert len(found) > 2
    wrong = {(c["at"], c["struck"]): faults.what_is_wrong(c) for c in found}
    assert not {n: w for n, w in wrong.items() if w}


def went_on_after(case: dict) -> int:
    """So many units of the run before were used."""
    words = (case["second_error"] or "").split()
    return int(words[words.index("after") + 1]) if "after" in words else 0


@pytest.mark.parametrize(("job", "kind"), [case for case in CASES if case[1] != "power"])
def test_a_later_end_leaves_more_to_go_on_with(job, kind, cases):
    found = [case for case in cases[job, kind] if case["second_error"] is not None]
    after = [went_on_after(case) for case in found]
    assert after == sorted(after) and after[-1] > after[0], after


@pytest.mark.parametrize("job", ["4bit", "gptq"])
def test_the_user_who_stops_it_is_told_how_to_go_on(job, cases):
    stopped = [case for case in cases[job, "SIGTERM"] if case["code"] == 75]
    assert len(stopped) > 1
    for case in stopped:
        text = " ".join(case["error"].split())
        assert "Stopping when the step in hand is finished" in text
        assert "finished and kept" in text and "Go on with: qwq-quant" in text
        assert any(name.startswith(".m.journal") for name in case["between"])


# --- nothing is done twice --------------------------------------------------------------------


def plan_of(folder, **format):
    return plan_4bit(Checkpoint.open(folder), Bnb4bit(**format), PLAIN)


def tokens_of(seed=0, n_sequences=8, seq_len=32) -> Tokens:
    ids = np.random.default_rng(seed).integers(0, 4090, (n_sequences, seq_len))
    return Tokens(ids, "random", "0" * 64)


@contextmanager
def stopping_at(n: int):
    """The user wants to stop at the n-th unit: a Resume to write with."""
    resume, append, units = Resume(), journal.Journal.append, []

    def counted(self, *unit, **how):
        units.append(unit)
        if len(units) == n:
            resume.stop.make()
        append(self, *unit, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.Journal, "append", counted)
        yield resume


def interrupt(plan, output, n_units: int, **how) -> Stopped:
    with stopping_at(n_units) as resume, pytest.raises(Stopped) as stopped:
        write_4bit.write_4bit(plan, output, resume=resume, command=("a b",), **how)
    return stopped.value


def files(folder) -> dict[str, bytes]:
    """All but the manifest's time."""
    return {
        p.relative_to(folder).as_posix(): faults.TIMES.sub(b"", p.read_bytes())
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    write_4bit.write_4bit(plan_of(model), folder, command=("a b",))
    return files(folder)


def test_tensors_are_not_encoded_again(model, undisturbed, tmp_path, monkeypatch):
    plan, read, done = plan_of(model), [], []
    stopped = interrupt(plan, tmp_path / "out", 8)
    assert "8 of 15 tensors are finished" in stopped.why
    assert stopped.next_step == "Go on with: qwq-quant 'a b'"
    assert sorted(os.listdir(tmp_path)) == [".out.journal", ".out.partial"]
    read_16bit = model_folder.Source.read_16bit

    def noted(self, *rows):
        read.append(self.info.name)
        return read_16bit(self, *rows)

    monkeypatch.setattr(model_folder.Source, "read_16bit", noted)
    write_4bit.write_4bit(plan, tmp_path / "out", progress=done.append, command=("a b",))
    assert set(read) == {t.name for t in plan.tensors[8:]}
    weights = [plan.checkpoint.tensors[t.name].n_weights for t in plan.tensors]
    assert done == [sum(weights[:8]), *weights[8:]]
    assert files(tmp_path / "out") == undisturbed and os.listdir(tmp_path) == ["out"]


class Dies(Exception):
    """Stands for a kill: nothing is saved when it comes."""


def dying_after(method):
    """A method whose caller dies as soon as it is done."""

    def dying(self):
        method(self)
        raise Dies

    return dying


@contextmanager
def gptq_calls(dies_at: int | None = None):
    """The shapes of the linears that GPTQ is run on; it dies at one of them."""
    gptq, seen = write_gptq.gptq, []

    def noted(W, *rest):
        seen.append(tuple(W.shape))
        if len(seen) == dies_at:
            raise Dies
        return gptq(W, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_gptq, "gptq", noted)
        yield seen


def singular(folder, target) -> Path:
    """The model, two columns of its first layer's inputs the same: H needs a damping."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    for name in ("model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"):
        tensors[name][..., 1] = tensors[name][..., 0]
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(("patience", "n_layers_done"), [(0, 2), (1e9, 1)])
def test_layers_are_not_quantized_again(
    patience, n_layers_done, made_models, tmp_path, monkeypatch
):
    """It dies in the third of three layers of seven linears each. Where the states behind the
    second were not saved, that is made again too. What the first one needed is not forgotten.
    """
    monkeypatch.setattr(passes, "PATIENCE", patience)
    source = Checkpoint.open(singular(made_models("qwen2")[0], tmp_path / "source"))
    plan, tokens, steps = plan_gptq(source, Gptq(4, 64), 0.0, True), tokens_of(), []
    once = write_gptq.write_gptq(plan, tokens, tmp_path / "once")
    with gptq_calls(dies_at=18), pytest.raises(Dies):
        write_gptq.write_gptq(plan, tokens, tmp_path / "out")
    with gptq_calls() as again:
        found = write_gptq.write_gptq(plan, tokens, tmp_path / "out", progress=steps.append)
    assert len(again) == 21 - 7 * n_layers_done and steps == [n_layers_done, *[1] * len(steps[1:])]
    assert "model.layers.0.self_attn.q_proj" in found.damped and found.damped == once.damped
    assert files(tmp_path / "out") == files(tmp_path / "once")
    assert sorted(os.listdir(tmp_path)) == ["once", "out", "source"]


def test_an_end_before_any_state_is_saved(made_models, tmp_path):
    """Linears of the first layer are there, but nothing to go on with behind them."""
    plan = plan_gptq(Checkpoint.open(made_models("qwen2")[0]), Gptq(8, 64), 0.01, True)
    write_gptq.write_gptq(plan, tokens_of(), tmp_path / "once")
    with gptq_calls(dies_at=5), pytest.raises(Dies):
        write_gptq.write_gptq(plan, tokens_of(), tmp_path / "out")
    said: list[str] = []
    with gptq_calls() as again:
        write_gptq.write_gptq(plan, tokens_of(), tmp_path / "out", resume=Resume(say=said.append))
    assert len(again) == 21 and f"Going on after {len(plan.stays)} steps of" in said[0]
    assert files(tmp_path / "out") == files(tmp_path / "once")


LOST = {
    "model.layers.1.mlp.up_proj.qweight": 1,
    "lm_head.weight": 0,
    "model.embed_tokens.weight": 0,
}
"""And how many layers are left to go on behind."""


@pytest.mark.parametrize("name", LOST)
def test_lost_weights_take_the_states_behind_them_with_them(
    name, made_models, tmp_path, monkeypatch
):
    """The power fails in the third layer, and one tensor did not reach the disk."""
    monkeypatch.setattr(passes, "PATIENCE", 0)
    plan = plan_gptq(Checkpoint.open(made_models("qwen2")[0]), Gptq(4, 64), 0.01, True)
    write_gptq.write_gptq(plan, tokens_of(), tmp_path / "once")
    with gptq_calls(dies_at=18), pytest.raises(Dies):
        write_gptq.write_gptq(plan, tokens_of(), tmp_path / "out")
    lost = load_file(tmp_path / "once" / "model.safetensors")[name]
    lost, path = lost.view(torch.uint8).numpy().tobytes(), tmp_path / ".out.partial"
    path = path / ".model.safetensors.partial"
    path.write_bytes(path.read_bytes().replace(lost, bytes(len(lost))))
    forget_marks(tmp_path / ".out.journal")
    with gptq_calls() as again:
        write_gptq.write_gptq(plan, tokens_of(), tmp_path / "out")
    assert len(again) == 21 - 7 * LOST[name]
    assert files(tmp_path / "out") == files(tmp_path / "once")


def forget_marks(path: Path) -> None:
    """As if nothing of it were known to have reached the disk."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if b"on_disk" not in line))


def test_who_was_ended_behind_the_last_rename_is_done(model, undisturbed, tmp_path, monkeypatch):
    """No --force is needed, nothing is written again, and what was found is told again."""
    row = Result("source", 1, 2, 3.0, 0.5, None, None, None)

    def check(plan, folder):
        return (row,)

    with monkeypatch.context() as patch, pytest.raises(Dies):
        patch.setattr(PendingFolder, "publish", dying_after(PendingFolder.publish))
        write_4bit.write_4bit(plan_of(model), tmp_path / "out", check=check)
    before = os.stat(tmp_path / "out").st_ino
    written = write_4bit.write_4bit(plan_of(model), tmp_path / "out", check=pytest.fail)
    assert written.results == (row,) and written.folder == tmp_path / "out"
    assert written.nbytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert os.listdir(tmp_path) == ["out"] and os.stat(tmp_path / "out").st_ino == before
    with pytest.raises(CannotCreate, match="exists already"):
        write_4bit.write_4bit(plan_of(model), tmp_path / "out")


# --- only the same job goes on ----------------------------------------------------------------


def test_another_job_is_refused_or_starts_over_and_says_why(model, undisturbed, tmp_path):
    interrupt(plan_of(model, quant_type="fp4", double_quant=False), tmp_path / "out", 9)
    left = files(tmp_path)
    with pytest.raises(BadInput) as refused:
        write_4bit.write_4bit(plan_of(model), tmp_path / "out", resume=Resume("required"))
    why = "Not as it was: double quant was False and is True; quant type was fp4 and is nf4."
    assert refused.value.why == why and files(tmp_path) == left
    said: list[str] = []
    how = {"command": ("a b",), "resume": Resume(say=said.append)}
    write_4bit.write_4bit(plan_of(model), tmp_path / "out", **how)
    assert "starts over; not as it was: double quant was False" in said[0]
    assert files(tmp_path / "out") == undisturbed and os.listdir(tmp_path) == ["out"]
    with pytest.raises(InputMissing, match="no interrupted run"):
        resume = Resume("required")
        write_4bit.write_4bit(plan_of(model), tmp_path / "out", resume=resume, force=True)
    assert files(tmp_path / "out") == undisturbed


def test_other_tokens_are_another_job(made_models, tmp_path):
    """--tokens, or another text of the same length."""
    plan = plan_gptq(Checkpoint.open(made_models("qwen2")[0]), Gptq(4, 64), 0.01, True)
    with stopping_at(8) as resume, pytest.raises(Stopped):
        write_gptq.write_gptq(plan, tokens_of(), tmp_path / "out", resume=resume)
    for tokens, words in (
        (tokens_of(n_sequences=9), "calibration was 256 tokens in sequences of 32 and is 288"),
        (tokens_of(seed=1), "Not as it was: calibration text."),
    ):
        with pytest.raises(BadInput) as refused:
            write_gptq.write_gptq(plan, tokens, tmp_path / "out", resume=Resume("required"))
        assert words in refused.value.why
    config = plan.checkpoint.config
    config["rms_norm_eps"] = 0.5 * config["rms_norm_eps"]  # decides what the layers put out
    with pytest.raises(BadInput, match="cannot be continued") as refused:
        write_gptq.write_gptq(plan, tokens_of(), tmp_path / "out", resume=Resume("required"))
    assert refused.value.why == "Not as it was: config.json."


def test_what_another_job_left_is_no_part_of_the_output(model, undisturbed, tmp_path):
    """Its shards, and the states of a model that this one does not run."""
    interrupt(plan_of(model, quant_type="fp4"), tmp_path / "out", 9)
    (tmp_path / ".out.partial" / "model-00001-of-00002.safetensors").write_text("old")
    (tmp_path / ".out.states").mkdir()
    (tmp_path / ".out.states" / ".quantize.0.partial").write_text("old")
    write_4bit.write_4bit(plan_of(model), tmp_path / "out", command=("a b",))
    assert files(tmp_path / "out") == undisturbed and os.listdir(tmp_path) == ["out"]


# --- the commands -----------------------------------------------------------------------------


def loads(command, dies_at: int | None = None) -> tuple[int, int]:
    """Run it; its exit code, and how many layers it loaded before it died at one of them."""
    load, seen = StreamedModel._load, []

    def noted(self, *layer):
        seen.append(layer)
        if len(seen) == dies_at:
            raise Dies
        return load(self, *layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamedModel, "_load", noted)
        code = CliRunner().invoke(cli, [str(word) for word in command]).exit_code
    return code, len(seen)


def test_no_stage_is_done_again(model, tmp_path, monkeypatch):
    """Measuring loads the one layer three times, checking three times; all of it is made anew that
    is small: figures, report, card.
    """
    monkeypatch.setattr(passes, "PATIENCE", 0)
    monkeypatch.setattr("quant.cli.calibrating.CHECKED_TOKENS", 512)
    few = ("--tokens", 256, "--seq-len", 64, "--device", "cpu")
    command = ("dynamic-4bit", model, "-o", tmp_path / "out", "--budget", "2kB", *few)
    assert loads(command) == (0, 6)
    expected = files(tmp_path / "out")
    assert {"README.md", "sensitivity.json", "figures/report.html"} < expected.keys()
    for dies_at in (3, 5):
        shutil.rmtree(tmp_path / "out")
        assert loads(command, dies_at) == (70, dies_at)
        assert loads(command) == (0, 6 - (dies_at - 1))
        assert files(tmp_path / "out") == expected and os.listdir(tmp_path) == ["out"]
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(PendingFolder, "publish", dying_after(PendingFolder.publish))
        assert loads(command) == (70, 6)
    assert loads(command) == (0, 0) and files(tmp_path / "out") == expected
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("how", [["dynamic-4bit", "--budget", "2kB"], ["dynamic-4bit", "--budget",
                         "0", "--no-check"], ["gptq", "--group-size", "32"]])  # fmt: skip
def test_a_second_run_is_refused_while_the_first_has_only_begun(how, model, tmp_path):
    with write_4bit.run_4bit(plan_of(model), tmp_path / "out", False, (), None):
        few = ("--tokens", "256", "--seq-len", "64")
        command = [how[0], str(model), "-o", str(tmp_path / "out"), *how[1:], *few]
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 73 and "Another run is writing" in result.stderr, result.output
        assert "Measuring" not in result.stderr
    assert not os.listdir(tmp_path)


def test_the_time_left_is_reckoned_without_what_was_done_before(monkeypatch, capsys):
    """Sixty of a hundred steps by an earlier run, four by this one in 40 seconds."""
    now = [0.0]
    monkeypatch.setattr("quant.cli.progress.time.monotonic", lambda: now[0])
    with Progress("Layers", 100) as bar:
        now[0] = 50.0
        bar.advance(60)
        for _ in range(4):
            now[0] += 10.0
            bar.advance(1)
        now[0] += 10.0
        bar.advance(1)
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "Layers: 60 of 100"
    assert shown[1] == "Layers: 62 of 100, 6 min 20 s left"
