"""Models for the evaluation tests, as users make them."""

from pathlib import Path

from quant.source import open_source
from quant.to_gguf import Wishes, plan_gguf
from quant.write_gguf import write_gguf


def to_gguf(folder: Path, type_name: str, output: Path) -> Path:
    """`folder` as a GGUF file of that type."""
    write_gguf(plan_gguf(open_source(str(folder)), Wishes(type_name)), output)
    return output
