"""Quantizes a planned GPTQ model layer by layer, and writes its folder as it goes.

Of the source, one decoder layer is in memory at a time; of the result, one linear. The folder
appears whole and verified, or not at all.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from quant.algorithms.gptq import IntegerGrid, NotFinite, gptq, round_to_nearest
from quant.calibration.feedback import quantize_streamed
from quant.calibration.gptq_weights import GptqWeights
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens
from quant.calibration.weights import ChangedWeights, CheckpointWeights
from quant.check_weights import Candidate, check_weights
from quant.display import printable
from quant.durable import write_whole
from quant.errors import BadInput
from quant.formats import Float16Overflow
from quant.gptq_card import gptq_card
from quant.gptq_model import GptqPlan
from quant.measuring.measure import calibration_facts
from quant.model_folder import (
    STORED,
    Source,
    check_room,
    write_folder,
    write_json,
    write_model_config,
)
from quant.report.choice import Result
from quant.sinks.safetensors import ShardedSink
from quant.sinks.written import WrittenFile
from quant.tensors import TensorReader

QUANTIZE_CONFIG = "quantize_config.json"
"""AutoGPTQ's own place for what config.json's quantization_config says too."""

N_MODELS = 3
"""How many models check_gptq runs."""

Check = Callable[[GptqPlan, Path], tuple[Result, ...]]
"""Measures the written folder, before it gets its name."""


@dataclass
class WrittenGptq:
    """What was written."""

    folder: Path
    nbytes: int = 0  # of all weight files
    results: tuple[Result, ...] = ()
    damped: dict[str, float] = field(default_factory=dict)
    """Linears whose H was singular, and the damping that made it regular."""


def write_gptq(
    plan: GptqPlan,
    tokens: Tokens,
    output: Path,
    *,
    device: str = "cpu",
    force: bool = False,
    base_model: str | None = None,
    command: tuple[str, ...] = (),
    progress: Callable[[int], None] = lambda n_layers: None,
    check: Check | None = None,
) -> WrittenGptq:
    """Carry out the plan, calibrated on `tokens`. Calls progress(1) after each layer.

    base_model: the hub's name of the source, for the model card.
    Raises BadInput for too few tokens, weights or activations that are not finite, or a source that
    changed; CannotCreate or OutputFailed.
    """
    check_tokens(plan, tokens)
    check_room(output, plan.nbytes, force)
    written = WrittenGptq(output)

    def fill(folder: Path) -> list[WrittenFile]:
        files = _write_weights(plan, tokens, folder, device, written, progress)
        quantization = plan.quantization_config
        write_model_config(plan.checkpoint, plan.dtype, quantization, folder)
        write_json(folder / QUANTIZE_CONFIG, quantization)
        return files

    def finish(folder: Path, files: list[WrittenFile]) -> dict:
        written.nbytes = sum(file.nbytes for file in files)
        written.results = check(plan, folder) if check else ()
        card = gptq_card(plan, written.nbytes, tokens, written.results, base_model)
        write_whole(folder / "README.md", card.encode())
        return {
            "type": f"gptq, {plan.format.bits}-bit",
            "quantization": plan.quantization_config,
            "calibration": calibration_facts(tokens),
            "damped": written.damped,
            "results": [asdict(result) for result in written.results],
        }

    write_folder(plan.checkpoint, output, force, command, fill, finish)
    return written


def check_tokens(plan: GptqPlan, tokens: Tokens) -> None:
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
            f"Give --tokens {4 * plan.widest} or more, and a text (--calibration) that has them.",
        )


def _write_weights(
    plan: GptqPlan,
    tokens: Tokens,
    folder: Path,
    device: str,
    written: WrittenGptq,
    progress: Callable[[int], None],
) -> list[WrittenFile]:
    """What stays as it is first, then every linear as it is quantized."""
    tensors, stored = plan.checkpoint.tensors, STORED[plan.dtype]
    planned = [(name, stored, tensors[name].shape) for name in plan.plain]
    for name in plan.quantized:
        parts = plan.format.parts(plan.shape(name))
        planned += [(f"{name}.{suffix}", *part) for suffix, part in parts.items()]
    sink = ShardedSink(folder, planned)

    def quantize(name: str, W: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
        grid = make_grid(plan, W)
        try:
            rounded = gptq(W, H, grid, plan.damp, plan.static_groups)
            Q, scale, zero = (x.cpu().numpy() for x in (rounded.Q, grid.scale, grid.zero))
            parts = plan.format.encode(Q, scale, zero)
        except NotFinite as error:
            raise _not_finite(name, error) from None
        except Float16Overflow:
            raise _too_large(name) from None
        for suffix, part in parts.items():
            sink.write(f"{name}.{suffix}", part)
        if rounded.damp > plan.damp:
            written.damped[name] = rounded.damp
        return rounded.W_hat

    try:
        with TensorReader() as reader:
            for name in plan.plain:
                sink.write(name, Source(tensors[name], reader, plan.dtype).blocks())
        model = StreamedModel(plan.checkpoint, device=device)
        quantize_streamed(model, plan.groups, tokens.ids, quantize, progress)
        return sink.finish()
    finally:
        sink.discard()


def make_grid(plan: GptqPlan, W: torch.Tensor) -> IntegerGrid:
    """The plan's grid for a weight W (rows, columns), on its device."""
    group_size = plan.format.columns_of_group(W.shape[1])
    return IntegerGrid(
        tuple(W.shape), plan.format.bits, group_size, plan.format.symmetric, W.device
    )


def _not_finite(name: str, error: NotFinite) -> BadInput:
    return BadInput(
        f"{printable(name)} cannot be quantized: {error}.",
        "There are NaN or infinite values among what flows through the model: weights before it "
        "are damaged, or activations overflow.",
        "Run `qwq-quant inspect` and `qwq-quant doctor` on the model.",
    )


def _too_large(name: str) -> BadInput:
    return BadInput(
        f"{printable(name)} has weights that GPTQ's float16 scales cannot hold.",
        "A group's scale would be beyond 65504.",
        "Write the model with `qwq-quant dynamic-4bit`, whose scales are float32.",
    )


def check_gptq(
    plan: GptqPlan,
    folder: Path,
    tokens: Tokens,
    device: str,
    progress: Callable[[int], None] = lambda n: None,
) -> tuple[Result, ...]:
    """The source, plain rounding on the same grid and what was written, read back from `folder`.

    Calls progress(1) after each layer of each model.
    """
    names = frozenset(f"{name}.weight" for name in plan.quantized)

    def rounded(name: str, w: torch.Tensor) -> torch.Tensor:
        return round_to_nearest(w, make_grid(plan, w)).W_hat

    plain = ChangedWeights(CheckpointWeights(plan.checkpoint), names, rounded)
    candidates = [
        Candidate(f"plain {plan.format.bits}-bit rounding", plan.nbytes, plain),
        Candidate(f"GPTQ {plan.format.bits}-bit", plan.nbytes, GptqWeights(folder)),
    ]
    return check_weights(plan.checkpoint, candidates, tokens, device, progress)
