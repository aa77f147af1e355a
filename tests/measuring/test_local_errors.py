"""Weight, activation and block errors against transformers' whole model with hooks."""

import pytest
import torch
from measuring_helpers import (
    DENSE,
    bnb_rounded,
    groups_of,
    measured,
    quantized,
    random_tokens,
    seen,
    square,
)
from model_makers import make_model
from torch import nn

from quant.calibration.streamed_model import StreamedModel
from quant.checkpoint import Checkpoint
from quant.formats.nf4 import Bnb4bit
from quant.groups import find_experts
from quant.measuring.measure import measure
from quant.sensitivity import read_sensitivity, write_sensitivity

IDS = random_tokens((5, 24))


def logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits


def expected_local(model, groups) -> dict[str, tuple[float, float]]:
    """Module -> its weight and activation errors; group -> the same of its members together."""
    with seen(model, nn.Linear) as calls:
        logits(model)
    found = {}
    for group in groups:
        sums = torch.zeros(4, dtype=torch.float64)
        for name in group.modules:
            w = model.get_submodule(name).weight.data
            dw, x = w - bnb_rounded(w), calls[name][0]
            own = torch.tensor([square(dw), square(w), square(x @ dw.T), square(x @ w.T)])
            found[name] = (own[0] / own[1]).item(), (own[2] / own[3]).item()
            sums += own
        found[group.name] = (sums[0] / sums[1]).item(), (sums[2] / sums[3]).item()
    return found


def expected_block(model, group) -> float:
    """Of the residual stream behind the layer, the rest of the model being as it was."""
    kind = type(model.model.layers[0])
    with seen(model, kind) as plain:
        logits(model)
    with seen(model, kind) as changed, quantized(model, group.modules):
        logits(model)
    layer = f"model.layers.{group.layer}"
    return square(changed[layer][1] - plain[layer][1]) / square(plain[layer][1])


@pytest.mark.parametrize("name", DENSE)
def test_every_error_of_every_linear_and_group(made_models, name):
    folder, model = made_models(name)
    groups = groups_of(folder)
    found = measured(folder, IDS, "activation", "block")
    assert list(found.metrics) == ["weight", "activation", "block"]
    expected = expected_local(model, groups)
    for module, (weight, activation) in expected.items():
        if module in found.modules:
            values = found.modules[module].values
            assert values["weight"] == pytest.approx(weight, rel=1e-4), module
            assert values["activation"] == pytest.approx(activation, rel=1e-3), module
    for group in groups:
        weight, activation = expected[group.name]
        assert found.values("weight")[group.name] == pytest.approx(weight, rel=1e-4)
        assert found.values("activation")[group.name] == pytest.approx(activation, rel=1e-3)
        block = expected_block(model, group)
        assert found.values("block")[group.name] == pytest.approx(block, rel=1e-3), group.name


def test_one_sequence_at_a_time_gives_the_same(made_models, monkeypatch):
    folder, _ = made_models("qwen3")
    whole = measured(folder, IDS, "activation", "block")
    monkeypatch.setattr("quant.calibration.streamed_model.ACTIVATION_NBYTES", 1)
    single = measured(folder, IDS, "activation", "block")
    for metric in ("activation", "block"):
        assert single.values(metric) == pytest.approx(whole.values(metric), rel=1e-4)


@pytest.mark.parametrize("name", ["qwen2moe", "qwen3moe"])
def test_experts_are_run_but_not_measured(made_models, name):
    folder, model = made_models(name)
    found = measured(folder, IDS, "activation")
    assert {group.kind for group in found.groups.values()} == {"qkv", "o"}
    assert find_experts(Checkpoint.open(folder).tensors.values())
    expected = expected_local(model, found.groups.values())
    for group in found.groups:  # of the last layer too, behind all experts
        activation = expected[group][1]
        assert found.values("activation")[group] == pytest.approx(activation, rel=1e-3)


def test_weights_alone_need_no_text(made_models):
    folder, _ = made_models("llama2")
    model = StreamedModel(Checkpoint.open(folder))
    found = measure(model, None, Bnb4bit(), "bfloat16", frozenset({"weight"}))
    assert list(found.metrics) == ["weight"] and found.calibration == {}
    assert found.values("weight") == measured(folder, IDS, "activation").values("weight")


def test_searched_scales_lower_every_error(made_models):
    folder, _ = made_models("llama2")
    model = StreamedModel(Checkpoint.open(folder))
    searched = Bnb4bit(search_scales=True)
    found = measure(model, None, searched, "bfloat16", frozenset({"weight"})).values("weight")
    plain = measure(model, None, Bnb4bit(), "bfloat16", frozenset({"weight"})).values("weight")
    assert all(0.8 * plain[name] < found[name] < 0.9 * plain[name] for name in plain)


def test_a_linear_without_weights_has_no_error(tmp_path):
    model = make_model("qwen2", tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path)
    found = measured(tmp_path, IDS, "activation", "block", "gradient")
    name = "model.layers.1.mlp.down_proj"
    assert [found.values(metric)[name] for metric in found.metrics] == [0.0] * 4


def test_what_is_measured_says_where_it_comes_from_and_survives_the_file(made_models, tmp_path):
    folder, _ = made_models("llama2")
    found = measured(folder, IDS, "activation")
    assert found.model["architecture"] == "LlamaForCausalLM"
    assert found.calibration == {
        "name": "random", "sha256": "0" * 64, "n_tokens": 120, "seq_len": 24, "seed": 0
    }  # fmt: skip
    assert found.quantization == {
        "quant_type": "nf4", "blocksize": 64, "double_quant": True, "search_scales": False
    }  # fmt: skip
    write_sensitivity(tmp_path / "s.json", found)
    assert read_sensitivity(tmp_path / "s.json") == found
