"""--fix and --recipe of the commands that write a model: mended on the way, and said so."""

import json
import shutil

import pytest
from click.testing import CliRunner
from doctor_helpers import edit, found, template_of

from quant.checkpoint import Checkpoint
from quant.cli import cli
from quant.fix import MendedCheckpoint
from quant.model_folder import copy_other_files

QUICK = ("--budget", "0", "--no-check")


def run(*args):
    return CliRunner().invoke(cli, [str(a) for a in args])


def words(text: str) -> str:
    """What was printed, without its line ends."""
    return " ".join(text.split())


@pytest.fixture
def broken(tiny_qwq, tmp_path):
    """A QwQ with two defects and one matter of opinion."""
    folder = shutil.copytree(tiny_qwq, tmp_path / "broken-qwq")
    edit(folder, "tokenizer_config.json", pad_token="<|im_end|>")
    edit(folder, "config.json", rope_theta=...)
    assert found(folder) == {"pad-is-eos", "rope-incomplete", "template-opens-think"}
    return folder


def read(folder, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_dynamic_4bit_mends_all(broken, tiny_qwq, tmp_path):
    done = run("dynamic-4bit", broken, "-o", tmp_path / "out", *QUICK, "--fix", "all")
    assert done.exit_code == 0, done.output
    said = words(done.stderr)
    assert 'recipe qwq-32b (for Qwen2ForCausalLM called "broken-qwq")' in said
    assert "mended pad-is-eos, rope-incomplete" in said
    assert "pad_token is <|endoftext|> (4091)" in said
    assert read(tmp_path / "out", "config.json")["rope_theta"] == 1000000.0
    assert read(tmp_path / "out", "tokenizer_config.json")["pad_token"] == "<|endoftext|>"
    assert template_of(tmp_path / "out") == template_of(tiny_qwq)  # a matter of opinion
    assert read(broken, "tokenizer_config.json")["pad_token"] == "<|im_end|>"  # the source
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (broken / name).read_bytes()


def test_dynamic_4bit_mends_what_is_named(broken, tmp_path):
    fix = ("--fix", "template-opens-think, pad-is-eos")
    done = run("dynamic-4bit", broken, "-o", tmp_path / "out", *QUICK, *fix)
    assert "mended pad-is-eos, template-opens-think" in words(done.stderr), done.output
    assert "<think>" not in template_of(tmp_path / "out").rpartition("add_generation")[2]
    assert "rope_theta" not in read(tmp_path / "out", "config.json")


def test_a_plan_says_what_it_would_mend(broken, tmp_path):
    plan = ("dynamic-4bit", broken, "-o", tmp_path / "out", *QUICK, "--dry-run")
    done = run(*plan, "--fix", "all", "--format", "json")
    notes = json.loads(done.stdout)["notes"]
    assert notes[0].startswith("recipe qwq-32b") and notes[1].startswith("mended pad-is-eos")
    assert "recipe qwen3 (named)" in words(run(*plan, "--recipe", "qwen3").output)
    assert "recipe" not in run(*plan).output
    assert not (tmp_path / "out").exists()


def test_nothing_to_mend(tiny_qwq, tmp_path):
    done = run("dynamic-4bit", tiny_qwq, "-o", tmp_path / "out", *QUICK, "--fix", "all")
    assert done.exit_code == 0 and "the doctor finds nothing to mend" in words(done.stderr)
    assert template_of(tmp_path / "out") == template_of(tiny_qwq)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--fix", "pad-is-stopp"), 2, "--fix pad-is-stopp is no check of the doctor"),
        (("--fix", "eos-disagree"), 2, "does not find that in this model"),
        (("--fix", " ,"), 2, "--fix names nothing"),
        (("--recipe", "qwq"), 78, 'no recipe "qwq"'),
        (("--recipe", "./none.toml"), 66, "no file ./none.toml"),
    ],
)
def test_wishes_that_cannot_be_granted(options, code, says, broken, tmp_path):
    done = run("dynamic-4bit", broken, "-o", tmp_path / "out", *QUICK, *options)
    assert done.exit_code == code and says in words(done.stderr)
    assert not (tmp_path / "out").exists()


def test_files_that_a_mend_makes_come_along(tiny_qwq, tmp_path):
    source = Checkpoint.open(tiny_qwq)
    contents = {"generation_config.json": b"{}\n", "new.json": b"[]\n", "config.json": b"no"}
    mended = MendedCheckpoint(
        source.folder, source.name, None, source.config, source.tensors, contents
    )
    copy_other_files(mended, tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written["generation_config.json"] == b"{}\n" and written["new.json"] == b"[]\n"
    assert written["tokenizer.json"] == (tiny_qwq / "tokenizer.json").read_bytes()
    assert "config.json" not in written  # it is made from mended.config
