"""NF4 and FP4 with error feedback: what is stored is what was rounded, and outputs gain."""

import numpy as np
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit

from quant.algorithms.gptq import output_error
from quant.feedback_4bit import encode_with_feedback
from quant.formats.nf4 import ASCENDING, Bnb4bit

SHAPES = [(24, 192), (5, 48), (7, 33)]  # blocks within rows, across rows, a short last one
FORMATS = [
    Bnb4bit(kind, double_quant, search_scales=search)
    for kind in ("nf4", "fp4")
    for double_quant in (True, False)
    for search in (True, False)
]


def case(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """W and H of correlated inputs."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal(shape) * 0.02
    x = rng.standard_normal((1000, shape[1]))
    x = x @ (np.eye(shape[1]) + rng.standard_normal((shape[1], shape[1])) / np.sqrt(shape[1]))
    return torch.from_numpy(W).float(), torch.from_numpy(x.T @ x).float()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_what_is_stored_is_what_was_rounded(format, shape, dtype):
    W, H = case(shape)
    parts, rounded = encode_with_feedback(format, W, H, dtype)
    W_hat = rounded.W_hat
    np.testing.assert_array_equal(format.decode(parts, shape), W_hat.numpy())
    importance = H.diagonal().numpy() if format.search_scales else None
    plain = format.encode(W.to(getattr(torch, dtype)).float().numpy(), dtype, importance)
    assert {name: part.tobytes() for name, part in parts.items() if name} == {
        name: part.tobytes() for name, part in plain.items() if name
    }
    assert parts[""].shape == plain[""].shape and parts[""].dtype == np.uint8
    assert not np.array_equal(parts[""], plain[""])


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_bitsandbytes_decodes_the_same(format):
    W, H = case((24, 192))
    parts, rounded = encode_with_feedback(format, W, H, "bfloat16")
    tensors = {name: torch.from_numpy(part) for name, part in parts.items() if name}
    state = QuantState.from_dict(tensors, torch.device("cpu"))
    found = dequantize_4bit(torch.from_numpy(parts[""]), state)
    assert torch.equal(found.float(), rounded.W_hat)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_worse_on_weights_and_better_on_outputs(format):
    W, H = case((24, 192))
    W_hat = encode_with_feedback(format, W, H, "bfloat16")[1].W_hat
    w = W.bfloat16().float().numpy()
    plain = torch.from_numpy(format.decode(format.encode(w, "bfloat16"), w.shape))
    assert (W - W_hat).square().sum() > (W - plain).square().sum()
    assert output_error(W - W_hat, H) < 0.8 * output_error(W - plain, H)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_by_level(kind, shape):
    format = Bnb4bit(kind)
    parts = format.encode(case(shape)[0].numpy(), "bfloat16")
    nibbles = np.stack([parts[""] >> 4, parts[""] & 15], 1).reshape(-1)[: np.prod(shape)]
    levels = np.argsort(ASCENDING[kind])[nibbles].astype(np.uint8).reshape(shape)
    again = format.with_levels(parts, levels)
    assert {n: p.tobytes() for n, p in again.items()} == {n: p.tobytes() for n, p in parts.items()}
    with pytest.raises(ValueError, match="levels for"):
        format.with_levels(parts, levels[:2])
