"""dynamic-4bit --gptq: what is written is what was rounded, in order, and every loader reads it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from click.testing import CliRunner
from model_makers import make_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quant.budget import NOTHING
from quant.calibration.bnb_weights import Bnb4bitWeights
from quant.calibration.feedback import quantize_streamed
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens, cut_tokens
from quant.check_4bit import check_4bit
from quant.checkpoint import Checkpoint
from quant.cli import cli
from quant.dynamic_4bit import Plan4bit, plan_4bit
from quant.errors import BadInput
from quant.feedback_4bit import encode_with_feedback
from quant.formats.nf4 import Bnb4bit
from quant.texts import built_in_texts, held_out_texts
from quant.write_4bit import write_4bit
from quant.write_with_feedback import token_notes

KEPT = ("model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.down_proj")
FORMATS = {
    "nf4": Bnb4bit(search_scales=True),
    "fp4, absmax in float32": Bnb4bit("fp4", double_quant=False),
}
IDS = torch.arange(7, 4000, 166)[None]  # (1, 25)


def random_tokens(n_sequences=8, seq_len=64) -> Tokens:
    ids = np.random.default_rng(0).integers(0, 4090, (n_sequences, seq_len))
    return Tokens(ids, "random", "0" * 64)


def plan_with_feedback(folder: Path, format: Bnb4bit, *kept: str) -> Plan4bit:
    """A plan that keeps the named groups, whatever they cost."""
    plain = plan_4bit(Checkpoint.open(folder), format, NOTHING)
    return replace(plain, kept=frozenset(kept), feedback=True)


@pytest.fixture(scope="module")
def written(made_models, tmp_path_factory):
    """name of a format -> (plan, folder), a tiny Qwen2 with random weights."""
    made = {}

    def get(name: str):
        if name not in made:
            plan = plan_with_feedback(made_models("qwen2")[0], FORMATS[name], *KEPT)
            folder = tmp_path_factory.mktemp("feedback") / "out"
            write_4bit(plan, folder, tokens=random_tokens())
            made[name] = plan, folder
        return made[name]

    return get


@pytest.mark.parametrize("name", FORMATS)
def test_every_linear_was_rounded_on_the_outputs_of_those_before(name, written):
    plan, folder = written(name)
    reader, seen = Bnb4bitWeights(folder), []

    def again(module, W, H):
        _, rounded = encode_with_feedback(plan.format, W, H, plan.dtype)
        assert torch.equal(reader.read(f"{module}.weight").float(), rounded.W_hat.float())
        seen.append(module)
        return rounded.W_hat

    groups = [group for group in plan.groups if group.name not in KEPT]
    quantize_streamed(StreamedModel(plan.checkpoint), groups, random_tokens().ids, again)
    assert len(seen) == 21 - 3 - 1


@pytest.mark.parametrize("name", FORMATS)
def test_all_but_codes_and_scales_is_as_without_feedback(name, written, tmp_path):
    plan, folder = written(name)
    write_4bit(replace(plan, feedback=False), tmp_path / "plain")
    ours, plain = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "plain"))
    assert {n: (t.shape, t.dtype) for n, t in ours.items() if "quant_state" not in n} == {
        n: (t.shape, t.dtype) for n, t in plain.items() if "quant_state" not in n
    }
    differing = {n for n in ours if not torch.equal(ours[n].flatten(), plain[n].flatten())}
    quantized = {t.name for t in plan.tensors if t.is_4bit}
    if plan.format.search_scales:  # by the inputs' squares
        assert differing > quantized
        differing = {n for n in differing if "absmax" not in n and "quant_state" not in n}
    assert differing == quantized
    for name in ("config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_transformers_runs_what_our_decoder_reads(name, written):
    plan, folder = written(name)
    model, reader = AutoModelForCausalLM.from_pretrained(folder), Bnb4bitWeights(folder)
    for module in (module for group in plan.quantized_groups for module in group.modules):
        w = model.get_submodule(module).weight
        found = dequantize_4bit(w.data, w.quant_state)
        assert torch.equal(found, reader.read(f"{module}.weight")), module
    decoded = AutoModelForCausalLM.from_pretrained(plan.checkpoint.folder, dtype=torch.bfloat16)
    source = logits(decoded)
    decoded.load_state_dict({n: reader.read(n) for n in decoded.state_dict()})
    expected = logits(decoded)
    error = (logits(model) - expected).norm()
    assert error < 0.01 * expected.norm()  # bfloat16, summed in another order
    assert error < 0.1 * (expected - source).norm()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def test_float16(made_models, tmp_path):
    make_model("qwen2", tmp_path / "half").half().save_pretrained(tmp_path / "half")
    plan = plan_with_feedback(tmp_path / "half", Bnb4bit())
    write_4bit(plan, tmp_path / "out", tokens=random_tokens())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16 and torch.isfinite(logits(model)).all()


def test_of_a_mixture_of_experts_all_but_the_experts(made_models, tmp_path):
    plan = plan_with_feedback(made_models("qwen3moe")[0], Bnb4bit())
    write_4bit(plan, tmp_path / "out", tokens=random_tokens())
    reader = Bnb4bitWeights(tmp_path / "out")
    w = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[1].self_attn.q_proj
    found = dequantize_4bit(w.weight.data, w.weight.quant_state)
    assert torch.equal(found, reader.read("model.layers.1.self_attn.q_proj.weight"))


def test_better_than_plain_rounding_on_held_out_text(tiny_qwq, tmp_path):
    plan = plan_with_feedback(tiny_qwq, Bnb4bit(search_scales=True))
    held_out = cut_tokens(plan.checkpoint, held_out_texts(), 1024, 128)
    tokens = cut_tokens(plan.checkpoint, built_in_texts(), 2048, 128)
    written = write_4bit(
        plan,
        tmp_path / "out",
        tokens=tokens,
        check=lambda plan, folder: check_4bit(plan, folder, held_out, "cpu"),
    )
    source, plain, found = written.results
    assert source.kld is None and found.name == "NF4, error feedback"
    assert found.kld + 3 * found.kld_error < 0.7 * plain.kld  # 0.25 on 8192 tokens
    assert found.nbytes == plain.nbytes == plan.nbytes


# --- what is said ---------------------------------------------------------------------------------


def dynamic(*words):
    command = [str(word) for word in ("dynamic-4bit", *words)]
    return CliRunner().invoke(cli, command)


FEW = (
    "512 tokens of calibration text are fewer than 4 times the 192 inputs of the widest linear: "
    "feedback may be worse than plain rounding; give --tokens 768, and a text that has them"
)


def test_the_command_says_it_everywhere(made_models, tmp_path):
    out, source = tmp_path / "out", made_models("qwen2")[0]
    options = ("--gptq", "--tokens", 512, "--seq-len", 64)
    result = dynamic(source, "-o", out, *options, "--budget", "3%", "--metric", "weight")
    assert result.exit_code == 0, result.output
    assert "NF4 with error feedback, each layer on the outputs" in result.stdout
    assert "dynamic, feedback" in result.stdout
    assert FEW in " ".join(result.stderr.split())
    card = (out / "README.md").read_text()
    assert "NF4 with error feedback. Calibrated on 512 tokens of built-in" in card
    entry = json.loads((out / "qwq-quant.json").read_text())["outputs"]["."]
    assert entry["type"].startswith("NF4 with error feedback, 3 of 12 groups")
    assert entry["calibration"]["n_tokens"] == 512 and entry["damped"] == {}
    planned = dynamic(source, "-o", tmp_path / "x", *options, "--budget", 0, "--dry-run")
    assert planned.exit_code == 0 and not (tmp_path / "x").exists()
    assert "NF4 with error feedback: at least 192 tokens of calibration" in planned.stdout
    assert FEW in " ".join(planned.stdout.split())
    content = dynamic(source, "-o", tmp_path / "x", *options, "--budget", 0, "--dry-run",
                      "--format", "json")  # fmt: skip
    assert json.loads(content.stdout)["feedback"] is True


def test_without_it_nothing_is_said(tiny_qwq, tmp_path):
    result = dynamic(tiny_qwq, "-o", tmp_path / "out", "--budget", 0, "--no-check")
    assert result.exit_code == 0 and "feedback" not in result.output
    entry = json.loads((tmp_path / "out" / "qwq-quant.json").read_text())["outputs"]["."]
    assert entry["type"] == "NF4, 0 of 24 groups 16-bit" and "calibration" not in entry
    assert "feedback" not in (tmp_path / "out" / "README.md").read_text()


# --- what is refused ------------------------------------------------------------------------------


def test_too_few_tokens(tiny_qwq, made_models, tmp_path):
    result = dynamic(tiny_qwq, "-o", tmp_path / "out", "--gptq", "--tokens", 512)
    assert result.exit_code == 65 and "the widest linear has 768 inputs" in result.stderr
    assert "--tokens 3072" in result.stderr and not any(tmp_path.iterdir())
    plan = plan_with_feedback(made_models("qwen2")[0], Bnb4bit())
    with pytest.raises(BadInput, match="too few"):
        write_4bit(plan, tmp_path / "out", tokens=random_tokens(2, 64))
    assert not any(tmp_path.iterdir())


def test_few_tokens_are_noted(made_models):
    plan = plan_with_feedback(made_models("qwen2")[0], Bnb4bit())
    assert token_notes(plan, random_tokens(8, 64)) == (FEW,)
    assert token_notes(plan, random_tokens(12, 64)) == ()
    (note,) = token_notes(plan, random_tokens(7, 100))  # 768 would give seven sequences again
    assert "give --tokens 800," in note


def test_activations_that_are_not_finite(made_models, tmp_path):
    folder = tmp_path / "model"
    model = make_model("qwen2", folder)
    model.model.layers[1].input_layernorm.weight.data[:] = 3e38
    model.save_pretrained(folder)
    with pytest.raises(BadInput, match=r"model\.layers\.1\.self_attn\.q_proj cannot be quantized"):
        write_4bit(plan_with_feedback(folder, Bnb4bit()), tmp_path / "out", tokens=random_tokens())
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial"))


def test_a_16_bit_copy_needs_no_feedback(tiny_qwq, tmp_path):
    result = dynamic(tiny_qwq, "-o", tmp_path / "out", "--gptq", "--budget", "all", "--no-check",
                     "--tokens", 256)  # fmt: skip
    assert result.exit_code == 0 and "feedback" not in result.output
    ours, source = (load_file(f / "model.safetensors") for f in (tmp_path / "out", tiny_qwq))
    assert all(torch.equal(w, source[name]) for name, w in ours.items())
