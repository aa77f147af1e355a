"""The metadata as a whole, once every setting and override is in it.

Refused is what llama.cpp aborts on or computes wrongly; warned about is what it ignores.
"""

import math
from collections.abc import Iterator

import numpy as np

from quant.display import printable
from quant.errors import BadRecipe
from quant.gguf_file import Metadata
from quant.metadata_keys import ARCHITECTURES, SCALING_TYPES, SPECIAL_IDS, expected, is_read
from quant.overrides import FLOAT_FORMATS, number
from quant.rope import yarn_magnitude
from quant.sampling import check_sampling


def check_metadata(
    metadata: Metadata, arch: str, n_vocab_rows: int | None, force: bool = False
) -> list[str]:
    """Warnings about settings that are ignored or odd, once every override is in.

    `n_vocab_rows` is the number of rows of token_embd, or None where it is not known. Raises
    BadRecipe for what llama.cpp aborts on or computes wrongly; with `force` those are warnings
    too, but for the length of the vocabulary, which the loader takes the embedding's shape from.
    """
    _check_vocabulary_length(metadata, n_vocab_rows)
    unread = dict(_not_as_expected(metadata, arch))
    warnings = list(unread.values())
    metadata = {key: value for key, value in metadata.items() if key not in unread}
    for check, *arguments in (
        (check_sampling,),
        (_check_rope_scaling, arch),
        (_check_attn_factor, arch),
        (_check_heads, arch),
        (_check_layers, arch),
        (_check_experts, arch),
        (_check_special_ids, n_vocab_rows),
        (_ignored_keys, arch),
    ):
        try:
            warnings += check(metadata, *arguments)
        except BadRecipe as error:
            if not force:
                raise
            warnings.append(error.what)
    return warnings


def _not_as_expected(metadata: Metadata, arch: str) -> Iterator[tuple[str, str]]:
    """Known keys of a type that their readers do not take, or not finite; with a warning each.

    Only a GGUF file from elsewhere, or force, can bring them here. The checks leave them aside.
    """
    for key, value in metadata.items():
        known = expected(key, arch)
        shown = printable(key, 100)
        if known is not None and value.type not in known.types:
            wanted = " or ".join(known.types)
            yield key, f"{shown} is stored as {value.type}; readers want {wanted}."
        elif value.type in FLOAT_FORMATS and not math.isfinite(value.data):
            yield key, f"{shown} is {value.data}, which is no setting."


def _numbers(metadata: Metadata, key: str) -> list[int]:
    """The number, or the numbers layer by layer, under this key."""
    value = metadata.get(key)
    return [] if value is None else np.atleast_1d(value.data).tolist()


def _length(metadata: Metadata, key: str) -> int | None:
    value = metadata.get(key)
    return None if value is None or not value.type.startswith("arr[") else len(value.data)


def _check_vocabulary_length(metadata: Metadata, n_vocab_rows: int | None) -> None:
    n_tokens = _length(metadata, "tokenizer.ggml.tokens")
    if None not in (n_tokens, n_vocab_rows) and n_tokens != n_vocab_rows:
        raise BadRecipe(
            f"The vocabulary has {n_tokens} tokens, the embedding {n_vocab_rows} rows.",
            "llama.cpp takes the one for the other and does not load the file if they differ.",
        )
    for name in ("token_type", "scores"):
        n_items = _length(metadata, f"tokenizer.ggml.{name}")
        if None not in (n_tokens, n_items) and n_items != n_tokens:
            raise BadRecipe(
                f"tokenizer.ggml.{name} has {n_items} items for {n_tokens} tokens.",
                "There must be one for each token.",
            )


def _check_rope_scaling(metadata: Metadata, arch: str) -> list[str]:
    """# ref: llama-model.cpp, load_hparams; llama-context.cpp, the constructor"""
    prefix = f"{arch}.rope.scaling."
    kind = metadata[prefix + "type"].data if prefix + "type" in metadata else None
    factor = number(metadata, prefix + "factor")
    if factor is None:
        factor = number(metadata, f"{arch}.rope.scale_linear")
    if kind is not None and kind not in SCALING_TYPES:
        raise BadRecipe(
            f"{prefix}type is {printable(kind, 40)}; llama.cpp aborts on it.",
            f"It must be one of {', '.join(SCALING_TYPES)}.",
        )
    if factor is not None and not factor >= 1:
        raise BadRecipe(
            f"{prefix}factor is {factor:g}: the context would become shorter.",
            "A factor of 4 makes the context four times as long; it must be at least 1.",
        )
    if kind == "none" or kind is None:
        return _unscaled(prefix, kind, factor)
    if factor is None:
        return [f"{prefix}type is {kind}, but without {prefix}factor nothing is scaled."]
    if kind == "longrope":
        return [
            "longrope needs a tensor of factors, which this file has not: llama.cpp will stretch "
            f"positions linearly by {factor:g}."
        ]
    return _check_yarn_context(metadata, arch, factor) if kind == "yarn" else []


def _unscaled(prefix: str, kind: str | None, factor: float | None) -> list[str]:
    if factor in (None, 1):
        return []
    if kind == "none":
        return [f"{prefix}type is none: the factor {factor:g} has no effect."]
    return [f"{prefix}factor is {factor:g} without {prefix}type: llama.cpp takes it as linear."]


def _check_yarn_context(metadata: Metadata, arch: str, factor: float) -> list[str]:
    context = number(metadata, f"{arch}.context_length")
    original = number(metadata, f"{arch}.rope.scaling.original_context_length")
    if original is None:
        return [
            "YaRN has no rope.scaling.original_context_length; llama.cpp takes context_length "
            f"({context}) for it."
        ]
    reach = round(original * factor)
    if context is not None and context != reach:
        return [
            f"context_length is {context}, but YaRN stretches {original} tokens by {factor:g} to "
            f"{reach}."
        ]
    return []


def _check_attn_factor(metadata: Metadata, arch: str) -> list[str]:
    attn_factor = number(metadata, f"{arch}.rope.scaling.attn_factor")
    if attn_factor is None or attn_factor == 1:
        return []
    kind = metadata.get(f"{arch}.rope.scaling.type")
    factor = number(metadata, f"{arch}.rope.scaling.factor")
    yarn = kind is not None and kind.data == "yarn" and factor is not None and factor >= 1
    own = yarn_magnitude(factor) if yarn else 1.0
    what = (
        f"rope.scaling.attn_factor {attn_factor:g} comes on top of llama.cpp's own "
        f"{own:.4f}: cos and sin are multiplied by {attn_factor * own:.4f} in effect."
    )
    if own > 1 and math.isclose(attn_factor, own, rel_tol=1e-3):
        what += " That is YaRN's 1 + 0.1 ln(factor) twice; leave attn_factor out."
    return [what]


def _check_heads(metadata: Metadata, arch: str) -> list[str]:
    heads = _numbers(metadata, f"{arch}.attention.head_count")
    kv_heads = _numbers(metadata, f"{arch}.attention.head_count_kv") or heads
    if len(kv_heads) == 1:
        kv_heads = kv_heads * len(heads)
    if len(heads) == 1:
        heads = heads * len(kv_heads)
    for n_heads, n_kv_heads in zip(heads, kv_heads, strict=False):
        if n_kv_heads and n_heads % n_kv_heads:
            raise BadRecipe(
                f"{n_heads} attention heads cannot share {n_kv_heads} key and value heads.",
                "head_count must be a multiple of head_count_kv.",
            )
    if arch not in ARCHITECTURES or len(set(heads)) != 1 or heads[0] < 1:
        return []
    embedding = number(metadata, f"{arch}.embedding_length")
    key = number(metadata, f"{arch}.attention.key_length")
    if key is None and embedding is not None and embedding % heads[0]:
        raise BadRecipe(
            f"embedding_length {embedding} is no multiple of {heads[0]} heads.",
            "Without attention.key_length the size of a head is their quotient.",
        )
    if key is None and embedding is not None:
        key = embedding // heads[0]
    for name in ("attention.value_length", "rope.dimension_count"):
        n = number(metadata, f"{arch}.{name}")
        if None not in (n, key) and n != key:
            raise BadRecipe(
                f"{arch}.{name} is {n}, the size of a key head {key}.",
                f"llama.cpp's {arch} aborts unless they are equal.",
            )
    return []


_PER_LAYER = (
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "expert_used_count",
    "expert_feed_forward_length",
)


def _check_layers(metadata: Metadata, arch: str) -> list[str]:
    n_layers = number(metadata, f"{arch}.block_count")
    for name in _PER_LAYER:
        n_items = _length(metadata, f"{arch}.{name}")
        if None not in (n_layers, n_items) and n_items != n_layers:
            raise BadRecipe(
                f"{arch}.{name} has {n_items} items for {n_layers} layers.",
                "llama.cpp wants one number, or one for each layer.",
            )
    return []


def _check_experts(metadata: Metadata, arch: str) -> list[str]:
    """# ref: llama-model.cpp, load_hparams, the GGML_ASSERTs on experts"""
    n_experts = number(metadata, f"{arch}.expert_count") or 0
    used = max(_numbers(metadata, f"{arch}.expert_used_count"), default=0)
    groups = number(metadata, f"{arch}.expert_group_count") or 0
    used_groups = number(metadata, f"{arch}.expert_group_used_count") or 0
    if used > n_experts or (n_experts > 0 and used == 0):
        raise BadRecipe(
            f"{used} of {n_experts} experts are to be used.",
            "At least one must be, and no more than there are; llama.cpp aborts otherwise.",
        )
    fits = groups < n_experts and n_experts % max(groups, 1) == 0
    if groups and not (fits and (groups == 1 or 0 < used_groups < groups)):
        raise BadRecipe(
            f"{used_groups} of {groups} groups of {n_experts} experts are to be used.",
            "Groups must divide the experts, and some but not all be used; llama.cpp aborts "
            "otherwise.",
        )
    return []


def _check_special_ids(metadata: Metadata, n_vocab_rows: int | None) -> list[str]:
    n_tokens = _length(metadata, "tokenizer.ggml.tokens") or n_vocab_rows
    for key in SPECIAL_IDS:
        token = number(metadata, key)
        if None not in (token, n_tokens) and not 0 <= token < n_tokens:
            raise BadRecipe(
                f"{key} is {token}, but the vocabulary ends at {n_tokens - 1}.",
                "llama.cpp would take a default id instead, and the model might never stop.",
            )
    return []


def _ignored_keys(metadata: Metadata, arch: str) -> list[str]:
    if arch not in ARCHITECTURES:
        return []
    return [
        f"llama.cpp's {arch} does not read {printable(key, 100)}: it has no effect."
        for key in metadata
        if key.startswith(f"{arch}.") and not (expected(key, arch) and is_read(key, arch))
    ]
