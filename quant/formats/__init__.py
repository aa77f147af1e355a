"""Storage formats: float32 rows to bytes and back. No files, no models, numpy in and numpy out.

`FORMATS` is the table of everything `--type` can name inside a GGUF file. A family of formats
lives in one file of this folder; a new format is one `Format` entry in its family's own table.
"""

from quant.formats.dense import DENSE
from quant.formats.format import Float16Overflow, Format
from quant.formats.i_quants import I_QUANTS
from quant.formats.k_quants import K_QUANTS
from quant.formats.legacy_quants import LEGACY_QUANTS
from quant.formats.ternary import TERNARY

FAMILIES = (DENSE, LEGACY_QUANTS, K_QUANTS, I_QUANTS, TERNARY)

FORMATS: dict[str, Format] = {f.name: f for family in FAMILIES for f in family}

__all__ = ["FORMATS", "Float16Overflow", "Format"]
