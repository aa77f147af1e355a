"""What a model is, as facts: the same names for a checkpoint and for a GGUF file.

A checkpoint says `num_hidden_layers`, a GGUF file `qwen2.block_count`; here both say `layers`, so
that any two models can be laid side by side, and a model beside its own GGUF file. Headers and
small files are read, and no weights but Llama 3's few rope factors.

A fact has a value for programs and a text for people. Texts come from files that somebody
published: whoever prints one escapes it (quant.display.printable).
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np

from quant.architectures import (
    ARCHITECTURES,
    EXPERT_PARTS,
    NOT_WEIGHTS,
    assemble,
    check_graph,
    find_architecture,
    hyperparameters,
    read_dimensions,
)
from quant.checkpoint import Checkpoint
from quant.display import human_bytes
from quant.errors import QwqQuantError
from quant.gguf_file import GgufFile, Metadata, Value
from quant.rope import llama3_rope_factors, rope_metadata
from quant.sampling import PREFIX as SAMPLING_PREFIX
from quant.sampling import sampling_from_generation_config
from quant.source import Source, source_files
from quant.tensors import TensorInfo, TensorReader
from quant.tokenizer import SPECIAL_KEYS, UNUSED, read_chat_templates, read_vocabulary


@dataclass(frozen=True)
class Fact:
    """One thing known about a model: ("rope_theta", 1000000.0, "1,000,000").

    own: only models of this container can have it, so that its absence from a model of the other
    container is no difference.
    """

    key: str  # for programs
    value: object  # what JSON can hold; None if it is not known
    text: str  # untrusted
    label: str = ""  # for people; untrusted
    own: bool = False


@dataclass(frozen=True)
class Section:
    """Facts of one kind. problem: why they, or some of them, could not be read."""

    title: str
    facts: tuple[Fact, ...]
    problem: str = ""

    @property
    def key(self) -> str:
        return self.title.lower().replace(" ", "_")


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


@dataclass(frozen=True)
class Description:
    """Everything inspect tells of one model. notes: what a conversion would warn about."""

    model: str  # as the user named it
    container: str  # CHECKPOINT or GGUF
    sections: tuple[Section, ...]
    tensors: tuple[TensorKind, ...]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict:
        """One JSON object: sections of raw values, the tensor kinds, problems and notes."""
        return {
            "model": self.model,
            **{s.key: {fact.key: fact.value for fact in s.facts} for s in self.sections},
            "tensors": [kind.as_json() for kind in self.tensors],
            "problems": {s.key: s.problem for s in self.sections if s.problem},
            "notes": list(self.notes),
        }


CHECKPOINT, GGUF = "safetensors checkpoint", "GGUF"


def describe(source: Source) -> Description:
    """All facts of an opened model. What cannot be read becomes a section's problem, no error."""
    return _describe_gguf(source) if isinstance(source, GgufFile) else _describe_checkpoint(source)


def _describe_checkpoint(checkpoint: Checkpoint) -> Description:
    # A model that also sees or hears keeps the numbers of its text half in `text_config`.
    config = {**checkpoint.config, **_object(checkpoint.config.get("text_config"))}
    kinds = fold_tensors(checkpoint.tensors.values())
    name, obstacle, notes = _conversion(checkpoint)
    n_rows = _vocabulary_rows(checkpoint.tensors.values()) or config.get("vocab_size")
    tied = config.get("tie_word_embeddings")
    if not isinstance(tied, bool):
        tied = _has_no_head(kinds)
    rope = _rope_of_config(config, name)
    vocabulary, tokenizer_problem = {}, ""
    try:
        found = read_vocabulary(checkpoint, n_rows if _is_count(n_rows) else 0)
        vocabulary, notes = found.metadata(), [*notes, *found.notes]
    except QwqQuantError as error:
        tokenizer_problem = _reason(error)
        obstacle = obstacle or "not supported: see Tokenizer"
    tokens = _strings(vocabulary, "tokenizer.ggml.tokens")
    sections = (
        _file(
            checkpoint,
            _fact("class", _class_name(config), own=True),
            *([_fact("revision", checkpoint.revision, own=True)] if checkpoint.revision else []),
            Fact("to_gguf", not obstacle, obstacle or "supported", "to-gguf", own=True),
        ),
        _architecture(name or _class_name(config), config, 0, rope, n_rows, tied),
        _weights(kinds, config, 0),
        Section("Tokenizer", _tokenizer_facts(vocabulary), tokenizer_problem),
        _checkpoint_templates(checkpoint),
        _checkpoint_sampling(checkpoint, config, tokens),
    )
    return Description(checkpoint.name, CHECKPOINT, sections, kinds, tuple(notes))


def _describe_gguf(gguf: GgufFile) -> Description:
    metadata = gguf.metadata
    name = _text(metadata, "general.architecture")
    numbers = {
        key.removeprefix(f"{name}."): value.data
        for key, value in metadata.items()
        if name and key.startswith(f"{name}.")
    }
    kinds = fold_tensors(gguf.tensors.values())
    n_rows = _vocabulary_rows(gguf.tensors.values()) or numbers.get("vocab_size")
    rope = {key: value for key, value in numbers.items() if key.startswith("rope.")}
    rope["factors"] = _stored_rope_factors(gguf)
    has_tokens = "tokenizer.ggml.tokens" in metadata
    sections = (
        _file(gguf, *_gguf_facts(metadata)),
        _architecture(name, numbers, 1, rope, n_rows, _has_no_head(kinds)),
        _weights(kinds, numbers, 1),
        Section(
            "Tokenizer",
            _tokenizer_facts(metadata) if has_tokens else (),
            "" if has_tokens else "The file has no vocabulary.",
        ),
        Section("Chat template", _template_facts(_gguf_templates(metadata))),
        Section("Generation", _sampling_facts(metadata)),
    )
    return Description(str(gguf.path), GGUF, sections, kinds)


# --- values and texts -------------------------------------------------------------------------


def _fact(key: str, value: object, label: str = "", own: bool = False) -> Fact:
    """A fact printed in the plain way for its type."""
    value = _plain(value)
    return Fact(key, value, show(value), label, own)


def _plain(value: object) -> object:
    """`value` as JSON holds it: no numpy, no NaN, a number for all layers once if all are equal.

    A float is rounded to float32 and back to its shortest spelling: GGUF stores 1e-05 in float32,
    and config.json says 1e-05.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return items[0] if items and all(item == items[0] for item in items) else items
    if isinstance(value, float):
        with np.errstate(over="ignore"):
            value = float(str(np.float32(value)))
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def show(value: object) -> str:
    """A value as people read it: 152064 -> "152,064", True -> "yes", None -> "not stated"."""
    if value is None:
        return "not stated"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.7g}"
    if isinstance(value, list):
        numbers = [item for item in value if _is_number(item)]
        if numbers and len(numbers) == len(value):
            return f"{show(min(numbers))} to {show(max(numbers))}, by layer"
        return ", ".join(map(str, value[:8]))
    return str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def _is_count(value: object) -> bool:
    return isinstance(value, int) and _is_number(value) and value > 0


def _object(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _text(metadata: Metadata, key: str) -> str | None:
    value = metadata.get(key)
    return value.data if value is not None and isinstance(value.data, str) else None


def _strings(metadata: Metadata, key: str) -> list[str]:
    value = metadata.get(key)
    return value.data if value is not None and value.type == "arr[str]" else []


def _digest(*texts: str) -> str:
    """SHA-256 in hexadecimal; people are shown 12 digits of it, enough to tell two texts apart."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def _reason(error: QwqQuantError) -> str:
    return " ".join(line for line in (error.what, error.why) if line)


def human_count(n: int) -> str:
    """A number of weights: 32763876352 -> "32.8 B", 6822144 -> "6.82 M"."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= 0.9995 * scale:
            return f"{n / scale:#.3g} {unit}".replace(". ", " ")
    return str(n)


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


# --- the file ---------------------------------------------------------------------------------


def _file(source: Source, *more: Fact) -> Section:
    container = GGUF if isinstance(source, GgufFile) else CHECKPOINT
    paths = source_files(source)
    if container == GGUF:
        n_files, nbytes = max(1, len(paths)), source.nbytes
    else:
        n_files, nbytes = len(paths), sum(path.stat().st_size for path in paths)
    size = Fact("nbytes", nbytes, human_bytes(nbytes), "size on disk")
    return Section("File", (_fact("format", container), _fact("files", n_files), size, *more))


def _class_name(config: Mapping) -> str | None:
    """The class that transformers builds, from "architectures"; else the model_type."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else config.get("model_type")
    return name if isinstance(name, str) else None


def _gguf_facts(metadata: Metadata) -> tuple[Fact, ...]:
    texts = {
        "name": "general.name",
        "license": "general.license",
        "made_by": "general.quantized_by",
        "importance_matrix": "quantize.imatrix.dataset",
    }
    facts = [
        _fact(key, _text(metadata, place), own=True)
        for key, place in texts.items()
        if _text(metadata, place) is not None
    ]
    file_type = metadata.get("general.file_type")
    if file_type is not None:
        name = _file_type_name(file_type.data)
        facts.append(Fact("file_type", _plain(file_type.data), name, "file type", own=True))
    return tuple(facts)


def _file_type_name(number: object) -> str:
    """llama.cpp's name of the mixture: 15 -> "Q4_K_M"."""
    from gguf import LlamaFileType

    try:
        return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return show(_plain(number))


def _conversion(checkpoint: Checkpoint) -> tuple[str | None, str, list[str]]:
    """GGUF's name of the architecture, what stands in the way of to-gguf, and its warnings."""
    name, config = None, checkpoint.config
    try:
        architecture = find_architecture(config)
        name = architecture.gguf_name
        size = read_dimensions(architecture, config)
        warnings = check_graph(architecture, config)
        _, more = assemble(architecture, checkpoint, size)
        _, rope_warnings = hyperparameters(architecture, config, size)
    except QwqQuantError as error:
        return name, "not supported: see Notes", [f"to-gguf: {_reason(error)}"]
    return name, "", [*warnings, *more, *rope_warnings]


# --- architecture -----------------------------------------------------------------------------

NUMBERS = {
    "layers": (("num_hidden_layers", "n_layer", "num_layers"), ("block_count",)),
    "hidden_size": (("hidden_size", "n_embd", "d_model"), ("embedding_length",)),
    "heads": (("num_attention_heads", "n_head"), ("attention.head_count",)),
    "kv_heads": (("num_key_value_heads",), ("attention.head_count_kv",)),
    "head_size": (("head_dim",), ("attention.key_length",)),
    "feed_forward_size": (("intermediate_size", "n_inner"), ("feed_forward_length",)),
    "experts": (("num_experts", "num_local_experts", "n_routed_experts"), ("expert_count",)),
    "experts_used": (("num_experts_per_tok",), ("expert_used_count",)),
    "expert_size": (("moe_intermediate_size",), ("expert_feed_forward_length",)),
    "shared_expert_size": (
        ("shared_expert_intermediate_size",),
        ("expert_shared_feed_forward_length",),
    ),
    "context": (("max_position_embeddings", "n_positions"), ("context_length",)),
    "sliding_window": (("sliding_window",), ("attention.sliding_window",)),
    "norm_eps": (
        ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
        ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"),
    ),
}
"""A fact, its names in config.json, and its names in GGUF behind the architecture's."""

LABELS = {
    "kv_heads": "key-value heads",
    "feed_forward_size": "feed-forward size",
    "experts_used": "experts for a token",
}
OF_EXPERTS = ("experts", "experts_used", "expert_size", "shared_expert_size")


def _number(fact: str, numbers: Mapping, column: int) -> object:
    found = (numbers.get(name) for name in NUMBERS[fact][column])
    return _plain(next((value for value in found if value is not None), None))


def _architecture(
    name: str | None, numbers: Mapping, column: int, rope: Mapping, n_rows: object, tied: bool
) -> Section:
    """numbers: config.json (column 0 of NUMBERS) or the GGUF keys behind `name` (column 1)."""
    values = {fact: _number(fact, numbers, column) for fact in NUMBERS}
    heads, hidden = values["heads"], values["hidden_size"]
    if values["kv_heads"] is None:
        values["kv_heads"] = heads
    if values["head_size"] is None and _is_count(heads) and _is_count(hidden):
        values["head_size"] = hidden // heads
    values["context"] = rope.get("context_length", values["context"])
    if column == 0 and numbers.get("use_sliding_window") is False:
        values["sliding_window"] = None
    if not values["experts"]:
        values = {fact: value for fact, value in values.items() if fact not in OF_EXPERTS}
    texts = {
        "kv_heads": _kv_heads_text(heads, values["kv_heads"]),
        "sliding_window": show(values["sliding_window"] or "none"),
        "shared_expert_size": show(values.get("shared_expert_size") or "none"),
    }
    facts = (
        _fact("architecture", name),
        *(
            Fact(fact, value, texts.get(fact, show(value)), LABELS.get(fact, ""))
            for fact, value in values.items()
        ),
        _fact("rope_theta", rope.get("rope.freq_base")),
        _rope_scaling(rope),
        _fact("vocabulary", n_rows),
        _fact("tied_embeddings", tied),
        *_kv_cache(name, values, numbers.get("attention.value_length")),
    )
    return Section("Architecture", facts)


def _kv_heads_text(heads: object, kv_heads: object) -> str:
    """How many query heads share a key-value head: "8 (5 heads share one)"."""
    text = show(kv_heads)
    if not (_is_count(heads) and _is_count(kv_heads)) or heads % kv_heads:
        return text
    group = heads // kv_heads
    return f"{text} (one each)" if group == 1 else f"{text} ({group} heads share one)"


def _kv_cache(name: str | None, values: Mapping, value_size: object) -> Iterator[Fact]:
    """Bytes of a token's keys and values in 16 bits: layers x kv heads x (key + value size) x 2.

    Only for architectures known to keep exactly that. A value is as long as a key if not stated.
    """
    counts = [values["layers"], values["kv_heads"], values["head_size"]]
    counts.append(counts[-1] if value_size is None else value_size)
    known = name in {architecture.gguf_name for architecture in ARCHITECTURES}
    if not known or not all(map(_is_count, counts)):
        return
    n_layers, n_heads, key_size, value_size = counts
    nbytes, context = n_layers * n_heads * (key_size + value_size) * 2, values["context"]
    text = f"{human_bytes(nbytes)} in 16 bits"
    yield Fact("kv_cache_nbytes_per_token", nbytes, text, "KV cache, a token")
    if _is_count(context):
        text = f"{human_bytes(nbytes * context)} in 16 bits"
        yield Fact("kv_cache_nbytes", nbytes * context, text, "KV cache, full")


def _rope_of_config(config: dict, name: str | None) -> dict:
    """GGUF's rope keys for config.json, without the architecture; "factors" for Llama 3's.

    Where to-gguf would refuse the settings, only what kind they are and theta.
    """
    stated = {**_object(config.get("rope_scaling")), **_object(config.get("rope_parameters"))}
    kind = stated.get("rope_type", stated.get("type"))
    theta = stated.get("rope_theta", config.get("rope_theta"))
    try:
        metadata, _ = rope_metadata(config, name or "llama")
        rope = {key.partition(".")[2]: value.data for key, value in metadata.items()}
        rope["factors"] = llama3_rope_factors(config)
    except (QwqQuantError, KeyError, TypeError, ZeroDivisionError):  # or sizes that are none
        rope = {"rope.freq_base": theta}
    if kind not in (None, "default", "llama3"):
        rope.setdefault("rope.scaling.type", kind)
    return rope


def _stored_rope_factors(gguf: GgufFile) -> np.ndarray | None:
    """The tensor rope_freqs.weight: Llama 3's divisors of the rotary frequencies, (head / 2,)."""
    info = gguf.tensors.get("rope_freqs.weight")
    if info is None or info.dtype != "F32" or info.n_weights > 4096:
        return None
    with TensorReader() as reader:
        return reader.read_float32(info, 0, 1)[0]


def _rope_scaling(rope: Mapping) -> Fact:
    kind = _plain(rope.get("rope.scaling.type"))
    value: dict[str, object] = {} if kind in (None, "none") else {"type": kind}
    for name in ("factor", "original_context_length", "attn_factor"):
        if value and (number := rope.get(f"rope.scaling.{name}")) is not None:
            value[name] = _plain(number)
    if (factors := rope.get("factors")) is not None:
        largest = _plain(float(factors.max()))
        value = {**value, "type": kind or "llama3", "n_factors": len(factors), "factor": largest}
    if not value:
        return Fact("rope_scaling", None, "none")
    text = show(value["type"])
    if "factor" in value:
        text += f", factor {show(value['factor'])}"
    if "original_context_length" in value:
        text += f" over {show(value['original_context_length'])}"
    if "attn_factor" in value:
        text += f", attention {show(value['attn_factor'])}"
    return Fact("rope_scaling", value, text)


# --- tensors ----------------------------------------------------------------------------------

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


def _vocabulary_rows(infos: Iterable[TensorInfo]) -> int | None:
    """Rows of the token embedding."""
    return next((i.shape[0] for i in infos if kind_of(i.name) == "embedding" and i.shape), None)


def _has_no_head(kinds: Iterable[TensorKind]) -> bool:
    return all(kind.name != "output" for kind in kinds)


def _weights(kinds: Iterable[TensorKind], numbers: Mapping, column: int) -> Section:
    kinds = [kind for kind in kinds if kind.name not in NOT_PARAMETERS]
    n_weights, nbytes = sum(k.n_weights for k in kinds), sum(k.nbytes for k in kinds)
    bits = round(8 * nbytes / n_weights, 4) if n_weights else None
    types: dict[str, int] = {}
    for kind in kinds:
        for name, n in kind.types.items():
            types[name] = types.get(name, 0) + n
    types = dict(sorted(types.items(), key=lambda item: -item[1]))
    facts = [Fact("parameters", n_weights, f"{human_count(n_weights)} ({n_weights:,})")]
    total, used = (_number(fact, numbers, column) for fact in ("experts", "experts_used"))
    if _is_count(total) and _is_count(used):
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


# --- tokenizer --------------------------------------------------------------------------------

SPECIAL = {kind: f"tokenizer.ggml.{key}" for kind, key in SPECIAL_KEYS.items()}
SPECIAL["eot"] = "tokenizer.ggml.eot_token_id"
SHOWN_SPECIAL = ("bos", "eos", "eot", "pad", "unk")


def _tokenizer_facts(metadata: Metadata) -> tuple[Fact, ...]:
    """Facts from the `tokenizer.*` keys, which a checkpoint's vocabulary is translated to first."""
    if not metadata:
        return ()
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    merges = _strings(metadata, "tokenizer.ggml.merges")
    types = metadata.get("tokenizer.ggml.token_type", Value("arr[i32]", [])).data
    n_unused = int(np.count_nonzero(np.asarray(types) == UNUSED))
    digest = _digest(*tokens, *merges)
    return (
        _fact("model", _text(metadata, "tokenizer.ggml.model")),
        _fact("pre_tokenizer", _text(metadata, "tokenizer.ggml.pre"), "pre-tokenizer"),
        _fact("tokens", len(tokens)),
        _fact("unused_tokens", n_unused),
        _fact("merges", len(merges)),
        Fact("sha256", digest, digest[:12], "sha256 of tokens"),
        *(_token_fact(kind, metadata, tokens) for kind in SHOWN_SPECIAL),
        _flag(metadata, "add_bos", "adds bos"),
        _flag(metadata, "add_eos", "adds eos"),
    )


def _flag(metadata: Metadata, key: str, label: str) -> Fact:
    value = metadata.get(f"tokenizer.ggml.{key}_token")
    return _fact(key, None if value is None else value.data, label)


def _token_fact(kind: str, metadata: Metadata, tokens: list[str]) -> Fact:
    value = metadata.get(SPECIAL[kind])
    if value is None:
        return Fact(kind, None, "none")
    return Fact(kind, _token(value.data, tokens), _token_text(value.data, tokens))


def _token(token: object, tokens: list[str]) -> dict:
    """{"id": 4093, "text": "<|im_end|>"}; the text is None for an id that no token has."""
    known = isinstance(token, int) and 0 <= token < len(tokens)
    return {"id": _plain(token), "text": tokens[token] if known else None}


def _token_text(token: object, tokens: list[str]) -> str:
    text = _token(token, tokens)["text"]
    return f"{_plain(token)} {text if text is not None else '(no such token)'}"


# --- chat template ----------------------------------------------------------------------------


def _checkpoint_templates(checkpoint: Checkpoint) -> Section:
    try:
        return Section("Chat template", _template_facts(read_chat_templates(checkpoint)))
    except QwqQuantError as error:
        return Section("Chat template", (), _reason(error))


def _gguf_templates(metadata: Metadata) -> dict[str, str]:
    """Name -> text; the unnamed one is "default"."""
    place = "tokenizer.chat_template"
    found = {
        key.removeprefix(place).removeprefix(".") or "default": value.data
        for key, value in metadata.items()
        if key == place or key.startswith(f"{place}.")
    }
    return {name: text for name, text in found.items() if isinstance(text, str)}


def _template_facts(templates: Mapping[str, str]) -> tuple[Fact, ...]:
    """Each template by length and hash, and how it has an answer begin. Never rendered."""
    if not templates:
        return (Fact("default", None, "none"),)
    return tuple(
        Fact(
            name,
            {"length": len(text), "sha256": _digest(text), "opens_think": opens_think(text)},
            f"{len(text):,} characters, sha256 {_digest(text)[:12]}"
            + (", opens <think>" if opens_think(text) else ""),
            name,
        )
        for name, text in sorted(templates.items(), key=lambda item: item[0] != "default")
    )


def opens_think(template: str) -> bool:
    """Whether the prompt it makes for an answer ends in an open <think>, as QwQ's does.

    A search in the text behind the last `add_generation_prompt`: a <think> that nothing closes.
    The model's answer then lacks the tag, which is a common surprise.
    """
    _, found, tail = template.rpartition("add_generation_prompt")
    return bool(found) and tail.rfind("<think>") > tail.rfind("</think>")


# --- generation -------------------------------------------------------------------------------


def _checkpoint_sampling(checkpoint: Checkpoint, config: Mapping, tokens: list[str]) -> Section:
    """The settings that to-gguf would store, and the ids that end an answer."""
    problem, facts = "", ()
    try:
        generation = checkpoint.read_json("generation_config.json") or {}
        facts = _sampling_facts(sampling_from_generation_config(generation))
    except QwqQuantError as error:
        generation, problem = {}, _reason(error)
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    text = ", ".join(_token_text(end, tokens) for end in ends[:8]) or "not stated"
    stops = Fact("stop_tokens", [_plain(end) for end in ends], text, own=True)
    return Section("Generation", (*facts, stops), problem)


def _sampling_facts(metadata: Metadata) -> tuple[Fact, ...]:
    """The `general.sampling.*` keys: temp, top_k ..."""
    settings = {
        key.removeprefix(SAMPLING_PREFIX): value.data
        for key, value in metadata.items()
        if key.startswith(SAMPLING_PREFIX)
    }
    if not settings:
        return (Fact("sampling", None, "none; each program uses its own"),)
    labels = {"temp": "temperature"}
    return tuple(_fact(name, value, labels.get(name, name)) for name, value in settings.items())


# --- two models -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A fact that two models do not share; None where a model has no such fact."""

    section: str
    key: str
    label: str
    a: Fact | None
    b: Fact | None


@dataclass(frozen=True)
class Comparison:
    """What differs between two models. The weights' values are not compared."""

    a: Description
    b: Description
    facts: tuple[Difference, ...]
    tensors: tuple[tuple[TensorKind | None, TensorKind | None], ...]

    @property
    def identical(self) -> bool:
        return not self.facts and not self.tensors

    def as_json(self) -> dict:
        """Both descriptions, and their differences as pairs of raw values."""
        return {
            "models": [self.a.as_json(), self.b.as_json()],
            "identical": self.identical,
            "differences": [
                {
                    "section": d.section.lower().replace(" ", "_"),
                    "fact": d.key,
                    "values": [fact and fact.value for fact in (d.a, d.b)],
                }
                for d in self.facts
            ],
            "tensors": [[kind and kind.as_json() for kind in pair] for pair in self.tensors],
        }


def compare(a: Description, b: Description) -> Comparison:
    """The facts and tensor kinds that differ, in the order of the first model's."""
    same = a.container == b.container
    facts = tuple(
        difference
        for section_a, section_b in zip(a.sections, b.sections, strict=True)
        for difference in _compare_sections(section_a, section_b, same)
    )
    kinds_a, kinds_b = ({kind.name: kind for kind in d.tensors} for d in (a, b))
    pairs = [(kinds_a.get(name), kinds_b.get(name)) for name in {**kinds_a, **kinds_b}]
    return Comparison(a, b, facts, tuple(pair for pair in pairs if _kinds_differ(*pair, same)))


def _compare_sections(a: Section, b: Section, same_container: bool) -> list[Difference]:
    if a.problem != b.problem:
        told = (Fact("problem", s.problem, s.problem) if s.problem else None for s in (a, b))
        return [Difference(a.title, "problem", "", *told)]
    facts_a, facts_b = ({fact.key: fact for fact in section.facts} for section in (a, b))
    differences = []
    for key in {**facts_a, **facts_b}:
        fact_a, fact_b = facts_a.get(key), facts_b.get(key)
        one = fact_a or fact_b
        if fact_a and fact_b:
            differs = fact_a.value != fact_b.value
        else:
            differs = same_container or not one.own
        if differs:
            differences.append(Difference(a.title, key, one.label, fact_a, fact_b))
    return differences


def _kinds_differ(a: TensorKind | None, b: TensorKind | None, same_container: bool) -> bool:
    """Whether shapes, types or bytes differ; experts may be stacked or not."""
    if a is None or b is None:
        return same_container or (a or b).name not in NOT_PARAMETERS
    return (a.shapes, a.types, a.nbytes) != (b.shapes, b.types, b.nbytes)
