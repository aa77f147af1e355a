"""Writes the weights of a model that is quantized with error feedback, as it is quantized.

Every linear sees what the quantized ones before it put out, so the linears come in the order of the
model's own computation. What stays 16-bit is written first. Of the source, one decoder layer is in
memory at a time; of the result, one linear.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch

from quant.algorithms.gptq import NotFinite, Rounded
from quant.calibration.feedback import quantize_streamed
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens
from quant.checkpoint import Checkpoint
from quant.display import printable
from quant.errors import BadInput
from quant.folder_run import FolderRun, ticking
from quant.groups import Group
from quant.model_folder import STORED, Source
from quant.sinks.safetensors import ShardedSink
from quant.tensors import TensorReader


class FeedbackPlan(Protocol):
    """What the plans of all formats have in common that are made with error feedback."""

    checkpoint: Checkpoint
    dtype: str  # "bfloat16" or "float16": of what stays
    quantized_groups: tuple[Group, ...]  # in the order in which they are quantized
    stays: tuple[str, ...]  # names of the tensors that are 16-bit, in the order of the checkpoint
    widest: int  # the most columns that any quantized linear has

    def parts(self, module: str) -> list[tuple[str, str, tuple[int, ...]]]:
        """The tensors that a linear's weight becomes: (name, safetensors' dtype, shape)."""


Encode = Callable[[str, torch.Tensor, torch.Tensor], tuple[Mapping[str, np.ndarray], Rounded]]
"""(full dotted name of a linear, W, H of its inputs) -> its tensors by name, what they stand for.

May raise NotFinite."""

FEW = 4
"""Tokens to each input of the widest linear below which feedback was seen to do harm."""


def planned_tensors(plan: FeedbackPlan) -> list[tuple[str, str, tuple[int, ...]]]:
    """All tensors in the order in which they are written: (name, safetensors' dtype, shape)."""
    tensors, stored = plan.checkpoint.tensors, STORED[plan.dtype]
    planned = [(name, stored, tensors[name].shape) for name in plan.stays]
    for group in plan.quantized_groups:
        for module in group.modules:
            planned += plan.parts(module)
    return planned


def write_with_feedback(
    plan: FeedbackPlan,
    run: FolderRun,
    sink: ShardedSink,
    there: list[dict],
    encode: Encode,
    tokens: Tokens,
    device: str,
    progress: Callable[[int], None],
) -> dict[str, float]:
    """Write all weights behind those of `there`; the damping that each linear's H needed.

    Calls progress(1) after each layer. Raises BadInput for weights or inputs that are not finite.
    """
    tensors, tick = plan.checkpoint.tensors, run.journal.tick
    damps = {name: damp for unit in there for name, damp in unit.get("damp", {}).items()}

    def quantize(module: str, W: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
        try:
            parts, rounded = encode(module, W, H)
        except NotFinite as error:
            raise _not_finite(module, error) from None
        damps[module] = rounded.damp
        in_order = {name: parts[name] for name, _, _ in plan.parts(module)}
        run.write(sink, in_order, may_stop=False, damp={module: rounded.damp})
        tick()
        return rounded.W_hat

    with TensorReader() as reader:
        for name in plan.stays[len(there) :]:
            blocks = Source(tensors[name], reader, plan.dtype).blocks()
            run.write(sink, {name: ticking(blocks, tick)})
    if plan.quantized_groups:
        model = StreamedModel(plan.checkpoint, device=device)
        groups = plan.quantized_groups
        quantize_streamed(model, groups, tokens.ids, quantize, progress, run.passes)
    return damps


def check_tokens(plan: FeedbackPlan, tokens: Tokens) -> None:
    """Raise BadInput for fewer tokens than the widest linear has inputs.

    From so few, H cannot tell how its inputs go together, and what is made good on the calibration
    text is spoiled on others. KL divergence of examples/tiny-qwq (768 inputs at most) in 4 bits,
    against plain rounding's: 19 % more from 512 tokens, 5 % less from 1024, 63 % less from 4096.
    """
    if tokens.n_tokens < plan.widest:
        raise BadInput(
            f"{tokens.n_tokens} tokens of calibration text are too few: the widest linear has "
            f"{plan.widest} inputs.",
            "With fewer tokens than inputs, errors are made good on that text alone.",
            f"Give --tokens {_plenty(plan, tokens)} or more, and a text (--calibration) that has "
            "them.",
        )


def token_notes(plan: FeedbackPlan, tokens: Tokens) -> tuple[str, ...]:
    """For the user: tokens that are enough to begin with, but may not be worth the time.

    KL divergence of examples/tiny-qwq (768 inputs at most) in 4 bits and groups of 64, against
    plain rounding's: 22 % more from 1024 tokens, 42 % less from 1536, 19 % from 2048, 58 % from
    3072. So few are a matter of luck.
    """
    if tokens.n_tokens >= FEW * plan.widest:
        return ()
    return (
        f"{tokens.n_tokens} tokens of calibration text are fewer than {FEW} times the "
        f"{plan.widest} inputs of the widest linear: feedback may be worse than plain rounding; "
        f"give --tokens {_plenty(plan, tokens)}, and a text that has them",
    )


def _plenty(plan: FeedbackPlan, tokens: Tokens) -> int:
    """To ask for: whole sequences, of no less than FEW times the widest linear's inputs."""
    return -(-FEW * plan.widest // tokens.seq_len) * tokens.seq_len


def _not_finite(module: str, error: NotFinite) -> BadInput:
    return BadInput(
        f"{printable(module)} cannot be quantized: {error}.",
        "There are NaN or infinite values among what flows through the model: weights before it "
        "are damaged, or activations overflow.",
        "Run `qwq-quant inspect` and `qwq-quant doctor` on the model.",
    )
