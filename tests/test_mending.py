"""--fix and --recipe of the commands that write a model: mended on the way, and said so."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from doctor_helpers import edit, found, template_of

from quant.checkpoint import Checkpoint
from quant.cli import cli
from quant.fix import MendedCheckpoint
from quant.gguf_file import open_gguf
from quant.model_folder import copy_other_files
from quant.recipe import find_profile, recipe_text
from quant.sampling import PREFIX

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
    assert done.exit_code == 0 and "nothing had to be mended" in words(done.stderr)
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


# --- to-gguf ----------------------------------------------------------------------------------


def to_gguf(model, *options):
    """What was printed, and the metadata that was written; of a GGUF file, a copy's."""
    path = model.parent / "written.gguf"
    kind = () if model.suffix == ".gguf" else ("--type", "Q8_0")
    done = run("to-gguf", model, "-o", path, *kind, "--force", *options)
    assert done.exit_code == 0, done.output
    keys = {key: value.data for key, value in open_gguf(path).metadata.items()}
    return words(done.stderr), keys


def sampling(keys: dict) -> dict:
    """The settings among the keys, as a file's float32 has them."""
    found = {key.removeprefix(PREFIX): v for key, v in keys.items() if key.startswith(PREFIX)}
    return {name: float(np.float32(v)) if type(v) is float else v for name, v in found.items()}


def test_to_gguf_mends(broken):
    said, keys = to_gguf(broken)
    assert keys["tokenizer.ggml.padding_token_id"] == 4093 and "mended" not in said
    said, keys = to_gguf(broken, "--fix", "all")
    assert "mended pad-is-eos, rope-incomplete" in said
    assert keys["tokenizer.ggml.padding_token_id"] == 4091
    assert keys["qwen2.rope.freq_base"] == 1000000.0
    done = run("to-gguf", broken.parent / "written.gguf", "-o", broken.parent, "--fix", "all")
    assert done.exit_code == 65 and "is a GGUF file" in done.stderr


def test_to_gguf_completes_the_model_s_settings_by_the_recipe(broken):
    first = find_profile("qwen-official").metadata()
    first = sampling({key: value.data for key, value in first.items()})
    edit(broken, "generation_config.json", temperature=0.75)
    said, keys = to_gguf(broken)
    assert sampling(keys) == first | {"temp": 0.75}
    assert first["sequence"].startswith("penalties;") and first["min_p"] == 0
    assert (
        "settings are the model's own, the rest from recipe qwq-32b "
        '(for Qwen2ForCausalLM called "broken-qwq"), profile qwen-official;' in said
    )
    # A recipe that is named is taken as it is.
    said, keys = to_gguf(broken, "--recipe", "qwq-32b")
    assert sampling(keys) == first and "are those of recipe qwq-32b (named)" in said


def test_to_gguf_leaves_a_gguf_s_settings_alone(broken):
    edit(broken, "generation_config.json", temperature=0.75)
    to_gguf(broken, "--sampling", "none")
    gguf = broken.parent / "plain.gguf"
    (broken.parent / "written.gguf").rename(gguf)
    said, keys = to_gguf(gguf, "--name", "QwQ-32B")
    assert sampling(keys) == {} and "recipe" not in said
    said, keys = to_gguf(gguf, "--recipe", "qwen3")
    assert sampling(keys)["top_k"] == 20 and "recipe qwen3 (named)" in said


def test_to_gguf_stores_what_sampling_says(broken):
    said, keys = to_gguf(broken, "--sampling", "unsloth")
    assert sampling(keys)["sequence"] == "top_k;top_p;min_p;temperature;dry;typ_p;xtc"
    assert "no key for dry_multiplier = 0.5, dry_penalty_last_n = 4096" in said
    assert sampling(to_gguf(broken, "--sampling", "none")[1]) == {}
    assert sampling(to_gguf(broken, "--sampling", "deepseek-official")[1])["temp"] == pytest.approx(
        0.6
    )
    # A recipe of one's own, and its profiles.
    text = recipe_text("qwq-32b").replace("[profiles.unsloth]", "[profiles.mine]")
    recipe = broken.parent / "mine.toml"
    recipe.write_text(text.replace("min_p = 0.01\ndry", "min_p = 0.25\ndry"))
    said, keys = to_gguf(broken, "--recipe", recipe, "--sampling", "mine")
    assert sampling(keys)["min_p"] == 0.25 and "those of recipe" not in said


def test_a_model_without_a_recipe_keeps_its_own_settings(broken):
    folder = broken.rename(broken.parent / "model")
    edit(folder, "generation_config.json", temperature=0.9)
    said, keys = to_gguf(folder)
    assert sampling(keys)["temp"] == pytest.approx(0.9) and "recipe" not in said
