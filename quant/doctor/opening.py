"""MODEL opened to be looked at, not converted: quantized folders too, weights only where needed."""

from dataclasses import replace
from pathlib import Path

from quant.checkpoint import CONFIG, Checkpoint, read_tensors
from quant.display import printable
from quant.errors import BadInput, InputMissing
from quant.gguf_file import open_gguf
from quant.hub import Resolved, resolve
from quant.source import Source


def open_to_examine(model: str, **where) -> Source:
    """MODEL with the headers of its shards. where: options of quant.hub.resolve.

    Raises one of quant.errors.
    """
    found = resolve(model, **where)
    if not found.path.is_dir():
        return open_gguf(found.path)
    return open_folder(found.path, found.name, found.revision)


def open_folder(path: Path, name: str, revision: str | None = None) -> Checkpoint:
    """A checkpoint as Checkpoint.open checks it; one that is quantized as its shards hold it.

    Raises InputMissing or BadInput.
    """
    folder = read_small_files(path, name, revision)
    stored = read_tensors(path)
    try:
        return Checkpoint.open(path, name, revision)
    except BadInput:
        if not is_quantized(folder) and not any(t.endswith(".qweight") for t in stored):
            raise
    return replace(folder, tensors=stored)


def open_to_run(model: str, **where) -> Source:
    """MODEL's small files; the weights of one on the hub are not downloaded.

    Raises one of quant.errors.
    """
    try:
        return open_small(resolve(model, before_weights=_enough, **where))
    except _Enough as enough:
        repository, revision = enough.folder.parents[1].name, enough.folder.name
        name = repository.removeprefix("models--").replace("--", "/", 1)
        return read_small_files(enough.folder, name, revision)


class _Enough(Exception):
    """The small files are there: told from inside resolve, to end it before the weights."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder


def _enough(folder: Path) -> None:
    raise _Enough(folder)


def open_small(found: Resolved) -> Source:
    """A GGUF file, or a folder's small files without its tensors. Raises InputMissing, BadInput."""
    if not found.path.is_dir():
        return open_gguf(found.path)
    return read_small_files(found.path, found.name, found.revision)


def read_small_files(path: Path, name: str, revision: str | None) -> Checkpoint:
    folder = Checkpoint(path, name, revision, {}, {})
    config = folder.read_json(CONFIG)
    if config is None:
        raise InputMissing(
            f"{printable(path)} holds no {CONFIG}, so it is no model.",
            next_step="Give the folder that holds config.json, or a .gguf file.",
        )
    return replace(folder, config=config)


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether config.json says so, in one of the places that programs write it to."""
    places = ("quantization_config", "compression_config", "quantization")
    return any(checkpoint.config.get(place) for place in places)
