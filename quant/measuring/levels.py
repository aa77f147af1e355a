"""What plain rounding on a GPTQ grid costs each group, by the bits that it may have."""

from collections.abc import Callable

import numpy as np
import torch

from quant.calibration.passes import UNKEPT, Passes
from quant.calibration.streamed_model import StreamedModel
from quant.gptq_model import METRIC, GptqPlan
from quant.gptq_rounding import plainly_rounded
from quant.measuring.gradient import measure_gradient
from quant.measuring.measure import require_finite


def n_steps(plan: GptqPlan, model: StreamedModel) -> int:
    """How often `measure_levels` calls progress(1)."""
    return 2 * model.n_layers * (len(plan.ladder) - 1)


def measure_levels(
    plan: GptqPlan,
    model: StreamedModel,
    tokens: np.ndarray,
    progress: Callable[[int], None] = lambda n: None,
    passes: Passes = UNKEPT,
) -> dict[str, tuple[float, ...]]:
    """Group -> predicted KL divergence, nats a token, for each of the plan's ladder.

    The metric is plan_gptq's METRIC; 16 bits cost nothing. Calls progress(1) after each layer,
    forwards and backwards. Raises BadInput for a model that gives NaN or infinity.
    """
    found = []
    for bits in plan.ladder[:-1]:
        format = plan.format_with(bits)

        def rounding(w: torch.Tensor, format=format) -> torch.Tensor:
            return plainly_rounded(format, w)

        damage = measure_gradient(
            model, list(plan.groups), tokens, rounding, progress, passes, f"{bits} bits"
        )
        require_finite({METRIC: damage}, plan.checkpoint)
        found.append(damage)
    return {g.name: (*(damage[g.name] for damage in found), 0.0) for g in plan.groups}
