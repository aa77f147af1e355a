"""dynamic-4bit and measure as their users meet them: output, bad inputs, exit codes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from quant.cli import cli

FEW = ("--tokens", "512", "--seq-len", "128")
TINY_QWQ = Path(__file__).parent.parent / "examples" / "tiny-qwq"


def run(*args):
    return CliRunner().invoke(cli, [str(a) for a in args])


def dynamic(model, output, *options):
    return run("dynamic-4bit", model, "-o", output, *FEW, *options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The example of the help text, on few tokens: folder and what was printed."""
    folder = tmp_path_factory.mktemp("written") / "tiny-qwq-4bit"
    return folder, dynamic(TINY_QWQ, folder)


def test_the_default_run_prints_what_was_kept_and_lost(written):
    folder, result = written
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{folder}/  7.") and lines[0].endswith("MB of weights")
    assert lines[1].startswith("21 of 24 groups in NF4, 3 kept 16-bit, 5.")
    assert "KL divergence" in lines[3]
    source, plain, dynamic = (line.split() for line in lines[4:7])
    assert source[0] == "source" and plain[:2] == ["plain", "NF4"]
    assert dynamic[:2] == ["dynamic", "4-bit"]
    kld = [float(line[line.index("±") + 2]) for line in (plain, dynamic)]
    assert kld[1] < 0.75 * kld[0]  # the bound, here of the default run
    assert max(map(len, lines[1:])) <= 80  # the first begins with the user's own path


def test_the_folder_loads_and_answers(written):
    folder, _ = written
    model, tokenizer = (c.from_pretrained(folder) for c in (AutoModelForCausalLM, AutoTokenizer))
    message = [{"role": "user", "content": "What is 33 + 89?"}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=150, do_sample=False)
    assert "122" in tokenizer.decode(output[0], skip_special_tokens=True)


def test_measured_once_it_need_not_be_measured_again(written, tmp_path):
    folder, _ = written
    sensitivity = tmp_path / "s.json"
    result = run("measure", TINY_QWQ, "-o", sensitivity, *FEW)
    assert result.exit_code == 0, result.output
    assert "24 groups by weight, activation, gradient, in " in result.stdout
    found, again = (json.loads(p.read_text()) for p in (sensitivity, folder / "sensitivity.json"))
    assert found == again
    result = dynamic(TINY_QWQ, tmp_path / "again", "--sensitivity", sensitivity, "--no-check")
    assert result.exit_code == 0 and "KL divergence" not in result.output
    for name in ("model.safetensors", "config.json", "sensitivity.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    result = run("measure", TINY_QWQ, "-o", sensitivity, *FEW)
    assert result.exit_code == 73 and "--force" in result.stderr


def test_a_dry_run_prints_the_table_and_writes_nothing(written, tmp_path):
    sensitivity = written[0] / "sensitivity.json"
    result = dynamic(TINY_QWQ, tmp_path / "x", "--sensitivity", sensitivity, "--dry-run")
    assert result.exit_code == 0 and not any(tmp_path.iterdir())
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["group", "gradient", "16", "bits", "cost"]
    assert sum(line.endswith("  kept 16-bit") for line in lines[1:25]) == 3
    assert sum(line.endswith("  4-bit") for line in lines[1:25]) == 21
    errors = [float(line.split()[1]) for line in lines[1:25]]
    assert errors == sorted(errors, reverse=True)
    assert "predicted damage" in lines[26] and sum("<- chosen" in line for line in lines) == 1
    assert "Choosing greedily by damage per byte would leave" in result.stdout


def test_everything_as_json(written, tmp_path):
    sensitivity = written[0] / "sensitivity.json"
    options = ("--sensitivity", sensitivity, "--format", "json")
    plan = json.loads(dynamic(TINY_QWQ, tmp_path / "x", *options, "--dry-run").stdout)
    done = json.loads(dynamic(TINY_QWQ, tmp_path / "x", *options).stdout)
    config = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
    assert plan["llm_int8_skip_modules"] == done["llm_int8_skip_modules"]
    assert plan["llm_int8_skip_modules"] == config["llm_int8_skip_modules"]
    assert plan["kept"] == [g["name"] for g in plan["groups"] if g["kept"]] == done["kept"]
    assert len(plan["kept"]) == 3 and plan["solution"]["exact"] is True
    assert [r["name"] for r in done["results"]] == ["source", "plain NF4", "dynamic 4-bit"]
    assert done["nbytes"] == (tmp_path / "x" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("options", "quantized", "n_kept"),
    [
        (("--budget", "0"), "24 of 24 groups in NF4", 0),
        (("--budget", "0%", "--quant-type", "fp4"), "24 of 24 groups in FP4", 0),
        (("--budget", "all"), "0 of 24 groups in NF4", 24),
        (("--target-bpw", "4.8", "--no-double-quant"), "of 24 groups in NF4", None),
        (("--budget", "300kB", "--metric", "weight"), "of 24 groups in NF4", None),
    ],
)
def test_budgets_and_formats(tmp_path, options, quantized, n_kept):
    result = dynamic(TINY_QWQ, tmp_path / "x", *options, "--no-check", "--no-search-scales")
    assert result.exit_code == 0 and quantized in result.stdout, result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    n_linears = sum(type(m) is torch.nn.Linear for m in model.modules())
    if n_kept is None:
        assert 1 < n_linears < 43
        bits = float(result.stdout.partition("kept 16-bit, ")[2].split()[0])
        assert bits <= 4.8 or "--budget" in options
    else:
        assert n_linears == {0: 1, 24: 43}[n_kept]
    logits = model(torch.arange(7, 4000, 166)[None]).logits
    assert torch.isfinite(logits).all()


# --- bad input --------------------------------------------------------------------------------


def copy_of(model: Path, folder: Path, **config) -> Path:
    shutil.copytree(model, folder)
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stated, **config}))
    return folder


def with_nan(folder: Path) -> Path:
    copy_of(TINY_QWQ, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.4.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def text(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


BAD = {
    "already quantized": (
        lambda t, w: (w, ()), 65, "already", "16-bit"
    ),
    "calibration too short": (
        lambda t, w: (TINY_QWQ, ("--calibration", text(t / "c.txt", b"Too few words."))),
        65, "c.txt has only", "One sequence of 128 is the least",
    ),
    "calibration empty": (
        lambda t, w: (TINY_QWQ, ("--calibration", text(t / "c.txt", b" \n"))),
        65, "holds no text", "",
    ),
    "calibration not text": (
        lambda t, w: (TINY_QWQ, ("--calibration", text(t / "c.txt", b"\xff\xfe\x00a" * 999))),
        65, "is no UTF-8 text", "",
    ),
    "calibration missing": (
        lambda t, w: (TINY_QWQ, ("--calibration", t / "none.txt")), 66, "none.txt", ""
    ),
    "budget that buys nothing": (
        lambda t, w: (TINY_QWQ, ("--budget", "0.1%")), 78, "buys nothing", "--budget 0"
    ),
    "bits that buy nothing": (
        lambda t, w: (TINY_QWQ, ("--target-bpw", "4")), 78, "buys nothing", "4.38 bits"
    ),
    "budget that is none": (
        lambda t, w: (TINY_QWQ, ("--budget", "much")), 2, "is no budget", "10%, 1.5GB, 0 or all"
    ),
    "negative budget": (
        lambda t, w: (TINY_QWQ, ("--budget=-5%",)), 2, "is no budget", ""
    ),
    "infinite budget": (
        lambda t, w: (TINY_QWQ, ("--budget", "nan%")), 2, "is no budget", ""
    ),
    "two budgets": (
        lambda t, w: (TINY_QWQ, ("--budget", "5%", "--target-bpw", "5")), 2, "in two ways", ""
    ),
    "unknown architecture": (
        lambda t, w: (copy_of(TINY_QWQ, t / "m", architectures=["RwkvForCausalLM"]), ()),
        65, "RwkvForCausalLM", "",
    ),
    "NaN weights": (
        lambda t, w: (with_nan(t / "m"), ()), 65, "model.layers.4.mlp.up_proj.weight has 1 NaN", ""
    ),
    "NaN weights, plain": (
        lambda t, w: (with_nan(t / "m"), ("--budget", "0")),
        65, "model.layers.4.mlp.up_proj.weight has 1 NaN", "",
    ),
    "no model": (
        lambda t, w: (t / "nothing", ()), 66, "nothing", ""
    ),
    "unknown device": (
        lambda t, w: (TINY_QWQ, ("--device", "abacus")), 69, "abacus cannot be used", "--device cpu"
    ),
    "unknown device, plain": (
        lambda t, w: (TINY_QWQ, ("--device", "abacus", "--budget", "0")), 69, "abacus", ""
    ),
    "sensitivities of another model": (
        lambda t, w: (copy_of(TINY_QWQ, t / "m"), ("--sensitivity", other_sensitivity(t, w))),
        65, "those of another model", "qwq-quant measure",
    ),
    "sensitivities that are none": (
        lambda t, w: (TINY_QWQ, ("--sensitivity", text(t / "s.json", b"{}"))),
        65, "no usable file of sensitivities", "Measure again",
    ),
    "a metric that was not measured": (
        lambda t, w: (TINY_QWQ, ("--sensitivity", w / "sensitivity.json", "--metric", "kld")),
        65, "kld is not among", "",
    ),
    "sequences beyond the context": (
        lambda t, w: (TINY_QWQ, ("--seq-len", "999999")), 65, "too long for", "--seq-len 2048"
    ),
    "too few tokens": (
        lambda t, w: (TINY_QWQ, ("--tokens", "64", "--seq-len", "64")),
        65, "only 64 tokens", "longer",
    ),
}  # fmt: skip


def other_sensitivity(folder: Path, written: Path) -> Path:
    content = json.loads((written / "sensitivity.json").read_text())
    content["model"]["fingerprint"] = "0" * 64
    return text(folder / "s.json", json.dumps(content).encode())


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_explained_and_leaves_everything_as_it_was(written, tmp_path, name):
    make, code, what, then = BAD[name]
    model, options = make(tmp_path, written[0])
    before = {p.name for p in tmp_path.iterdir()}
    result = dynamic(model, tmp_path / "out", *options)
    assert result.exit_code == code, result.output
    assert what in result.stderr and then in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
    assert {p.name for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["NaN weights, plain", "already quantized", "NaN weights"])
def test_an_older_output_survives_bad_input_even_with_force(written, tmp_path, name):
    shutil.copytree(written[0], tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    make, code, what, _ = BAD[name]
    model, options = make(tmp_path, written[0])
    result = dynamic(model, tmp_path / "out", *options, "--force")
    assert result.exit_code == code and what in result.stderr
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize(
    ("make", "force", "message"),
    [
        (lambda out: out.mkdir() or text(out / "theirs", b"x"), True, "did not write: theirs"),
        (lambda out: text(out, b"x"), True, "is no folder"),
        (lambda out: shutil.copytree(TINY_QWQ, out), True, "did not write"),
    ],
)
def test_what_is_not_ours_is_never_replaced(tmp_path, make, force, message):
    make(tmp_path / "out")
    result = dynamic(TINY_QWQ, tmp_path / "out", *(["--force"] if force else []))
    assert result.exit_code == 73 and message in result.stderr


def test_outputs_that_cannot_be_are_refused_before_measuring(written, tmp_path):
    result = dynamic(TINY_QWQ, tmp_path / "none" / "out")
    assert result.exit_code == 73 and "mkdir -p" in result.stderr
    result = dynamic(TINY_QWQ, written[0])
    assert result.exit_code == 73 and "--force" in result.stderr
    assert "Measuring" not in result.stderr


def test_measure_refuses_bad_input_and_writes_nothing(written, tmp_path):
    for model in (written[0], with_nan(tmp_path / "nan")):
        result = run("measure", model, "-o", tmp_path / "s.json", *FEW)
        assert result.exit_code == 65 and not (tmp_path / "s.json").exists(), result.output


WHILE_MEASURING = """
from quant.calibration.streamed_model import StreamedModel as place
name, when = "_load", lambda self, index, seq_len: index == 2
"""
WHILE_WRITING = """
from quant.sinks.safetensors import ShardedSink as place
name, when = "write", lambda self, name, part: name == "model.layers.3.mlp.down_proj.weight"
"""
WHILE_CHECKING = """
import quant.write_4bit as place
name, when = "check_written", lambda plan, folder: any(folder.glob("*.safetensors"))
"""


@pytest.mark.parametrize("moment", [WHILE_MEASURING, WHILE_WRITING, WHILE_CHECKING])
def test_an_interrupted_run_that_keeps_nothing_leaves_nothing(tmp_path, moment):
    """Ctrl-C while the layers are measured, while they are written, and when all are there."""
    code = f"""
import os, signal, sys
{moment}
whole = getattr(place, name)
def interrupted(*args):
    if when(*args):
        os.kill(os.getpid(), signal.SIGINT)
    return whole(*args)
setattr(place, name, interrupted)
sys.argv = ["qwq-quant", "dynamic-4bit", {str(TINY_QWQ)!r}, "-o", {str(tmp_path / "out")!r},
            "--tokens", "256", "--seq-len", "64", "--no-search-scales", "--resume", "never"]
from quant.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130 and "Interrupted" in done.stderr, done.stderr
    assert not any(tmp_path.iterdir())
