"""Metadata set by hand, and the rotary settings of config.json: checked before a byte is written.

llama.cpp's own `--override-kv` writes -1 as 1 and "abc" as 0, knows no arrays and no text over 127
bytes, and finds out about a wrong type when the model no longer loads. Here an override is
KEY=TYPE:VALUE with GGUF's real types, held against what the architecture's loader reads.

Rotary scaling has one trap worth the space: YaRN multiplies cos and sin by m = 1 + 0.1 ln(factor),
and llama.cpp does so by itself. `rope.scaling.attn_factor` is a factor on top of m, so a file that
says attn_factor = m, as circulated recipes do, has m twice.
"""

import json
import math
import re
import struct

import numpy as np

from quant.display import printable
from quant.errors import BadInput, BadRecipe, UsageError
from quant.gguf_file import SCALAR_TYPES, Metadata, Value
from quant.metadata_keys import (
    ARCHITECTURES,
    SCALING_TYPES,
    SPECIAL_IDS,
    Key,
    expected,
    is_read,
    nearest,
    objection,
)
from quant.sampling import check_sampling

INTEGER_RANGES = {
    f"{sign}{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if sign == "i" else (0, 2**bits - 1)
    for sign in "ui"
    for bits in (8, 16, 32, 64)
}
FLOAT_FORMATS = {"f32": "<f", "f64": "<d"}
ALIASES = {"int": INTEGER_RANGES, "float": FLOAT_FORMATS}
"""llama.cpp's own words for a type; here they take the width that the key's readers expect."""

SYNTAX = "KEY=TYPE:VALUE"
EXAMPLE = "For example: --override qwen2.context_length=u32:131072"
TYPE_LIST = f"{', '.join(SCALAR_TYPES)}, or arr[TYPE] with a JSON array"
LONGEST_KEY = 65535  # bytes; # ref: ggml/docs/gguf.md, gguf_metadata_kv_t

_INTEGER = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_ARRAY = re.compile(r"arr\[(\w+)\]")
_TYPE_LIKE = re.compile(r"(u?int|float|double|str|bool|arr|[uif])\w*(\[.*\])?", re.IGNORECASE)


# --- text to value ----------------------------------------------------------------------------


def parse_override(text: str, arch: str, current: Metadata | None = None) -> tuple[str, Value]:
    """Key and value of one `--override`: "qwen2.context_length=u32:131072".

    TYPE is one of GGUF's scalar types, arr[TYPE] with a JSON array for VALUE, or llama.cpp's
    `int` and `float`, which take the width the key is known to have. A str is everything behind
    the colon, of any length. `current` is the metadata the file has, whose types are known too.

    Raises UsageError if the text cannot be taken apart, BadRecipe for a value its type cannot
    hold, and for `int` or `float` with a key that is unknown or of another kind.
    """
    key, _, rest = text.partition("=")
    kind, colon, shown = rest.partition(":")
    _check_key(key)
    known = _expected(key, arch, current or {})
    if not (colon and (kind in ALIASES or _is_type(kind))):
        raise _bad_syntax(text, known)
    if kind in ALIASES:
        kind = _width(kind, key, shown, known, arch)
    try:
        return key, Value(kind, _parse(kind, shown))
    except ValueError as error:
        raise BadRecipe(
            f"--override {key}: {printable(shown, 60) or 'nothing'} {error}.",
            f"A value of type {kind} is needed.",
            f"Write --override {key}={kind}:{_example(kind)}, for example.",
        ) from None


def _check_key(key: str) -> None:
    """A key that the container can hold and a person can read. Raises UsageError.

    # ref: gguf.cpp, gguf_init_from_reader: not empty; keys are compared as C strings
    """
    if not key:
        raise UsageError("--override has no key.", f"The form is {SYNTAX}.", EXAMPLE)
    if not key.isprintable() or any(c.isspace() for c in key):
        raise UsageError(
            f'--override: the key "{printable(key, 80)}" has a space or a control character.',
            f"The form is {SYNTAX}, without spaces around = and :.",
            EXAMPLE,
        )
    if len(key.encode()) > LONGEST_KEY:
        raise UsageError(f"--override: a key may have {LONGEST_KEY} bytes; this one has more.")


def _is_type(kind: str) -> bool:
    array = _ARRAY.fullmatch(kind)
    return (array.group(1) if array else kind) in SCALAR_TYPES


def _bad_syntax(text: str, known: Key | None) -> UsageError:
    key, equals, rest = text.partition("=")
    kind, colon, value = rest.partition(":")
    shown = f"--override {printable(key, 80)}"
    if equals and colon:
        what = f'{shown}: "{printable(kind, 40)}" is no type.'
    else:
        what = f"{shown} has no {'TYPE' if equals else 'value'}."
    if not (colon and _TYPE_LIKE.fullmatch(kind)):
        value = rest  # "general.url=https://..." has a colon, but before it no attempt at a type
    hint = f"Write {shown}={known.types[0]}:{printable(value, 60)}" if known and equals else EXAMPLE
    return UsageError(what, f"The form is {SYNTAX}; TYPE is one of {TYPE_LIST}.", hint)


def _width(alias: str, key: str, shown: str, known: Key | None, arch: str) -> str:
    """The type that `int` or `float` stands for with this key."""
    if known is None:
        raise _unknown_key(key, alias, shown, arch)
    for kind in known.types:
        if kind in ALIASES[alias]:
            return kind
    raise _wrong_type(key, alias, shown, known)


def _parse(kind: str, text: str) -> object:
    """`text` as the data of a Value. Raises ValueError, worded to follow the text."""
    array = _ARRAY.fullmatch(kind)
    if array:
        try:
            items = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            items = None
        if not isinstance(items, list):
            raise ValueError("is no JSON array such as [1, 2]")
        return [_fit(array.group(1), item) for item in items]
    if kind in INTEGER_RANGES:
        if not _INTEGER.fullmatch(text) or len(text) > 40:
            raise ValueError("is no whole number")
        return _fit(kind, int(text))
    if kind in FLOAT_FORMATS:
        if not _FLOAT.fullmatch(text):
            raise ValueError("is no number")
        return _fit(kind, float(text))
    if kind == "bool":
        if text not in ("true", "false"):
            raise ValueError("is neither true nor false")
        return text == "true"
    return _fit("str", text)


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _fit(kind: str, item: object) -> object:
    """One item as its scalar type holds it. Raises ValueError if it does not fit."""
    if kind == "str":
        if not isinstance(item, str):
            raise ValueError("has an item that is no text")
        if "\0" in item:
            raise ValueError("has a NUL byte, where readers would cut it off")
        if any("\ud800" <= c <= "\udfff" for c in item):  # what Python makes of broken UTF-8
            raise ValueError("is no UTF-8 text")
        return item
    if kind == "bool":
        if not isinstance(item, bool):
            raise ValueError("has an item that is neither true nor false")
        return item
    if isinstance(item, bool) or not isinstance(item, int | float):
        raise ValueError("has an item that is no number")
    if kind in INTEGER_RANGES:
        low, high = INTEGER_RANGES[kind]
        if not isinstance(item, int):
            raise ValueError("has an item that is no whole number")
        if not low <= item <= high:
            raise ValueError(f"does not fit: {kind} goes from {low} to {high}")
        return item
    layout = FLOAT_FORMATS[kind]
    try:
        (stored,) = struct.unpack(layout, struct.pack(layout, float(item)))
    except OverflowError:
        raise ValueError(f"is too large for {kind}") from None
    if not math.isfinite(stored):
        raise ValueError("is not finite")
    if stored == 0 and item != 0:
        raise ValueError(f"is too small for {kind}: it would be stored as 0")
    return float(item)


def _example(kind: str) -> str:
    array = _ARRAY.fullmatch(kind)
    if array:
        item = _example(array.group(1))
        return f'["{item}"]' if array.group(1) == "str" else f"[{item}]"
    return {"bool": "true", "str": "text", "f32": "0.5", "f64": "0.5"}.get(kind, "1")


# --- values against the schema ----------------------------------------------------------------


def apply_overrides(
    metadata: Metadata, overrides: list[str], arch: str, force: bool = False
) -> Metadata:
    """A copy of `metadata` with every override in it; of two for one key the later one stays.

    Refused, unless `force` insists: a key nobody reads, a type its readers do not accept, a value
    they abort on, and numbers that follow from the weights (block_count ...). Refused always: what
    the container computes (split.*, general.alignment). Raises BadRecipe or UsageError.
    """
    result = dict(metadata)
    for text in overrides:
        key, value = parse_override(text, arch, result)
        shown = text.partition("=")[2].partition(":")[2]
        _check_override(key, value, shown, arch, result, force)
        result[key] = value
    return result


def shorthand_overrides(
    arch: str,
    name: str | None = None,
    rms_eps: float | None = None,
    chat_template: str | None = None,
) -> list[str]:
    """`--name`, `--rms-eps` and the text of `--chat-template FILE`, as overrides."""
    overrides = []
    if name is not None:
        overrides.append(f"general.name=str:{name}")
    if rms_eps is not None:
        overrides.append(f"{arch}.attention.layer_norm_rms_epsilon=f32:{rms_eps!r}")
    if chat_template is not None:
        overrides.append(f"tokenizer.chat_template=str:{chat_template}")
    return overrides


def _expected(key: str, arch: str, current: Metadata) -> Key | None:
    """The schema's entry; for a key it lacks but the file has, the type it has there."""
    known = expected(key, arch)
    if known is None and key in current:
        return Key((current[key].type,), "a key this file has already")
    return known


def _check_override(
    key: str, value: Value, shown: str, arch: str, current: Metadata, force: bool
) -> None:
    """Raise BadRecipe if this value must not stand under this key."""
    known = _expected(key, arch, current)
    same = key in current and _same(current[key], value)
    if known is not None and known.set_by == "container" and not same:
        raise BadRecipe(
            f"{key} cannot be overridden.",
            "It describes how the file is laid out and is computed while it is written.",
        )
    if force or same:
        return
    if known is None:
        raise _unknown_key(key, value.type, shown, arch)
    if value.type not in known.types:
        raise _wrong_type(key, value.type, shown, known)
    why = objection(value, known)
    if why:
        raise BadRecipe(
            f"{key}={value.type}:{printable(shown, 60)} {why}.",
            f"{key}: {known.about}.",
            "--force-override insists.",
        )
    if known.set_by == "tensors":
        raise BadRecipe(
            f"{key} follows from the weights and is {_shown(current.get(key))}.",
            "With another value the file would not load, or would compute something else.",
            "--force-override insists.",
        )


def _same(a: Value, b: Value) -> bool:
    return a.type == b.type and np.array_equal(a.data, b.data)


def _shown(value: Value | None) -> str:
    return "not set" if value is None else printable(value.data, 60)


def _unknown_key(key: str, kind: str, shown: str, arch: str) -> BadRecipe:
    near = nearest(key, arch)
    key = printable(key, 100)
    what = f"No reader of a {printable(arch, 40)} model knows the key {key}."
    insist = "--force-override insists" + (", with an exact type." if kind in ALIASES else ".")
    if near is None:
        return BadRecipe(what, "It would be stored and have no effect.", insist)
    known = expected(near, arch)
    return BadRecipe(
        what,
        f"Did you mean {near}: {known.about}?",
        f"Write --override {near}={known.types[0]}:{printable(shown, 60)}; {insist}",
    )


def _wrong_type(key: str, kind: str, shown: str, known: Key) -> BadRecipe:
    return BadRecipe(
        f"{key} must be {' or '.join(known.types)}, not {kind}.",
        "Readers take a key only in the type they expect; llama.cpp refuses the file otherwise.",
        f"Write --override {key}={known.types[0]}:{printable(shown, 60)}; "
        "--force-override insists.",
    )


# --- the metadata as a whole ------------------------------------------------------------------


def check_metadata(
    metadata: Metadata, arch: str, n_vocab_rows: int | None, force: bool = False
) -> list[str]:
    """Warnings about settings that are ignored or odd, once every override is in.

    `n_vocab_rows` is the number of rows of token_embd, or None where it is not known. Raises
    BadRecipe for what llama.cpp aborts on or computes wrongly; with `force` those are warnings
    too, but for the length of the vocabulary, which the loader takes the embedding's shape from.
    """
    _check_vocabulary_length(metadata, n_vocab_rows)
    warnings = []
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


def _number(metadata: Metadata, key: str) -> float | None:
    """A number under this key; None if there is none or, by force, something else."""
    value = metadata.get(key)
    if value is None or value.type not in (*INTEGER_RANGES, *FLOAT_FORMATS):
        return None
    return value.data


def _numbers(metadata: Metadata, key: str) -> list[float]:
    """The number, or the numbers layer by layer, under this key."""
    value = metadata.get(key)
    if value is None or value.type in ("str", "bool", "arr[str]", "arr[bool]"):
        return []
    return list(value.data) if value.type.startswith("arr[") else [value.data]


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
    factor = _number(metadata, prefix + "factor")
    if factor is None:
        factor = _number(metadata, f"{arch}.rope.scale_linear")
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
    context = _number(metadata, f"{arch}.context_length")
    original = _number(metadata, f"{arch}.rope.scaling.original_context_length")
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
    attn_factor = _number(metadata, f"{arch}.rope.scaling.attn_factor")
    if attn_factor is None or attn_factor == 1:
        return []
    kind = metadata.get(f"{arch}.rope.scaling.type")
    factor = _number(metadata, f"{arch}.rope.scaling.factor")
    own = yarn_magnitude(factor) if kind and kind.data == "yarn" and factor else 1.0
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
    embedding = _number(metadata, f"{arch}.embedding_length")
    key = _number(metadata, f"{arch}.attention.key_length")
    if key is None and embedding is not None and embedding % heads[0]:
        raise BadRecipe(
            f"embedding_length {embedding} is no multiple of {heads[0]} heads.",
            "Without attention.key_length the size of a head is their quotient.",
        )
    if key is None and embedding is not None:
        key = embedding // heads[0]
    for name in ("attention.value_length", "rope.dimension_count"):
        n = _number(metadata, f"{arch}.{name}")
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
    n_layers = _number(metadata, f"{arch}.block_count")
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
    n_experts = _number(metadata, f"{arch}.expert_count") or 0
    used = max(_numbers(metadata, f"{arch}.expert_used_count"), default=0)
    groups = _number(metadata, f"{arch}.expert_group_count") or 0
    used_groups = _number(metadata, f"{arch}.expert_group_used_count") or 0
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
        token = _number(metadata, key)
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


# --- rotary scaling, by option ----------------------------------------------------------------


def yarn_magnitude(factor: float) -> float:
    """YaRN's own factor on cos and sin: 1 + 0.1 ln(factor).

    # ref: YaRN, https://arxiv.org/abs/2309.00071, section 3.4; ggml-cpu/ops.cpp, rope_yarn
    """
    return 1 + 0.1 * math.log(factor)


def rope_overrides(
    arch: str,
    scaling: str | None,
    factor: float | None,
    original_context: int | None,
    theta: float | None,
    context_length: int | None,
    current: Metadata,
) -> Metadata:
    """A copy of `current` with `--rope-scaling`, `--rope-theta` and `--context-length` applied.

    A new scaling replaces all of the old one. "yarn" raises context_length to original_context *
    factor unless it is given, and writes no attn_factor: llama.cpp multiplies by YaRN's magnitude
    itself. "none" removes scaling (Llama 3's way, a tensor rope_freqs, is no metadata and stays).

    Raises UsageError for options that do not go together, BadRecipe for values out of range.
    """
    metadata, prefix = dict(current), f"{arch}.rope."
    new: Metadata = {}
    if scaling is not None:
        for key in current:
            if key.startswith(f"{prefix}scaling.") or key == f"{prefix}scale_linear":
                del metadata[key]
        new.update(_scaling(arch, scaling, factor, original_context))
        if scaling == "yarn" and context_length is None:
            had = _number(current, f"{arch}.context_length") or 0
            context_length = max(had, round(original_context * factor))
    elif factor is not None or original_context is not None:
        raise UsageError(
            "--rope-factor and --rope-original-context need --rope-scaling.",
            "A factor can mean YaRN or linear interpolation.",
            "Add --rope-scaling yarn or --rope-scaling linear.",
        )
    if theta is not None:
        new[f"{prefix}freq_base"] = Value("f32", float(theta))
    if context_length is not None:
        new[f"{arch}.context_length"] = Value("u32", context_length)
    for key, value in new.items():
        _check_override(key, value, f"{value.data}", arch, metadata, force=False)
    return metadata | new


def _scaling(
    arch: str, scaling: str, factor: float | None, original_context: int | None
) -> Metadata:
    prefix = f"{arch}.rope.scaling."
    if scaling not in ("none", "linear", "yarn"):
        raise UsageError(
            f'--rope-scaling "{printable(scaling, 40)}" is unknown.',
            "It is one of none, linear and yarn.",
        )
    if scaling == "none":
        if factor is not None or original_context is not None:
            raise UsageError("--rope-scaling none takes no factor and no original context.")
        return {}
    if factor is None or not math.isfinite(factor):
        raise UsageError(
            f"--rope-scaling {scaling} needs --rope-factor, a finite number of at least 1.",
            "It says how many times longer the context becomes.",
        )
    if scaling == "linear":
        if original_context is not None:
            raise UsageError(
                "--rope-original-context is read for YaRN only.",
                "Linear scaling stretches every position alike.",
                "Leave it out, or choose --rope-scaling yarn.",
            )
        return {
            prefix + "type": Value("str", "linear"),
            prefix + "factor": Value("f32", float(factor)),
        }
    if original_context is None:
        raise UsageError(
            "--rope-scaling yarn needs --rope-original-context.",
            "It is the context length the model was trained at (32768 for QwQ-32B), which is not "
            "always what config.json gives.",
        )
    return {
        prefix + "type": Value("str", "yarn"),
        prefix + "factor": Value("f32", float(factor)),
        prefix + "original_context_length": Value("u32", original_context),
    }


# --- rotary settings of config.json -----------------------------------------------------------

DEFAULT_THETA = {"mixtral": 1e6}
"""What transformers takes where config.json has no rope_theta, if it is not 10000, by model_type.

# ref: transformers, RotaryEmbeddingConfigMixin.default_theta and its overrides
"""

UNSUPPORTED_SCALING = "It is one of default, linear, yarn, llama3 and dynamic."


def rope_metadata(config: dict, arch: str) -> tuple[Metadata, list[str]]:
    """The `{arch}.rope.*` keys for config.json's rotary settings, and warnings.

    Reads transformers 4's `rope_theta` with `rope_scaling` and transformers 5's `rope_parameters`.
    With YaRN, context_length is among the keys when max_position_embeddings is less than what the
    scaling reaches. `llama3` needs no keys but a tensor: llama3_rope_factors().

    Raises BadInput for scaling llama.cpp cannot do with this architecture, and for contradictions.
    """
    parameters, warnings = _rope_parameters(config)
    theta = _positive(parameters, "rope_theta")
    metadata = {f"{arch}.rope.freq_base": Value("f32", theta)}
    kind = parameters["rope_type"]
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (
        None,
        1,
    ):
        raise _bad_rope(
            "partial_rotary_factor is not 1", f"llama.cpp's {arch} rotates whole heads."
        )
    if kind == "default" or (kind == "llama3" and arch == "llama"):
        return metadata, warnings
    if kind == "dynamic":
        length = printable(config.get("max_position_embeddings"), 40)
        warnings.append(
            f"rope_type dynamic is left out: llama.cpp has none. Up to {length} tokens there is no "
            "difference; do not go beyond."
        )
        return metadata, warnings
    if kind == "linear":
        factor = _positive(parameters, "factor", at_least=1)
        metadata[f"{arch}.rope.scaling.type"] = Value("str", "linear")
        metadata[f"{arch}.rope.scaling.factor"] = Value("f32", factor)
        return metadata, warnings
    if kind == "yarn":
        yarn, more = _yarn_metadata(config, parameters)
        metadata.update({f"{arch}.{name}": value for name, value in yarn.items()})
        return metadata, warnings + more
    if kind == "llama3":
        raise _bad_rope("rope_type is llama3", f"llama.cpp's {arch} has no such factors.")
    raise _bad_rope(f"rope_type is {printable(kind, 40)}", UNSUPPORTED_SCALING)


def _yarn_metadata(config: dict, parameters: dict) -> tuple[Metadata, list[str]]:
    """YaRN's keys without their architecture, and warnings for what they cannot say.

    HF multiplies cos and sin by `attention_factor`, llama.cpp by attn_factor * m with
    m = 1 + 0.1 ln(factor); so attn_factor = attention_factor / m. HF's default attention_factor is
    m itself: then attn_factor is 1, which is llama.cpp's default, and is not written.
    # ref: transformers, _compute_yarn_parameters; llama-context.cpp, the constructor
    """
    warnings = []
    factor = _positive(parameters, "factor", at_least=1)
    longest = config.get("max_position_embeddings")
    original = config.get(
        "original_max_position_embeddings", parameters.get("original_max_position_embeddings")
    )
    if original is None:
        original = longest
        warnings.append(
            "YaRN has no original_max_position_embeddings; max_position_embeddings "
            f"({printable(longest, 40)}) is taken for it, as transformers does."
        )
    for name, value in (("max_position", longest), ("original_max_position", original)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise _bad_rope(f"{name}_embeddings is {printable(value, 40)}", "It must be a count.")
    metadata = {
        "rope.scaling.type": Value("str", "yarn"),
        "rope.scaling.factor": Value("f32", factor),
        "rope.scaling.original_context_length": Value("u32", original),
    }
    magnitude = yarn_magnitude(factor)
    attention_factor = _attention_factor(parameters, factor)
    if not math.isclose(attention_factor, magnitude, rel_tol=1e-6):
        metadata["rope.scaling.attn_factor"] = Value("f32", attention_factor / magnitude)
    for name, fixed in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
        value = parameters.get(name)
        if value is not None and value != fixed:
            warnings.append(
                f"YaRN's {name} is {printable(value, 40)} in config.json; llama.cpp takes {fixed} "
                "and GGUF has no key it would read for it."
            )
    reach = round(original * factor)
    if reach > longest:
        metadata["context_length"] = Value("u32", reach)
        warnings.append(
            f"context_length is {reach}, YaRN's {original} x {factor:g}; config.json's "
            f"max_position_embeddings is {longest}."
        )
    return metadata, warnings


def _attention_factor(parameters: dict, factor: float) -> float:
    """What HF multiplies cos and sin by. # ref: transformers, _compute_yarn_parameters"""
    if "attention_factor" in parameters:
        return _positive(parameters, "attention_factor")
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        log = 0.1 * math.log(factor)
        mscale, all_dim = _positive(parameters, "mscale"), _positive(parameters, "mscale_all_dim")
        return (mscale * log + 1) / (all_dim * log + 1)
    return yarn_magnitude(factor)


def llama3_rope_factors(config: dict) -> np.ndarray | None:
    """Llama 3.1's divisor of each rotary frequency, float32 (head_dim / 2,); None if not llama3.

    With wavelength l = 2 pi / frequency, the trained context L, and b, a = low_freq_factor,
    high_freq_factor: 1 where l < L / a, `factor` where l > L / b, and between them
    1 / ((1 - s) / factor + s) with s = (L / l - b) / (a - b). It is the tensor rope_freqs.weight.
    # ref: transformers, _compute_llama3_parameters; llama.cpp, conversion/llama.py
    """
    parameters, _ = _rope_parameters(config)
    if parameters["rope_type"] != "llama3":
        return None
    theta, factor = _positive(parameters, "rope_theta"), _positive(parameters, "factor")
    low, high = _positive(parameters, "low_freq_factor"), _positive(parameters, "high_freq_factor")
    if high <= low:
        raise _bad_rope("high_freq_factor is not above low_freq_factor", "It must be.")
    parameters.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    context = _positive(parameters, "original_max_position_embeddings")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    frequency = theta ** -(np.arange(0, head_dim, 2) / head_dim)  # (head_dim / 2,)
    turns = context * frequency / (2 * np.pi)  # rotations within the trained context: L / l
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _rope_parameters(config: dict) -> tuple[dict, list[str]]:
    """One dict with rope_type and rope_theta, from either place; and warnings."""
    legacy = _one_dict(config.get("rope_scaling"), "rope_scaling")
    new = _one_dict(config.get("rope_parameters"), "rope_parameters")
    thetas = [p["rope_theta"] for p in (new, legacy, config) if p.get("rope_theta") is not None]
    differing = [theta for theta in thetas if theta != thetas[0]]
    if differing:
        raise _contradiction("rope_theta", thetas[0], differing[0])
    for name in sorted((legacy.keys() | new.keys()) - {"rope_theta"}) if legacy and new else ():
        if legacy.get(name) != new.get(name):
            raise _contradiction(name, new.get(name), legacy.get(name))
    parameters = {"rope_type": "default", **legacy, **new}
    if thetas:
        return {**parameters, "rope_theta": thetas[0]}, []
    model_type = config.get("model_type")
    theta = DEFAULT_THETA.get(str(model_type), 10000.0)
    return {**parameters, "rope_theta": theta}, [
        f"config.json has no rope_theta; {theta:g} is taken, which is transformers' default for "
        f"{printable(model_type, 40)}."
    ]


def _one_dict(parameters: object, place: str) -> dict:
    """Rotary parameters with `rope_type` spelled so and nulls dropped; one dict for all layers."""
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise _bad_rope(f"{place} is {printable(parameters, 40)}", "It must be an object or null.")
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    if nested:
        if any(p != nested[0] for p in nested):
            raise _bad_rope(
                f"{place} differs from layer to layer",
                "The architectures that can be converted have one setting for all.",
            )
        parameters = nested[0]
    parameters = {name: value for name, value in parameters.items() if value is not None}
    legacy = parameters.pop("type", "default")
    if parameters:
        parameters.setdefault("rope_type", legacy)
    elif legacy != "default":
        parameters = {"rope_type": legacy}
    return parameters


def _positive(parameters: dict, name: str, at_least: float = 0) -> float:
    """A finite number above 0 and not below `at_least`. Raises BadInput."""
    value = parameters.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        what = f"{name} is missing" if value is None else f"{name} is {printable(value, 40)}"
        raise _bad_rope(what, "A number is needed.")
    if not 0 < value < 1e30 or value < at_least:
        limit = f"at least {at_least:g}" if at_least else "above 0"
        raise _bad_rope(f"{name} is {printable(value, 40)}", f"It must be finite and {limit}.")
    return float(value)


def _contradiction(name: str, a: object, b: object) -> BadInput:
    a, b = ("missing" if value is None else printable(value, 40) for value in (a, b))
    return _bad_rope(
        f"{printable(name, 40)} is {a} in one place and {b} in another",
        "It stands in rope_parameters (transformers 5), rope_scaling or the top level (4), and "
        "programs differ in which they read.",
    )


def _bad_rope(what: str, why: str) -> BadInput:
    return BadInput(f"In config.json, {what}.", why, "Correct config.json in a copy of the folder.")
