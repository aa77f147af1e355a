"""The end-to-end KL divergence when one group alone is quantized: dear, and nearest to the truth.

Every group needs the model run again from its layer to the end. The hidden states of many groups
travel through the layers together, so that each layer is loaded once for all of them:

    layer 0   reference ----------------------------------> layer 1 ...
              with group 0 quantized ---------------------> layer 1 ...
              with group 1 quantized ---------------------> layer 1 ...

States are tokens x hidden x 4 bytes a group; past MAX_STATES_NBYTES, or what the free memory has
room for, there are several sweeps.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from quant.calibration.hidden_states import SHARE_OF_MEMORY
from quant.calibration.passes import UNKEPT, Passes
from quant.calibration.streamed_model import StreamedModel
from quant.evaluation.streamed import compare_streamed
from quant.groups import Group
from quant.measuring.local_errors import Rounding, rounded
from quant.preflight import available_memory

MAX_STATES_NBYTES = 2 << 30
"""With a layer of QwQ-32B, its activations and the reference this stays below 8 GB."""

REFERENCE = "reference"
"""The name of its states; the others have their group's."""


def n_sweeps(model: StreamedModel, groups: list[Group], tokens: np.ndarray) -> int:
    """How often the whole model is run."""
    hidden = tokens.size * model.hidden_size * model.dtype.itemsize
    return -(-len(groups) // n_together(hidden))


def n_together(hidden: int) -> int:
    """Groups in a sweep, at most, whose states have so many bytes each."""
    return max(1, min(MAX_STATES_NBYTES, _room()) // hidden - 1)  # 1: the reference


@cache
def _room() -> int:
    """Bytes for states; looked up once, or the sweeps announced were not those that are made."""
    return int(SHARE_OF_MEMORY * available_memory())


def measure_kld(
    model: StreamedModel,
    groups: list[Group],
    tokens: np.ndarray,
    rounding: Rounding,
    progress: Callable[[int], None],
    passes: Passes = UNKEPT,
) -> dict[str, float]:
    """Group name -> mean KL divergence, nats a token. Calls progress(1) after each layer."""
    klds: dict[str, float] = {}
    sweeps = passes.once("kld sweeps", lambda: n_sweeps(model, groups, tokens))
    for i in range(sweeps):
        part = groups[i * len(groups) // sweeps : (i + 1) * len(groups) // sweeps]
        klds |= _sweep(model, part, tokens, rounding, progress, passes, f"kld {i}")
    return klds


def _sweep(
    model: StreamedModel,
    groups: list[Group],
    tokens: np.ndarray,
    rounding: Rounding,
    progress: Callable[[int], None],
    passes: Passes,
    name: str,
) -> dict[str, float]:
    """The last step compares."""
    walk = passes.begin(name, model.n_layers + 1)
    if walk.n_done:
        progress(min(walk.n_done, model.n_layers))
    if walk.finished:
        return walk.facts[-1]
    reference = model.embed(tokens)
    walk.restore(REFERENCE, reference.tensor)
    states = {group: reference.like() for group in walk.arrays if group != REFERENCE}
    for group, state in states.items():
        walk.restore(group, state.tensor)
    for layer in model.layers(tokens.shape[1], n_done=walk.n_done):
        for state in states.values():
            layer.run(state, state)
        for group in (g for g in groups if g.layer == layer.index):
            states[group.name] = reference.like()
            with layer.changed(rounded(layer, [group], rounding)):
                layer.run(reference, states[group.name])
        layer.run(reference, reference)
        found = {group: state.tensor for group, state in states.items()}
        walk.done({REFERENCE: reference.tensor, **found})
        progress(1)
    scores = compare_streamed(model, reference, list(states.values()), tokens)
    means = (max(0.0, float(s.kld.mean())) for s in scores)  # rounding may leave -1e-9
    walk.done({}, facts=dict(zip(states, means, strict=True)))
    return walk.facts[-1]
