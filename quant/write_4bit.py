"""Writes the folder of a planned 4-bit model: weights, config, tokenizer, report, card, manifest.

Without error feedback tensor by tensor, in the order of the checkpoint; with it, as the model
computes. It is filled under a temporary name and read back; it appears whole or not at all.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path

from quant.calibration.tokens import Tokens
from quant.convert import worker_count
from quant.durable import write_whole
from quant.dynamic_4bit import Plan4bit, PlannedTensor, part_name
from quant.folder_run import FolderRun, WrittenFolder, folder_run, ticking, write_folder
from quant.groups import find_linears
from quant.journal import Resume
from quant.model_card import model_card
from quant.model_folder import STORED, Source, write_model_config
from quant.report.choice import Result
from quant.report.sensitivity_report import sensitivity_report
from quant.safetensors_file import read_header
from quant.sensitivity import write_sensitivity
from quant.sinks.safetensors import ShardedSink
from quant.sinks.written import WrittenFile
from quant.skip_list import check_skip_list
from quant.tensors import TensorReader

FIGURES = "figures"

Check = Callable[[Plan4bit, Path], tuple[Result, ...]]
"""Measures the written folder, before it gets its name."""


def write_4bit(
    plan: Plan4bit,
    output: Path,
    *,
    tokens: Tokens | None = None,
    device: str = "cpu",
    force: bool = False,
    command: tuple[str, ...] = (),
    resume: Resume | None = None,
    **how,
) -> WrittenFolder:
    """Carry out the plan, or what an interrupted run left of it. The rest is as for `fill_4bit`."""
    with run_4bit(plan, output, force, command, resume, tokens=tokens, device=device) as run:
        return fill_4bit(plan, run, tokens=tokens, device=device, **how)


def run_4bit(
    plan: Plan4bit,
    output: Path,
    force: bool,
    command: tuple[str, ...],
    resume: Resume | None,
    *,
    tokens: Tokens | None = None,
    device: str = "cpu",
    metric: str | None = None,
    held_out: Tokens | None = None,
) -> AbstractContextManager[FolderRun]:
    """Lock the output, before anything is measured or written, and see what is finished of it.

    plan: the final one, or one whose budget is spent later by a `metric` that is measured on
    `tokens`. held_out: what is checked on in the end, if anything is; `device` is what a model is
    run on. Raises CannotCreate or OutputFailed if it cannot be written, and what Journal raises.
    """
    hashed = {"groups kept in 16 bits": sorted(plan.kept)}
    facts = {**asdict(plan.format), "type_of_what_stays": plan.dtype, "feedback": plan.feedback}
    if metric is not None:
        facts |= {"budget": str(plan.budget), "metric": metric}
    return folder_run(
        plan.checkpoint,
        output,
        force,
        command,
        resume,
        code=CODE,
        hashed=hashed,
        facts=facts,
        tokens=tokens,
        held_out=held_out,
        device=device,
        nbytes=plan.nbytes,
    )


def fill_4bit(
    plan: Plan4bit,
    run: FolderRun,
    *,
    tokens: Tokens | None = None,
    device: str = "cpu",
    base_model: str | None = None,
    progress: Callable[[int], None] = lambda n: None,
    check: Check | None = None,
) -> WrittenFolder:
    """Carry out the plan. The folder appears whole and verified, or not at all.

    tokens: of the calibration text, and `device` to run the model on, for a plan with feedback.
    base_model: the hub's name of the source, for the model card.
    Calls progress(weights written), or, with feedback, progress(1) after each layer; first of all
    with what an interrupted run had done.
    Raises BadInput for NaN weights, too few tokens or a source that changed; CannotCreate,
    OutputFailed or Stopped.
    """
    damped: dict[str, float] = {}

    def fill(folder: Path, sink: ShardedSink, there: list[dict]) -> None:
        write_config(plan, folder)  # first: it may find that no list of exceptions would do
        if plan.feedback:
            damped.update(_write_with_feedback(plan, run, sink, there, tokens, device, progress))
        else:
            write_weights(plan, run, sink, len(there), progress)

    def finish(folder: Path, files: list[WrittenFile]) -> tuple[WrittenFolder, dict]:
        check_written(plan, folder)
        results = check(plan, folder) if check else ()
        written = WrittenFolder(run.output, sum(file.nbytes for file in files), results, damped)
        _write_report(plan, folder, results)
        card = model_card(plan, written.nbytes, results, base_model, tokens)
        write_whole(folder / "README.md", card.encode())
        return written, _facts(plan, written, tokens)

    return write_folder(run, *_planned(plan), fill, finish)


CODE = (
    "formats", "sinks", "convert.py", "dynamic_4bit.py", "finite.py", "groups.py", "lora.py",
    "folder_run.py", "model_folder.py", "tensors.py", "write_4bit.py",
)  # fmt: skip
"""What makes bytes of a plan."""


# --- weights ----------------------------------------------------------------------------------


def _planned(plan: Plan4bit) -> tuple[list[tuple[str, str, tuple[int, ...]]], int]:
    """The tensors in the order in which they are written; how many of the source's need no pass."""
    if plan.feedback:
        from quant.write_with_feedback import planned_tensors

        return planned_tensors(plan), len(plan.stays)
    return [part for tensor in plan.tensors for part in _parts(plan, tensor)], len(plan.tensors)


def write_weights(
    plan: Plan4bit,
    run: FolderRun,
    sink: ShardedSink,
    n_done: int,
    progress: Callable[[int], None],
) -> None:
    """All tensors behind the first n, a few million weights a core in memory.

    Calls progress(weights written).
    """
    tensors, tick = plan.checkpoint.tensors, run.journal.tick
    progress(sum(tensors[t.name].n_weights for t in plan.tensors[:n_done]))
    with TensorReader() as reader, ThreadPoolExecutor(worker_count()) as pool:

        def ticking_map(step, *ranges):
            return ticking(pool.map(step, *ranges), tick)

        for tensor in plan.tensors[n_done:]:
            source = Source(tensors[tensor.name], reader, plan.dtype)
            if tensor.is_4bit:
                encoded = plan.format.encode_rows(
                    source.read_float32, tensor.shape, plan.dtype, map=ticking_map
                )
                parts = {part_name(tensor.name, suffix): p for suffix, p in encoded.items()}
            else:
                parts = {tensor.name: ticking(source.blocks(), tick)}
            run.write(sink, parts)
            progress(tensors[tensor.name].n_weights)


def _write_with_feedback(
    plan: Plan4bit,
    run: FolderRun,
    sink: ShardedSink,
    there: list[dict],
    tokens: Tokens,
    device: str,
    progress: Callable[[int], None],
) -> dict[str, float]:
    """What stays 16-bit first, then every 4-bit linear as it is made; unusual dampings."""
    # Only here: torch takes a second to import, and plain rounding needs none of it.
    from quant.algorithms.gptq import DAMP
    from quant.feedback_4bit import encode_with_feedback
    from quant.write_with_feedback import check_tokens, write_with_feedback

    def encode(module: str, W, H):
        parts, rounded = encode_with_feedback(plan.format, W, H, plan.dtype)
        return {part_name(f"{module}.weight", suffix): p for suffix, p in parts.items()}, rounded

    check_tokens(plan, tokens)
    damps = write_with_feedback(plan, run, sink, there, encode, tokens, device, progress)
    return {module: damp for module, damp in damps.items() if damp > DAMP}


def _parts(plan: Plan4bit, tensor: PlannedTensor) -> list[tuple[str, str, tuple[int, ...]]]:
    """The tensors that one becomes: (name, safetensors' dtype, shape)."""
    if tensor.is_4bit:
        return plan.parts(tensor.name.removesuffix(".weight"))
    return [(tensor.name, STORED[plan.dtype], tensor.shape)]


# --- everything else --------------------------------------------------------------------------


def quantization_config(plan: Plan4bit) -> dict:
    """What transformers and vLLM read; the fields and their order are bitsandbytes' own."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": plan.dtype,
        "bnb_4bit_quant_storage": "uint8",  # vLLM takes no other
        "bnb_4bit_quant_type": plan.format.quant_type,
        "bnb_4bit_use_double_quant": plan.format.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": plan.skip_list,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def write_config(plan: Plan4bit, folder: Path) -> None:
    """config.json of the source, with the quantization added if there is any."""
    any_4bit = any(t.is_4bit for t in plan.tensors)
    quantization = quantization_config(plan) if any_4bit else None
    write_model_config(plan.checkpoint, plan.dtype, quantization, folder)


def check_written(plan: Plan4bit, folder: Path) -> None:
    """Hold the list in config.json against the weights on the disk, as every loader would."""
    stored = [name for path in folder.glob("*.safetensors") for name in read_header(path)[0]]
    quantized = {name.removesuffix(".weight.absmax") for name in stored if name.endswith(".absmax")}
    linears = find_linears(plan.checkpoint.tensors.values())
    check_skip_list(plan.skip_list, linears, [name for name in linears if name not in quantized])


def _write_report(plan: Plan4bit, folder: Path, results: tuple[Result, ...]) -> None:
    """sensitivity.json, and the figures and the page in their own folder."""
    if plan.sensitivity is None:
        return
    write_sensitivity(folder / "sensitivity.json", plan.sensitivity)
    choice = replace(plan.choice, results=results)
    (folder / FIGURES).mkdir()
    for name, content in sensitivity_report(plan.sensitivity, choice).items():
        write_whole(folder / FIGURES / name, content)


def _facts(plan: Plan4bit, written: WrittenFolder, tokens: Tokens | None) -> dict:
    """What the manifest says about the choice and its outcome."""
    facts = {
        "type": f"{plan.format_name}, {len(plan.kept)} of {len(plan.groups)} groups 16-bit",
        "kept": sorted(plan.kept),
        "results": [asdict(result) for result in written.results],
    }
    if plan.feedback:
        from quant.measuring.measure import calibration_facts

        facts |= {"calibration": calibration_facts(tokens), "damped": written.damped}
    return facts
