"""The shape of the network: sizes, heads, rotary settings, and the KV cache that follows from them.

config.json and GGUF state the same numbers under other names. They are brought to one set of names
first (`read_sizes`, and GGUF's own keys for rope), and one function makes the section of both.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from quant.architectures import ARCHITECTURES
from quant.display import human_bytes
from quant.errors import QwqQuantError
from quant.gguf_file import GgufFile
from quant.inspection.facts import Fact, Section, as_object, is_count, plain, plain_fact, show
from quant.rope import llama3_rope_factors, rope_metadata
from quant.tensors import TensorReader

SIZES = {
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

IN_CONFIG, IN_GGUF = 0, 1
"""Columns of SIZES."""

LABELS = {
    "kv_heads": "key-value heads",
    "feed_forward_size": "feed-forward size",
    "experts_used": "experts for a token",
}
OF_EXPERTS = ("experts", "experts_used", "expert_size", "shared_expert_size")


def read_sizes(stated: Mapping, column: int) -> dict[str, object]:
    """Each of SIZES as config.json or the GGUF keys state it; None where they do not."""
    sizes = {}
    for fact, names in SIZES.items():
        found = (stated.get(name) for name in names[column])
        sizes[fact] = plain(next((value for value in found if value is not None), None))
    if column == IN_CONFIG and stated.get("use_sliding_window") is False:
        sizes["sliding_window"] = None
    return sizes


def architecture_section(
    name: str | None,
    sizes: Mapping[str, object],
    rope: Mapping[str, object],
    n_rows: object,
    tied: bool,
    value_size: object = None,
) -> Section:
    """name: GGUF's if there is one; sizes: of read_sizes; rope: of rope_of_config or rope_of_gguf.

    n_rows: of the embedding; value_size: of a value head, if it is stated apart from a key's.
    """
    sizes = dict(sizes)
    heads, hidden = sizes["heads"], sizes["hidden_size"]
    if sizes["kv_heads"] is None:
        sizes["kv_heads"] = heads
    if sizes["head_size"] is None and is_count(heads) and is_count(hidden):
        sizes["head_size"] = hidden // heads
    sizes["context"] = rope.get("context_length", sizes["context"])
    if not sizes["experts"]:
        sizes = {fact: value for fact, value in sizes.items() if fact not in OF_EXPERTS}
    texts = {
        "kv_heads": _kv_heads_text(heads, sizes["kv_heads"]),
        "sliding_window": show(sizes["sliding_window"] or "none"),
        "shared_expert_size": show(sizes.get("shared_expert_size") or "none"),
    }
    facts = (
        plain_fact("architecture", name),
        *(
            Fact(fact, value, texts.get(fact, show(value)), LABELS.get(fact, ""))
            for fact, value in sizes.items()
        ),
        plain_fact("rope_theta", rope.get("rope.freq_base")),
        _rope_scaling(rope),
        plain_fact("vocabulary", n_rows),
        plain_fact("tied_embeddings", tied),
        *_kv_cache(name, sizes, value_size),
    )
    return Section("Architecture", facts)


def _kv_heads_text(heads: object, kv_heads: object) -> str:
    """How many query heads share a key-value head: "8 (5 heads share one)"."""
    text = show(kv_heads)
    if not (is_count(heads) and is_count(kv_heads)) or heads % kv_heads:
        return text
    group = heads // kv_heads
    return f"{text} (one each)" if group == 1 else f"{text} ({group} heads share one)"


def _kv_cache(name: str | None, sizes: Mapping, value_size: object) -> Iterator[Fact]:
    """Bytes of a token's keys and values in 16 bits: layers x kv heads x (key + value size) x 2.

    Only for architectures known to keep exactly that. A value is as long as a key if not stated.
    """
    counts = [sizes["layers"], sizes["kv_heads"], sizes["head_size"]]
    counts.append(counts[-1] if value_size is None else value_size)
    known = name in {architecture.gguf_name for architecture in ARCHITECTURES}
    if not known or not all(map(is_count, counts)):
        return
    n_layers, n_heads, key_size, value_size = counts
    nbytes, context = n_layers * n_heads * (key_size + value_size) * 2, sizes["context"]
    text = f"{human_bytes(nbytes)} in 16 bits"
    yield Fact("kv_cache_nbytes_per_token", nbytes, text, "KV cache, a token")
    if is_count(context):
        text = f"{human_bytes(nbytes * context)} in 16 bits"
        yield Fact("kv_cache_nbytes", nbytes * context, text, "KV cache, full")


# --- rotary settings --------------------------------------------------------------------------


def rope_of_config(config: dict, name: str | None) -> dict:
    """GGUF's rope keys for config.json, without the architecture; "factors" for Llama 3's.

    Where to-gguf would refuse the settings, only what kind they are and theta.
    """
    stated = {**as_object(config.get("rope_scaling")), **as_object(config.get("rope_parameters"))}
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


def rope_of_gguf(gguf: GgufFile, stated: Mapping[str, object]) -> dict:
    """The rope keys among those `stated` for the architecture; "factors" for Llama 3's."""
    rope = {key: value for key, value in stated.items() if key.startswith("rope.")}
    return {**rope, "factors": _stored_rope_factors(gguf)}


def _stored_rope_factors(gguf: GgufFile) -> np.ndarray | None:
    """The tensor rope_freqs.weight: Llama 3's divisors of the rotary frequencies, (head / 2,)."""
    info = gguf.tensors.get("rope_freqs.weight")
    if info is None or info.dtype != "F32" or info.n_weights > 4096:
        return None
    with TensorReader() as reader:
        return reader.read_float32(info, 0, 1)[0]


def _rope_scaling(rope: Mapping) -> Fact:
    kind = plain(rope.get("rope.scaling.type"))
    value: dict[str, object] = {} if kind in (None, "none") else {"type": kind}
    for name in ("factor", "original_context_length", "attn_factor"):
        if value and (number := rope.get(f"rope.scaling.{name}")) is not None:
            value[name] = plain(number)
    if (factors := rope.get("factors")) is not None:
        largest = plain(float(factors.max()))
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
