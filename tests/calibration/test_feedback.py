"""Quantizing while the model runs, against a whole transformers model and hooks."""

import copy

import numpy as np
import pytest
import torch

from quant.calibration.feedback import quantize_streamed
from quant.calibration.streamed_model import StreamedModel
from quant.checkpoint import Checkpoint
from quant.groups import find_groups

IDS = np.random.default_rng(0).integers(0, 4090, (3, 40))


def coarse(W: torch.Tensor) -> torch.Tensor:
    """A rounding that leaves its mark on everything behind it."""
    return (W * 8).round() / 8


def inputs_of(model, name: str) -> torch.Tensor:
    """What the linear sees, (n_tokens, in_features) float64."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model(torch.from_numpy(IDS))
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double()


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama-bias"])
def test_every_linear_sees_what_the_quantized_ones_before_it_put_out(name, made_models):
    folder, model = made_models(name)
    model = copy.deepcopy(model)
    checkpoint = Checkpoint.open(folder)
    groups = find_groups(checkpoint.tensors.values())
    found, steps = {}, []

    def quantize(module, W, H):
        found[module] = W.clone(), H.clone()
        return coarse(W)

    hidden = quantize_streamed(StreamedModel(checkpoint), groups, IDS, quantize, steps.append)
    assert list(found) == [module for group in groups for module in group.modules]
    assert steps == [1, 1, 1]
    for group in groups:
        x = inputs_of(model, group.modules[0])
        for module in group.modules:
            W, H = found[module]
            linear = model.get_submodule(module)
            assert torch.equal(W, linear.weight.data)
            assert (H - x.T @ x).norm() < 1e-5 * H.norm()
            linear.weight.data = coarse(W)
    with torch.no_grad():
        whole = last_hidden(model)
    torch.testing.assert_close(hidden.tensor, whole, rtol=1e-4, atol=1e-4)


def last_hidden(model) -> torch.Tensor:
    """The last layer's output, before the norm."""
    seen = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(torch.from_numpy(IDS))
    hook.remove()
    return seen[0]


def test_micro_batches_change_nothing(made_models, monkeypatch):
    folder, _ = made_models("qwen2")
    checkpoint = Checkpoint.open(folder)
    groups = find_groups(checkpoint.tensors.values())
    runs = []
    for nbytes in (1, 1 << 30):
        monkeypatch.setattr("quant.calibration.streamed_model.ACTIVATION_NBYTES", nbytes)
        seen = {}

        def quantize(module, W, H, seen=seen):
            seen[module] = H.clone()
            return coarse(W)

        quantize_streamed(StreamedModel(checkpoint), groups, IDS, quantize)
        runs.append(seen)
    for module, H in runs[0].items():
        torch.testing.assert_close(H, runs[1][module], rtol=1e-4, atol=1e-2)


def test_groups_left_out_keep_their_weights(made_models):
    folder, model = made_models("qwen2")
    checkpoint = Checkpoint.open(folder)
    groups = find_groups(checkpoint.tensors.values())[5:7]
    asked = []

    def quantize(module, W, H):
        asked.append(module)
        return W

    hidden = quantize_streamed(StreamedModel(checkpoint), groups, IDS, quantize)
    assert asked == [module for group in groups for module in group.modules]
    with torch.no_grad():
        torch.testing.assert_close(hidden.tensor, last_hidden(model), rtol=1e-4, atol=1e-4)


def test_a_layer_runs_no_further_than_it_is_looked_at(made_models, monkeypatch):
    """Linears that run for each group: 0, then q k v, then o too, then gate and up; at last all."""
    folder, _ = made_models("qwen2")
    checkpoint = Checkpoint.open(folder)
    groups = find_groups(checkpoint.tensors.values())
    calls, forward = [], torch.nn.Linear.forward

    def counted(self, x):
        calls.append(self)
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    quantize_streamed(StreamedModel(checkpoint), groups, IDS, lambda name, W, H: W)
    assert len(calls) == 3 * (0 + 3 + 4 + 6 + 7)
