"""The gradient measure against autograd through the whole model, and against what it predicts."""

import numpy as np
import pytest
import torch
from measuring_helpers import (
    DENSE,
    bnb_rounded,
    groups_of,
    measured,
    nf4_rounding,
    random_tokens,
    seen,
)
from torch import nn

from quant.calibration import hidden_states
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import cut_tokens
from quant.checkpoint import Checkpoint
from quant.measuring import gradient
from quant.measuring.gradient import SEED, measure_gradient
from quant.measuring.kld import measure_kld
from quant.texts import read_texts

IDS = random_tokens((4, 24))


def drawn_tokens(logits: torch.Tensor) -> torch.Tensor:
    """One token a position of (n, vocab) from softmax of `logits`, with the program's numbers."""
    generator = torch.Generator().manual_seed(SEED)
    u = torch.empty_like(logits).exponential_(generator=generator)
    return (logits - u.log()).argmax(1)


def expected_gradient(model, groups) -> dict[str, float]:
    """1/2 mean over tokens of (g . dy)^2, the whole model differentiated at once."""
    linears = [name for group in groups for name in group.modules]
    for name in linears:
        model.get_submodule(name).weight.requires_grad_(True)
    with seen(model, nn.Linear) as calls:
        logits = model(torch.from_numpy(IDS)).logits.flatten(0, 1)
    t = drawn_tokens(logits.detach())
    loss = nn.functional.cross_entropy(logits, t, reduction="sum")
    g = torch.autograd.grad(loss, [calls[name][1] for name in linears])
    g = dict(zip(linears, g, strict=True))
    found = {}
    for group in groups:
        felt = 0
        for name in group.modules:
            w = model.get_submodule(name).weight.data
            dy = calls[name][0].detach() @ (w - bnb_rounded(w)).T
            felt = felt + (g[name] * dy).sum(-1)
        found[group.name] = 0.5 * float(felt.square().mean())
    return found


@pytest.mark.parametrize("name", DENSE)
def test_streamed_backward_pass_equals_autograd_through_the_whole_model(made_models, name):
    folder, model = made_models(name)
    found = measured(folder, IDS, "gradient").values("gradient")
    expected = expected_gradient(model, groups_of(folder))
    assert found == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("name", ["qwen2moe", "qwen3moe"])
def test_through_experts(made_models, name):
    folder, model = made_models(name)
    found = measured(folder, IDS, "gradient").values("gradient")
    assert found == pytest.approx(expected_gradient(model, groups_of(folder)), rel=2e-3)


def measured_directly(folder, ids) -> dict[str, float]:
    steps = []
    model = StreamedModel(Checkpoint.open(folder))
    with nf4_rounding() as rounding:
        found = measure_gradient(model, groups_of(folder), ids, rounding, steps.append)
    assert steps == [1] * (2 * model.n_layers)
    return found


def test_one_sequence_at_a_time_and_states_in_a_file_give_the_same(made_models, monkeypatch):
    folder, _ = made_models("qwen3")
    whole = measured_directly(folder, IDS)
    monkeypatch.setattr("quant.calibration.streamed_model.ACTIVATION_NBYTES", 1)
    monkeypatch.setattr(hidden_states, "available_memory", lambda: 0)
    assert measured_directly(folder, IDS) == pytest.approx(whole, rel=1e-3)


def one_hot_frequencies(folder, ids, n: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each token is drawn at a position in n draws, and its probability."""
    model = StreamedModel(Checkpoint.open(folder))
    states = model.embed(np.repeat(ids, n, axis=0))
    for layer in model.layers(ids.shape[1]):
        layer.run(states, states)
    x = model.norm(states.tensor[:, -1])
    with torch.no_grad():
        w = torch.cat([rows for _, rows in model.head_blocks()])
        p = (x[0] @ w.T).softmax(0)
    generator = torch.Generator().manual_seed(1)
    # p W - W_t, so W_t again; W has more rows than columns, but those of a random W all differ.
    drawn = p @ w - gradient._gradient_of_sampled_loss(model, x, generator)
    t = torch.cdist(drawn, w).argmin(1)
    return np.bincount(t, minlength=len(w)) / n, p.numpy()


@pytest.mark.parametrize("block_nbytes", [1 << 26, 500 * 4 * 256])
def test_tokens_are_drawn_from_the_models_own_distribution(tiny_qwq, monkeypatch, block_nbytes):
    """From blocks of the output matrix too: the Gumbel trick must not favour one of them."""
    monkeypatch.setattr("quant.calibration.streamed_model.HEAD_BLOCK_NBYTES", block_nbytes)
    n = 2000
    found, p = one_hot_frequencies(tiny_qwq, random_tokens((1, 4), 3), n)
    likely = np.argsort(p)[-20:]
    assert p[likely].sum() > 0.2
    spread = np.sqrt(p * (1 - p) / n)
    assert (np.abs(found - p)[likely] < 4.5 * spread[likely]).all()


def exact_second_order(model, ids: torch.Tensor, group) -> float:
    """1/2 sum over tokens i of dl^T (diag p - p p^T) dl, dl the logits' answer to dy_i alone."""
    with seen(model, nn.Linear) as calls, torch.no_grad():
        p = model(ids).logits.double().softmax(-1)
    total = 0.0
    for i in range(ids.shape[1]):
        for_token = torch.zeros(1, ids.shape[1], 1)
        for_token[0, i] = 1

        def shifted(scale, for_token=for_token):
            handles = []
            for name in group.modules:
                linear = model.get_submodule(name)
                dy = calls[name][0] @ (linear.weight.data - bnb_rounded(linear.weight.data)).T
                dy = dy * for_token
                handles.append(linear.register_forward_hook(lambda _, x, y, dy=dy: y + scale * dy))
            logits = model(ids).logits
            for handle in handles:
                handle.remove()
            return logits

        with torch.no_grad():  # a central difference: forward-mode AD knows no fused attention
            dl = (shifted(0.5) - shifted(-0.5)).double()
        total += float(((p * dl * dl).sum(-1) - (p * dl).sum(-1).square()).sum())
    return 0.5 * total / ids.shape[1]


def test_draws_average_to_the_exact_second_order_divergence(made_models):
    """The same sequence many times over, each time with tokens drawn anew."""
    folder, model = made_models("qwen2")
    ids = random_tokens((1, 8), 5)
    found = measured_directly(folder, np.repeat(ids, 1000, axis=0))
    for group in groups_of(folder)[4:8]:
        exact = exact_second_order(model, torch.from_numpy(ids), group)
        assert found[group.name] == pytest.approx(exact, rel=0.15), group.name


def ranks(values: dict[str, float]) -> np.ndarray:
    return np.argsort(np.argsort([values[name] for name in sorted(values)]))


def test_prediction_from_one_text_orders_groups_as_measured_on_another(tiny_qwq, texts):
    """Of the same kinds. Spearman above 0.9, and the sums within a fifth of each other."""
    checkpoint = Checkpoint.open(tiny_qwq)
    model, groups = StreamedModel(checkpoint), groups_of(tiny_qwq)
    with nf4_rounding() as rounding:
        ids = cut_tokens(checkpoint, read_texts(texts / "calibration.jsonl"), 2048, 128).ids
        predicted = measure_gradient(model, groups, ids, rounding, lambda n: None)
        other = cut_tokens(checkpoint, read_texts(texts / "heldout.jsonl"), 1024, 128).ids
        truth = measure_kld(model, groups, other, rounding, lambda n: None)
    assert np.corrcoef(ranks(predicted), ranks(truth))[0, 1] > 0.9
    assert sum(predicted.values()) == pytest.approx(sum(truth.values()), rel=0.2)
