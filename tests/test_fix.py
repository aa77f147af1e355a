"""fix: every planted defect is mended and gone, the source is untouched, whole or not at all."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from doctor_helpers import diagnose, edit, found, save_release, template_of, write_hole
from test_doctor import CONSEQUENCES, PLANTED, TINY

from quant.cli import fix as cli_fix
from quant.doctor.checks import CHECKS
from quant.doctor.sandbox import render
from quant.errors import BadInput, BadRecipe, CannotCreate, UsageError
from quant.fix import MendedCheckpoint, Wanted, mended_checkpoint, plan_fix, write_fix
from quant.source import open_source
from quant.to_gguf import Wishes, plan_gguf
from quant.write_gguf import write_gguf

OPINIONS = {i for i, check in CHECKS.items() if check.opinion}


@pytest.fixture
def copy(tiny_qwq, tmp_path):
    return shutil.copytree(tiny_qwq, tmp_path / "tiny-qwq")


def fix(model, output, recipe=None, **wanted) -> Path:
    plan = plan_fix(open_source(str(model)), recipe, Wanted(**wanted))
    return write_fix(plan, output).folder


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


# --- every defect that can be mended ----------------------------------------------------------


@pytest.mark.parametrize("planted", PLANTED)
def test_mended_and_gone(planted, copy, tmp_path):
    PLANTED[planted](copy)
    check_id = planted.partition(" ")[0]
    before = hashes(copy)
    plan = plan_fix(open_source(str(copy)), None, Wanted(apply=(check_id,)))
    after = {finding.id for finding in write_fix(plan, tmp_path / "mended").after.findings}
    assert check_id in {finding.id for finding in plan.before.findings}
    assert check_id not in after
    assert hashes(copy) == before  # the source
    # Nothing is left or new but notes, and what followed from the defect.
    assert after <= TINY | {"yarn-always", *CONSEQUENCES.get(planted, ())}


@pytest.mark.parametrize("planted", [p for p in PLANTED if p.partition(" ")[0] not in OPINIONS])
def test_all_leaves_notes_alone(planted, copy, tmp_path):
    PLANTED[planted](copy)
    plan = plan_fix(open_source(str(copy)), None, Wanted(everything=True))
    fixed = write_fix(plan, tmp_path / "mended")
    assert not fixed.after.of("error", "warning")
    assert set(plan.mended).isdisjoint(OPINIONS)


def test_many_at_once(copy, tmp_path):
    for planted in (
        "pad-outside (no token)", "eos-disagree", "special-outside", "not-special",
        "template-keeps-thoughts", "rope-incomplete", "generation-unlike (greedy)", "dtype-stated",
    ):  # fmt: skip
        PLANTED[planted](copy)
    assert len(diagnose(copy).of("error", "warning")) >= 8
    mended = fix(copy, tmp_path / "mended", everything=True)
    report = diagnose(mended, recipe="qwq-32b")
    assert not report.of("error", "warning")
    config = json.loads((mended / "config.json").read_text())
    assert config["rope_theta"] == 1000000.0 and config["torch_dtype"] == "bfloat16"


def test_what_a_mend_uncovers_is_mended_too(copy, tmp_path):
    """With eos wrong, pad is not equal to it; with eos right, it is."""
    for planted in ("pad-is-eos", "never-stops"):
        PLANTED[planted](copy)
    assert "pad-is-eos" not in found(copy)
    plan = plan_fix(open_source(str(copy)), None, Wanted(everything=True))
    assert set(plan.mended) == {"never-stops", "pad-is-eos"}
    assert not write_fix(plan, tmp_path / "mended").after.of("error", "warning")


def test_transformers_loads_what_was_mended_and_generates_alike(copy, tiny_qwq, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    PLANTED["rope-incomplete (transformers 5)"](copy)
    PLANTED["pad-is-eos"](copy)
    mended = fix(copy, tmp_path / "mended", everything=True)
    models = [
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (tiny_qwq, mended)
    ]
    tokens = torch.arange(60).reshape(1, 60)
    with torch.no_grad():
        expected, got = (model(tokens).logits for model in models)
        wrong = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)(tokens).logits
    assert torch.equal(expected, got)
    assert not torch.allclose(expected, wrong, atol=0.1)  # theta 10000, silently
    assert AutoTokenizer.from_pretrained(mended).pad_token == "<|endoftext|>"


# --- wishes -----------------------------------------------------------------------------------


def test_a_pad_token_of_ones_own(tmp_path):
    release = save_release(tmp_path, "QwQ-32B")
    mended = fix(release, tmp_path / "mended", pad_token="<|vision_pad|>")
    assert found(mended, recipe="qwq-32b") == {"template-opens-think"}
    config = json.loads((mended / "config.json").read_text())
    generation = json.loads((mended / "generation_config.json").read_text())
    assert config["pad_token_id"] == generation["pad_token_id"] == 151654  # as Unsloth publishes it


def test_the_recipe_s_pad_token_is_chosen(tmp_path):
    release = save_release(tmp_path, "DeepSeek-R1-Distill-Qwen-32B")
    with pytest.raises(BadRecipe, match="--pad-token"):  # it has none of the usual ones
        fix(release, tmp_path / "none", apply=("pad-is-eos",))
    release = save_release(tmp_path, "QwQ-32B")
    edit(release, "tokenizer_config.json", pad_token="<|im_end|>")
    mended = fix(release, tmp_path / "mended", everything=True)
    assert (
        json.loads((mended / "tokenizer_config.json").read_text())["pad_token"] == "<|vision_pad|>"
    )


def test_all_leaves_what_cannot_be_mended_and_says_so(tmp_path):
    release = save_release(tmp_path, "DeepSeek-R1-Distill-Qwen-32B")
    edit(release, "config.json", torch_dtype="float16")
    plan = plan_fix(open_source(str(release)), None, Wanted(everything=True))
    assert plan.mended == ("dtype-stated",)
    (note,) = plan.notes
    assert note.startswith("pad-is-eos is not mended: No token") and "--pad-token" in note


def test_weights_of_64_bits_have_a_name(copy, tmp_path):
    shapes = {"model.embed_tokens.weight": (4096, 4), "lm_head.weight": (4096, 4)}
    write_hole(copy / "model.safetensors", shapes, "F64")
    mended = fix(copy, tmp_path / "mended", apply=("dtype-stated",))
    assert json.loads((mended / "config.json").read_text())["torch_dtype"] == "float64"


def test_think_is_stripped_and_nothing_else(copy, tmp_path):
    mended = fix(copy, tmp_path / "mended", template_think="strip")
    talk = [{"role": "user", "content": "hi"}]
    variables = [{"messages": talk, "add_generation_prompt": True}]
    old, new = (render(template_of(folder), variables)[0].text for folder in (copy, mended))
    assert old == new + "<think>\n"
    with pytest.raises(UsageError, match="nothing to do"):
        fix(mended, tmp_path / "again", template_think="strip")


@pytest.mark.parametrize("place", ["chat_template.jinja", "list", "both"])
def test_the_template_is_mended_where_it_lies(place, copy, tmp_path):
    text = template_of(copy)
    if place in ("chat_template.jinja", "both"):
        (copy / "chat_template.jinja").write_text(text)
    if place == "chat_template.jinja":
        edit(copy, "tokenizer_config.json", chat_template=...)
    if place == "list":
        entries = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": text}]
        edit(copy, "tokenizer_config.json", chat_template=entries)
    mended = fix(copy, tmp_path / "mended", apply=("template-opens-think",))
    assert "template-opens-think" not in found(mended, recipe="qwq-32b")
    kept = json.loads((mended / "tokenizer_config.json").read_text()).get("chat_template")
    if place == "list":
        assert {"name": "tool_use", "template": "x"} in kept
    if place == "both":
        assert kept == (mended / "chat_template.jinja").read_text()
    if place == "chat_template.jinja":
        assert kept is None


def test_yarn_has_all_its_fields_and_transformers_reads_them(tiny_qwq, tmp_path):
    from transformers import AutoConfig

    mended = fix(tiny_qwq, tmp_path / "mended", yarn=4.0)
    rope = AutoConfig.from_pretrained(mended).rope_parameters
    assert (rope["rope_type"], rope["rope_theta"]) == ("yarn", 1000000.0)
    assert (rope["factor"], rope["original_max_position_embeddings"]) == (4.0, 2048)
    assert json.loads((mended / "config.json").read_text())["max_position_embeddings"] == 8192
    assert found(mended, recipe="qwq-32b") == TINY | {"yarn-always"}
    release = save_release(tmp_path, "QwQ-32B")
    mended = fix(release, tmp_path / "long", yarn=4.0)
    config = json.loads((mended / "config.json").read_text())
    assert config["rope_scaling"]["original_max_position_embeddings"] == 32768
    assert config["max_position_embeddings"] == 131072


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"apply": ("pad-is-stopp",)}, "no check of the doctor"),
        ({"apply": ("pad-is-eos",)}, "does not find that"),
        ({"pad_token": "<|nope|>"}, "no token of this model"),
        ({"yarn": 0.5}, "no factor"),
        ({"yarn": float("nan")}, "no factor"),
    ],
)
def test_wishes_that_cannot_be_granted(wanted, says, tiny_qwq, tmp_path):
    with pytest.raises(UsageError) as error:
        fix(tiny_qwq, tmp_path / "mended", **wanted)
    assert says in str(error.value) and not list(tmp_path.iterdir())


def test_what_can_only_be_told_is_not_mended(copy, tmp_path):
    edit(copy, "config.json", rms_norm_eps=1e-6)
    with pytest.raises(UsageError, match="Unsloth tried 1e-6"):
        fix(copy, tmp_path / "mended", apply=("norm-eps",))


# --- whole or not at all ----------------------------------------------------------------------


def test_shards_are_links_and_small_files_are_not(copy, tmp_path):
    (copy / "README.md").write_text("card")
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    (copy / ".git").mkdir()
    mended = fix(copy, tmp_path / "mended", apply=("pad-is-stop",), pad_token="<|im_start|>")
    assert os.path.samefile(copy / "model.safetensors", mended / "model.safetensors")
    for name in ("tokenizer.json", "README.md", "config.json"):
        assert (mended / name).stat().st_nlink == 1
    names = {path.name for path in mended.iterdir()}
    assert {"pytorch_model.bin", ".git"}.isdisjoint(names) and "qwq-quant.json" in names
    entry = json.loads((mended / "qwq-quant.json").read_text())["outputs"]["."]
    assert entry["mended"] == ["pad-is-stop"] and entry["recipe"] == "qwq-32b"
    assert {file["name"] for file in entry["files"]} | {"qwq-quant.json"} == names


def test_another_file_system_gets_copies(copy, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    plan = plan_fix(open_source(str(copy)), None, Wanted(yarn=2.0))
    fixed = write_fix(plan, tmp_path / "mended")
    assert (fixed.linked, fixed.copied) == (0, 1)
    assert hashes(copy)["model.safetensors"] == hashes(fixed.folder)["model.safetensors"]


def test_outputs_that_are_refused(copy, tmp_path):
    wanted = {"yarn": 2.0}
    for place in (copy, copy / "inside", tmp_path):
        with pytest.raises((UsageError, CannotCreate)):
            fix(copy, place, **wanted)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(CannotCreate):
        fix(copy, tmp_path / "taken", **wanted)
    plan = plan_fix(open_source(str(copy)), None, Wanted(**wanted))
    with pytest.raises(CannotCreate):
        write_fix(plan, tmp_path / "taken", force=True)
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"
    write_fix(plan, tmp_path / "mended")
    with pytest.raises(CannotCreate):
        write_fix(plan, tmp_path / "mended")
    write_fix(plan, tmp_path / "mended", force=True)
    assert {p.name for p in tmp_path.iterdir()} == {"tiny-qwq", "taken", "mended"}


def test_a_mend_that_does_not_help_writes_nothing(copy, tmp_path, monkeypatch):
    """A check whose mend was broken: the doctor still finds it, so nothing appears."""
    from dataclasses import replace

    PLANTED["pad-is-eos"](copy)
    broken = replace(CHECKS["pad-is-eos"], mend=lambda repair, patient: repair.say("nothing"))
    monkeypatch.setitem(CHECKS, "pad-is-eos", broken)
    with pytest.raises(BadInput, match="still has: pad-is-eos"):
        fix(copy, tmp_path / "mended", everything=True)
    assert {p.name for p in tmp_path.iterdir()} == {"tiny-qwq"}


def test_killed_in_the_middle_leaves_nothing_under_the_final_name(copy, tmp_path):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "import quant.fix as f\n"
        "from quant.source import open_source\n"
        "plan = f.plan_fix(open_source(sys.argv[1]), None, f.Wanted(yarn=2.0))\n"
        "f._write_manifest = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "f.write_fix(plan, Path(sys.argv[2]))\n"
    )
    target = tmp_path / "mended"
    done = subprocess.run([sys.executable, "-c", code, str(copy), str(target)], check=False)
    assert done.returncode == -signal.SIGKILL and not target.exists()
    fix(copy, target, yarn=2.0)  # takes over what was left
    assert {p.name for p in tmp_path.iterdir()} == {"tiny-qwq", "mended"}


def test_a_link_out_of_the_folder_is_not_followed(copy, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (copy / "secret.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(BadInput, match="link out of"):
        fix(copy, tmp_path / "mended", yarn=2.0)
    assert not (tmp_path / "mended").exists()


SERVED = """
import json, sys, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.fit_params = sys.argv[1], 128, False, False
params.cpuparams.n_threads, params.use_jinja = 1, True
server = xllamacpp.Server(params)
request = urllib.request.Request(
    server.listening_address + "/apply-template", sys.stdin.read().encode(),
    {"Content-Type": "application/json"},
)
with urllib.request.urlopen(request) as answer:
    print("\\n" + json.dumps(json.load(answer)["prompt"]))
"""


@pytest.mark.parametrize(
    "planted", ["template-keeps-thoughts", "template-no-prompt", "template-missing"]
)
def test_llama_cpp_renders_the_mended_template_alike(planted, copy, tmp_path):
    """llama.cpp has a Jinja of its own; the mended template has to match the makers' in it."""
    pytest.importorskip("xllamacpp")
    original = template_of(copy)
    PLANTED[planted](copy)
    mended = fix(copy, tmp_path / "mended", everything=True)
    path = tmp_path / "mended.gguf"
    write_gguf(plan_gguf(open_source(str(mended)), Wishes("Q8_0")), path)
    talk = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo"},
        {"role": "user", "content": "three"},
    ]
    done = subprocess.run(
        [sys.executable, "-c", SERVED, str(path)], input=json.dumps({"messages": talk}),
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    variables = {"messages": talk, "add_generation_prompt": True}
    expected = render(original, [variables])[0].text
    served = json.loads(done.stdout.splitlines()[-1])
    if planted == "template-no-prompt":  # the opening of a turn is appended, <think> is not
        expected = expected.removesuffix("<think>\n")
    assert served == expected


# --- in memory, for to-gguf and dynamic-4bit --------------------------------------------------


def test_a_mended_checkpoint_converts_without_a_folder(copy):
    for planted in ("rope-incomplete", "template-keeps-thoughts", "eos-disagree", "dtype-stated"):
        PLANTED[planted](copy)
    source = open_source(str(copy))
    mended = mended_checkpoint(plan_fix(source, None, Wanted(everything=True)))
    assert isinstance(mended, MendedCheckpoint)
    metadata = plan_gguf(mended, Wishes("Q8_0")).metadata
    assert metadata["qwen2.rope.freq_base"].data == 1e6
    assert "ns.said" in metadata["tokenizer.chat_template"].data
    assert plan_gguf(source, Wishes("Q8_0")).metadata["qwen2.rope.freq_base"].data == 1e4


def test_a_gguf_is_sent_to_to_gguf(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    with pytest.raises(BadInput, match="to-gguf"):
        plan_fix(open_source(str(tmp_path / "a.gguf")), None, Wanted(everything=True))


# --- the command ------------------------------------------------------------------------------


def run(*args):
    runner = CliRunner()
    return runner.invoke(cli_fix.command, list(map(str, args)), standalone_mode=False)


def test_before_and_after_are_printed(copy, tmp_path):
    PLANTED["pad-is-eos"](copy)
    done = run(copy, "-o", tmp_path / "mended", "--all")
    assert done.exception is None
    before, after = done.output.split("\nAfter\n")
    assert "pad-is-eos" in before and "pad-is-eos" not in after.split("\n\n")[1]
    assert "mended pad-is-eos" in after and "shards linked: 1" in after
    assert max(map(len, before.splitlines()[2:])) <= 80


def test_json_and_idle_runs(copy, tmp_path):
    PLANTED["pad-is-eos"](copy)
    out = tmp_path / "mended"
    answer = json.loads(run(copy, "-o", out, "--apply", "pad-is-eos", "--format", "json").output)
    assert answer["mended"] == ["pad-is-eos"] and answer["shards"] == {"linked": 1, "copied": 0}
    assert "pad-is-eos" in {f["id"] for f in answer["before"]["findings"]}
    assert "pad-is-eos" not in {f["id"] for f in answer["after"]["findings"]}
    done = run(out, "-o", tmp_path / "again", "--all")
    assert isinstance(done.exception, UsageError) and "--apply" in str(done.exception)


def test_all_with_opinions_alone_names_them(tiny_qwq, tmp_path):
    error = run(tiny_qwq, "-o", tmp_path / "x", "--all").exception
    assert isinstance(error, UsageError) and "pad-is-stop, template-opens-think" in error.why
    error = run(tiny_qwq, "-o", tmp_path / "x", "--yarn", "1").exception
    assert isinstance(error, UsageError) and "more than 1" in error.why


def test_a_quantized_folder_is_mended_too(copy, tmp_path):
    PLANTED["pad-is-eos"](copy)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit(copy, "config.json", quantization_config=settings)
    done = run(copy, "-o", tmp_path / "tiny-qwq-4bit", "--all")
    assert done.exception is None and "mended pad-is-eos" in done.output
    config = json.loads((tmp_path / "tiny-qwq-4bit" / "config.json").read_text())
    assert config["quantization_config"] == settings
