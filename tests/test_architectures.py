"""What is refused at plan time: models llama.cpp would load wrongly, or not at all."""

import json
import shutil

import numpy as np
import pytest
from model_makers import make_model
from safetensors.numpy import load_file, save_file

from quant.architectures import ARCHITECTURES, assemble, find_architecture, read_dimensions
from quant.checkpoint import Checkpoint
from quant.errors import BadInput
from quant.source import open_source
from quant.to_gguf import Wishes, plan_gguf


@pytest.fixture
def changed(made_models, tmp_path):
    """changed(name, config={...}, drop=[...], add={...}) -> a copy of a model, altered."""

    def make(name, config=None, drop=(), add=None):
        folder, _ = made_models(name)
        copy = tmp_path / "changed"
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        if config:
            merged = json.loads((copy / "config.json").read_text()) | config
            merged = {k: v for k, v in merged.items() if v is not ...}
            (copy / "config.json").write_text(json.dumps(merged))
        if drop or add:
            tensors = load_file(copy / "model.safetensors")
            tensors = {k: v for k, v in tensors.items() if k not in drop} | (add or {})
            save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return make


def plan(folder):
    return plan_gguf(open_source(str(folder)), Wishes("BF16"))


def test_unsupported_architecture_lists_what_is(changed):
    folder = changed("qwen2", {"architectures": ["GemmaForCausalLM"]})
    with pytest.raises(BadInput) as caught:
        plan(folder)
    for architecture in ARCHITECTURES:
        assert architecture.hf_names[0] in str(caught.value)
    assert "GemmaForCausalLM" in str(caught.value)


def test_remote_code_is_named_and_never_run(changed):
    folder = changed(
        "qwen2",
        {"architectures": ["OddForCausalLM"], "auto_map": {"AutoModel": "modeling_odd.OddModel"}},
    )
    (folder / "modeling_odd.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(BadInput, match=r"modeling_odd\.py"):
        plan(folder)


REFUSED = {
    "no layers": ("qwen2", {"num_hidden_layers": ...}, '"num_hidden_layers" .* is missing'),
    "text for a size": ("qwen2", {"hidden_size": "128"}, '"hidden_size" in config.json is 128'),
    "negative": ("qwen2", {"vocab_size": -1}, '"vocab_size"'),
    "true": ("qwen2", {"num_hidden_layers": True}, '"num_hidden_layers"'),
    "too many layers": ("qwen2", {"num_hidden_layers": 513}, "cannot load that many"),
    "heads": ("qwen2", {"num_key_value_heads": 3}, "cannot share"),
    "head size": ("qwen2", {"head_dim": 64}, "head_dim 64 x 4 heads"),
    "epsilon": ("qwen2", {"rms_norm_eps": 0}, '"rms_norm_eps"'),
    "epsilon of nothing": ("qwen2", {"rms_norm_eps": 1e-300}, '"rms_norm_eps" .* 32-bit'),
    "activation": ("qwen2", {"hidden_act": "gelu"}, "gelu"),
    "shape": ("qwen2", {"intermediate_size": 200}, "do not belong together"),
    "missing layer": ("qwen2", {"num_hidden_layers": 4}, "no tensor model.layers.3"),
    "layer too many": ("qwen2", {"num_hidden_layers": 2}, "have no place"),
    "dense layers": ("qwen3moe", {"mlp_only_layers": [0]}, "no experts"),
    "dense layers as text": ("qwen3moe", {"mlp_only_layers": "0"}, '"mlp_only_layers" .* is 0'),
    "dense layers as a number": ("qwen2moe", {"mlp_only_layers": 0}, '"mlp_only_layers"'),
    "sparse step": ("qwen2moe", {"decoder_sparse_step": 2}, "no experts"),
    "sparse step as text": ("qwen2moe", {"decoder_sparse_step": "1"}, '"decoder_sparse_step"'),
    "half a sparse step": ("qwen2moe", {"decoder_sparse_step": 1.5}, '"decoder_sparse_step"'),
    "window as text": ("mistral", {"sliding_window": "4096"}, '"sliding_window" .* is 4096'),
    "negative window": ("mistral", {"sliding_window": -1}, '"sliding_window" .* is -1'),
    "window in use": (
        "qwen2", {"sliding_window": [64], "use_sliding_window": True}, '"sliding_window"'
    ),
    "use of a window": ("qwen2", {"use_sliding_window": "false"}, '"use_sliding_window"'),
    "architecture as a number": ("qwen2", {"architectures": [2]}, "config.json names '2'"),
    "architecture in a list": ("qwen2", {"architectures": [["Qwen2ForCausalLM"]]}, "config.json"),
    "no architecture": ("qwen2", {"architectures": [None]}, "config.json names none"),
    "architecture as an object": ("qwen2", {"architectures": {"0": "x"}}, "config.json names none"),
    "tied as text": ("qwen2", {"tie_word_embeddings": "false"}, '"tie_word_embeddings"'),
    "routing as text": ("qwen2moe", {"norm_topk_prob": "false"}, '"norm_topk_prob"'),
    "routing": ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
    "routing 2": ("qwen2moe", {"norm_topk_prob": True}, "norm_topk_prob is true"),
    "experts": ("qwen3moe", {"num_local_experts": 5}, "5 x 128"),
    "theta of nothing": (
        "llama2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e-300}}, "32-bit"
    ),
    "endless context": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 1e9,
                "original_max_position_embeddings": 64,
            }
        },
        "YaRN stretches 64 tokens by 1e\\+09",
    ),
    "llama3 rope": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }
        },
        "no Llama|llama3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, changed):
    name, config, words = REFUSED[case]
    with pytest.raises(BadInput, match=words):
        plan(changed(name, config))


def test_missing_output_layer(changed):
    with pytest.raises(BadInput, match="tie_word_embeddings"):
        plan(changed("qwen2", drop=["lm_head.weight"]))


def test_stored_but_tied_output_layer_follows_the_config(changed):
    job = plan(changed("qwen2", {"tie_word_embeddings": True}))
    assert "output.weight" not in {a.name for a in job.plan.assignments}
    assert any("lm_head.weight is stored although" in note for note in job.notes)


def test_qwen2_moe_needs_an_output_layer_even_when_tied(tmp_path):
    make_model("qwen2moe", tmp_path / "m", tie_word_embeddings=True)
    job = plan(tmp_path / "m")
    output = next(a for a in job.plan.assignments if a.name == "output.weight")
    assert output.source.source_name == "model.embed_tokens.weight"


def test_left_over_and_unreadable_tensors(changed):
    extra = {"model.layers.0.mlp.\x1b[2Jsecret": np.ones(3, np.float32)}
    with pytest.raises(BadInput) as caught:
        plan(changed("qwen2", add=extra))
    assert "1 tensors have no place" in str(caught.value) and "\x1b" not in str(caught.value)
    ints = {"model.norm.weight": np.ones(128, np.int32)}
    with pytest.raises(BadInput, match="stored as I32"):
        plan(changed("qwen2", add=ints, drop=["model.layers.0.mlp.\x1b[2Jsecret"]))


def test_old_buffers_are_ignored(changed):
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)}
    assert plan(changed("llama2", add=buffers)).plan.n_weights > 0


def test_sliding_window_is_a_note(changed):
    folder = changed("mistral", {"sliding_window": 64})
    assert any("last 64 tokens" in note for note in plan(folder).notes)
    assert not any(
        "last 64 tokens" in n for n in plan(changed("qwen2", {"sliding_window": 64})).notes
    )


def test_planning_reads_no_weights(tmp_path, made_models):
    """Headers alone: the weights may be a hole in the disk."""
    import os
    import struct

    folder, _ = made_models("qwen2")
    shutil.copytree(folder, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    content = path.read_bytes()
    n = 8 + struct.unpack("<Q", content[:8])[0]
    path.write_bytes(content[:n])
    os.truncate(path, len(content))
    checkpoint = Checkpoint.open(tmp_path / "m")
    architecture = find_architecture(checkpoint.config)
    tensors, _ = assemble(
        architecture, checkpoint, read_dimensions(architecture, checkpoint.config)
    )
    assert len(tensors) == 3 + 3 * 12
