"""GPTQ folders: planned, written, decoded again by plain arithmetic, run, and refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from model_makers import torch_logits
from safetensors.torch import load_file, save_file

from quant.algorithms.gptq import IntegerGrid, gptq
from quant.calibration.feedback import quantize_streamed
from quant.calibration.gptq_weights import GptqWeights
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens, cut_tokens
from quant.checkpoint import Checkpoint
from quant.cli.gptq import command
from quant.cli.plan_4bit import print_outcome
from quant.errors import BadInput, CannotCreate
from quant.formats.gptq import WHOLE_ROW, Gptq
from quant.gptq_model import GptqPlan, plan_gptq
from quant.report.choice import Result
from quant.texts import built_in_texts, held_out_texts
from quant.write_gptq import check_gptq, write_gptq


def random_tokens(n_sequences=8, seq_len=64) -> Tokens:
    ids = np.random.default_rng(0).integers(0, 4090, (n_sequences, seq_len))
    return Tokens(ids, "random", "0" * 64)


def plan_of(folder: Path, *format, damp=0.01, static_groups=True) -> GptqPlan:
    return plan_gptq(Checkpoint.open(folder), Gptq(*format), damp, static_groups)


def plainly_decoded(parts: dict[str, np.ndarray], bits: int, offset: int) -> np.ndarray:
    """(rows, columns) float64. # ref: AutoGPTQ 0.7.1, qlinear_cuda_old.py, forward"""
    shifts, mask = np.arange(0, 32, bits), 2**bits - 1
    zeros = (parts["qzeros"].astype(np.int64)[:, :, None] >> shifts) & mask
    zeros = zeros.reshape(len(zeros), -1) + offset
    codes = (parts["qweight"].astype(np.int64)[:, None, :] >> shifts[:, None]) & mask
    codes = codes.reshape(-1, codes.shape[-1])
    g_idx = parts["g_idx"]
    return (parts["scales"].astype(np.float64)[g_idx] * (codes - zeros[g_idx])).T


@pytest.fixture(scope="module")
def written(made_models, tmp_path_factory):
    """(bits, group size, symmetric) -> (plan, folder), a tiny Qwen2 with random weights."""
    made = {}

    def get(*format, static_groups=True):
        key = (*format, static_groups)
        if key not in made:
            plan = plan_of(made_models("qwen2")[0], *format, static_groups=static_groups)
            folder = tmp_path_factory.mktemp("gptq") / "out"
            write_gptq(plan, random_tokens(), folder, command=("gptq", "x"))
            made[key] = plan, folder
        return made[key]

    return get


FORMATS = [(4, 64, True), (8, 32, True), (4, 32, False), (4, WHOLE_ROW, True)]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_stored_weights_are_those_that_gptq_made(format, written):
    plan, folder = written(*format)
    stored = load_file(folder / "model.safetensors")
    offset = 1 if format[2] else 0
    reader = GptqWeights(folder)

    def again(name, W, H):
        grid = IntegerGrid(tuple(W.shape), *format[:1], reader_size(W), format[2])
        W_hat = gptq(W, H, grid).W_hat
        parts = {k: stored[f"{name}.{k}"].numpy() for k in ("qweight", "qzeros", "scales", "g_idx")}
        decoded = plainly_decoded(parts, format[0], offset)
        np.testing.assert_array_equal(decoded.astype(np.float32), W_hat.numpy())
        assert torch.equal(reader.read(f"{name}.weight"), W_hat)
        assert reader.shape(f"{name}.weight") == tuple(W.shape)
        return W_hat

    def reader_size(W):
        return W.shape[1] if format[1] == WHOLE_ROW else format[1]

    model = StreamedModel(plan.checkpoint)
    quantize_streamed(model, plan.groups, random_tokens().ids, again)


def test_everything_else_is_the_source_in_16_bits(written, made_models):
    plan, folder = written(4, 64, True)
    stored, source = load_file(folder / "model.safetensors"), made_models("qwen2")[1].state_dict()
    parts = {f"{m}.{p}" for m in plan.quantized for p in ("qweight", "qzeros", "scales", "g_idx")}
    assert set(stored) == parts | (set(source) - {f"{m}.weight" for m in plan.quantized})
    for name in set(stored) - parts:
        assert torch.equal(stored[name], source[name].bfloat16())
    assert "model.layers.0.self_attn.q_proj.bias" in stored


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_sizes_are_known_before(format, written):
    plan, folder = written(*format)
    stored = load_file(folder / "model.safetensors")
    assert sum(t.nbytes for t in stored.values()) == plan.nbytes
    linears = sum(t.nbytes for n, t in stored.items() if n.rpartition(".")[0] in plan.quantized)
    linears -= sum(t.nbytes for n, t in stored.items() if n.endswith("proj.bias"))
    n_weights = sum(np.prod(plan.shape(name)) for name in plan.quantized)
    assert plan.bits_per_weight == pytest.approx(8 * linears / n_weights)


def test_files(written):
    _, folder = written(4, 64, True)
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "quantize_config.json", "qwq-quant.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    quantization = json.loads((folder / "quantize_config.json").read_text())
    assert config["quantization_config"] == quantization
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    expected = {"bits": 4, "group_size": 64, "sym": True, "desc_act": False, "quant_method": "gptq"}
    assert quantization.items() >= {**expected, "checkpoint_format": "gptq"}.items()
    entry = json.loads((folder / "qwq-quant.json").read_text())["outputs"]["."]
    assert entry["command"] == ["gptq", "x"]
    assert {f["name"] for f in entry["files"]} == names - {"qwq-quant.json"}
    assert entry["calibration"]["n_tokens"] == 512 and entry["damped"] == {}


def test_asymmetric_weights_say_so(written):
    plan, folder = written(4, 32, False)
    quantization = json.loads((folder / "quantize_config.json").read_text())
    assert (quantization["sym"], quantization["checkpoint_format"]) == (False, "gptq_v2")
    assert "vLLM does not load asymmetric weights" in plan.notes[0]
    assert "asymmetric" in (folder / "README.md").read_text()


def test_the_folder_runs_as_transformers_runs_these_weights(written, made_models):
    plan, folder = written(4, 64, True)
    model, weights = made_models("qwen2")[1], GptqWeights(folder)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict({name: weights.read(name).float() for name in kept})
    tokens = random_tokens().ids[:1]
    expected = torch_logits(model, tokens[0].tolist())
    model.load_state_dict(kept)
    streamed = StreamedModel(plan.checkpoint, weights)
    hidden = streamed.embed(tokens)
    for layer in streamed.layers(tokens.shape[1]):
        layer.run(hidden, hidden)
    x = streamed.norm(hidden.tensor[0])
    found = torch.cat([x @ w.T for _, w in streamed.head_blocks()], 1)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-3, atol=1e-3)
    assert np.abs(found.detach().numpy() - torch_logits(model, tokens[0].tolist())).max() > 0.05


@pytest.mark.parametrize("bits", [4, 8])
def test_better_than_plain_rounding_on_held_out_text(bits, tiny_qwq, tmp_path):
    plan = plan_of(tiny_qwq, bits, 128, True)
    held_out = cut_tokens(plan.checkpoint, held_out_texts(), 1024, 128)
    tokens = cut_tokens(plan.checkpoint, built_in_texts(), 4096, 256)
    written = write_gptq(
        plan,
        tokens,
        tmp_path / "out",
        check=lambda plan, folder: check_gptq(plan, folder, held_out, "cpu"),
    )
    source, plain, found = written.results
    assert source.kld is None and plain.nbytes == found.nbytes == plan.nbytes
    assert found.kld + 3 * found.kld_error < plain.kld
    assert f"{found.kld:.5f}" in (tmp_path / "out" / "README.md").read_text()


# --- what is refused ------------------------------------------------------------------------------


def changed_copy(folder: Path, target: Path, change) -> Path:
    """The model with `change` applied to its tensors (a dict)."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def refused(plan: GptqPlan, output: Path, tokens: Tokens | None = None) -> BadInput:
    with pytest.raises(BadInput) as caught:
        write_gptq(plan, tokens or random_tokens(), output)
    assert not output.exists() and not list(output.parent.glob(".*partial"))
    return caught.value


def test_too_few_tokens(made_models, tmp_path):
    plan = plan_of(made_models("qwen2")[0], 4, 64)
    error = refused(plan, tmp_path / "out", random_tokens(2, 64))
    assert "128 tokens" in error.what and "192 inputs" in error.what
    assert "--tokens 768" in error.next_step


def test_group_sizes_that_do_not_divide_rows(made_models):
    with pytest.raises(BadInput) as caught:
        plan_of(made_models("qwen2")[0], 4, 128)
    assert "groups of 128 do not divide its rows of 192 weights" in caught.value.what
    assert caught.value.next_step == "Try --group-size 64."


def test_mixtures_of_experts(made_models):
    with pytest.raises(BadInput, match="mixture of experts"):
        plan_of(made_models("qwen3moe")[0], 4, 32)


def test_weights_that_are_not_finite(made_models, tmp_path):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    folder = changed_copy(made_models("qwen2")[0], tmp_path / "model", spoil)
    error = refused(plan_of(folder, 4, 64), tmp_path / "out")
    assert "model.layers.1.mlp.up_proj.weight" in error.what


def test_activations_that_are_not_finite(made_models, tmp_path):
    def spoil(tensors):
        tensors["model.layers.1.input_layernorm.weight"][:] = 3e38

    folder = changed_copy(made_models("qwen2")[0], tmp_path / "model", spoil)
    error = refused(plan_of(folder, 4, 64), tmp_path / "out")
    assert "model.layers.1.self_attn.q_proj cannot be quantized" in error.what
    assert "inputs are not finite" in error.what


def test_weights_beyond_the_scales(made_models, tmp_path):
    def spoil(tensors):
        tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = 1e7

    folder = changed_copy(made_models("qwen2")[0], tmp_path / "model", spoil)
    error = refused(plan_of(folder, 4, 64), tmp_path / "out")
    assert "model.layers.2.mlp.down_proj has weights that GPTQ's float16" in error.what


def test_singular_inputs_are_told(made_models, tmp_path):
    def spoil(tensors):  # two columns of every input are the same
        norm = tensors["model.layers.0.input_layernorm.weight"]
        norm[1] = norm[0]
        embedding = tensors["model.embed_tokens.weight"]
        embedding[:, 1] = embedding[:, 0]

    folder = changed_copy(made_models("qwen2")[0], tmp_path / "model", spoil)
    plan = plan_of(folder, 4, 64, damp=0.0)
    written = write_gptq(plan, random_tokens(), tmp_path / "out")
    assert 0 < written.damped["model.layers.0.self_attn.q_proj"] < 0.01


def test_an_output_that_exists(made_models, tmp_path):
    plan = plan_of(made_models("qwen2")[0], 4, 64)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(CannotCreate):
        write_gptq(plan, random_tokens(), tmp_path / "out", force=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


# --- the command ----------------------------------------------------------------------------------


def run(*words):
    return CliRunner().invoke(command, [str(word) for word in words])


def test_the_command(tiny_qwq, tmp_path):
    out = tmp_path / "out"
    result = run(tiny_qwq, "-o", out, "--tokens", 1024, "--seq-len", 128, "--no-check", "--format",
                 "json", "--bits", 8)  # fmt: skip
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["quantization_config"]["bits"] == 8
    assert content["nbytes"] == (out / "model.safetensors").stat().st_size
    (note,) = content["notes"]
    assert note.startswith("1024 tokens") and note.endswith(
        "--tokens 3072, and a text that has them"
    )
    assert "1024 tokens of calibration text are fewer than 4 times" in result.stderr
    assert "1024 tokens" in (out / "README.md").read_text().partition("Note: ")[2]
    again = run(tiny_qwq, "-o", out, "--tokens", 1024)
    assert isinstance(again.exception, CannotCreate)


@pytest.mark.parametrize(("kld", "is_said"), [(0.037, True), (0.0238, False), (0.012, False)])
def test_what_was_for_nothing_is_said(capsys, kld, is_said):
    """Farther from the source than plain rounding, by more than the two standard errors."""
    rows = [Result("source", 9, 100, 45.0, 3.0)]
    rows += [Result("plain", 9, 100, 45.0, 3.0, 0.023, 0.0005, 0.8)]
    rows += [Result("GPTQ", 9, 100, 45.0, 3.0, kld, 0.0005, 0.8)]
    print_outcome(SimpleNamespace(damped={}, results=tuple(rows)))
    assert ("lost more than plain rounding" in capsys.readouterr().out) == is_said


def test_the_plan_alone(tiny_qwq, tmp_path):
    result = run(tiny_qwq, "-o", tmp_path / "out", "--dry-run", "--group-size", "-1", "--asym")
    assert result.exit_code == 0, result.output
    assert "42 linears in 4 bits" in result.stdout
    assert "At least 768 tokens" in result.stdout
    assert "asymmetric" in result.stdout and "fewer" not in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [("--bits", 3), ("--group-size", 0), ("--damp", 2), ("--damp", "nan")],
    ids=str,
)
def test_options_that_cannot_be(words, tiny_qwq, tmp_path):
    assert run(tiny_qwq, "-o", tmp_path / "out", *words).exit_code == 2


def test_bad_input_before_any_work(tiny_qwq, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("Too little of it. " * 60)
    few = run(tiny_qwq, "-o", tmp_path / "out", "--calibration", text, "--seq-len", 64)
    assert isinstance(few.exception, BadInput) and "too few" in few.exception.what
    dry = run(tiny_qwq, "-o", tmp_path / "out", "--tokens", 512, "--dry-run")
    assert isinstance(dry.exception, BadInput) and "--tokens 3072" in dry.exception.next_step
    odd = run(tiny_qwq, "-o", tmp_path / "out", "--group-size", 96)
    assert isinstance(odd.exception, BadInput) and "--group-size 128" in odd.exception.next_step
