"""GPTQ folders as candidates: decoded exactly, whole or layer by layer, without its libraries."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from model_makers import make_model
from safetensors.torch import load_file, save_file

from quant.errors import BadInput, QwqQuantError
from quant.evaluation.runners import folder as folder_room
from quant.evaluation.runners import open_runner
from quant.evaluation.runners.stored import count_weights, find_weights, loaded_nbytes
from quant.evaluation.runners.streamed import StreamedRunner
from quant.formats.gptq import Gptq

WINDOWS = np.random.default_rng(0).integers(0, 4090, (2, 32)).astype(np.int32)

KINDS = {
    "Int4": (4, 64, True, "gptq"),
    "Int8": (8, 32, True, "gptq"),
    "Int4-asym": (4, 32, False, "gptq_v2"),
    "Int4-asym-v1": (4, 32, False, "gptq"),
    "Int4-sym-v2": (4, 64, True, "gptq_v2"),
    "Int8-row-v2": (8, -1, False, "gptq_v2"),
}
"""bits, group size, symmetric, checkpoint format."""


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (n, m) packed along n, the first lowest. # ref: AutoGPTQ 0.7.1, pack"""
    n_codes = 32 // bits
    parts = codes.astype(np.uint64).reshape(-1, n_codes, codes.shape[1])
    packed = sum(parts[:, i] << np.uint64(bits * i) for i in range(n_codes))
    return packed.astype(np.uint32).view(np.int32)


def rounded(w: np.ndarray, kind: tuple, order: np.ndarray) -> tuple[dict, np.ndarray]:
    """(the stored parts, the weights they stand for), as GPTQModel stores them.

    order: columns in the order in which they are put into groups (desc_act).
    """
    bits, group_size, symmetric, stored_as = kind
    n_rows, n_columns = w.shape
    group_size = n_columns if group_size == -1 else group_size
    g_idx = np.empty(n_columns, np.int32)
    g_idx[order] = np.arange(n_columns) // group_size
    top = 2**bits - 1
    scales = np.empty((n_columns // group_size, n_rows), np.float16)
    zeros = np.empty(scales.shape, np.int64)
    for g in range(len(scales)):
        of = w[:, g_idx == g]
        low, high = np.minimum(of.min(1), 0), np.maximum(of.max(1), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        scales[g] = (high - low) / top
        zeros[g] = (top + 1) // 2 if symmetric else np.rint(-low / scales[g]).clip(0, top)
    scale, zero = scales.astype(np.float32)[g_idx].T, zeros[g_idx].T
    codes = np.rint(w / scale + zero).clip(0, top)
    stored = words(zeros.T, bits).T
    if stored_as == "gptq":  # GPTQModel, convert_gptq_v2_to_v1_format: from the words
        stored = (stored.view(np.uint32) - np.uint32((2**32 - 1) // top)).view(np.int32)
    parts = {"qweight": words(codes.T, bits), "qzeros": stored, "scales": scales, "g_idx": g_idx}
    return parts, (codes - zero).astype(np.float32) * scale


def quantized(source: Path, output: Path, kind: tuple, shuffled: bool = False) -> dict:
    """`source` as a GPTQ folder; the weights that its linears stand for."""
    shutil.copytree(source, output)
    tensors, meant = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = tensor
            continue
        w = tensor.float().numpy()
        if name.endswith("0.self_attn.q_proj.weight"):
            w = np.abs(w) + 0.01  # no negative weights: zero point 0
        order = np.random.default_rng(1).permutation(w.shape[1]) if shuffled else slice(None)
        parts, meant[name] = rounded(w, kind, order)
        for part, value in parts.items():
            tensors[name.replace("weight", part)] = torch.from_numpy(np.ascontiguousarray(value))
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    bits, group_size, symmetric, stored_as = kind
    say(output, {"bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": shuffled,
                 "quant_method": "gptq", "checkpoint_format": stored_as})  # fmt: skip
    return meant


def say(folder: Path, quantization: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def expected(model, meant: dict) -> np.ndarray:
    """transformers' logits with these weights instead of the model's own."""
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(kept | {n: torch.from_numpy(w) for n, w in meant.items()})
    with torch.no_grad():
        found = model(torch.from_numpy(WINDOWS.astype(np.int64))).logits[:, 16:-1].numpy().copy()
    model.load_state_dict(kept)
    return found


def found_by(runner) -> np.ndarray:
    return np.array([logits.copy() for logits in runner.logits(WINDOWS, 16)])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shuffled", [False, True], ids=["", "desc_act"])
def test_weights_are_decoded_exactly(made_models, tmp_path, monkeypatch, name, shuffled):
    source, model = made_models("qwen2")
    meant = quantized(source, tmp_path / "m", KINDS[name], shuffled)
    wanted = expected(model, meant)
    with open_runner(tmp_path / "m") as runner:
        assert not isinstance(runner, StreamedRunner)
        whole = found_by(runner)
    monkeypatch.setattr(folder_room, "_free_memory", lambda device: 0)
    with open_runner(tmp_path / "m") as runner:
        assert isinstance(runner, StreamedRunner)
        streamed = found_by(runner)
    assert np.abs(whole - wanted).max() < 1e-4 and np.abs(streamed - wanted).max() < 1e-4
    assert np.abs(expected(model, {}) - wanted).max() > 0.01


@pytest.mark.parametrize("stored_as", ["gptq", "gptq_v2"])
def test_a_zero_point_of_0_is_read_as_it_was_meant(made_models, tmp_path, stored_as):
    from quant.calibration.gptq_weights import GptqWeights

    kind = (4, 32, False, stored_as)
    meant = quantized(made_models("qwen2")[0], tmp_path / "m", kind)
    weights, name = GptqWeights(tmp_path / "m"), "model.layers.0.self_attn.q_proj.weight"
    assert meant[name].min() >= 0 and np.array_equal(weights.read(name).numpy(), meant[name])


def test_ours_can_be_asked(tiny_qwq, tmp_path):
    """A folder that `gptq` wrote answers, for its weights are in memory."""
    from quant.calibration.tokens import cut_tokens
    from quant.checkpoint import Checkpoint
    from quant.evaluation.questions import ask, grade, read_questions
    from quant.gptq_model import plan_gptq
    from quant.texts import built_in_texts
    from quant.write_gptq import write_gptq

    plan = plan_gptq(Checkpoint.open(tiny_qwq), Gptq(8, 64, True), 0.01, True)
    write_gptq(plan, cut_tokens(plan.checkpoint, built_in_texts(), 1024, 256), tmp_path / "m")
    questions = read_questions(tiny_qwq / "questions.jsonl")[:4]
    with open_runner(tmp_path / "m") as runner, open_runner(tiny_qwq) as source:
        assert runner.eos == source.eos and runner.n_ctx_trained == source.n_ctx_trained
        assert grade(questions, list(ask(runner, questions))).n_right >= 3
        p, q = found_by(source), found_by(runner)
    assert 0 < np.abs(p - q).max() < 0.5


def test_experts(made_models, tmp_path, monkeypatch):
    """AutoGPTQ's mixtures of experts have integers in every expert."""
    source, _ = made_models("qwen3moe")
    meant = quantized(source, tmp_path / "m", (4, 32, True, "gptq"))
    assert any(".experts." in name for name in meant)
    plain = tmp_path / "plain"
    shutil.copytree(source, plain)
    tensors = load_file(source / "model.safetensors")
    tensors |= {name: torch.from_numpy(w) for name, w in meant.items()}
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    with open_runner(tmp_path / "m") as runner, open_runner(plain) as same:
        wanted = found_by(same)
        assert np.abs(found_by(runner) - wanted).max() < 1e-4
    monkeypatch.setattr(folder_room, "_free_memory", lambda device: 0)
    with open_runner(tmp_path / "m") as runner:
        assert np.abs(found_by(runner) - wanted).max() < 1e-4


def test_weights_are_counted_not_words(tiny_qwq, tmp_path):
    meant = quantized(tiny_qwq, tmp_path / "m", (4, 64, True, "gptq"))
    weights = find_weights(tmp_path / "m")
    n = count_weights(weights)
    assert n == count_weights(find_weights(tiny_qwq)) and meant.keys() < set(weights.names)
    assert loaded_nbytes(tmp_path / "m", weights, 4) == 4 * n


# --- what is refused --------------------------------------------------------------------------


@pytest.fixture
def int4(made_models, tmp_path) -> Path:
    quantized(made_models("qwen2")[0], tmp_path / "m", (4, 64, True, "gptq"))
    return tmp_path / "m"


@pytest.mark.parametrize(
    "change",
    [{"bits": 3}, {"bits": "4"}, {"group_size": 0}, {"group_size": 24}, {"group_size": None},
     {"sym": "yes"}, {"checkpoint_format": "marlin"}, {"checkpoint_format": []}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("streamed", [False, True])
def test_odd_settings(int4, change, streamed, monkeypatch):
    config = json.loads((int4 / "config.json").read_text())
    say(int4, config["quantization_config"] | change)
    if streamed:
        monkeypatch.setattr(folder_room, "_free_memory", lambda device: 0)
    with pytest.raises(BadInput), open_runner(int4) as runner:
        found_by(runner)


@pytest.mark.parametrize("part", ["qzeros", "scales", "g_idx"])
@pytest.mark.parametrize("streamed", [False, True])
def test_damaged_parts(int4, part, streamed, monkeypatch):
    tensors = load_file(int4 / "model.safetensors")
    name = f"model.layers.1.mlp.up_proj.{part}"
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, int4 / "model.safetensors", {"format": "pt"})
    if streamed:
        monkeypatch.setattr(folder_room, "_free_memory", lambda device: 0)
    with pytest.raises(BadInput, match="up_proj"), open_runner(int4) as runner:
        found_by(runner)


def test_groups_that_are_not_there(int4):
    tensors = load_file(int4 / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.g_idx"][3] = 99
    save_file(tensors, int4 / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="g_idx"):
        open_runner(int4)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.qweight", "model.norm.weight"])
def test_missing_tensors(int4, name):
    """transformers would make random ones up."""
    tensors = load_file(int4 / "model.safetensors")
    del tensors[name]
    save_file(tensors, int4 / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="lacks 1 of"):
        open_runner(int4)


def test_other_integers_need_their_own_library(int4):
    assert find_spec("gptqmodel") is None
    say(int4, {"bits": 4, "group_size": 64, "quant_method": "awq", "zero_point": True})
    with pytest.raises(QwqQuantError):
        open_runner(int4)


def test_a_missing_tensor_of_a_16_bit_folder(tmp_path):
    make_model("qwen2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"lacks 1 of.*\n.*2\.mlp\.down_proj"):
        open_runner(tmp_path)
