"""Quantizes a planned GPTQ model layer by layer, and writes its folder as it goes.

The folder appears whole and verified, or not at all.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from quant.algorithms.gptq import gptq
from quant.calibration.gptq_weights import GptqWeights
from quant.calibration.passes import UNKEPT, Passes
from quant.calibration.tokens import Tokens
from quant.calibration.weights import ChangedWeights, CheckpointWeights
from quant.check_weights import Candidate, check_weights
from quant.checkpoint import Checkpoint, read_tensors
from quant.display import printable
from quant.durable import write_whole
from quant.dynamic_rules import check_rules, stored_bits
from quant.errors import BadInput
from quant.formats import Float16Overflow
from quant.gptq_card import gptq_card
from quant.gptq_model import METRIC, GptqPlan
from quant.gptq_rounding import make_grid, plainly_rounded
from quant.measuring.measure import calibration_facts
from quant.model_folder import check_room, write_folder, write_json, write_model_config
from quant.report.choice import Result
from quant.sinks.written import WrittenFile
from quant.write_with_feedback import Encode, check_tokens, write_with_feedback

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
        quantization = plan.quantization_config  # first: it may find that no rules would do
        files, damps = write_with_feedback(plan, _encoder(plan), tokens, folder, device, progress)
        written.damped = {module: damp for module, damp in damps.items() if damp > plan.damp}
        write_model_config(plan.checkpoint, plan.dtype, quantization, folder)
        if quantization is not None:
            write_json(folder / QUANTIZE_CONFIG, quantization)
            check_rules(quantization, plan.groups, stored_bits(read_tensors(folder), plan.groups))
        return files

    def finish(folder: Path, files: list[WrittenFile]) -> dict:
        written.nbytes = sum(file.nbytes for file in files)
        written.results = check(plan, folder) if check else ()
        card = gptq_card(plan, written.nbytes, tokens, written.results, base_model)
        write_whole(folder / "README.md", card.encode())
        return _facts(plan, written, tokens)

    write_folder(plan.checkpoint, output, force, command, fill, finish)
    return written


def _facts(plan: GptqPlan, written: WrittenGptq, tokens: Tokens) -> dict:
    """What the manifest says about the choice and its outcome."""
    facts = {
        "type": plan.name,
        "quantization": plan.quantization_config,
        "calibration": calibration_facts(tokens),
        "damped": written.damped,
        "results": [asdict(result) for result in written.results],
    }
    if plan.choice:
        facts |= {"budget": str(plan.budget), "metric": METRIC, "ladder": plan.ladder}
        facts |= {"damage": plan.damage, "bits": plan.bits}
    return facts


def _encoder(plan: GptqPlan) -> Encode:
    def encode(module: str, W: torch.Tensor, H: torch.Tensor):
        format = plan.format_of(module)
        grid = make_grid(format, W)
        rounded = gptq(W, H, grid, plan.damp, plan.static_groups)
        Q, scale, zero = (x.cpu().numpy() for x in (rounded.Q, grid.scale, grid.zero))
        try:
            parts = format.encode(Q, scale, zero)
        except Float16Overflow:
            raise _too_large(module) from None
        return {f"{module}.{suffix}": part for suffix, part in parts.items()}, rounded

    return encode


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
    passes: Passes = UNKEPT,
) -> tuple[Result, ...]:
    """The source, plain rounding of all linears and what was written, read back from `folder`.

    Calls progress(1) after each layer of each model.
    """
    names = frozenset(f"{name}.weight" for group in plan.groups for name in group.modules)
    plain = ChangedWeights(
        CheckpointWeights(plan.checkpoint), names, lambda _, w: plainly_rounded(plan.format, w)
    )
    nbytes = plan.levels.least + plan.levels.rest
    copied = None if plan.quantized else CheckpointWeights(Checkpoint.open(folder))
    candidates = [
        Candidate(f"plain {plan.format.bits}-bit rounding", nbytes, plain),
        Candidate(plan.name, plan.nbytes, copied or GptqWeights(folder)),
    ]
    return check_weights(plan.checkpoint, candidates, tokens, device, progress, passes)
