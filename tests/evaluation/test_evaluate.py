"""Many candidates in one run: the figures, what is left out, resuming, the files."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT
from evaluation_helpers import kill_itself, raise_other, raise_ours, talk, to_gguf

from quant import errors
from quant.cli.evaluate import command
from quant.errors import BadInput, CannotCreate, OutputFailed
from quant.evaluation import evaluate as evaluation_room
from quant.evaluation import measuring
from quant.evaluation.base_file import encode_header, encode_rows
from quant.evaluation.chunks import cut_chunks
from quant.evaluation.evaluate import PAGE, WORK, Model, evaluate
from quant.evaluation.isolation import run_isolated
from quant.evaluation.measuring import Wishes
from quant.evaluation.questions import Question
from quant.evaluation.runners import open_runner
from quant.evaluation.window_file import WindowFile
from quant.gguf_file import open_gguf
from quant.journal import Journal, Resume
from quant.texts import held_out_texts

CATEGORIES = ("code", "english", "reasoning", "language")

N_CTX, N_TOKENS = 128, 1200


class Silent:
    """A listener that remembers."""

    def __init__(self):
        self.begun, self.notes, self.n = [], [], 0

    def begin(self, label, total):
        self.begun.append((label, total))

    def advance(self, n):
        self.n += n

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def models(tiny_qwq, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    names = ("F32", "Q8_0", "Q4_0", "Q2_K")
    return {name: to_gguf(tiny_qwq, name, folder / f"{name}.gguf") for name in names}


@pytest.fixture
def wishes() -> Wishes:
    return Wishes(held_out_texts(), N_CTX, N_TOKENS)


def measure(models, names, wishes, output, listener=None, reference="F32", **options):
    return evaluate(
        Model(reference, models[reference]),
        [Model(name, models[name]) for name in names],
        wishes,
        output,
        listener or Silent(),
        **options,
    )


def test_divergence_grows_as_bits_shrink(models, wishes, tmp_path):
    found = measure(models, ["F32", "Q8_0", "Q4_0", "Q2_K"], wishes, tmp_path / "r")
    klds = [c.statistics.kld.value for c in found.candidates]
    assert abs(klds[0]) < 1e-5 < klds[1] < klds[2] < klds[3]
    same = [c.statistics.same_top.value for c in found.candidates]
    assert same[0] == 1 and same == sorted(same, reverse=True)
    assert found.candidates[0].ppl == found.reference.ppl
    assert [c.nbytes for c in found.candidates] == [m.stat().st_size for m in models.values()]
    assert found.candidates[1].bits_per_weight == pytest.approx(8.6, abs=0.2)
    assert all(sum(c.dp_histogram) == c.statistics.n_positions for c in found.candidates)
    assert found.failed == () and not (tmp_path / "r" / WORK).exists()
    assert set(found.text["categories"]) == set(CATEGORIES)


def test_it_is_what_two_runners_side_by_side_give(models, wishes, tmp_path):
    """The way over 16-bit log-probabilities on the disk changes the third digit at most."""
    from quant.evaluation.comparison import compare

    found = measure(models, ["Q4_0"], wishes, tmp_path / "r").candidates[0].statistics
    with open_runner(models["F32"]) as a, open_runner(models["Q4_0"]) as b:
        exact = compare(a, b, cut_chunks(a, held_out_texts(), N_CTX, N_TOKENS))
    assert found.ppl == exact.ppl and found.ppl_reference == exact.ppl_reference
    assert found.kld.value == pytest.approx(exact.kld.value, rel=1e-3)
    assert found.dp_rms.value == pytest.approx(exact.dp_rms.value, rel=1e-9)
    for name, part in exact.by_category.items():
        assert found.by_category[name].n_positions == part.n_positions
        assert found.by_category[name].kld.value == pytest.approx(
            part.kld.value, rel=1e-3, abs=1e-5
        )


def test_bad_candidates_are_named_and_the_rest_reported(models, wishes, tmp_path, tiny_qwq):
    from model_makers import make_model

    (tmp_path / "no.gguf").write_bytes(b"x" * 100)
    make_model("qwen2", tmp_path / "small", vocab_size=4095)
    swapped = tmp_path / "swapped"
    shutil.copytree(tiny_qwq, swapped)
    tokenizer = json.loads((swapped / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:2000]
    (swapped / "tokenizer.json").write_text(json.dumps(tokenizer))
    bad = {"no": tmp_path / "no.gguf", "small": tmp_path / "small", "swapped": swapped}
    bad |= {"nan": with_nan(models["Q8_0"], tmp_path / "nan.gguf")}
    bad |= {"hostile": with_hostile_template(tiny_qwq, tmp_path / "hostile")}
    listener = Silent()
    wishes = replace(wishes, questions=(Question("What is 1 + 1?", "1 + 1 = 2"),))
    names = ["no", "Q8_0", "small", "swapped", "nan", "hostile"]
    found = measure(models | bad, names, wishes, tmp_path / "r", listener)
    assert [c.name for c in found.candidates] == ["Q8_0"]
    said = {failed.name: str(failed.error) for failed in found.failed}
    assert "GGUF" in said["no"] and "4095 tokens instead of 4096" in said["small"]
    assert "other tokens" in said["swapped"] and "invalid data" in said["nan"]
    assert "chat template" in said["hostile"] and "512 MiB" in said["hostile"]
    assert sum("left out" in note for note in listener.notes) == 5
    assert "hostile.gguf reads" not in dict(listener.begun)  # it was tried first
    assert (tmp_path / "r" / WORK).is_dir()  # for the run in which they are mended


def with_nan(path: Path, output: Path) -> Path:
    """A copy with one NaN in its last norm."""
    raw = bytearray(path.read_bytes())
    offset = open_gguf(path).tensors["output_norm.weight"].offset
    raw[offset : offset + 4] = np.float32(np.nan).tobytes()
    output.write_bytes(raw)
    return output


def with_hostile_template(source: Path, folder: Path) -> Path:
    """A GGUF of a model whose chat template asks for 10 GB."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ 'a' * 10**10 }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return to_gguf(folder, "Q8_0", folder / "hostile.gguf")


def test_windows_longer_than_the_model_was_made_for_are_noted(models, tiny_qwq):
    said = []
    for path in (models["Q8_0"], tiny_qwq):
        with open_runner(path) as runner:
            for n_ctx in (2048, 2049):
                measuring._warn_of_long_windows(runner, n_ctx, lambda *what: said.append(what))
    assert len(said) == 2 and all("2049 tokens" in s[1] and "2048" in s[1] for s in said)


def test_nothing_is_left_behind_by_what_is_refused(models, wishes, tmp_path):
    with pytest.raises(BadInput, match="too short"):
        measure(models, [], replace(wishes, n_ctx=90_000), tmp_path / "r")
    assert not (tmp_path / "r").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(BadInput, match="too short"):
        measure(models, [], replace(wishes, n_ctx=90_000), tmp_path / "mine")
    assert (tmp_path / "mine").is_dir() and not list((tmp_path / "mine").iterdir())


def test_a_device_that_is_not_there_is_refused_before_any_work(models, tmp_path):
    with pytest.raises(errors.Unavailable, match="meta2"):
        run_command(models["F32"], models["Q8_0"], "-o", tmp_path / "r", "--device", "meta2")
    assert not (tmp_path / "r").exists()


def test_missing_candidates_are_told_first(models, tmp_path):
    done = run_command(models["F32"], tmp_path / "none.gguf", "-o", tmp_path / "r", "--tokens",
                       300, "--context", 64, "--device", "cpu")  # fmt: skip
    assert done.return_value == 65
    assert done.stderr.index("none.gguf is left out") < done.stderr.index("take")
    assert json.loads((tmp_path / "r" / "results.json").read_text())["settings"]["device"] == "cpu"


def test_places_that_cannot_be_written_are_refused_before_any_work(models, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CannotCreate, match="not a folder"):
        run_command(models["F32"], models["Q8_0"], "-o", tmp_path / "file")
    with pytest.raises(CannotCreate, match="no folder"):
        run_command(models["F32"], models["Q8_0"], "-o", tmp_path / "r", "--base-file",
                    tmp_path / "none" / "b.kld")  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_text_shorter_than_a_window(models, tmp_path, wishes):
    (tmp_path / "t.txt").write_text("a few words")
    from quant.texts import read_texts

    short = Wishes(read_texts(tmp_path / "t.txt"), N_CTX)
    with pytest.raises(BadInput, match="too short"):
        measure(models, ["Q8_0"], short, tmp_path / "r")


def test_a_bad_reference_ends_the_run(models, wishes, tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput):
        measure(models | {"no": tmp_path / "no.gguf"}, ["Q8_0"], wishes, tmp_path / "r",
                reference="no")  # fmt: skip


def test_llama_cpps_base_file_can_be_the_reference(models, wishes, tmp_path):
    with open_runner(models["F32"]) as runner:
        chunks = cut_chunks(runner, held_out_texts(), N_CTX, N_TOKENS)
        rows = [encode_rows(x) for x in runner.logits(chunks.inputs, chunks.first)]
    path = tmp_path / "base.kld"
    path.write_bytes(encode_header(chunks, 4096) + b"".join(r.tobytes() for r in rows))
    found = measure(models | {"base": path}, ["Q4_0"], wishes, tmp_path / "r", reference="base")
    own = measure(models, ["Q4_0"], wishes, tmp_path / "r2")
    assert found.candidates[0].statistics.kld == own.candidates[0].statistics.kld
    assert found.candidates[0].bits_per_weight is None
    assert found.reference.ppl.value <= own.reference.ppl.value  # its tail is cut off
    assert path.exists() and found.text["sha256"] is None
    kept = tmp_path / "kept.kld"
    measure(models, ["Q4_0"], wishes, tmp_path / "r3", base_file=kept)
    assert kept.read_bytes() == path.read_bytes()


def test_an_interrupted_run_goes_on(models, wishes, tmp_path):
    """Killed in the middle of the second candidate; its first windows are not read again."""
    whole = measure(models, ["Q8_0", "Q4_0"], wishes, tmp_path / "whole")

    class Dying(Silent):
        def advance(self, n):
            super().advance(n)
            if len(self.begun) == 3 and self.n >= 2 * self.begun[0][1] + 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(models, ["Q8_0", "Q4_0"], wishes, tmp_path / "r", Dying())
    listener = Silent()
    again = measure(models, ["Q8_0", "Q4_0"], wishes, tmp_path / "r", listener)
    totals = dict(listener.begun)
    assert totals["F32.gguf reads"] == 0 and "Q8_0.gguf reads" not in totals
    assert 0 < totals["Q4_0.gguf reads"] <= len(whole.candidates) * 1000
    assert totals["Q4_0.gguf reads"] < whole.text["n_windows"]
    assert again.as_json() == whole.as_json()


def test_two_runs_on_one_folder(models, wishes, tmp_path):
    (tmp_path / "r").mkdir()
    asked = evaluation_room._fingerprint(Model("F32", models["F32"]), wishes)
    other = Journal(tmp_path / "r" / PAGE, asked, Resume(), "windows", None)
    with other, pytest.raises(CannotCreate, match="Another run"):
        measure(models, ["Q8_0"], wishes, tmp_path / "r")


def test_too_little_disk_is_said_before_any_work(models, wishes, tmp_path, monkeypatch):
    monkeypatch.setattr(
        measuring.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9)
    )
    with pytest.raises(OutputFailed, match="need"):
        measuring.measure_reference(models["F32"], wishes, tmp_path, lambda *message: None)
    assert not list(tmp_path.glob("*.kld"))


# --- windows on the disk ----------------------------------------------------------------------


def test_a_torn_record_is_dropped_and_another_header_begins_anew(tmp_path):
    path = tmp_path / "f"
    with WindowFile(path, b"head", 8) as file:
        file.append(b"a" * 8)
        file.append(b"b" * 8)
        with pytest.raises(ValueError, match="a record"):
            file.append(b"c")
    path.write_bytes(path.read_bytes()[:-3])
    with WindowFile(path, b"head", 8) as file:
        assert file.n_records == 1 and path.stat().st_size == 12
        file.append(b"c" * 8)
    assert path.read_bytes() == b"head" + b"a" * 8 + b"c" * 8
    with WindowFile(path, b"else", 8) as file:
        assert file.n_records == 0
    assert path.read_bytes() == b"else"


# --- processes --------------------------------------------------------------------------------


def test_a_process_says_what_it_did(capfd):
    heard = []
    assert run_isolated(talk, (5,), lambda *m: heard.append(m)) == {"a": 5}
    assert heard == [("advance", 2)] and capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (raise_ours, "what\nwhy\nnext"),
        (raise_other, "ZeroDivisionError: odd"),
        (kill_itself, "SIGKILL"),
    ],
)
def test_a_process_that_fails(work, message):
    with pytest.raises(BadInput) as caught:
        run_isolated(work, (), lambda *m: None)
    assert message in str(caught.value)


def test_a_process_ends_with_its_parent(tmp_path):
    """Killed, a parent can end nothing; a model of 20 GB must not stay behind."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); "
        "from evaluation_helpers import sleep_long; from quant.evaluation.isolation import *; "
        "run_isolated(sleep_long, (Path(sys.argv[2]),), print)"
    )
    file = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", code, str(ROOT / "tests"), str(file)])
    while parent.poll() is None and not (file.exists() and file.read_text()):
        time.sleep(0.01)
    child = Path("/proc") / file.read_text()
    parent.kill()
    parent.wait()
    for _ in range(500):  # 5 s; an orphan's death is seen when init has reaped it
        state = child / "stat"
        if not state.exists() or ") Z " in state.read_text():
            return
        time.sleep(0.01)
    pytest.fail("it is still there")


def test_every_error_survives_the_way_between_processes():
    from quant.evaluation.isolation import _rebuilt

    for kind in (BadInput, OutputFailed, errors.Unavailable):
        error = _rebuilt(kind.__name__, "a", "b", "c")
        assert type(error) is kind and str(error) == "a\nb\nc"


# --- files ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(models, tiny_qwq, tmp_path_factory) -> Path:
    """A report of a whole run by the command line, with everything in it."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "bad<b>.gguf").write_bytes(b"no")
    done = run_command(
        tiny_qwq, models["Q8_0"], models["Q2_K"], folder / "bad<b>.gguf", "-o", folder / "out",
        "--context", N_CTX, "--tokens", N_TOKENS, "--loops", "--seeds", 1, "--loop-tokens", 64,
        "--sampling", "qwen-official", "--sampling", "unsloth",
        "--questions", short_questions(folder),
    )  # fmt: skip
    assert done.return_value == 65, done.output
    (folder / "out" / "stdout.txt").write_text(done.stdout)
    return folder / "out"


def run_command(*arguments):
    return CliRunner().invoke(command, list(map(str, arguments)), standalone_mode=False,
                              catch_exceptions=False)  # fmt: skip


def short_questions(folder: Path) -> Path:
    lines = (ROOT / "examples" / "tiny-qwq" / "questions.jsonl").read_text().splitlines()[:4]
    (folder / "q.jsonl").write_text("\n".join(lines))
    return folder / "q.jsonl"


def test_the_json_holds_everything(report):
    found = json.loads((report / "results.json").read_text())
    assert [c["name"] for c in found["candidates"]] == ["Q8_0.gguf", "Q2_K.gguf"]
    assert found["failed"][0]["name"] == "bad<b>.gguf" and found["failed"][0]["what"]
    first = found["candidates"][0]
    assert first["statistics"]["n_positions"] == found["text"]["n_positions"]
    assert {r["profile"] for r in first["loops"]} == {"qwen-official", "unsloth"}
    assert len(first["texts"]) == 10 and first["questions"]["n_questions"] == 4
    assert found["reference"]["statistics"] is None and found["settings"]["loops"]["seeds"] == [1]


def test_the_csv_has_llama_cpps_names(report):
    rows = list(csv.DictReader(io.StringIO((report / "results.csv").read_text())))
    mean = {(r["model"], r["category"]): r for r in rows if r["figure"] == "Mean KLD"}
    assert set(mean) == {(m, c) for m in ("Q8_0.gguf", "Q2_K.gguf")
                         for c in ("", *CATEGORIES)}  # fmt: skip
    whole = json.loads((report / "results.json").read_text())["candidates"][0]["statistics"]
    assert float(mean["Q8_0.gguf", ""]["value"]) == whole["kld"]["value"]
    n = [int(mean["Q8_0.gguf", c]["n_positions"]) for c in CATEGORIES]
    assert sum(n) == whole["n_positions"]


def test_the_page_holds_everything_and_asks_nothing_of_the_network(report):
    page = (report / "report.html").read_text()
    for text in ("What was lost", "By kind of text", "Does it stop", "Tasks", "Left out",
                 "Q2_K.gguf", "unsloth", "exact match", "bad&lt;b&gt;.gguf"):  # fmt: skip
        assert text in page, text
    assert "<b>.gguf" not in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def test_the_tables_fit_80_columns(report):
    lines = (report / "stdout.txt").read_text().splitlines()
    assert max(map(len, lines[:-1])) <= 80
    text = "\n".join(lines)
    for part in ("mean KLD", "top-1", "Mean KLD by kind of text", "endless", "exact match",
                 "bad<b>.gguf was left out", "reference"):  # fmt: skip
        assert part in text, part


def test_long_names_and_wide_numbers_still_fit(capsys):
    from quant.cli.evaluation_table import print_evaluation
    from quant.evaluation.divergence import PositionScores, statistics
    from quant.evaluation.evaluate import Answers, Evaluation, Measured

    draw = np.random.default_rng(0)
    nll = draw.gamma(2, 4, (2, 50))
    scores = PositionScores(nll[0], nll[1], draw.gamma(1, 1e-5, 50), nll[0] > 2)
    kinds = {f"language:{i}": statistics(scores) for i in range(3)}
    name, whole = "a-very-long-name-of-a-model-\x1b[2J-and-more.gguf", statistics(scores, kinds)
    model = Measured(name, 123_456_789_012, 10.25, whole.ppl, whole, (0,) * 17, Answers())
    text = {"n_positions": 50, "n_windows": 2, "n_ctx": 64, "name": "t"}
    print_evaluation(Evaluation(model, (model, model), (), text, {"loops": None}))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and "\x1b" not in "".join(lines)
    assert any("a-very-long" in line and "…" in line for line in lines)


def test_divergences_are_shown_as_finely_as_they_are_known():
    from quant.evaluation.divergence import Estimate
    from quant.evaluation.report import divergence

    assert divergence(Estimate(0.0704, 0.0021)) == "0.07040 ± 0.00210"
    assert divergence(Estimate(0.00016412, 0.0000023)) == "0.000164 ± 0.000002"
    assert divergence(Estimate(3.3e-7, 1.2e-10)) == "0.0000003 ± 0.0000000"
    assert divergence(Estimate(0, 0)) == "0.00000 ± 0.00000"
    assert divergence(Estimate(-2e-9, 1e-9)) == "0.0000000 ± 0.0000000"
    assert divergence(Estimate(-0.5, 0.1)) == "-0.50000 ± 0.10000"


def test_a_report_that_exists_is_not_replaced(report, models, tiny_qwq):
    before = (report / "report.html").read_bytes()
    with pytest.raises(CannotCreate, match="exists"):
        run_command(tiny_qwq, models["Q8_0"], "-o", report)
    assert (report / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "option", "other"),
    [
        (("--sampling", "unsloth"), "--sampling", "--loops"),
        (("--prompts", "short"), "--prompts", "--loops"),
        (("--seeds", 3), "--seeds", "--loops"),
        (("--loops", "--run-code"), "--run-code", "--tasks"),
    ],
)
def test_options_that_would_be_of_no_use_are_refused(words, option, other, models, tmp_path):
    with pytest.raises(click.UsageError, match=f"{option} is of no use without {other}"):
        run_command(models["F32"], models["F32"], "-o", tmp_path / "r", *words)
    assert not (tmp_path / "r").exists()


def test_something_else_of_that_name_is_never_replaced(models, tiny_qwq, tmp_path):
    (tmp_path / "report.html").write_text("my diary")
    with pytest.raises(CannotCreate):
        run_command(tiny_qwq, models["Q8_0"], "-o", tmp_path, "--force")
    assert (tmp_path / "report.html").read_text() == "my diary"


def test_json_on_stdout(models, tmp_path):
    done = run_command(models["F32"], models["Q8_0"], "-o", tmp_path / "r", "--tokens", 600,
                       "--context", 64, "--format", "json")  # fmt: skip
    assert done.return_value == 0
    assert json.loads(done.stdout)["candidates"][0]["name"] == "Q8_0.gguf"


def test_candidates_of_the_same_name_are_told_apart(models, tmp_path):
    (tmp_path / "a").mkdir()
    shutil.copy(models["Q8_0"], tmp_path / "a" / "F32.gguf")
    done = run_command(
        models["F32"], models["F32"], tmp_path / "a" / "F32.gguf", models["F32"],
        f"{tmp_path}/a/../a/./F32.gguf", "-o", tmp_path / "r",
        "--tokens", 300, "--context", 64, "--format", "json",
    )  # fmt: skip
    names = [c["name"] for c in json.loads(done.stdout)["candidates"]]
    assert names == [f"{models['F32'].parent.name}/F32.gguf", "a/F32.gguf"]


# --- in a browser -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_the_window(report, tmp_path, width):
    """In a frame: a window of its own is never narrower than 500."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium here: Debian's package of that name shows the page for real")
    page = (report / "report.html").read_text()
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    script = (
        "<script>addEventListener('load',()=>parent.postMessage("
        "[innerWidth,document.documentElement.scrollWidth<=innerWidth,"
        "...Array.from(document.querySelectorAll('svg'),e=>e.getBoundingClientRect().width>300)],"
        "'*'))</script>"
    )
    (tmp_path / "p.html").write_text(page.replace("</body>", script + "</body>"))
    (tmp_path / "frame.html").write_text(
        "<script>onmessage=e=>{document.title=e.data}</script>"
        f'<iframe src="p.html" style="border:0" width="{width}" height="900"></iframe>'
    )
    done = subprocess.run(
        [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path}/u",
         "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/frame.html"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout).group(1)
    assert title == f"{width},true,true,true,true"
