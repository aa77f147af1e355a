"""Models in which one group of linears is hard to quantize, though they compute what they did.

Between two linears a channel may be made smaller in one and larger in the other by the same factor,
here a power of two, so that not a bit of the result changes. One large column in each block of 64
weights leaves the other 63 only the lowest of NF4's levels.
"""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

BLOCK = 64
FACTOR = 32

_BEFORE = {  # what is scaled down by channel (rows, or elements of a vector)
    "qkv": ("input_layernorm.weight",),
    "o": ("self_attn.v_proj.weight", "self_attn.v_proj.bias"),
    "gate_up": ("post_attention_layernorm.weight",),
    "down": ("mlp.up_proj.weight",),
}
_AFTER = {  # what is scaled up by column
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
FUSED = {
    "qkv": "self_attn.qkv_proj",
    "o": "self_attn.o_proj",
    "gate_up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
}


def plant(source: Path, folder: Path, kind: str, layer: int, factor: int = FACTOR) -> str:
    """Copy the model in `source` to `folder` with a hard group planted; returns its name.

    source: one safetensors file, bfloat16, whose head size is BLOCK (each kv head's channels then
    become the same columns of o_proj in every query head); may be `folder` itself.
    """
    if source != folder:
        shutil.copytree(source, folder)
    w = load_file(folder / "model.safetensors")
    prefix = f"model.layers.{layer}."
    for name in _BEFORE[kind]:
        w[prefix + name][BLOCK // 2 :: BLOCK] /= factor
    for name in _AFTER[kind]:
        w[f"{prefix}{name}.weight"][:, BLOCK // 2 :: BLOCK] *= factor
    save_file(w, folder / "model.safetensors", metadata={"format": "pt"})
    return prefix + FUSED[kind]
