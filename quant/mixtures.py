"""Which format each tensor of a GGUF file gets, for every name `--type` understands.

A mixture is a default format and llama.cpp's exceptions to it. The rules are data about names and
shapes: no weights are read. K- and I-quants will bring llama.cpp's per-layer exceptions here.

# ref: llama_tensor_get_type and tensor_allows_quantization in llama.cpp's src/llama-quant.cpp
"""

from dataclasses import dataclass

from quant.assembly import Assembly
from quant.formats import FORMATS
from quant.plan import Assignment

KEPT_F32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
"""Routers: tiny, and a wrong choice of expert costs more than any rounding."""


@dataclass(frozen=True)
class Mixture:
    """A file type of llama.cpp: its name, the number in general.file_type, its default format."""

    name: str
    file_type: int  # enum llama_ftype
    default: str  # a key of FORMATS


MIXTURES = {
    m.name: m
    for m in (
        Mixture("F32", 0, "F32"),
        Mixture("F16", 1, "F16"),
        Mixture("BF16", 32, "BF16"),
        Mixture("Q8_0", 7, "Q8_0"),
        Mixture("Q4_0", 2, "Q4_0"),
        Mixture("Q4_1", 3, "Q4_1"),
        Mixture("Q5_0", 8, "Q5_0"),
        Mixture("Q5_1", 9, "Q5_1"),
    )
}


def assign_formats(tensors: list[Assembly], mixture: Mixture) -> list[Assignment]:
    """Each tensor's format and the rule that chose it."""
    return [_assign(tensor, mixture) for tensor in tensors]


def _assign(tensor: Assembly, mixture: Mixture) -> Assignment:
    default = FORMATS[mixture.default]
    if len(tensor.shape) < 2:
        return Assignment(tensor, FORMATS["F32"], "vectors stay exact")
    if tensor.name.endswith(KEPT_F32):
        return Assignment(tensor, FORMATS["F32"], "routers stay exact")
    if tensor.n_columns % default.block_size:
        rule = f"rows of {tensor.n_columns} do not fill blocks of {default.block_size}"
        return Assignment(tensor, FORMATS["F16"], rule)
    if tensor.name == "output.weight" and default.block_size > 1 and mixture.name != "Q8_0":
        return Assignment(tensor, FORMATS["Q8_0"], "the output layer keeps 8 bits")
    return Assignment(tensor, default, f"{mixture.name} default")
