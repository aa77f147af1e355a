"""Plain computations that the streamed measurements are held against: whole models and hooks."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn

from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens
from quant.checkpoint import Checkpoint
from quant.formats.nf4 import Bnb4bit
from quant.groups import Group, find_groups
from quant.measuring.measure import measure, rounding_of
from quant.sensitivity import Sensitivity

DENSE = ("qwen2", "qwen2-tied", "qwen3", "llama3", "llama-bias", "mistral")


def random_tokens(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4090, shape)


def measured(folder: Path, ids: np.ndarray, *metrics: str) -> Sensitivity:
    """What the program measures, plain NF4, bfloat16."""
    model = StreamedModel(Checkpoint.open(folder))
    return measure(
        model, Tokens(ids, "random", "0" * 64), Bnb4bit(), "bfloat16", frozenset(metrics)
    )


def groups_of(folder: Path) -> list[Group]:
    return find_groups(Checkpoint.open(folder).tensors.values())


@contextmanager
def nf4_rounding():
    """The program's own rounding of plain NF4, for calling a measure directly."""
    with ThreadPoolExecutor(1) as pool:
        yield rounding_of(Bnb4bit(), "bfloat16", pool)


def bnb_rounded(w: torch.Tensor) -> torch.Tensor:
    """w after bitsandbytes stored it as NF4 with double quantization and read it again, float32."""
    packed, state = quantize_4bit(w.bfloat16(), quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state).float()


@contextmanager
def quantized(model: nn.Module, modules: tuple[str, ...]) -> Iterator[None]:
    """While it is open, these linears of a whole model are rounded to NF4 by bitsandbytes."""
    linears = [model.get_submodule(name) for name in modules]
    kept = [linear.weight.data for linear in linears]
    for linear, w in zip(linears, kept, strict=True):
        linear.weight.data = bnb_rounded(w)
    try:
        yield
    finally:
        for linear, w in zip(linears, kept, strict=True):
            linear.weight.data = w


@contextmanager
def seen(model: nn.Module, kind: type | tuple) -> Iterator[dict]:
    """While it is open: name -> (input, output) of the modules of these types, as they run."""
    calls, handles = {}, []

    def keep(name):
        def hook(_, inputs, output):
            calls[name] = inputs[0], output[0] if isinstance(output, tuple) else output

        return hook

    for name, module in model.named_modules():
        if isinstance(module, kind):
            handles.append(module.register_forward_hook(keep(name)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def square(x: torch.Tensor) -> float:
    return float(x.double().square().sum())


def kl_divergence(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    """Mean over all positions but each sequence's last, of logits (n_sequences, seq_len, vocab)."""
    p, q = (x[:, :-1].double().log_softmax(-1) for x in (reference, candidate))
    return float((p.exp() * (p - q)).sum(-1).mean())
