"""Output errors weighted by what the loss feels of them: a prediction of the KL divergence.

To second order, a disturbance dy of a linear's output y at a token costs

    KL ~ 1/2 E (g . dy)^2        g = d(-ln p(t)) / dy,  t drawn from the model's own p

since E g g^T is the Fisher information of the next tokens with respect to y. Tokens are taken one
by one: the disturbances of two tokens are held to be independent. One t is drawn a position.
# ref: Martens, New Insights and Perspectives on the Natural Gradient Method, arXiv 1412.1193

The gradient needs a backward pass, which is streamed too: the input of every layer is kept in a
file, and each layer is loaded again on the way back and differentiated alone. In memory are the
states between two layers, whatever the number of layers.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from quant.calibration.hidden_states import HiddenStates, StatesFile
from quant.calibration.passes import UNKEPT, Passes
from quant.calibration.streamed_model import StreamedLayer, StreamedModel, give_back_memory
from quant.groups import Group
from quant.measuring.local_errors import Rounding, difference, rounded

POSITIONS_AT_ONCE = 512
SEED = 0


def measure_gradient(
    model: StreamedModel,
    groups: list[Group],
    tokens: np.ndarray,
    rounding: Rounding,
    progress: Callable[[int], None],
    passes: Passes = UNKEPT,
    name: str = "gradient",
) -> dict[str, float]:
    """Group name -> predicted KL divergence, nats a token.

    Calls progress(1) after each layer, forwards and backwards. name: of the way back, among the
    passes of an output; its first step is the head.
    """
    back = passes.begin(name, 1 + model.n_layers)
    if not back.finished:
        hidden, inputs = _forwards(model, tokens, progress, passes, name)
        if back.n_done == 0:
            gradient = _gradient_at_head(model, hidden)
            back.done({"gradient": gradient.tensor}, facts={})
        else:
            gradient = hidden
            back.restore("gradient", gradient.tensor)
    if back.n_done > 1:
        progress(back.n_done - 1)
    seq_len = tokens.shape[1]
    for layer in model.layers(seq_len, backwards=True, n_done=back.n_done - 1):
        of_layer = [group for group in groups if group.layer == layer.index]
        w_hat = rounded(layer, of_layer, rounding)
        source, sums = inputs[layer.index], {}
        for part, x in layer.micro_batches(source, share=2):  # the graph takes as much again
            upstream = gradient.tensor[part].to(x.device)
            downstream = _backwards(layer, of_layer, w_hat, x, upstream, sums)
            gradient.tensor[part] = downstream.cpu()
            give_back_memory()
        del w_hat  # before the next layer is loaded
        back.done({"gradient": gradient.tensor}, facts=sums)
        progress(1)
    sums = {group: total for of_layer in back.facts for group, total in of_layer.items()}
    return {group: 0.5 * total / tokens.size for group, total in sums.items()}


def _forwards(
    model: StreamedModel,
    tokens: np.ndarray,
    progress: Callable[[int], None],
    passes: Passes,
    name: str,
) -> tuple[HiddenStates, StatesFile]:
    """What the head is given; and that, entry 0 and so on, which every layer is given."""
    hidden = model.embed(tokens)
    inputs = StatesFile(1 + model.n_layers, hidden, kept=passes.file(f"{name} inputs"))
    there = passes.begin(f"{name} inputs", model.n_layers, until=name, into=inputs)
    inputs.write(0, hidden)
    there.restore("hidden", hidden.tensor)
    if there.n_done:
        progress(there.n_done)
    for layer in model.layers(tokens.shape[1], n_done=there.n_done):
        layer.run(hidden, hidden)
        inputs.write(layer.index + 1, hidden)
        there.done({"hidden": hidden.tensor})
        progress(1)
    return hidden, inputs


def _gradient_at_head(model: StreamedModel, states: HiddenStates) -> HiddenStates:
    """d(-ln p(t)) / d(hidden) at every position, t drawn from the model's own distribution.

    It takes the place of the states.
    """
    flat = states.tensor.view(-1, states.tensor.shape[-1])
    generator = torch.Generator(device=model.device).manual_seed(SEED)
    for start in range(0, len(flat), POSITIONS_AT_ONCE):
        part = slice(start, start + POSITIONS_AT_ONCE)
        hidden = flat[part].to(model.device, copy=True).requires_grad_(True)
        x = model.norm(hidden)
        to_x = _gradient_of_sampled_loss(model, x.detach(), generator)
        flat[part] = torch.autograd.grad(x, hidden, to_x)[0].cpu()
    return states


@torch.no_grad()
def _gradient_of_sampled_loss(
    model: StreamedModel, x: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """sum over i of p_i W_i - W_t, (n, hidden), for normed states x (n, hidden).

    Two passes over the output matrix: the first draws t by the Gumbel trick (the largest of
    l_i - ln(-ln u_i) is distributed like softmax of l), the second sums.
    """
    n = len(x)
    best = torch.full((n,), -torch.inf, device=x.device)
    drawn, log_sum = torch.zeros_like(x), best.clone()
    for _, w in model.head_blocks():
        logits = (x @ w.T).float()
        log_sum = torch.logaddexp(log_sum, logits.logsumexp(1))
        noise = torch.empty_like(logits).exponential_(generator=generator).log_().neg_()
        largest, where = (logits + noise).max(1)
        drawn = torch.where((largest > best)[:, None], w[where], drawn)
        best = torch.maximum(best, largest)
    mean = torch.zeros_like(x)
    for _, w in model.head_blocks():
        mean += torch.exp((x @ w.T).float() - log_sum[:, None]).to(w.dtype) @ w
    return mean - drawn


def _backwards(
    layer: StreamedLayer,
    groups: list[Group],
    w_hat: dict[str, torch.Tensor],
    x: torch.Tensor,
    upstream: torch.Tensor,
    sums: dict[str, float],
) -> torch.Tensor:
    """The loss's gradient at the layer's input, from that at its output; adds to `sums`."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # linear -> input, output

    def keep(name: str):
        return lambda _, inputs, output: seen.update({name: (inputs[0], output)})

    linears = layer.linears
    handles = [linears[name].register_forward_hook(keep(name)) for name in w_hat]
    with torch.enable_grad():
        x = x.requires_grad_(True)
        y = layer.forward(x)
    for handle in handles:
        handle.remove()
    outputs = [output for _, output in seen.values()]
    downstream, *at_linears = torch.autograd.grad(y, [x, *outputs], upstream)
    g = dict(zip(seen, at_linears, strict=True))
    with torch.no_grad():
        for group in groups:
            felt = 0.0  # (sequences, seq_len)
            for name in group.modules:
                dw = difference(linears[name].weight, w_hat[name])
                felt += (g[name] * F.linear(seen[name][0], dw)).sum(-1)
            sums[group.name] = sums.get(group.name, 0.0) + float(felt.square().sum())
    return downstream
