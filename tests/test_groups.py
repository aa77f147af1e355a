"""Groups of linears, from names and shapes of real models."""

import pytest
import transformers
from model_makers import MODELS

from quant.checkpoint import Checkpoint
from quant.groups import KINDS, find_experts, find_groups, find_linears

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
DENSE = [name for name in MODELS if "moe" not in name]


def layer_tensors(prefix, n_layers=2, attention=ATTENTION, mlp=MLP):
    for layer in range(n_layers):
        for leaf in attention:
            yield f"{prefix}layers.{layer}.self_attn.{leaf}.weight", (64, 64)
            yield f"{prefix}layers.{layer}.self_attn.{leaf}.bias", (64,)
        for leaf in mlp:
            yield f"{prefix}layers.{layer}.mlp.{leaf}.weight", (64, 64)
        yield f"{prefix}layers.{layer}.input_layernorm.weight", (64,)


def test_the_groups_of_a_trained_model(tiny_qwq):
    checkpoint = Checkpoint.open(tiny_qwq)
    groups = find_groups(checkpoint.tensors.values())
    n_layers = checkpoint.config["num_hidden_layers"]
    assert [(g.layer, g.kind) for g in groups] == [
        (layer, kind) for layer in range(n_layers) for kind in ("qkv", "o", "gate_up", "down")
    ]
    layer = "model.layers.1."
    assert [(g.name, g.modules) for g in groups if g.layer == 1] == [
        (
            layer + "self_attn.qkv_proj",
            tuple(layer + f"self_attn.{x}_proj" for x in "qkv"),
        ),
        (layer + "self_attn.o_proj", (layer + "self_attn.o_proj",)),
        (layer + "mlp.gate_up_proj", (layer + "mlp.gate_proj", layer + "mlp.up_proj")),
        (layer + "mlp.down_proj", (layer + "mlp.down_proj",)),
    ]
    assert not find_experts(checkpoint.tensors.values())


@pytest.mark.parametrize("name", DENSE)
def test_every_linear_of_a_dense_model_is_in_one_group(name, made_models):
    """transformers' own modules are the truth."""
    folder, model = made_models(name)
    tensors = list(Checkpoint.open(folder).tensors.values())
    real = {n for n, m in model.named_modules() if type(m).__name__ == "Linear"}
    grouped = [module for group in find_groups(tensors) for module in group.modules]
    assert sorted(grouped) == sorted(real - {"lm_head"})
    tied = model.config.tie_word_embeddings
    assert set(find_linears(tensors)) == (real - {"lm_head"} if tied else real)


@pytest.mark.parametrize("name", ["qwen2moe", "qwen3moe"])
def test_experts_are_in_no_group_and_are_told(name, made_models):
    folder, model = made_models(name)
    tensors = list(Checkpoint.open(folder).tensors.values())
    groups = find_groups(tensors)
    assert {g.kind for g in groups} == {"qkv", "o"}
    assert len(groups) == 2 * model.config.num_hidden_layers
    experts = set(find_experts(tensors))
    assert experts == {t.name for t in tensors if ".mlp." in t.name}
    n_routed = sum(".mlp.experts." in name for name in experts)
    assert n_routed == 3 * model.config.num_experts * model.config.num_hidden_layers
    # a loader may hold them as linears, so the skip list has to know them
    assert {e.removesuffix(".weight") for e in experts} <= set(find_linears(tensors))


def test_a_model_with_experts_in_some_layers_only():
    tensors = [
        *layer_tensors("model.", 1),
        ("model.layers.1.mlp.gate.weight", (8, 64)),
        ("model.layers.1.mlp.experts.0.down_proj.weight", (64, 64)),
        ("model.layers.1.mlp.shared_experts.down_proj.weight", (64, 64)),
        ("model.layers.1.mlp.experts.gate_up_proj", (8, 64, 64)),
    ]
    assert {g.layer for g in find_groups(tensors)} == {0}
    assert len(find_experts(tensors)) == 4


def test_layers_come_in_the_order_of_numbers():
    tensors = sorted(layer_tensors("model.", 12))  # as text: 0, 1, 10, 11, 2 ...
    assert [g.layer for g in find_groups(tensors)][::4] == list(range(12))


def test_phi_3_is_fused_already():
    config = transformers.Phi3Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Phi3ForCausalLM(config)
    tensors = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    groups = find_groups(tensors)
    assert [g.kind for g in groups] == ["qkv", "o", "gate_up", "down"] * 2
    assert all(g.modules == (g.name,) for g in groups)


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
def test_prefixes_of_language_models(prefix):
    groups = find_groups(layer_tensors(prefix))
    assert len(groups) == 8
    assert groups[0].name == f"{prefix}layers.0.self_attn.qkv_proj"


@pytest.mark.parametrize(
    "prefix", ["vision_tower.vision_model.encoder.", "audio_tower.", "mtp.", "model.visual.", ""]
)
def test_other_layers_have_no_groups(prefix):
    assert find_groups(layer_tensors(prefix)) == []
    assert len(find_linears(layer_tensors(prefix))) == 14


def test_only_matrices_count():
    assert find_groups([("model.layers.0.self_attn.q_proj.weight", (64,))]) == []
    assert find_groups([("model.layers.0.self_attn.q_proj.bias", (64, 64))]) == []
    assert find_groups([("model.layers.0.self_attn.rotary.q_proj.weight", (64, 64))]) == []
    assert find_groups([(f"model.layers.{'9' * 5000}.mlp.down_proj.weight", (2, 2))]) == []
    assert find_groups([]) == []


def test_kinds_are_one_table():
    assert [kind.name for kind in KINDS] == ["qkv", "o", "gate_up", "down"]
    members = [member for kind in KINDS for member in kind.members]
    assert len(members) == len(set(members))
