"""What the choice is worth: scripts/measure_choice.py in small, judged by transformers' model."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from measuring_helpers import bnb_rounded, kl_divergence, random_tokens
from planted_models import FUSED, plant
from transformers import AutoModelForCausalLM

from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import cut_tokens
from quant.checkpoint import Checkpoint
from quant.dynamic_4bit import Budget, Plan4bit, plan_4bit
from quant.formats.nf4 import Bnb4bit
from quant.measuring.measure import measure
from quant.texts import read_texts

PLANTED = [("down", 3), ("o", 1), ("qkv", 2), ("gate_up", 4)]


@dataclass
class Judge:
    """Held-out divergence of a model with some groups rounded by bitsandbytes."""

    folder: Path
    ids: torch.Tensor

    @cached_property
    def plain(self) -> Plan4bit:
        return plan_4bit(Checkpoint.open(self.folder), Bnb4bit(), Budget("share", 0.0))

    @cached_property
    def model(self):
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    @cached_property
    def weights(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Module -> its weight, and that in 4 bits."""
        names = [name for group in self.plain.groups for name in group.modules]
        own = {name: self.model.get_submodule(name).weight.data for name in names}
        return {name: (w, bnb_rounded(w)) for name, w in own.items()}

    def logits(self, four_bit: set[str]) -> torch.Tensor:
        for name, (w, w_hat) in self.weights.items():
            self.model.get_submodule(name).weight.data = w_hat if name in four_bit else w
        with torch.no_grad():
            return self.model(self.ids).logits

    @cached_property
    def reference(self) -> torch.Tensor:
        return self.logits(set())

    def divergence(self, kept: frozenset[str]) -> float:
        groups = [group for group in self.plain.groups if group.name not in kept]
        return kl_divergence(
            self.reference, self.logits({name for group in groups for name in group.modules})
        )

    def random_choice(self, seed: int) -> frozenset[str]:
        """Groups in random order, each if it still fits into 10 %."""
        room, kept = 0.1 * self.plain.nbytes, set()
        for name in np.random.default_rng(seed).permutation(list(self.plain.extra_nbytes)):
            if self.plain.extra_nbytes[name] <= room:
                room -= self.plain.extra_nbytes[name]
                kept.add(str(name))
        return frozenset(kept)


def judge(folder: Path, texts: Path, n_tokens: int) -> Judge:
    tokens = cut_tokens(Checkpoint.open(folder), read_texts(texts / "heldout.jsonl"), n_tokens, 128)
    return Judge(folder, torch.from_numpy(tokens.ids))


def measured(folder: Path, texts: Path, n_tokens: int, *metrics: str):
    checkpoint = Checkpoint.open(folder)
    tokens = cut_tokens(checkpoint, read_texts(texts / "calibration.jsonl"), n_tokens, 128)
    model = StreamedModel(checkpoint)
    return measure(model, tokens, Bnb4bit(), "bfloat16", frozenset(metrics))


def test_10_percent_more_bytes_leave_three_quarters_of_the_divergence(tiny_qwq, texts):
    found = judge(tiny_qwq, texts, 1024)
    plan = plan_4bit(
        found.plain.checkpoint, Bnb4bit(), sensitivity=measured(tiny_qwq, texts, 2048, "gradient")
    )
    assert plan.nbytes <= 1.1 * found.plain.nbytes
    kld = found.divergence(plan.kept)
    assert kld <= 0.75 * found.divergence(frozenset())
    random = [found.divergence(found.random_choice(seed)) for seed in range(6)]
    assert kld < 0.95 * min(random)


@pytest.mark.parametrize(("kind", "layer"), PLANTED)
def test_planting_changes_no_bit_of_the_output(tiny_qwq, tmp_path, kind, layer):
    plant(tiny_qwq, tmp_path / "planted", kind, layer)
    ids = torch.from_numpy(random_tokens((1, 32)))
    with torch.no_grad():
        own, planted = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (tiny_qwq, tmp_path / "planted")
        )
    assert torch.equal(own, planted)


@pytest.mark.parametrize(("kind", "layer"), PLANTED)
def test_a_planted_group_comes_out_on_top_and_is_kept(tiny_qwq, texts, tmp_path, kind, layer):
    name = plant(tiny_qwq, tmp_path / "planted", kind, layer)
    assert name == f"model.layers.{layer}.{FUSED[kind]}"
    found = judge(tmp_path / "planted", texts, 512)
    sensitivity = measured(tmp_path / "planted", texts, 512, "activation", "block", "gradient")
    for metric in ("activation", "block", "gradient"):
        values = sensitivity.values(metric)
        assert max(values, key=values.__getitem__) == name, metric
    plan = plan_4bit(found.plain.checkpoint, Bnb4bit(), sensitivity=sensitivity)
    assert name in plan.kept
    kld = found.divergence(plan.kept)
    assert kld < 0.4 * found.divergence(frozenset())
    assert kld < 0.95 * np.mean([found.divergence(found.random_choice(seed)) for seed in range(3)])
