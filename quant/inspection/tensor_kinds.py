"""The tensors of a model by their task: "attention q", "mlp down", and what they add up to.

Hugging Face's names and GGUF's are folded over layers and experts to the same few kinds, so that
300 tensors become twelve rows, and the rows of two containers can be compared.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from quant.architectures import ARCHITECTURES, EXPERT_PARTS, NOT_WEIGHTS
from quant.display import human_bytes
from quant.inspection.facts import Fact, Section, human_count, is_count
from quant.tensors import TensorInfo

KINDS = {
    "token_embd": "embedding",
    "attn_q": "attention q",
    "attn_k": "attention k",
    "attn_v": "attention v",
    "attn_qkv": "attention qkv",
    "attn_output": "attention o",
    "ffn_gate": "mlp gate",
    "ffn_up": "mlp up",
    "ffn_down": "mlp down",
    "ffn_gate_inp": "router",
    "ffn_gate_exps": "experts gate",
    "ffn_up_exps": "experts up",
    "ffn_gate_up_exps": "experts gate + up",
    "ffn_down_exps": "experts down",
    "ffn_gate_inp_shexp": "shared expert router",
    "ffn_gate_shexp": "shared expert gate",
    "ffn_up_shexp": "shared expert up",
    "ffn_down_shexp": "shared expert down",
    "bias": "biases",
    "norm": "norms",
    "output": "output",
    "rope_freqs": "rope factors",
    "buffer": "buffers",
}
"""GGUF's names of tensors, and ours, in the order of printing."""

NOT_PARAMETERS = ("rope factors", "buffers")
"""Kinds of tensors that were not trained: computed from config.json, here or by old releases."""

_OUTER = {
    "model.embed_tokens.weight": "token_embd",
    "model.norm.weight": "output_norm",
    "lm_head.weight": "output",
}
_IN_LAYER = {
    **dict(chain.from_iterable({**a.layer, **a.optional}.items() for a in ARCHITECTURES)),
    **{f"mlp.experts.*.{part}.weight": name for part, name in EXPERT_PARTS.items()},
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
"""Hugging Face's names in a layer -> GGUF's, as quant.architectures knows them."""

_LANGUAGE_MODEL = re.compile(r"^(model\.)?language_model\.(model\.)?")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class TensorKind:
    """Tensors with one task, folded over layers and experts: "attention q", "mlp down"."""

    name: str  # untrusted where the name of a tensor was not understood
    n_tensors: int
    shapes: tuple[tuple[int, ...], ...]  # each once, largest first; of experts the shape of one
    types: dict[str, int]  # type -> weights stored in it, most first
    nbytes: int

    @property
    def n_weights(self) -> int:
        return sum(self.types.values())

    def as_json(self) -> dict:
        return {
            "kind": self.name,
            "n_tensors": self.n_tensors,
            "shapes": [list(shape) for shape in self.shapes],
            "n_weights": self.n_weights,
            "nbytes": self.nbytes,
            "types": self.types,
        }


def kind_of(name: str) -> str:
    """The task of a tensor by its name, Hugging Face's or GGUF's; else the name without numbers.

    "model.layers.7.self_attn.q_proj.weight" and "blk.7.attn_q.weight" -> "attention q".
    """
    if name.endswith(NOT_WEIGHTS):
        return KINDS["buffer"]
    folded = _NUMBER.sub("*", name)
    inner = _LANGUAGE_MODEL.sub("model.", folded)
    inner = _OUTER.get(inner, inner)
    inner = _IN_LAYER.get(inner.removeprefix("model.layers.*."), inner)
    stem = inner.removeprefix("blk.*.").removesuffix(".weight")
    if stem.endswith(".bias"):
        return KINDS["bias"]
    if stem not in KINDS and "norm" in stem.rpartition(".")[2]:
        return KINDS["norm"]
    return KINDS.get(stem, folded.removesuffix(".weight"))


def fold_tensors(infos: Iterable[TensorInfo]) -> tuple[TensorKind, ...]:
    """The tensors by kind: known kinds in the order of KINDS, then the others as they come."""
    groups: dict[str, list[TensorInfo]] = {kind: [] for kind in KINDS.values()}
    for info in infos:
        groups.setdefault(kind_of(info.name), []).append(info)
    return tuple(_fold(kind, group) for kind, group in groups.items() if group)


def _fold(kind: str, group: list[TensorInfo]) -> TensorKind:
    types: dict[str, int] = {}
    for info in group:
        types[info.dtype] = types.get(info.dtype, 0) + info.n_weights
    return TensorKind(
        kind,
        len(group),
        tuple(sorted({_shape_of_one(kind, info.shape) for info in group}, reverse=True)),
        dict(sorted(types.items(), key=lambda item: -item[1])),
        sum(info.nbytes + (info.scale.nbytes if info.scale else 0) for info in group),
    )


def _shape_of_one(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without what the containers do differently: experts stacked, a row of one."""
    if kind == "shared expert router":
        return shape[-1:]
    return shape[-2:] if kind.startswith("experts ") else shape


def vocabulary_rows(infos: Iterable[TensorInfo]) -> int | None:
    """Rows of the token embedding; None if no tensor is known to be it."""
    return next((i.shape[0] for i in infos if kind_of(i.name) == "embedding" and i.shape), None)


def has_no_head(kinds: Iterable[TensorKind]) -> bool:
    """Whether the output layer is missing, as it is where the embedding does its work."""
    return all(kind.name != "output" for kind in kinds)


def weights_section(kinds: Iterable[TensorKind], sizes: Mapping[str, object]) -> Section:
    """Parameters, bytes and types of all that was trained; `sizes` says how many experts work."""
    kinds = [kind for kind in kinds if kind.name not in NOT_PARAMETERS]
    n_weights, nbytes = sum(k.n_weights for k in kinds), sum(k.nbytes for k in kinds)
    bits = round(8 * nbytes / n_weights, 4) if n_weights else None
    types: dict[str, int] = {}
    for kind in kinds:
        for name, n in kind.types.items():
            types[name] = types.get(name, 0) + n
    types = dict(sorted(types.items(), key=lambda item: -item[1]))
    facts = [Fact("parameters", n_weights, f"{human_count(n_weights)} ({n_weights:,})")]
    total, used = sizes["experts"], sizes["experts_used"]
    if is_count(total) and is_count(used):
        in_experts = sum(kind.n_weights for kind in kinds if kind.name.startswith("experts "))
        active = n_weights - in_experts + in_experts * used // total
        text = f"{human_count(active)} ({active:,})"
        facts.append(Fact("active_parameters", active, text, "active for a token"))
    facts += [
        Fact("nbytes", nbytes, human_bytes(nbytes), "size"),
        Fact("bits_per_weight", bits, "not known" if bits is None else f"{bits:.2f}"),
        Fact(
            "types",
            {name: round(n / n_weights, 6) for name, n in types.items() if n_weights},
            shares(types) + (" 100 %" if len(types) == 1 else ""),
        ),
    ]
    return Section("Weights", tuple(facts))


def shares(types: Mapping[str, int]) -> str:
    """Types and how much of the weights each holds: "Q4_K 78.2 %, Q6_K 21.8 %"; one type alone."""
    total = sum(types.values())
    if len(types) < 2 or not total:
        return ", ".join(types)
    return ", ".join(f"{name} {_percent(n / total)}" for name, n in types.items())


def _percent(share: float) -> str:
    if share > 0.9995:
        return ">99.9 %"
    return f"{100 * share:.1f} %" if share >= 0.0005 else "<0.1 %"
