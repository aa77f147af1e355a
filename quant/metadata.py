"""The metadata of a GGUF file: what the model is, its sizes, its settings, its vocabulary."""

import re

from quant import __version__
from quant.checkpoint import Checkpoint
from quant.gguf_file import Metadata, Value
from quant.mixtures import Mixture

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)
_CARD_KEYS = {"license": "general.license", "license_name": "general.license.name",
              "license_link": "general.license.link"}  # fmt: skip
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


def size_label(n_weights: int) -> str:
    """A model's size as people write it: 32763876352 -> "33B", 6820000 -> "6.8M"."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n_weights >= 0.9995 * scale or unit == "K":
            return f"{n_weights / scale:.{1 if n_weights < 9.95 * scale else 0}f}{unit}"
    raise AssertionError("unreachable")


def general_metadata(
    checkpoint: Checkpoint, gguf_name: str, mixture: Mixture, name: str, n_weights: int
) -> Metadata:
    """The general.* keys: architecture, name, size, licence, source, file type."""
    metadata = {
        "general.architecture": Value("str", gguf_name),
        "general.type": Value("str", "model"),
        "general.name": Value("str", name),
        "general.size_label": Value("str", size_label(n_weights)),
        "general.quantized_by": Value("str", f"qwq-quant {__version__}"),
        **_card_metadata(checkpoint),
    }
    if checkpoint.revision is not None:
        metadata["general.source.huggingface.repository"] = Value("str", checkpoint.name)
        url = f"https://huggingface.co/{checkpoint.name}"
        metadata["general.source.repo_url"] = Value("str", url)
    metadata["general.quantization_version"] = Value("u32", QUANTIZATION_VERSION)
    metadata["general.file_type"] = Value("u32", mixture.file_type)
    return metadata


def _card_metadata(checkpoint: Checkpoint) -> Metadata:
    """The licence, from the YAML front matter of README.md."""
    text = (checkpoint.read_bytes("README.md") or b"").decode("utf-8", "replace")
    card = _FRONT_MATTER.match(text)
    if card is None:
        return {}
    found = {}
    for line in card.group(1).splitlines():
        key, colon, value = line.partition(":")
        if colon and key in _CARD_KEYS and value.strip():
            found[_CARD_KEYS[key]] = Value("str", value.strip().strip("'\""))
    return found
