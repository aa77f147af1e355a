"""What every folder of a quantized model has, whatever its format: the weights of the source in 16
bits, its tokenizer and other small files, config.json, a manifest with all hashes.

How it is filled, by as many runs as it takes, is quant.folder_run's.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from quant import manifest
from quant.checkpoint import CONFIG, INDEX, Checkpoint
from quant.convert import WEIGHTS_AT_ONCE
from quant.display import human_bytes, printable
from quant.durable import (
    check_replaceable_folder,
    own_leftovers,
    translated_errors,
    write_whole,
)
from quant.errors import BadInput, OutputFailed
from quant.finite import count_nonfinite
from quant.fix import MendedCheckpoint
from quant.formats import FORMATS, Float16Overflow
from quant.sinks.written import WrittenFile
from quant.tensors import TensorInfo, TensorReader, to_float32

STORED = {"bfloat16": "BF16", "float16": "F16"}

OTHER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "*.tiktoken")
"""Small files of a model folder that go along: tokenizer, templates, settings, licences."""

NOT_COPIED = {CONFIG, INDEX, manifest.NAME, "sensitivity.json", "quantize_config.json"}
"""What is made anew, or is of no use with other weights."""


def check_room(output: Path, nbytes: int, force: bool) -> None:
    """Raise CannotCreate or OutputFailed if a folder of `nbytes` cannot be written there."""
    check_replaceable_folder(output, force)
    with translated_errors(output):
        status = os.statvfs(Path(os.path.abspath(output)).parent)
    free = status.f_bavail * status.f_frsize + own_leftovers(output)
    if nbytes > free:
        raise OutputFailed(
            f"The output needs {human_bytes(nbytes)}, but only {human_bytes(free)} are free "
            f"where {printable(output)} would be.",
            "Nothing was written.",
            "Free some space, or choose another folder with -o.",
        )


# --- weights ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
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
    if isinstance(checkpoint, MendedCheckpoint):
        names |= checkpoint.contents.keys()  # a mend may add a file
    for name in sorted(names - NOT_COPIED):
        if not (folder / name).exists() and (content := checkpoint.read_bytes(name)) is not None:
            write_whole(folder / name, content)


def write_model_config(
    checkpoint: Checkpoint, dtype: str, quantization: dict | None, folder: Path
) -> None:
    """config.json of the source with the quantization added; the type under both its names."""
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    config |= {"dtype": dtype, "torch_dtype": dtype}  # transformers 5 reads one, 4 both
    if quantization is not None:
        config["quantization_config"] = quantization
    write_json(folder / CONFIG, config)


def write_json(path: Path, content: dict) -> None:
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def write_manifest(
    checkpoint: Checkpoint,
    folder: Path,
    sources: list[manifest.SourceFile],
    files: list[WrittenFile],
    facts: dict,
    command: tuple[str, ...],
) -> None:
    tensors = {t.entry.name: t for file in files for t in file.tensors}
    entry = {
        "command": list(command),
        "source": {
            "model": checkpoint.name,
            "revision": checkpoint.revision,
            "files": [asdict(file) for file in sources],
        },
        **facts,
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
