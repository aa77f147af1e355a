"""Quantizes a planned GPTQ model layer by layer, and writes its folder as it goes.

The folder appears whole and verified, or not at all.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
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
from quant.folder_run import FolderRun, WrittenFolder, folder_run, write_folder
from quant.formats import Float16Overflow
from quant.gptq_card import gptq_card
from quant.gptq_model import METRIC, GptqPlan
from quant.gptq_rounding import make_grid, plainly_rounded
from quant.journal import Resume
from quant.measuring.measure import calibration_facts
from quant.model_folder import write_json, write_model_config
from quant.report.choice import Result
from quant.sinks.safetensors import ShardedSink
from quant.sinks.written import WrittenFile
from quant.write_with_feedback import (
    Encode,
    check_tokens,
    planned_tensors,
    write_with_feedback,
)

QUANTIZE_CONFIG = "quantize_config.json"
"""AutoGPTQ's own place for what config.json's quantization_config says too."""

N_MODELS = 3
"""How many models check_gptq runs."""

Check = Callable[[GptqPlan, Path], tuple[Result, ...]]
"""Measures the written folder, before it gets its name."""


def write_gptq(
    plan: GptqPlan,
    tokens: Tokens,
    output: Path,
    *,
    device: str = "cpu",
    force: bool = False,
    command: tuple[str, ...] = (),
    resume: Resume | None = None,
    **how,
) -> WrittenFolder:
    """Carry out the plan, or what an interrupted run left of it. The rest is as for `fill_gptq`."""
    check_tokens(plan, tokens)
    with run_gptq(plan, tokens, output, force, command, resume, device=device) as run:
        return fill_gptq(plan, tokens, run, device=device, **how)


def run_gptq(
    plan: GptqPlan,
    tokens: Tokens,
    output: Path,
    force: bool,
    command: tuple[str, ...],
    resume: Resume | None,
    *,
    device: str = "cpu",
    measured: Tokens | None = None,
    held_out: Tokens | None = None,
) -> AbstractContextManager[FolderRun]:
    """Lock the output, before anything is measured or written, and see what is finished of it.

    plan: the final one, or one whose budget is spent later by what is measured on `measured`.
    held_out: what is checked on in the end, if anything is. Raises CannotCreate or OutputFailed if
    it cannot be written, and what Journal raises.
    """
    facts = {"bits": plan.format.bits, "group_size": plan.format.group_size}
    facts |= {"symmetric": plan.format.symmetric, "static_groups": plan.static_groups}
    facts |= {"damp": plan.damp, "type_of_what_stays": plan.dtype, "budget": str(plan.budget)}
    return folder_run(
        plan.checkpoint,
        output,
        force,
        command,
        resume,
        code=CODE,
        hashed={"bits of the groups": dict(plan.bits), "text to measure on": measured},
        facts=facts,
        tokens=tokens,
        held_out=held_out,
        device=device,
        nbytes=plan.nbytes,
    )


def fill_gptq(
    plan: GptqPlan,
    tokens: Tokens,
    run: FolderRun,
    *,
    device: str = "cpu",
    base_model: str | None = None,
    progress: Callable[[int], None] = lambda n_layers: None,
    check: Check | None = None,
) -> WrittenFolder:
    """Carry out the plan, calibrated on `tokens`. Calls progress(1) after each layer.

    base_model: the hub's name of the source, for the model card.
    Raises BadInput for too few tokens, weights or activations that are not finite, or a source that
    changed; CannotCreate, OutputFailed or Stopped.
    """
    damped: dict[str, float] = {}

    def fill(folder: Path, sink: ShardedSink, there: list[dict]) -> None:
        quantization = plan.quantization_config  # first: it may find that no rules would do
        damps = write_with_feedback(
            plan, run, sink, there, _encoder(plan), tokens, device, progress
        )
        damped.update({module: damp for module, damp in damps.items() if damp > plan.damp})
        write_model_config(plan.checkpoint, plan.dtype, quantization, folder)
        if quantization is not None:
            write_json(folder / QUANTIZE_CONFIG, quantization)

    def finish(folder: Path, files: list[WrittenFile]) -> tuple[WrittenFolder, dict]:
        if plan.quantized:
            stored = stored_bits(read_tensors(folder), plan.groups)
            check_rules(plan.quantization_config, plan.groups, stored)
        results = check(plan, folder) if check else ()
        written = WrittenFolder(run.output, sum(file.nbytes for file in files), results, damped)
        card = gptq_card(plan, written.nbytes, tokens, results, base_model)
        write_whole(folder / "README.md", card.encode())
        return written, _facts(plan, written, tokens)

    return write_folder(run, planned_tensors(plan), len(plan.stays), fill, finish)


CODE = ("formats", "sinks", "convert.py", "finite.py", "gptq_model.py", "groups.py", "lora.py",
        "folder_run.py", "model_folder.py", "tensors.py")  # fmt: skip
"""What makes bytes of a plan, besides what runs the model."""


def _facts(plan: GptqPlan, written: WrittenFolder, tokens: Tokens) -> dict:
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
