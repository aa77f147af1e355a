"""Writes the folder of a planned 4-bit model: weights, config, tokenizer, report, card, manifest.

It is filled under a temporary name and read back; it appears whole or not at all.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from quant import manifest
from quant.checkpoint import CONFIG, INDEX, Checkpoint
from quant.convert import WEIGHTS_AT_ONCE, worker_count
from quant.display import printable
from quant.durable import PendingFolder, write_whole
from quant.dynamic_4bit import Plan4bit, PlannedTensor
from quant.errors import BadInput
from quant.finite import count_nonfinite
from quant.formats import FORMATS, Float16Overflow
from quant.groups import find_linears
from quant.model_card import model_card
from quant.report.choice import Result
from quant.report.sensitivity_report import sensitivity_report
from quant.safetensors_file import read_header
from quant.sensitivity import write_sensitivity
from quant.sinks.safetensors import ShardedSink
from quant.sinks.written import WrittenFile
from quant.skip_list import check_skip_list
from quant.source import check_unchanged, source_files
from quant.tensors import TensorInfo, TensorReader, to_float32

STORED = {"bfloat16": "BF16", "float16": "F16"}
FIGURES = "figures"

OTHER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "*.tiktoken")
"""Small files of a model folder that go along: tokenizer, templates, settings, licences."""

MAX_OTHER_NBYTES = 200_000_000

Check = Callable[[Path], tuple[Result, ...]]
"""Measures the written folder, before it gets its name."""


@dataclass(frozen=True)
class Written4bit:
    """What was written."""

    folder: Path
    nbytes: int  # of all weight files
    results: tuple[Result, ...] = ()


def write_4bit(
    plan: Plan4bit,
    output: Path,
    *,
    force: bool = False,
    base_model: str | None = None,
    command: tuple[str, ...] = (),
    progress: Callable[[int], None] = lambda n_weights: None,
    check: Check | None = None,
) -> Written4bit:
    """Carry out the plan. The folder appears whole and verified, or not at all.

    base_model: the hub's name of the source, for the model card.
    Raises BadInput for NaN weights or a source that changed, CannotCreate or OutputFailed.
    """
    checkpoint = plan.checkpoint
    before = [manifest.SourceFile.of(path) for path in source_files(checkpoint)]
    pending = PendingFolder(output, force)
    folder = pending.temporary
    try:
        files = write_weights(plan, folder, progress)
        copy_other_files(checkpoint, folder)
        write_config(plan, folder)
        check_written(plan, folder)
        check_unchanged(checkpoint, before)
        results = check(folder) if check else ()
        _write_report(plan, folder, results)
        card = model_card(plan, sum(file.nbytes for file in files), results, base_model)
        write_whole(folder / "README.md", card.encode())
        _write_manifest(plan, folder, before, files, results, command)
        pending.publish()
    finally:
        pending.discard()
    return Written4bit(output, sum(file.nbytes for file in files), results)


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
                source = _Source(tensors[tensor.name], reader, plan.dtype)
                if tensor.is_4bit:
                    encoded = plan.format.encode_rows(
                        source.read_float32, tensor.shape, plan.dtype, map=pool.map
                    )
                    for suffix, part in encoded.items():
                        sink.write(_part_name(tensor.name, suffix), part)
                else:
                    sink.write(tensor.name, source.blocks())
                progress(tensors[tensor.name].n_weights)
        return sink.finish()
    finally:
        sink.discard()


def _part_name(tensor: str, suffix: str) -> str:
    return f"{tensor}.{suffix}" if suffix else tensor


def _parts(plan: Plan4bit, tensor: PlannedTensor) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """The tensors that one becomes: (name, dtype, shape); JSON is at most so long."""
    if not tensor.is_4bit:
        yield tensor.name, STORED[plan.dtype], tensor.shape
        return
    for suffix, (dtype, shape) in plan.format.parts(tensor.shape).items():
        yield _part_name(tensor.name, suffix), dtype, shape


@dataclass(frozen=True)
class _Source:
    """A stored tensor, read as the output's 16-bit type: what quantizing on load would see."""

    info: TensorInfo
    reader: TensorReader
    dtype: str

    def read_float32(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), finite. Raises BadInput."""
        return to_float32(self.read_16bit(start, stop), STORED[self.dtype])

    def read_16bit(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop): bfloat16 as its bits in uint16, or float16. Raises BadInput."""
        stored = STORED[self.dtype]
        if self.info.dtype == stored:
            rows = self.reader.read_stored(self.info, start, stop)
        else:
            w = self.reader.read_float32(self.info, start, stop)
            try:
                rows = FORMATS[stored].encode(w)[""].view(np.uint16).reshape(w.shape)
            except Float16Overflow:
                raise BadInput(
                    f"{printable(self.info.name)} has weights that float16 cannot hold.",
                    'They are beyond 65504, but config.json says "float16".',
                    'Set "dtype": "bfloat16" in a copy of the model\'s config.json.',
                ) from None
            rows = rows.view(np.float16) if stored == "F16" else rows
        if n_bad := count_nonfinite(rows, stored):
            raise BadInput(
                f"{printable(self.info.name)} has {n_bad} NaN or infinite weights, the first in "
                f"rows {start} to {stop - 1}.",
                "A model with such weights gives NaN for every text.",
                "Download the checkpoint again, or ask its maker.",
            )
        return rows

    def blocks(self) -> Iterator[np.ndarray]:
        """The whole tensor, a few rows at a time."""
        n_rows = max(1, 4 * WEIGHTS_AT_ONCE // self.info.n_columns)
        for start in range(0, self.info.n_rows, n_rows):
            yield self.read_16bit(start, min(start + n_rows, self.info.n_rows))


# --- everything else --------------------------------------------------------------------------


def copy_other_files(checkpoint: Checkpoint, folder: Path) -> None:
    """The tokenizer and whatever else is small; not the weights, their index or the card."""
    names = {p.name for pattern in OTHER_FILES for p in checkpoint.folder.glob(pattern)}
    for name in sorted(names - {CONFIG, INDEX, manifest.NAME, "sensitivity.json"}):
        if (content := checkpoint.read_bytes(name)) is not None:
            write_whole(folder / name, content)


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
    """config.json of the source with the quantization added; the type under both its names."""
    config = {k: v for k, v in plan.checkpoint.config.items() if k != "quantization_config"}
    config |= {"dtype": plan.dtype, "torch_dtype": plan.dtype}  # transformers 5 reads one, 4 both
    if any(t.is_4bit for t in plan.tensors):
        config["quantization_config"] = quantization_config(plan)
    write_whole(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


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


def _write_manifest(
    plan: Plan4bit,
    folder: Path,
    sources: list[manifest.SourceFile],
    files: list[WrittenFile],
    results: tuple[Result, ...],
    command: tuple[str, ...],
) -> None:
    tensors = {t.entry.name: t for file in files for t in file.tensors}
    entry = {
        "command": list(command),
        "source": {
            "model": plan.checkpoint.name,
            "revision": plan.checkpoint.revision,
            "files": [asdict(file) for file in sources],
        },
        "type": f"{plan.format.quant_type}, {len(plan.kept)} of {len(plan.groups)} groups 16-bit",
        "kept": sorted(plan.kept),
        "results": [asdict(result) for result in results],
        "files": list(_hashed(folder, {file.path.name: file for file in files})),
        "tensors": {
            name: {"type": t.entry.type, "xxh3_128": t.xxh3_128} for name, t in tensors.items()
        },
        **manifest.environment(),
    }
    manifest.write_for_folder(folder, entry)


def _hashed(folder: Path, weights: dict[str, WrittenFile]) -> Iterator[dict]:
    """Every file with its sha256; that of the weights is known already."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in weights:
            yield {"name": name, "nbytes": weights[name].nbytes, "sha256": weights[name].sha256}
        else:
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            yield {"name": name, "nbytes": len(content), "sha256": digest}
