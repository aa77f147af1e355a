"""GPTQ folders in the library that people load them with: GPTQModel, alone and in transformers."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPTQConfig

from quant.calibration.gptq_weights import GptqWeights
from quant.calibration.tokens import Tokens
from quant.checkpoint import Checkpoint
from quant.formats.gptq import Gptq
from quant.gptq_model import plan_gptq
from quant.write_gptq import write_gptq

EXTRA = "needs the extra: pip install 'qwq-quant[gptq]'"
pytest.importorskip("optimum", reason=EXTRA)
gptqmodel = pytest.importorskip("gptqmodel", reason=EXTRA)

IDS = torch.arange(7, 4000, 166)[None]  # (1, 25)
QKV, DOWN = "model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.down_proj"

CASES = {
    "4-bit": (Gptq(4, 32), {}),
    "8-bit": (Gptq(8, 32), {}),
    "4-bit, asymmetric": (Gptq(4, 32, False), {}),
    "8-bit, asymmetric": (Gptq(8, 32, False), {}),
    "8- and 16-bit": (Gptq(8, 32), {QKV: 16, DOWN: 16}),
    "4- and 8-bit": (Gptq(4, 32), {QKV: 8}),
    "4-, 8- and 16-bit": (Gptq(4, 32), {QKV: 8, DOWN: 16}),
}
MIXED = ("4- and 8-bit", "4-, 8- and 16-bit")


@pytest.fixture(scope="module")
def written(made_models, tmp_path_factory):
    """name -> (plan, folder, logits of the weights that our own decoder reads)."""
    made = {}

    def get(name: str):
        if name not in made:
            format, bits = CASES[name]
            plan = plan_gptq(Checkpoint.open(made_models("qwen2")[0]), format, 0.01, True)
            plan = replace(plan, bits=bits)
            folder = tmp_path_factory.mktemp("gptqmodel") / "out"
            ids = np.random.default_rng(0).integers(0, 4090, (8, 64))
            write_gptq(plan, Tokens(ids, "random", "0" * 64), folder)
            made[name] = plan, folder, decoded_logits(plan, folder)
        return made[name]

    return get


def decoded_logits(plan, folder) -> torch.Tensor:
    """transformers' plain model in float32. Weights are rounded to float16, as GPTQModel does."""
    model = AutoModelForCausalLM.from_pretrained(plan.checkpoint.folder, dtype=torch.float32)
    reader = GptqWeights(folder)
    model.load_state_dict({name: reader.read(name).float() for name in model.state_dict()})
    for module in plan.quantized:
        w = model.get_submodule(module).weight
        w.data = w.data.half().float()
    return logits(model)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def bits_of_modules(model, plan) -> dict[str, int]:
    modules = [module for group in plan.groups for module in group.modules]
    return {module: getattr(model.get_submodule(module), "bits", 16) for module in modules}


def assert_as_planned(model, plan) -> None:
    expected = {module: plan.bits_of(group) for group in plan.groups for module in group.modules}
    assert bits_of_modules(model, plan) == expected


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", [name for name in CASES if name not in MIXED])
def test_transformers_computes_what_our_decoder_reads(name, written):
    plan, folder, expected = written(name)
    exact = GPTQConfig(bits=plan.format.bits, backend="gptq_torch")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=exact
    )
    assert_as_planned(model, plan)
    assert distance(logits(model), expected) < 1e-6
    # The kernel that it chooses itself computes in bfloat16.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert_as_planned(model, plan)
    assert distance(logits(model), expected) < 0.02


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0].bits == 4])
def test_gptqmodel_computes_what_our_decoder_reads(name, written):
    plan, folder, expected = written(name)
    model = gptqmodel.GPTQModel.load(
        str(folder), device="cpu", dtype=torch.bfloat16, backend=gptqmodel.BACKEND.GPTQ_TORCH
    ).model.float()  # it loads no float32
    assert_as_planned(model, plan)
    assert distance(logits(model), expected) < 5e-4  # float16's rounding of the weights


@pytest.mark.parametrize("name", MIXED)
def test_transformers_refuses_linears_of_4_and_8_bits_and_does_not_misread_them(name, written):
    _, folder, _ = written(name)
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_why_asymmetric_weights_are_gptq_v2(written, tmp_path):
    """GPTQModel refuses them in the older format, unless it wrote them itself."""
    _, folder, _ = written("4-bit, asymmetric")
    shutil.copytree(folder, tmp_path / "out")
    for name in ("config.json", "quantize_config.json"):
        text = (tmp_path / "out" / name).read_text()
        assert json.loads(text) and "gptq_v2" in text
        (tmp_path / "out" / name).write_text(text.replace("gptq_v2", "gptq"))
    with pytest.raises(ValueError, match="sym=False"):
        gptqmodel.GPTQModel.load(str(tmp_path / "out"), device="cpu", dtype=torch.bfloat16)
