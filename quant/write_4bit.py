"""Writes the folder of a planned 4-bit model: weights, config, tokenizer, report, card, manifest.

Without error feedback tensor by tensor, in the order of the checkpoint; with it, as the model
computes. It is filled under a temporary name and read back; it appears whole or not at all.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from quant.calibration.tokens import Tokens
from quant.convert import worker_count
from quant.durable import write_whole
from quant.dynamic_4bit import Plan4bit, PlannedTensor, part_name
from quant.groups import find_linears
from quant.model_card import model_card
from quant.model_folder import STORED, Source, check_room, write_folder, write_model_config
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


@dataclass
class Written4bit:
    """What was written."""

    folder: Path
    nbytes: int = 0  # of all weight files
    results: tuple[Result, ...] = ()
    damped: dict[str, float] = field(default_factory=dict)
    """With feedback: linears whose H was singular, and the damping that made it regular."""


def write_4bit(
    plan: Plan4bit,
    output: Path,
    *,
    tokens: Tokens | None = None,
    device: str = "cpu",
    force: bool = False,
    base_model: str | None = None,
    command: tuple[str, ...] = (),
    progress: Callable[[int], None] = lambda n: None,
    check: Check | None = None,
) -> Written4bit:
    """Carry out the plan. The folder appears whole and verified, or not at all.

    tokens: of the calibration text, and `device` to run the model on, for a plan with feedback.
    base_model: the hub's name of the source, for the model card.
    Calls progress(weights written), or, with feedback, progress(1) after each layer.
    Raises BadInput for NaN weights, too few tokens or a source that changed; CannotCreate or
    OutputFailed.
    """
    check_output(plan, output, force)
    written = Written4bit(output)

    def fill(folder: Path) -> list[WrittenFile]:
        write_config(plan, folder)  # first: it may find that no list of exceptions would do
        if plan.feedback:
            files = _write_with_feedback(plan, folder, tokens, device, written, progress)
        else:
            files = write_weights(plan, folder, progress)
        check_written(plan, folder)
        return files

    def finish(folder: Path, files: list[WrittenFile]) -> dict:
        written.nbytes = sum(file.nbytes for file in files)
        written.results = check(plan, folder) if check else ()
        _write_report(plan, folder, written.results)
        card = model_card(plan, written.nbytes, written.results, base_model, tokens)
        write_whole(folder / "README.md", card.encode())
        return _facts(plan, written, tokens)

    write_folder(plan.checkpoint, output, force, command, fill, finish)
    return written


def check_output(plan: Plan4bit, output: Path, force: bool) -> None:
    """Raise CannotCreate or OutputFailed if what is planned cannot be written there."""
    check_room(output, plan.nbytes, force)


# --- weights ----------------------------------------------------------------------------------


def write_weights(
    plan: Plan4bit, folder: Path, progress: Callable[[int], None]
) -> list[WrittenFile]:
    """All tensors, a few million weights a core in memory. Calls progress(weights written)."""
    tensors = plan.checkpoint.tensors
    sink = ShardedSink(folder, [part for t in plan.tensors for part in _parts(plan, t)])
    try:
        with TensorReader() as reader, ThreadPoolExecutor(worker_count()) as pool:
            for tensor in plan.tensors:
                source = Source(tensors[tensor.name], reader, plan.dtype)
                if tensor.is_4bit:
                    encoded = plan.format.encode_rows(
                        source.read_float32, tensor.shape, plan.dtype, map=pool.map
                    )
                    for suffix, part in encoded.items():
                        sink.write(part_name(tensor.name, suffix), part)
                else:
                    sink.write(tensor.name, source.blocks())
                progress(tensors[tensor.name].n_weights)
        return sink.finish()
    finally:
        sink.discard()


def _write_with_feedback(
    plan: Plan4bit,
    folder: Path,
    tokens: Tokens,
    device: str,
    written: Written4bit,
    progress: Callable[[int], None],
) -> list[WrittenFile]:
    """What stays 16-bit first, then every 4-bit linear as it is made."""
    # Only here: torch takes a second to import, and plain rounding needs none of it.
    from quant.algorithms.gptq import DAMP
    from quant.feedback_4bit import encode_with_feedback
    from quant.write_with_feedback import check_tokens, write_with_feedback

    def encode(module: str, W, H):
        parts, rounded = encode_with_feedback(plan.format, W, H, plan.dtype)
        return {part_name(f"{module}.weight", suffix): p for suffix, p in parts.items()}, rounded

    check_tokens(plan, tokens)
    files, damps = write_with_feedback(plan, encode, tokens, folder, device, progress)
    written.damped = {module: damp for module, damp in damps.items() if damp > DAMP}
    return files


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


def _facts(plan: Plan4bit, written: Written4bit, tokens: Tokens | None) -> dict:
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
