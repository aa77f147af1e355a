"""The linears that engines fuse into one matrix: qkv, o, gate_up, down of each decoder layer.

vLLM multiplies q, k and v as one matrix, and gate and up as one. Such a matrix is 4-bit or 16-bit
as a whole, so the group is the smallest thing that can be kept exact. Names and shapes are enough
to find the groups; no weights are read.

Experts and routers are in no group and keep their 16 bits: transformers 5 holds experts as one
3-d parameter, which bitsandbytes does not convert. `find_experts` tells whether there were any.

# ref: packed_modules_mapping of Qwen2ForCausalLM and others in vLLM
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from quant.tensors import TensorInfo

Named = TensorInfo | tuple[str, tuple[int, ...]]
"""A tensor's name and shape, however they are known."""


@dataclass(frozen=True)
class Kind:
    """One fused matrix of a decoder layer: what it is made of, and where it stands."""

    name: str
    parent: str  # the module in the layer that holds it
    members: tuple[str, ...]  # Hugging Face's linears, in the order in which vLLM stacks them
    fused: str  # vLLM's name; models such as Phi-3 store it under this name themselves


KINDS = (
    Kind("qkv", "self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    Kind("o", "self_attn", ("o_proj",), "o_proj"),
    Kind("gate_up", "mlp", ("gate_proj", "up_proj"), "gate_up_proj"),
    Kind("down", "mlp", ("down_proj",), "down_proj"),
)
"""Another architecture's fused matrix is one more entry."""

_LAYER = re.compile(r"(?:(?:model|language_model)\.)+layers\.([0-9]{1,6})\.")
"""A decoder layer of a language model; encoders of images and sound have other names before it."""

_EXPERT = re.compile(r"\.mlp\.(experts|shared_experts?|shared_expert_gate|gate)\.")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_positions|position_embedding|wte|wpe)$")


@dataclass(frozen=True)
class Group:
    """Linears that are quantized together or not at all."""

    name: str  # vLLM's, such as "model.layers.3.self_attn.qkv_proj"
    kind: str  # a name of KINDS
    layer: int
    modules: tuple[str, ...]  # full dotted names of its linears


def find_groups(tensors: Iterable[Named]) -> list[Group]:
    """The groups of every decoder layer, in layer order, within a layer in the order of KINDS."""
    modules = dict.fromkeys(_matrices(tensors))  # an ordered set
    layers = {m[0]: int(m[1]) for m in map(_LAYER.match, modules) if m}
    groups = []
    for prefix, layer in sorted(layers.items(), key=lambda item: item[1]):
        for kind in KINDS:
            fused = f"{prefix}{kind.parent}.{kind.fused}"
            names = dict.fromkeys(
                [f"{prefix}{kind.parent}.{member}" for member in kind.members] + [fused]
            )
            if present := tuple(name for name in names if name in modules):
                groups.append(Group(fused, kind.name, layer, present))
    return groups


def find_experts(tensors: Iterable[Named]) -> list[str]:
    """The names of all tensors of experts, shared experts and routers; none in a dense model."""
    return [name for name, _ in map(_name_and_shape, tensors) if _EXPERT.search(name)]


def find_linears(tensors: Iterable[Named]) -> list[str]:
    """Every module that a loader might hold as a linear layer: all matrices but embeddings.

    A few that are none (a table of positions) do no harm: in a skip list they match nothing.
    """
    return [name for name in _matrices(tensors) if not _EMBEDDING.search(name)]


def _matrices(tensors: Iterable[Named]) -> list[str]:
    """The modules that own a 2-d `weight`."""
    return [
        name.removesuffix(".weight")
        for name, shape in map(_name_and_shape, tensors)
        if name.endswith(".weight") and len(shape) == 2
    ]


def _name_and_shape(tensor: Named) -> tuple[str, tuple[int, ...]]:
    return (tensor.name, tensor.shape) if isinstance(tensor, TensorInfo) else tensor
