"""Models that cannot be measured: named, before anything is written."""

import pytest
import torch
from measuring_helpers import measured, random_tokens
from model_makers import make_model

from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens
from quant.checkpoint import Checkpoint
from quant.errors import BadInput
from quant.formats.nf4 import Bnb4bit
from quant.measuring.measure import measure

IDS = random_tokens((2, 16))
NAME = "model.layers.1.mlp.up_proj"


def model_with(folder, value: float):
    model = make_model("qwen2", folder)
    with torch.no_grad():
        model.get_submodule(NAME).weight[3, 4] = value
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("metrics", [{"weight"}, {"activation", "gradient"}, {"kld"}])
@pytest.mark.filterwarnings("error")
def test_a_weight_beyond_float16_is_named(tmp_path, metrics):
    model = StreamedModel(Checkpoint.open(model_with(tmp_path, 1e5)))
    with pytest.raises(BadInput, match=rf"{NAME}.weight has weights that float16") as caught:
        tokens = Tokens(IDS, "random", "0" * 64)
        measure(model, tokens, Bnb4bit(), "float16", frozenset(metrics))
    assert "65504" in caught.value.why and "bfloat16" in caught.value.next_step


@pytest.mark.parametrize("metric", ["activation", "block", "gradient"])
def test_a_model_that_overflows_is_no_fault_of_the_program(tmp_path, metric):
    with pytest.raises(BadInput, match="cannot be measured") as caught:
        measured(model_with(tmp_path, 1e38), IDS, metric)
    assert "NaN or infinity" in caught.value.why
