"""How much a 4-bit folder lost: it, plain 4-bit and the source on held-out text, streamed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from quant.calibration.bnb_weights import Bnb4bitWeights
from quant.calibration.hidden_states import HiddenStates
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens
from quant.calibration.weights import ChangedWeights, CheckpointWeights, Weights
from quant.convert import worker_count
from quant.dynamic_4bit import Budget, Plan4bit, plan_4bit
from quant.evaluation.divergence import Statistics, statistics
from quant.evaluation.streamed import compare_streamed
from quant.measuring.measure import rounding_of
from quant.report.choice import Result

N_MODELS = 3


def check_4bit(
    plan: Plan4bit,
    folder: Path,
    tokens: Tokens,
    device: str,
    progress: Callable[[int], None] = lambda n: None,
) -> tuple[Result, ...]:
    """The source, plain 4-bit and what was written: perplexity, KL divergence, top-1 agreement.

    The written weights are read back from `folder` and decoded. Plain 4-bit is what bitsandbytes
    itself would make of the source. The second half of each sequence is scored. Calls progress(1)
    after each layer of each model.
    """
    checkpoint, ids = plan.checkpoint, tokens.ids
    source = StreamedModel(checkpoint, device=device)
    reference = _final_states(source, ids, progress)
    plain_format = replace(plan.format, search_scales=False)
    plain = plan_4bit(checkpoint, plain_format, Budget("share", 0.0))
    rows: list[tuple[str, int, Weights]] = []
    with ThreadPoolExecutor(worker_count()) as pool:
        rounding = rounding_of(plain_format, plan.dtype, pool)
        names = frozenset(t.name for t in plain.tensors if t.is_4bit)
        weights = ChangedWeights(CheckpointWeights(checkpoint), names, lambda name, w: rounding(w))
        rows.append((f"plain {plan.format.quant_type.upper()}", plain.nbytes, weights))
        rows.append((_name(plan), plan.nbytes, Bnb4bitWeights(folder)))
        states = [
            _final_states(StreamedModel(checkpoint, weights, device=device), ids, progress)
            for _, _, weights in rows
        ]
    first = tokens.seq_len // 2
    scores = compare_streamed(source, reference, states, ids, first)
    nbytes = sum(2 * info.n_weights for info in checkpoint.tensors.values())
    return (
        _source_result(nbytes, statistics(scores[0])),
        *(_result(name, n, statistics(s)) for (name, n, _), s in zip(rows, scores, strict=True)),
    )


def _final_states(
    model: StreamedModel, ids: np.ndarray, progress: Callable[[int], None]
) -> HiddenStates:
    hidden = model.embed(ids)
    for layer in model.layers(ids.shape[1]):
        layer.run(hidden, hidden)
        progress(1)
    return hidden


def _name(plan: Plan4bit) -> str:
    if not plan.kept:
        searched = ", scales searched" if plan.format.search_scales else ", as written"
        return plan.format.quant_type.upper() + searched
    return "dynamic 4-bit" if len(plan.kept) < len(plan.groups) else "16-bit copy"


def _source_result(nbytes: int, s: Statistics) -> Result:
    return Result("source", nbytes, s.n_positions, s.ppl_reference.value, s.ppl_reference.error)


def _result(name: str, nbytes: int, s: Statistics) -> Result:
    return Result(
        name,
        nbytes,
        s.n_positions,
        s.ppl.value,
        s.ppl.error,
        s.kld.value,
        s.kld.error,
        s.same_top.value,
    )
