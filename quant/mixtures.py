"""Which format each tensor of a GGUF file gets, for every name `--type` understands.

A mixture is a default format and llama.cpp's exceptions to it: more bits for attn_v and ffn_down in
some layers, for the output, fewer elsewhere. The rules are data about names and shapes, no weights
are read; the result equals llama-quantize's tensor by tensor.

Three things differ on purpose. A tensor that the user gives a format by hand does not shift the
pattern of later layers (llama.cpp counts only the tensors its own rules have seen). With tied
embeddings --output-type means the embedding with --pure, too, where llama.cpp drops it. And every
choice carries its reason, for the printed plan.

# ref: llama_tensor_get_type_impl, tensor_type_fallback, tensor_requires_imatrix in llama-quant.cpp
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from quant.assembly import Assembly
from quant.display import printable
from quant.errors import BadRecipe
from quant.formats import FORMATS, i_quants
from quant.gguf_file import Metadata
from quant.plan import Assignment

# --- what there is to choose from -------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """A file type of llama.cpp: its name, the number in general.file_type, its default format."""

    name: str
    file_type: int  # enum llama_ftype, llama.h
    default: str  # a key of FORMATS


MIXTURES = {
    m.name: m
    for m in (
        Mixture("F32", 0, "F32"),
        Mixture("F16", 1, "F16"),
        Mixture("BF16", 32, "BF16"),
        Mixture("Q8_0", 7, "Q8_0"),
        Mixture("Q6_K", 18, "Q6_K"),
        Mixture("Q5_K_M", 17, "Q5_K"),
        Mixture("Q5_K_S", 16, "Q5_K"),
        Mixture("Q5_1", 9, "Q5_1"),
        Mixture("Q5_0", 8, "Q5_0"),
        Mixture("Q4_K_M", 15, "Q4_K"),
        Mixture("Q4_K_S", 14, "Q4_K"),
        Mixture("Q4_1", 3, "Q4_1"),
        Mixture("Q4_0", 2, "Q4_0"),
        Mixture("IQ4_NL", 25, "IQ4_NL"),
        Mixture("IQ4_XS", 30, "IQ4_XS"),
        Mixture("Q3_K_L", 13, "Q3_K"),
        Mixture("Q3_K_M", 12, "Q3_K"),
        Mixture("Q3_K_S", 11, "Q3_K"),
        Mixture("IQ3_M", 27, "IQ3_S"),
        Mixture("IQ3_S", 26, "IQ3_S"),
        Mixture("IQ3_XS", 22, "IQ3_S"),
        Mixture("IQ3_XXS", 23, "IQ3_XXS"),
        Mixture("Q2_K", 10, "Q2_K"),
        Mixture("Q2_K_S", 21, "Q2_K"),
        Mixture("IQ2_M", 29, "IQ2_S"),
        Mixture("IQ2_S", 28, "IQ2_XS"),
        Mixture("IQ2_XS", 20, "IQ2_XS"),
        Mixture("IQ2_XXS", 19, "IQ2_XXS"),
        Mixture("TQ2_0", 37, "TQ2_0"),
        Mixture("TQ1_0", 36, "TQ1_0"),
        Mixture("IQ1_M", 31, "IQ1_M"),
        Mixture("IQ1_S", 24, "IQ1_S"),
    )
}

MOSTLY = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "IQ2_S": "IQ2_M"}
"""The file type of a file that is mostly of one format, where it is not of the same name. What
llama.cpp takes a file for that does not say. # ref: llama_model_loader in llama-model-loader.cpp"""

NEAR_2_BITS = ("IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
"""Mixtures with a rule book of their own."""

FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"), "IQ4_NL"),
    **dict.fromkeys(("IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""What replaces a format of 256-weight blocks where rows do not fill them."""

NEEDS_IMPORTANCE = ("IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
"""Too coarse to be of use where every weight counts alike."""

KEPT_EXACT = ("_norm.weight", "ffn_gate_inp.weight")
"""Norms and routers: tiny, and a wrong choice of expert costs more than any rounding."""

KINDS = (
    "attn_qkv.weight", "attn_v.weight", "attn_k.weight", "attn_q.weight", "attn_output.weight",
    "ffn_up", "ffn_gate", "ffn_down",
)  # fmt: skip


# --- what the rules ask -----------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """What the rules ask about a model."""

    architecture: str
    n_layers: int
    heads_per_kv: int
    n_experts: int

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> "Model":
        architecture = metadata["general.architecture"].data

        def number(key: str, default: int) -> int:
            value = metadata.get(f"{architecture}.{key}")
            return value.data if value is not None and isinstance(value.data, int) else default

        heads = number("attention.head_count", 1)
        kv_heads = number("attention.head_count_kv", heads)
        return cls(
            architecture,
            number("block_count", 0),
            heads // kv_heads if kv_heads else 0,
            number("expert_count", 0),
        )

    @property
    def is_70b(self) -> bool:
        """What llama.cpp calls a 70B: 80 layers, for llama only with shared kv heads."""
        if self.n_layers != 80:
            return False
        return self.architecture == "qwen2" or (
            self.architecture == "llama" and self.heads_per_kv > 1
        )


@dataclass(frozen=True)
class Choices:
    """What the user decided by hand."""

    output_type: str | None = None
    embedding_type: str | None = None
    tensor_types: tuple[tuple[str, str], ...] = ()  # (regular expression, format), first match wins
    pure: bool = False  # no exceptions to the default
    has_importance: bool = False


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: the `index`-th of `count` of its kind."""

    index: int
    count: int
    model: Model
    has_importance: bool

    @property
    def first_eighth(self) -> bool:
        return self.index < self.count // 8

    @property
    def middle(self) -> bool:
        return self.count // 8 <= self.index < 7 * self.count // 8

    @property
    def more_bits(self) -> bool:
        """The first and last eighth, and every third layer between (use_more_bits)."""
        return not self.middle or (self.index - self.count // 8) % 3 == 2

    @property
    def shares_kv(self) -> bool:
        """Four or more heads share a key and value head: attn_v is small, and worth more bits."""
        return self.model.heads_per_kv >= 4


Rule = str | Callable[[Place], str | None]
"""A format, or a function of the place; None keeps the default."""

ATTN_V: dict[str, Rule] = {
    "Q2_K": lambda p: "Q4_K" if p.shares_kv else "Q3_K",
    "Q2_K_S": lambda p: "Q4_K" if p.shares_kv else None,
    "IQ3_XXS": lambda p: "Q4_K" if p.shares_kv else None if p.has_importance else "IQ3_S",
    "IQ3_XS": lambda p: "Q4_K" if p.shares_kv else None,
    "IQ3_S": lambda p: "Q4_K" if p.shares_kv else None,
    "IQ3_M": "Q4_K",
    "Q3_K_M": lambda p: "Q5_K" if p.index < 2 else "Q4_K",
    "Q3_K_L": "Q5_K",
    "IQ4_NL": lambda p: "Q5_K" if p.shares_kv else None,
    "IQ4_XS": lambda p: "Q5_K" if p.shares_kv else None,
    "Q4_K_M": lambda p: "Q6_K" if p.more_bits else None,
    "Q5_K_M": lambda p: "Q6_K" if p.more_bits else None,
    "Q4_K_S": lambda p: "Q5_K" if p.index < 4 else None,
}
ATTN_QK: dict[str, Rule] = {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}
ATTN_OUTPUT: dict[str, Rule] = {
    "Q2_K": "Q3_K",
    "IQ3_XXS": "IQ3_S",
    "Q3_K_M": "Q4_K",
    "Q3_K_L": "Q5_K",
    "IQ3_M": "Q4_K",
}
ATTN_OUTPUT_8_EXPERTS = (
    "Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S",
    "IQ3_M", "IQ4_XS",
)  # fmt: skip
FFN_DOWN: dict[str, Rule] = {
    "Q2_K": "Q3_K",
    "Q2_K_S": lambda p: "Q4_K" if p.first_eighth else None,
    "IQ3_XXS": lambda p: None if p.has_importance else "Q4_K" if p.first_eighth else "Q3_K",
    "Q3_K_M": lambda p: "Q5_K" if p.index < p.count // 16 else "Q4_K",
    "IQ3_M": lambda p: (
        "Q4_K" if p.first_eighth or (p.model.n_experts == 8 and p.more_bits) else None
    ),
    "Q3_K_L": "Q5_K",
    "Q4_K_M": lambda p: "Q6_K" if p.more_bits else None,
    "IQ4_NL": lambda p: "Q5_K" if p.first_eighth and not p.has_importance else None,
    "IQ4_XS": lambda p: "Q5_K" if p.first_eighth and not p.has_importance else None,
    "Q5_K_M": lambda p: "Q6_K" if p.more_bits else None,
    "Q4_K_S": lambda p: "Q5_K" if p.first_eighth else None,
    "Q4_0": lambda p: "Q4_1" if p.first_eighth and p.has_importance else None,
    "Q5_0": lambda p: "Q5_1" if p.first_eighth and p.has_importance else None,
}
FFN_GATE_UP: dict[str, Rule] = {"IQ3_XS": lambda p: "IQ3_XXS" if p.middle else None}
TOKEN_EMBD: dict[str, Rule] = {
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"), "Q2_K"),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "IQ3_S"),
    **dict.fromkeys(("TQ1_0", "TQ2_0"), "Q4_K"),
}


# --- choosing ---------------------------------------------------------------------------------


def assign_formats(
    tensors: list[Assembly], mixture: Mixture, model: Model, choices: Choices
) -> list[Assignment]:
    """Each tensor's format and the rule that chose it, in the order of `tensors`.

    Raises BadRecipe for a pattern that matches no tensor.
    """
    _check_patterns(tensors, choices)
    tied = all(t.name != "output.weight" for t in tensors)
    places = _places(tensors, model, choices.has_importance, mixture)
    return [Assignment(t, *_choose(t, mixture, places.get(t.name), tied, choices)) for t in tensors]


def left_open(tensors: list[Assembly], choices: Choices) -> set[str]:
    """The names of the tensors whose formats neither their kind nor the user has decided."""
    tied = all(t.name != "output.weight" for t in tensors)
    return {
        t.name for t in tensors if _is_quantized(t) and _by_hand(t.name, tied, choices)[0] is None
    }


def mostly(assignments: Iterable[Assignment]) -> Mixture:
    """The file type that says which format most weights are in."""
    n_weights: dict[str, int] = {}
    for a in assignments:
        n_weights[a.format.name] = n_weights.get(a.format.name, 0) + a.source.n_weights
    name = max(n_weights, key=n_weights.__getitem__)
    return MIXTURES[MOSTLY.get(name, name)]


def needs_importance(assignment: Assignment, mixture: Mixture) -> bool:
    """Whether llama.cpp refuses this choice without an importance matrix."""
    name = assignment.format.name
    if assignment.name in ("token_embd.weight", "output.weight"):
        return name in i_quants.REFUSES_WITHOUT_IMPORTANCE
    return name in NEEDS_IMPORTANCE or (name == "Q2_K" and mixture.name == "Q2_K_S")


def _check_patterns(tensors: list[Assembly], choices: Choices) -> None:
    for pattern, _ in choices.tensor_types:
        found = [t for t in tensors if re.search(pattern, t.name)]
        if not any(map(_is_quantized, found)):
            what = f"only {printable(found[0].name)}, which stays exact" if found else "no tensor"
            raise BadRecipe(
                f'--tensor-type matches {what}: "{printable(pattern)}".',
                "It is searched for in GGUF's names, such as blk.0.ffn_down.weight.",
                "--dry-run prints the names.",
            )


def _is_quantized(tensor: Assembly) -> bool:
    """Whether a mixture applies to it at all (tensor_allows_quantization)."""
    return (
        len(tensor.shape) > 1
        and tensor.name.endswith("weight")
        and not tensor.name.endswith(KEPT_EXACT)
    )


def _kind(name: str) -> str | None:
    """The kind of layer tensor, as llama.cpp looks for it in the name."""
    found = next((kind for kind in KINDS if kind in name), None)
    return "attn_v.weight" if found == "attn_qkv.weight" else found


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match.group(1)) if match else -1


def _places(
    tensors: list[Assembly], model: Model, has_importance: bool, mixture: Mixture
) -> dict[str, Place]:
    """The place of every layer tensor among its kind, counted as llama.cpp counts.

    Kinds are counted in the order (layer, name). With experts, a layer has several tensors of a
    kind, and the layer's number stands for the count, but not in the near-2-bit rules.
    """
    kinds: dict[str, list[str]] = {}
    for name in sorted((t.name for t in tensors if _is_quantized(t)), key=lambda n: (_layer(n), n)):
        if kind := _kind(name):
            kinds.setdefault(kind, []).append(name)
    by_layer = model.n_experts > 1 and mixture.name not in NEAR_2_BITS
    places = {}
    for kind, names in kinds.items():
        is_ffn = kind.startswith("ffn_")
        count = model.n_layers if is_ffn else len(names)
        for i, name in enumerate(names):
            index = _layer(name) if is_ffn and by_layer else i
            places[name] = Place(index, count, model, has_importance)
    return places


def _choose(
    tensor: Assembly, mixture: Mixture, place: Place | None, tied: bool, choices: Choices
) -> tuple:
    """The format of one tensor, and why."""
    if not _is_quantized(tensor):
        return FORMATS["F32"], "vectors stay exact" if len(tensor.shape) < 2 else "stays exact"
    name, reason = _by_hand(tensor.name, tied, choices)
    if name is None:
        name, reason = mixture.default, f"{mixture.name} default"
        exception = None if choices.pure else _exception(tensor, mixture, place, tied)
        if exception not in (None, mixture.default):
            name, reason = exception, f"{mixture.name} exception"
    return _fit(tensor, name, reason)


def _by_hand(name: str, tied: bool, choices: Choices) -> tuple[str | None, str]:
    if name == "token_embd.weight" and choices.embedding_type:
        return choices.embedding_type, "--embedding-type"
    if name == "output.weight" and choices.output_type:
        return choices.output_type, "--output-type"
    for pattern, type_name in choices.tensor_types:
        if re.search(pattern, name):
            return type_name, f"--tensor-type {pattern}"
    if tied and name == "token_embd.weight" and choices.output_type:
        return choices.output_type, "--output-type"
    return None, ""


def _exception(tensor: Assembly, mixture: Mixture, place: Place | None, tied: bool) -> str | None:
    """The format that the mixture's rules give this tensor, or None for its default."""
    default = FORMATS[mixture.default]
    if default.block_size == 1:
        return None
    if tensor.name == "output.weight" or (tied and tensor.name == "token_embd.weight"):
        if tensor.n_columns % default.block_size:
            return "Q8_0"
        if mixture.name in (*NEAR_2_BITS, "IQ3_XXS"):
            return "Q5_K"
        return None if mixture.default == "Q8_0" else "Q6_K"
    if tensor.name == "token_embd.weight":
        return TOKEN_EMBD.get(mixture.name)
    if place is None:
        return None
    kind = _kind(tensor.name)
    if mixture.name in NEAR_2_BITS:
        return _near_2_bits(kind, mixture.name, place)
    if kind == "attn_v.weight":
        return _attn_v(mixture, place)
    if kind in ("attn_k.weight", "attn_q.weight"):
        if kind == "attn_k.weight" and place.model.n_experts == 8:
            return "Q8_0"
        return _apply(ATTN_QK, mixture, place)
    if kind == "attn_output.weight":
        if place.model.n_experts == 8:
            return "Q5_K" if mixture.name in ATTN_OUTPUT_8_EXPERTS else None
        return _apply(ATTN_OUTPUT, mixture, place)
    return _apply(FFN_DOWN if kind == "ffn_down" else FFN_GATE_UP, mixture, place)


def _apply(rules: dict[str, Rule], mixture: Mixture, place: Place) -> str | None:
    rule = rules.get(mixture.name)
    return rule(place) if callable(rule) else rule


def _attn_v(mixture: Mixture, place: Place) -> str | None:
    if place.model.n_experts == 8:
        return "Q8_0"
    chosen = _apply(ATTN_V, mixture, place)
    if place.model.is_70b and (chosen or mixture.default) in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return chosen


def _near_2_bits(kind: str, name: str, place: Place) -> str | None:
    better = "IQ3_S" if name in ("IQ2_S", "IQ2_M") else "Q2_K"
    eight = place.model.n_experts == 8
    if kind == "attn_v.weight":
        return "Q4_K" if place.shares_kv or place.model.n_experts >= 4 else better
    if kind == "attn_k.weight":
        return "Q4_K" if eight else None
    if kind == "ffn_down":
        return better if place.first_eighth else None
    if kind == "attn_output.weight":
        if eight:
            return "Q5_K"
        if name in ("IQ1_S", "IQ1_M"):
            return "IQ2_XXS"
        return "IQ3_S" if better == "IQ3_S" else None
    return None


def _fit(tensor: Assembly, name: str, reason: str) -> tuple:
    """The format, or what replaces it where the rows do not fill its blocks."""
    columns, wanted = tensor.n_columns, FORMATS[name]
    if columns % wanted.block_size == 0:
        return wanted, reason
    smaller = FORMATS[FALLBACK.get(name, name)]
    if columns % smaller.block_size:
        smaller = FORMATS["F16"]
    return smaller, f"rows of {columns} do not fit {name}"
