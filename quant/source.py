"""MODEL, as the user typed it, opened: a checkpoint folder, a repository on the hub, or a GGUF."""

from collections.abc import Callable
from pathlib import Path

from quant.checkpoint import Checkpoint, read_config
from quant.gguf_file import GgufFile, open_gguf
from quant.hub import resolve

Source = Checkpoint | GgufFile


def open_source(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    offline: bool = False,
    check_config: Callable[[dict], object] = lambda config: None,
) -> Source:
    """Find and open MODEL; headers only. Raises one of quant.errors.

    check_config: called with config.json before the weights of a hub model are downloaded.
    """
    found = resolve(
        model,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        offline=offline,
        before_weights=lambda folder: check_config(read_config(folder)),
    )
    if found.path.is_dir():
        return Checkpoint.open(found.path, found.name, found.revision)
    return open_gguf(found.path)


def source_files(source: Source) -> list[Path]:
    """Every file that holds weights of the source, sorted."""
    return sorted({info.path for info in source.tensors.values()})
