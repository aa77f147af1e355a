"""Errors seen where they arise: in a weight, at its output, and in the residual stream behind it.

One sweep over the model gives all three. With w_hat the decoded 4-bit copy of w, dw = w - w_hat,
x the real inputs and y the block's output:

    weight      |dw|^2 / |w|^2
    activation  sum over tokens |dw x|^2 / sum over tokens |w x|^2
    block       sum over tokens |y_hat - y|^2 / sum over tokens |y|^2

The sum over tokens of |dw x|^2 is the trace of dw X dw^T, X = sum x x^T being the inputs' second
moments; it is summed at the outputs, which needs no n x n matrix (3 GB for QwQ-32B's down_proj).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from quant.calibration.hidden_states import HiddenStates
from quant.calibration.passes import UNKEPT, Passes
from quant.calibration.streamed_model import StreamedLayer, StreamedModel, give_back_memory
from quant.display import printable
from quant.errors import BadInput
from quant.groups import Group

Rounding = Callable[[torch.Tensor], torch.Tensor]
"""A weight (out, in) to its decoded low-bit copy, same shape, in a 16-bit type, on the CPU.

Raises OverflowError if that type cannot hold the weight."""


@dataclass
class Ratio:
    """|error|^2 and |signal|^2, summed over whatever they are seen on."""

    error: float = 0.0
    signal: float = 0.0

    def add(self, error: torch.Tensor, signal: torch.Tensor) -> None:
        self.error += float(error.square().sum())
        self.signal += float(signal.square().sum())

    @property
    def value(self) -> float:
        """0 where there is no signal: nothing was there to be lost."""
        return self.error / self.signal if self.signal else 0.0

    @staticmethod
    def total(ratios: "list[Ratio]") -> "Ratio":
        return Ratio(sum(r.error for r in ratios), sum(r.signal for r in ratios))


@dataclass
class LocalErrors:
    """Of every linear by full dotted name, and of every group by name."""

    weight: dict[str, Ratio]
    activation: dict[str, Ratio]
    block: dict[str, Ratio]

    @classmethod
    def of_layers(cls, found: list[dict]) -> "LocalErrors":
        """Those of each layer, as dataclasses.asdict gives them away, put together."""
        return cls(
            *(
                {name: Ratio(**each) for layer in found for name, each in layer[part].items()}
                for part in ("weight", "activation", "block")
            )
        )


def measure_local_errors(
    model: StreamedModel,
    groups: list[Group],
    tokens: np.ndarray | None,
    rounding: Rounding,
    with_block: bool,
    progress: Callable[[int], None],
    passes: Passes = UNKEPT,
) -> LocalErrors:
    """Sweep over the model once. with_block: also rerun each block once a group.

    tokens (n_sequences, seq_len); without any, only the weights are looked at.
    Calls progress(1) after each layer.
    """
    walk = passes.begin("local errors", model.n_layers)
    state: dict[str, torch.Tensor] = {}
    if tokens is not None and not walk.finished:
        hidden = model.embed(tokens)
        walk.restore("hidden", hidden.tensor)
        after = hidden.like() if with_block else hidden
    if walk.n_done:
        progress(walk.n_done)
    for layer in model.layers(1 if tokens is None else tokens.shape[1], n_done=walk.n_done):
        errors = LocalErrors({}, {}, {})
        of_layer = [group for group in groups if group.layer == layer.index]
        w_hat = rounded(layer, of_layer, rounding)
        _add_weight_errors(errors, layer, w_hat)
        if tokens is not None:
            with _adding_activation_errors(errors, layer, w_hat):
                layer.run(hidden, after)
            if with_block:
                for group in of_layer:
                    chosen = {name: w_hat[name] for name in group.modules}
                    errors.block[group.name] = _block_error(layer, chosen, hidden, after)
            hidden, after = after, hidden
            state = {"hidden": hidden.tensor}
        del w_hat  # before the next layer is loaded
        walk.done(state, facts=asdict(errors))
        progress(1)
    return LocalErrors.of_layers(walk.facts)


def rounded(
    layer: StreamedLayer, groups: list[Group], rounding: Rounding
) -> dict[str, torch.Tensor]:
    """The decoded low-bit copy of each linear of `groups`, in 16 bits, on the layer's device.

    Raises BadInput for a weight that float16 cannot hold, where that is the type.
    """
    linears, found = layer.linears, {}
    for name in (name for group in groups for name in group.modules):
        w = linears[name].weight.data
        try:
            found[name] = rounding(w).to(w.device)
        except OverflowError:
            raise BadInput(
                f"{printable(name)}.weight has weights that float16 cannot hold.",
                'They are beyond 65504, but config.json says "float16".',
                'Set "dtype": "bfloat16" in a copy of the model\'s config.json.',
            ) from None
    give_back_memory()
    return found


def difference(w: torch.Tensor, w_hat: torch.Tensor) -> torch.Tensor:
    """w_hat - w in the type of w. (Plain subtraction of two types converts w_hat besides.)"""
    return w_hat.to(w.dtype, copy=True).sub_(w)


def _add_weight_errors(
    errors: LocalErrors, layer: StreamedLayer, w_hat: dict[str, torch.Tensor]
) -> None:
    for name, rounded_weight in w_hat.items():
        w = layer.linears[name].weight.data
        errors.weight[name] = Ratio()
        errors.weight[name].add(difference(w, rounded_weight), w)


@contextmanager
def _adding_activation_errors(
    errors: LocalErrors, layer: StreamedLayer, w_hat: dict[str, torch.Tensor]
) -> Iterator[None]:
    """While it is open, the errors of whatever the linears compute are added up."""
    linears = layer.linears

    def add(name: str):
        ratio = errors.activation.setdefault(name, Ratio())

        def hook(linear: nn.Linear, inputs: tuple, output: torch.Tensor) -> None:
            wx = output if linear.bias is None else output - linear.bias
            ratio.add(F.linear(inputs[0], difference(linear.weight, w_hat[name])), wx)

        return hook

    handles = [linears[name].register_forward_hook(add(name)) for name in w_hat]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _block_error(
    layer: StreamedLayer,
    w_hat: dict[str, torch.Tensor],
    before: HiddenStates,
    after: HiddenStates,
) -> Ratio:
    """The error of the residual stream behind the block when it has these weights."""
    ratio = Ratio()
    for part, x in layer.micro_batches(before):
        with layer.changed(w_hat):
            y_hat = layer.forward(x)
        y = after.tensor[part].to(y_hat.device)
        ratio.add(y_hat - y, y)
    return ratio
