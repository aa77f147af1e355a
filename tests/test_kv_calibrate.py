"""kv-calibrate: the scales of the whole model, one layer in memory, and what they are good for."""

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from kv_cache_helpers import divergence, read_text, step_by_step
from model_makers import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens
from quant.checkpoint import Checkpoint
from quant.cli import cli
from quant.errors import BadInput
from quant.kv_cache import Int8Cache, RecordingCache, read_scales
from quant.kv_cache.calibrate import measure_kv_scales

BIASES = {28: 150, 29: -120, 30: 167, 31: 90, 60: -160, 61: 110, 62: -140, 63: 80}
"""Of k_proj, on channels that rotary embedding hardly turns, as in Qwen2.5's first layer."""


def run(*words) -> object:
    return CliRunner().invoke(cli, [str(w) for w in words])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def biased(tiny_qwq, tmp_path_factory):
    """The folder of a tiny-qwq with Qwen2.5's biases, in two of its layers."""
    folder = tmp_path_factory.mktemp("models") / "biased"
    shutil.copytree(tiny_qwq, folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in (0, 5):
        bias = tensors[f"model.layers.{layer}.self_attn.k_proj.bias"].view(2, 64)
        for channel, value in BIASES.items():
            bias[:, channel] += value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def streamed_scales(folder, ids: np.ndarray):
    return measure_kv_scales(StreamedModel(Checkpoint.open(folder)), Tokens(ids, "", ""))


def assert_same_scales(ours, theirs) -> None:
    assert ours.model_type == theirs.model_type
    assert ours.layers.keys() == theirs.layers.keys()
    for i, channels in theirs.layers.items():
        torch.testing.assert_close(ours.layers[i].mid, channels.mid, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.layers[i].range, channels.range, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama3", "qwen3moe"])
def test_scales_equal_the_whole_models(made_models, name):
    folder, model = made_models(name)
    ids = np.random.default_rng(1).integers(0, 4090, (5, 32))
    whole = RecordingCache(model.config)
    with torch.no_grad():
        model(torch.from_numpy(ids), past_key_values=whole)
    assert_same_scales(streamed_scales(folder, ids), whole.scales())


def test_scales_equal_over_several_micro_batches(made_models, monkeypatch):
    """What is recorded is the extremes of all, not of the last few sequences."""
    from quant.calibration import streamed_model

    folder, _ = made_models("qwen2")
    ids = np.random.default_rng(2).integers(0, 4090, (5, 32))
    together = streamed_scales(folder, ids)
    monkeypatch.setattr(streamed_model, "ACTIVATION_NBYTES", 1)
    assert_same_scales(streamed_scales(folder, ids), together)


def test_only_layers_of_full_attention_are_measured(tmp_path, monkeypatch):
    """One with a window keeps what it was given: it would see the sequence before."""
    from quant.calibration import streamed_model

    kinds = ["full_attention", "sliding_attention", "full_attention"]
    windowed = {"use_sliding_window": True, "sliding_window": 8, "layer_types": kinds}
    model = make_model("qwen2", tmp_path, **windowed)
    ids = np.random.default_rng(1).integers(0, 4090, (5, 32))
    monkeypatch.setattr(streamed_model, "ACTIVATION_NBYTES", 1)
    ours = streamed_scales(tmp_path, ids)
    assert list(ours.layers) == [0, 2]
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.from_numpy(ids), past_key_values=stock)
    for i in (0, 2):
        keys = stock.layers[i].keys
        mid = (keys.amax((0, 2)) + keys.amin((0, 2))) / 2
        torch.testing.assert_close(ours.layers[i].mid, mid, rtol=1e-4, atol=1e-4)
    Int8Cache(model.config, scales=ours)  # which layers they are of is what it wants too


def test_the_command_cures_a_model_with_key_biases(biased, texts, tmp_path):
    """On text other than what was calibrated on, divergence falls to less than a tenth."""
    path = tmp_path / "kv-scales.safetensors"
    made = run("kv-calibrate", biased, "-o", path, "--tokens", 1024, "--seq-len", 128)
    assert made.exit_code == 0, made.output
    assert "6 layers seen by 1024 tokens of built-in" in made.output
    model = AutoModelForCausalLM.from_pretrained(biased, dtype=torch.float32).eval()
    text = read_text(AutoTokenizer.from_pretrained(biased), texts / "heldout.jsonl", 110)
    expected = step_by_step(model, text, DynamicCache(config=model.config), 30)
    plain, centred = (
        divergence(expected, step_by_step(model, text, cache, 30))
        for cache in (Int8Cache(model.config), Int8Cache(model.config, scales=path))
    )
    assert centred[0] * 10 < plain[0]
    assert centred[1] >= 0.98 and centred[0] < 1e-3


def test_only_files_of_scales_are_replaced(tiny_qwq, made_models, tmp_path):
    path = tmp_path / "kv-scales.safetensors"
    few = ("--tokens", 64, "--seq-len", 32)
    assert run("kv-calibrate", tiny_qwq, "-o", path, *few).exit_code == 0
    again = run("kv-calibrate", tiny_qwq, "-o", path, *few)
    assert again.exit_code == 73 and "--force" in again.output
    assert run("kv-calibrate", tiny_qwq, "-o", path, *few, "--force").exit_code == 0
    assert len(read_scales(path).layers) == 6
    weights = made_models("qwen2")[0] / "model.safetensors"
    before = weights.read_bytes()
    refused = run("kv-calibrate", tiny_qwq, "-o", weights, *few, "--force")
    assert refused.exit_code == 73 and "no file of scales" in refused.output
    assert weights.read_bytes() == before
    own = run("kv-calibrate", tiny_qwq, "-o", tiny_qwq / "model.safetensors", *few, "--force")
    assert own.exit_code == 2 and "is the source itself" in own.output


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"head_dim": 24}, "a head size of 24"),
        ({"layer_types": ["sliding_attention"] * 3, "sliding_window": 8}, "None of its layers"),
    ],
)
def test_models_that_no_int8_cache_serves_are_refused_at_once(tmp_path, config, words):
    make_model("qwen3", tmp_path, **config)
    if "layer_types" in config:  # use_sliding_window decides what becomes of sliding_window
        raw = json.loads((tmp_path / "config.json").read_text())
        raw |= config | {"use_sliding_window": True, "max_window_layers": 0}
        (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(BadInput, match="cannot hold this model's keys") as error:
        streamed_scales(tmp_path, np.zeros((1, 4), np.int64))
    assert words in error.value.why


def test_keys_out_of_bounds_are_named(tmp_path):
    """Weights of 1e30 are finite, what they make of a text is not."""
    model = make_model("qwen2", tmp_path)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.fill_(1e30)
    model.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="The keys of layer 1 are infinite"):
        streamed_scales(tmp_path, np.arange(8)[None])


def test_a_gguf_file_and_a_bad_text_are_refused(tiny_qwq, tmp_path):
    out = tmp_path / "kv-scales.safetensors"
    (tmp_path / "short.txt").write_text("too short")
    refused = run("kv-calibrate", tiny_qwq, "-o", out, "--calibration", tmp_path / "short.txt")
    assert refused.exit_code == 65 and "has only" in refused.output
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert run("kv-calibrate", tmp_path / "m.gguf", "-o", out).exit_code in (2, 65)
    assert not out.exists()
