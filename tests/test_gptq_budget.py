"""gptq --budget: which linears get 8 or 16 bits, what is written of it, and what it is worth."""

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from model_makers import make_model
from safetensors.torch import load_file

from quant.budget import NOTHING, Budget
from quant.calibration.gptq_weights import GptqWeights
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens, cut_tokens
from quant.calibration.weights import ChangedWeights, CheckpointWeights
from quant.check_weights import Candidate, check_weights
from quant.checkpoint import Checkpoint
from quant.cli import cli
from quant.errors import BadRecipe
from quant.formats.gptq import Gptq
from quant.gptq_model import GptqPlan, plan_gptq, spend_budget
from quant.gptq_rounding import plainly_rounded
from quant.measuring.levels import measure_levels
from quant.texts import built_in_texts, held_out_texts
from quant.write_gptq import write_gptq

TENTH = Budget("share", 0.1)


def random_tokens(n_sequences=8, seq_len=64) -> Tokens:
    ids = np.random.default_rng(0).integers(0, 4090, (n_sequences, seq_len))
    return Tokens(ids, "random", "0" * 64)


def plan_of(folder: Path, format: Gptq, budget: Budget = NOTHING) -> GptqPlan:
    return plan_gptq(Checkpoint.open(folder), format, 0.01, True, budget)


def random_damage(plan: GptqPlan) -> dict[str, tuple[float, ...]]:
    rng = np.random.default_rng(1)
    return {
        group.name: (*sorted(rng.random(len(plan.ladder) - 1), reverse=True), 0.0)
        for group in plan.groups
    }


# --- the plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("budget", [TENTH, Budget("bytes", 150e3), Budget("share", 0.12)], ids=str)
def test_a_budget_is_kept_and_nothing_that_fits_is_better(made_models, bits, budget):
    plain = plan_of(made_models("qwen2")[0], Gptq(bits, 32), budget)
    damage = random_damage(plain)
    plan = spend_budget(plain, damage)
    room = budget.value * plain.nbytes if budget.unit == "share" else budget.value
    assert plain.nbytes < plan.nbytes <= plain.nbytes + room
    assert plan.solution.exact and plan.choice.chosen[0] == plan.nbytes
    left = plain.nbytes + room - plan.nbytes
    for group in plan.groups:  # no single step more, nor any exchange within one group
        for level, n in enumerate(plan.ladder):
            more = plan.group_nbytes(group, n) - plan.group_nbytes(group, plan.bits_of(group))
            now = damage[group.name][plan.ladder.index(plan.bits_of(group))]
            assert more > left or damage[group.name][level] >= now


def test_no_budget_buys_nothing(made_models):
    folder = made_models("qwen2")[0]
    assert plan_of(folder, Gptq(4, 32), Budget("bytes", 0)).bits == {}
    assert "dynamic" not in plan_of(folder, Gptq(4, 32)).quantization_config
    with pytest.raises(BadRecipe) as caught:
        plan_of(folder, Gptq(4, 32), Budget("bytes", 100))
    assert "buys nothing" in caught.value.what and "o_proj" in caught.value.what


def test_a_steep_ladder_goes_to_16_bits(made_models):
    """Where 8 bits help little, whatever is bought is bought at 16."""
    plain = plan_of(made_models("qwen2")[0], Gptq(4, 32), Budget("share", 0.1))
    plan = spend_budget(plain, {g.name: (1.0, 1.0, 0.0) for g in plain.groups})
    assert set(plan.bits.values()) == {16} and not plan.mixes_integers and plan.notes == ()
    config = plan.quantization_config
    assert [list(plan.quantized)] == config["modules_in_block_to_quantize"]


def test_where_all_have_8_bits_they_are_no_exceptions(made_models):
    plan = plan_of(made_models("qwen2")[0], Gptq(4, 32))
    plan = replace(plan, bits={group.name: 8 for group in plan.groups})
    assert plan.quantization_config["bits"] == 8 and "dynamic" not in plan.quantization_config


# --- the folder -----------------------------------------------------------------------------------


BITS = {
    "model.layers.0.self_attn.qkv_proj": 8,
    "model.layers.0.mlp.down_proj": 16,
    "model.layers.2.mlp.gate_up_proj": 8,
    "model.layers.2.self_attn.o_proj": 16,
}


@pytest.fixture(scope="module", params=[True, False], ids=["sym", "asym"])
def mixed(request, made_models, tmp_path_factory):
    """(plan, folder) with linears of 4, 8 and 16 bits."""
    plan = replace(plan_of(made_models("qwen2")[0], Gptq(4, 32, request.param)), bits=BITS)
    folder = tmp_path_factory.mktemp("mixed") / "out"
    write_gptq(plan, random_tokens(), folder)
    return plan, folder


def test_sizes_and_shapes(mixed, made_models):
    plan, folder = mixed
    stored, source = load_file(folder / "model.safetensors"), made_models("qwen2")[1].state_dict()
    assert sum(t.nbytes for t in stored.values()) == plan.nbytes
    reader = GptqWeights(folder)
    for group in plan.groups:
        bits = BITS.get(group.name, 4)
        for module in group.modules:
            if bits == 16:
                assert torch.equal(
                    stored[f"{module}.weight"], source[f"{module}.weight"].bfloat16()
                )
                assert f"{module}.qweight" not in stored
            else:
                columns = source[f"{module}.weight"].shape[1]
                assert stored[f"{module}.qweight"].shape[0] == columns * bits // 32
            w, w_hat = source[f"{module}.weight"], reader.read(f"{module}.weight").float()
            error = float((w - w_hat).norm() / w.norm())
            assert error < {4: 0.25, 8: 0.02, 16: 0.003}[bits]
            assert error > {4: 0.05, 8: 0.003, 16: 0.0}[bits]


def test_what_readers_are_told(mixed):
    _, folder = mixed
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config == json.loads((folder / "quantize_config.json").read_text())
    assert config["dynamic"][r"-:^model\.layers\.0\.mlp\.down_proj$"] == {}
    assert config["dynamic"][r"+:^model\.layers\.0\.self_attn\.qkv_proj$"] == {"bits": 8}
    assert len(config["dynamic"]) == 4 + 1 + 3 + 1
    assert config["bits"] == 4 and "modules_in_block_to_quantize" not in config


def test_a_16_bit_copy(made_models, tmp_path):
    folder, model = made_models("qwen2")
    write_gptq(plan_of(folder, Gptq(4, 32), Budget("all")), random_tokens(), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(w.bfloat16(), stored[n]) for n, w in model.state_dict().items())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "quantize_config.json").exists()


# --- what it is worth -----------------------------------------------------------------------------


class Judge:
    """Divergence of tiny-qwq on held-out text with its groups in given bits."""

    def __init__(self, folder: Path):
        self.plain = plan_of(folder, Gptq(), TENTH)
        self.held_out = cut_tokens(self.plain.checkpoint, held_out_texts(), 2048, 256)

    @cached_property
    def chosen(self) -> GptqPlan:
        tokens = cut_tokens(self.plain.checkpoint, built_in_texts(), 2048, 128)
        damage = measure_levels(self.plain, StreamedModel(self.plain.checkpoint), tokens.ids)
        return spend_budget(self.plain, damage)

    def random(self, seed: int) -> GptqPlan:
        """Groups in random order, each in 8 bits if it still fits."""
        room, bits = self.chosen.nbytes - self.plain.nbytes, {}
        for i in np.random.default_rng(seed).permutation(len(self.plain.groups)):
            group = self.plain.groups[i]
            more = self.plain.group_nbytes(group, 8) - self.plain.group_nbytes(group, 4)
            if more <= room:
                room -= more
                bits[group.name] = 8
        return replace(self.plain, bits=bits)

    def divergences(self, plans: list[GptqPlan]) -> list[float]:
        """Of plain rounding, which is what was measured."""
        candidates = [Candidate("", 0, self.rounded(plan)) for plan in plans]
        checkpoint = self.plain.checkpoint
        return [r.kld for r in check_weights(checkpoint, candidates, self.held_out, "cpu")[1:]]

    def rounded(self, plan: GptqPlan) -> ChangedWeights:
        return ChangedWeights(
            CheckpointWeights(plan.checkpoint),
            frozenset(f"{module}.weight" for module in plan.quantized),
            lambda name, w: plainly_rounded(plan.format_of(name.removesuffix(".weight")), w),
        )


@pytest.fixture(scope="module")
def judge(tiny_qwq):
    return Judge(tiny_qwq)


def test_measured_damage_falls_with_the_bits(judge):
    for damage in judge.chosen.damage.values():
        four, eight, sixteen = damage
        assert four / 1000 < eight < four / 100 and sixteen == 0


def test_the_choice_beats_chance_and_no_choice(judge):
    plain, chosen, *random = judge.divergences(
        [replace(judge.plain, budget=NOTHING), judge.chosen, *map(judge.random, range(4))]
    )
    assert chosen < 0.55 * plain
    assert chosen < min(random)
    assert chosen < 0.8 * np.mean(random)


# --- the command ----------------------------------------------------------------------------------


def gptq(*words):
    return CliRunner().invoke(cli, [str(word) for word in ("gptq", *words)])


FEW = ("--tokens", 512, "--seq-len", 64, "--group-size", 32)


def test_a_budget_of_nothing_is_no_budget(made_models, tmp_path):
    for name, more in (("none", ()), ("zero", ("--budget", 0))):
        result = gptq(made_models("qwen2")[0], "-o", tmp_path / name, *FEW, "--no-check", *more)
        assert result.exit_code == 0, result.output
    for file in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "none" / file).read_bytes() == (tmp_path / "zero" / file).read_bytes()


def test_the_command(made_models, tmp_path):
    out, source = tmp_path / "out", made_models("qwen2")[0]
    planned = gptq(source, "-o", out, *FEW, "--budget", "3%", "--dry-run")
    assert planned.exit_code == 0 and not any(tmp_path.iterdir()), planned.output
    lines = planned.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["group", "gradient", "8", "bits", "cost", "16", "bits", "cost"]
    errors = [float(line.split()[1]) for line in lines[1:13]]
    assert errors == sorted(errors, reverse=True)
    assert any(line.endswith("  8-bit") for line in lines[1:13])
    assert sum("<- chosen" in line for line in lines) == 1
    result = gptq(source, "-o", out, *FEW, "--budget", "3%", "--format", "json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    raised = {group["name"]: group["bits"] for group in content["groups"] if group["bits"] > 4}
    assert {line.split()[0] for line in lines[1:13] if line.endswith("  8-bit")} == {
        name.removeprefix("model.") for name, bits in raised.items() if bits == 8
    }
    assert content["nbytes"] == (out / "model.safetensors").stat().st_size
    names = [row["name"] for row in content["results"]]
    assert names == ["source", "plain 4-bit rounding", "GPTQ, mixed bits"]
    entry = json.loads((out / "qwq-quant.json").read_text())["outputs"]["."]
    assert entry["bits"] == raised and entry["budget"] == "3%" and len(entry["damage"]) == 12
    card = (out / "README.md").read_text()
    assert all(f"- `{name}`: {bits}-bit" in card for name, bits in raised.items())
    assert "GPTQModel.load" in card and "transformers does not load linears of 4 and of 8" in card


BAD = {
    "buys nothing": (("--budget", "0.1%"), 78, "buys nothing"),
    "no budget": (("--budget", "much"), 2, "is no budget"),
    "no damping": (("--damp", "0"), 2, "0<x<1"),  # transformers refuses such a config
    "nothing but damping": (("--damp", "1"), 2, "0<x<1"),
    "too few tokens": (("--budget", "3%", "--tokens", "512"), 65, "are too few"),
    "odd group size": (("--budget", "3%", "--group-size", "96"), 65, "do not divide"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_any_work(name, tiny_qwq, tmp_path):
    options, code, expected = BAD[name]
    result = gptq(tiny_qwq, "-o", tmp_path / "out", *options)
    assert result.exit_code == code and expected in result.stderr, result.output
    assert "Measuring" not in result.stderr and not any(tmp_path.iterdir())


def test_a_model_that_gives_nan(tmp_path):
    model = make_model("qwen2", tmp_path / "model")
    model.model.layers[1].input_layernorm.weight.data[:] = 3e38
    model.save_pretrained(tmp_path / "model")
    result = gptq(tmp_path / "model", "-o", tmp_path / "out", *FEW, "--budget", "3%")
    assert result.exit_code == 65 and "cannot be measured" in result.stderr, result.output
    assert not (tmp_path / "out").exists()
