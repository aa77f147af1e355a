"""Metadata set by hand: `--override KEY=TYPE:VALUE`, checked before a byte is written.

llama.cpp's own `--override-kv` writes -1 as 1 and "abc" as 0, knows no arrays and no text over 127
bytes, and finds out about a wrong type when the model no longer loads. Here an override is
KEY=TYPE:VALUE with GGUF's real types, held against what the architecture's loader reads.
"""

import json
import math
import re
import struct

import numpy as np

from quant.display import printable
from quant.errors import BadRecipe, UsageError
from quant.gguf_file import SCALAR_TYPES, Metadata, Value
from quant.metadata_keys import (
    Key,
    expected,
    nearest,
    objection,
)

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
        check_override(key, value, shown, arch, result, force)
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


def check_override(
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
    known = None if near is None else expected(near, arch)
    if known is None:
        return BadRecipe(what, "It would be stored and have no effect.", insist)
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


def number(metadata: Metadata, key: str) -> float | None:
    """A number under this key; None if there is none or, by force, something else."""
    value = metadata.get(key)
    if value is None or value.type not in (*INTEGER_RANGES, *FLOAT_FORMATS):
        return None
    return value.data
