"""How much a 4-bit folder lost: it, plain 4-bit and the source on held-out text, streamed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from quant.calibration.bnb_weights import Bnb4bitWeights
from quant.calibration.passes import UNKEPT, Passes
from quant.calibration.tokens import Tokens
from quant.calibration.weights import ChangedWeights, CheckpointWeights
from quant.check_weights import Candidate, check_weights
from quant.convert import worker_count
from quant.dynamic_4bit import Budget, Plan4bit, plan_4bit
from quant.measuring.measure import rounding_of
from quant.report.choice import Result

N_MODELS = 3


def check_4bit(
    plan: Plan4bit,
    folder: Path,
    tokens: Tokens,
    device: str,
    progress: Callable[[int], None] = lambda n: None,
    passes: Passes = UNKEPT,
) -> tuple[Result, ...]:
    """The source, plain 4-bit and what was written: perplexity, KL divergence, top-1 agreement.

    The written weights are read back from `folder` and decoded. Plain 4-bit is what bitsandbytes
    itself would make of the source. The second half of each sequence is scored. Calls progress(1)
    after each layer of each model.
    """
    checkpoint = plan.checkpoint
    plain_format = replace(plan.format, search_scales=False)
    plain = plan_4bit(checkpoint, plain_format, Budget("share", 0.0))
    names = frozenset(t.name for t in plain.tensors if t.is_4bit)
    with ThreadPoolExecutor(worker_count()) as pool:
        rounding = rounding_of(plain_format, plan.dtype, pool)
        weights = ChangedWeights(CheckpointWeights(checkpoint), names, lambda name, w: rounding(w))
        candidates = [
            Candidate(f"plain {plan.format.quant_type.upper()}", plain.nbytes, weights),
            Candidate(_name(plan), plan.nbytes, Bnb4bitWeights(folder)),
        ]
        return check_weights(checkpoint, candidates, tokens, device, progress, passes)


def _name(plan: Plan4bit) -> str:
    if len(plan.kept) == len(plan.groups):
        return "16-bit copy"
    if plan.kept:
        return "dynamic, feedback" if plan.feedback else "dynamic 4-bit"
    how = "scales searched" if plan.format.search_scales else "as written"
    return f"{plan.format.quant_type.upper()}, {'error feedback' if plan.feedback else how}"
