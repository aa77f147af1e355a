"""The divergence of one group at a time against transformers' whole model, run once a group."""

import pytest
import torch
from measuring_helpers import (
    DENSE,
    groups_of,
    kl_divergence,
    measured,
    nf4_rounding,
    quantized,
    random_tokens,
)

from quant.calibration.streamed_model import StreamedModel
from quant.checkpoint import Checkpoint
from quant.measuring import kld
from quant.measuring.kld import measure_kld, n_sweeps

IDS = random_tokens((4, 24))


def expected_klds(model, groups) -> dict[str, float]:
    ids = torch.from_numpy(IDS)
    with torch.no_grad():
        reference = model(ids).logits
        found = {}
        for group in groups:
            with quantized(model, group.modules):
                found[group.name] = kl_divergence(reference, model(ids).logits)
    return found


@pytest.mark.parametrize("name", [*DENSE, "qwen3moe"])
def test_each_group_alone_in_4_bits(made_models, name):
    folder, model = made_models(name)
    found = measured(folder, IDS, "kld").values("kld")
    assert found == pytest.approx(expected_klds(model, groups_of(folder)), rel=2e-3)


def directly(folder) -> tuple[dict[str, float], int]:
    """Group -> divergence, and how many layers were run for it."""
    steps = []
    model, groups = StreamedModel(Checkpoint.open(folder)), groups_of(folder)
    with nf4_rounding() as rounding:
        found = measure_kld(model, groups, IDS, rounding, steps.append)
    assert len(steps) == n_sweeps(model, groups, IDS) * model.n_layers
    return found, len(steps)


@pytest.mark.parametrize("at_once", [1, 5])
def test_several_sweeps_and_blocks_of_the_head_give_the_same(made_models, monkeypatch, at_once):
    folder, _ = made_models("qwen2-tied")
    whole, n_steps = directly(folder)
    assert n_steps == 3
    monkeypatch.setattr(kld, "MAX_STATES_NBYTES", at_once * IDS.size * 128 * 4)
    monkeypatch.setattr("quant.calibration.streamed_model.HEAD_BLOCK_NBYTES", 1000 * 4 * 128)
    monkeypatch.setattr("quant.evaluation.streamed.LOGITS_AT_ONCE", 7000)
    parts, n_steps = directly(folder)
    assert n_steps == 3 * -(-12 // at_once)
    assert list(parts) == list(whole)
    assert parts == pytest.approx(whole, rel=1e-3)
