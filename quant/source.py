"""MODEL, as the user typed it, opened: a checkpoint folder, a repository on the hub, or a GGUF."""

from collections.abc import Callable
from pathlib import Path

from quant.architectures import check_weights
from quant.checkpoint import Checkpoint, read_config
from quant.display import printable
from quant.errors import BadInput, UsageError
from quant.gguf_file import GgufFile, open_gguf
from quant.hub import resolve
from quant.lora import merge_adapter, open_adapter
from quant.manifest import SourceFile

Source = Checkpoint | GgufFile


def open_source(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    offline: bool = False,
    lora: str | None = None,
    check_config: Callable[[dict], object] = lambda config: None,
) -> Source:
    """Find and open MODEL; headers only. Raises one of quant.errors.

    lora: an adapter to merge into the weights, a folder or org/name@revision; looked at first, as
    it is small. check_config: called with config.json before the weights of a hub model are
    downloaded.
    """
    access = {"token": token, "cache_dir": cache_dir, "offline": offline}
    adapter = None if lora is None else open_adapter(lora, **access)
    found = resolve(
        model,
        revision=revision,
        before_weights=lambda folder: check_config(read_config(folder)),
        **access,
    )
    if found.path.is_dir():
        checkpoint = Checkpoint.open(found.path, found.name, found.revision)
        return checkpoint if adapter is None else merge_adapter(checkpoint, adapter)
    if adapter is not None:
        raise UsageError(
            f"--lora cannot be merged into {printable(found.path)}, a GGUF file.",
            "Its weights may be quantized already, and bear llama.cpp's names.",
            "Give the checkpoint that it was made from.",
        )
    return open_gguf(found.path)


def open_checkpoint(model: str, **options) -> Checkpoint:
    """MODEL, for commands that run it: a folder or a repository. Options as for open_source.

    Its tensors are those that its config.json calls for, in shape and type.
    Raises UsageError for a GGUF file, and as open_source does.
    """
    source = open_source(model, **options)
    if isinstance(source, GgufFile):
        raise UsageError(
            f"{printable(source.path)} is a GGUF file; this needs the checkpoint it came from.",
            "Its layers are run with transformers, which reads safetensors.",
            "Give the model's folder, or org/name on the hub.",
        )
    check_weights(source)
    return source


def source_files(source: Source) -> list[Path]:
    """Every file that its weights come from, sorted; those of a merged adapter too."""
    return sorted(frozenset().union(*(info.files for info in source.tensors.values())))


def check_unchanged(source: Source, before: list[SourceFile]) -> None:
    """Raise BadInput if a file of the source is not what it was when `before` was taken."""
    after = [SourceFile.of(path) for path in source_files(source)]
    changed = [old.name for old, new in zip(before, after, strict=True) if old != new]
    if changed:
        raise BadInput(
            f"{printable(', '.join(changed))} changed while it was being read.",
            "The output would mix two versions of the model, so it was not kept.",
            "Run the command again when the download or the training has ended.",
        )
