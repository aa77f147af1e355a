"""Quantizing a model while it runs: every linear sees the inputs that it will see when all before
it are quantized, and so can make good part of their errors.

    layer 0: inputs of qkv -> H -> qkv quantized -> inputs of o -> H -> o quantized -> ...
             -> its output, as the quantized layer gives it -> layer 1: ...

AutoGPTQ calls this order "true sequential". A layer runs once for each group of linears, each time
only as far as the group's inputs, and once more to its end; one H is in memory at a time.
"""

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch

from quant.algorithms.gptq import Hessian
from quant.calibration.hidden_states import HiddenStates
from quant.calibration.passes import UNKEPT, Passes
from quant.calibration.streamed_model import StreamedLayer, StreamedModel
from quant.groups import Group

PASS = "quantize"
"""Its name among the passes of an output."""

Quantize = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
"""(full dotted name of a linear, its weight W, H of its inputs) -> W_hat, shaped like W."""


def quantize_streamed(
    model: StreamedModel,
    groups: list[Group] | tuple[Group, ...],
    tokens: np.ndarray,
    quantize: Quantize,
    progress: Callable[[int], None] = lambda n: None,
    passes: Passes = UNKEPT,
) -> HiddenStates:
    """Call `quantize` for every linear of `groups`, in their order; the last layer's output.

    tokens (n_sequences, seq_len). Calls progress(1) after each layer. passes: what was quantized
    in layers that an earlier run finished is the caller's; it is not asked for again.
    """
    walk = passes.begin(PASS, model.n_layers)
    hidden = model.embed(tokens)
    walk.restore("hidden", hidden.tensor)
    if walk.n_done:
        progress(walk.n_done)
    for layer in model.layers(tokens.shape[1], n_done=walk.n_done):
        for group in (g for g in groups if g.layer == layer.index):
            H = _hessian(layer, group, hidden)
            for name in group.modules:
                linear = layer.linears[name]
                W_hat = quantize(name, linear.weight.data, H)
                linear.weight.data = W_hat.to(linear.weight.data)
        layer.run(hidden, hidden)
        walk.done({}, {"hidden": hidden.tensor})
        progress(1)
    return hidden


class _Enough(Exception):
    """What was wanted of a layer's forward has been seen."""


@torch.no_grad()
def _hessian(layer: StreamedLayer, group: Group, hidden: HiddenStates) -> torch.Tensor:
    """H of the inputs that all linears of the group share."""
    first = layer.linears[group.modules[0]]
    hessian = Hessian(first.in_features, first.weight.device)

    def hook(name: str, x: torch.Tensor) -> None:
        if name == group.modules[0]:
            hessian.add(x)
            raise _Enough

    with layer.watched(hook):
        for _, x in layer.micro_batches(hidden):
            with suppress(_Enough):
                layer.forward(x)
    return hessian.H
