"""How one talks with a model: its tokens, its chat template, and how its answers are sampled.

A model gives bad answers when any of the three is wrong, and neither sizes nor types show it.
A checkpoint's files are translated to GGUF's keys first, by the code that to-gguf uses, and the
facts are taken from those keys. Chat templates are programs: they are measured, never run.
"""

import hashlib
from collections.abc import Mapping

import numpy as np

from quant.checkpoint import Checkpoint
from quant.errors import QwqQuantError
from quant.gguf_file import Metadata, Value
from quant.inspection.facts import Fact, Section, plain, plain_fact, reason, text_at, texts_at
from quant.sampling import PREFIX as SAMPLING_PREFIX
from quant.sampling import sampling_from_generation_config
from quant.vocabulary.chat_templates import read_chat_templates
from quant.vocabulary.draft import UNUSED
from quant.vocabulary.special_tokens import SPECIAL_KEYS

TOKENS = "tokenizer.ggml.tokens"
CHAT_TEMPLATE = "tokenizer.chat_template"
SPECIAL = {kind: f"tokenizer.ggml.{key}" for kind, key in SPECIAL_KEYS.items()}
SPECIAL["eot"] = "tokenizer.ggml.eot_token_id"
SHOWN_SPECIAL = ("bos", "eos", "eot", "pad", "unk")


# --- tokenizer --------------------------------------------------------------------------------


def tokenizer_section(metadata: Metadata, problem: str = "") -> Section:
    """Facts from the `tokenizer.*` keys; none where there are no tokens."""
    if TOKENS not in metadata:
        return Section("Tokenizer", (), problem or "The file has no vocabulary.")
    return Section("Tokenizer", _tokenizer_facts(metadata), problem)


def _tokenizer_facts(metadata: Metadata) -> tuple[Fact, ...]:
    tokens = texts_at(metadata, TOKENS)
    merges = texts_at(metadata, "tokenizer.ggml.merges")
    types = metadata.get("tokenizer.ggml.token_type", Value("arr[i32]", [])).data
    n_unused = int(np.count_nonzero(np.asarray(types) == UNUSED))
    digest = _digest(*tokens, *merges)
    return (
        plain_fact("model", text_at(metadata, "tokenizer.ggml.model")),
        plain_fact("pre_tokenizer", text_at(metadata, "tokenizer.ggml.pre"), "pre-tokenizer"),
        plain_fact("tokens", len(tokens)),
        plain_fact("unused_tokens", n_unused),
        plain_fact("merges", len(merges)),
        Fact("sha256", digest, digest[:12], "sha256 of tokens"),
        *(_token_fact(kind, metadata, tokens) for kind in SHOWN_SPECIAL),
        _flag(metadata, "add_bos", "adds bos"),
        _flag(metadata, "add_eos", "adds eos"),
    )


def _digest(*texts: str) -> str:
    """SHA-256 in hexadecimal; people are shown 12 digits of it, enough to tell two texts apart."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def _flag(metadata: Metadata, key: str, label: str) -> Fact:
    value = metadata.get(f"tokenizer.ggml.{key}_token")
    return plain_fact(key, None if value is None else value.data, label)


def _token_fact(kind: str, metadata: Metadata, tokens: list[str]) -> Fact:
    value = metadata.get(SPECIAL[kind])
    if value is None:
        return Fact(kind, None, "none")
    return Fact(kind, _token(value.data, tokens), _token_text(value.data, tokens))


def _token(token: object, tokens: list[str]) -> dict:
    """{"id": 4093, "text": "<|im_end|>"}; the text is None for an id that no token has."""
    known = isinstance(token, int) and 0 <= token < len(tokens)
    return {"id": plain(token), "text": tokens[token] if known else None}


def _token_text(token: object, tokens: list[str]) -> str:
    text = _token(token, tokens)["text"]
    return f"{plain(token)} {text if text is not None else '(no such token)'}"


# --- chat template ----------------------------------------------------------------------------


def checkpoint_templates(checkpoint: Checkpoint) -> Section:
    """The templates that to-gguf would store."""
    try:
        return _template_section(read_chat_templates(checkpoint))
    except QwqQuantError as error:
        return Section("Chat template", (), reason(error))


def gguf_templates(metadata: Metadata) -> Section:
    """The templates a GGUF file holds; the unnamed one is "default"."""
    found = {
        key.removeprefix(CHAT_TEMPLATE).removeprefix(".") or "default": value.data
        for key, value in metadata.items()
        if key == CHAT_TEMPLATE or key.startswith(f"{CHAT_TEMPLATE}.")
    }
    return _template_section({n: text for n, text in found.items() if isinstance(text, str)})


def _template_section(templates: Mapping[str, str]) -> Section:
    """Each template by length and hash, and how it has an answer begin."""
    if not templates:
        return Section("Chat template", (Fact("default", None, "none"),))
    ordered = sorted(templates.items(), key=lambda item: item[0] != "default")
    return Section("Chat template", tuple(_template_fact(name, text) for name, text in ordered))


def _template_fact(name: str, template: str) -> Fact:
    digest, opens = _digest(template), opens_think(template)
    text = f"{len(template):,} characters, sha256 {digest[:12]}"
    return Fact(
        name,
        {"length": len(template), "sha256": digest, "opens_think": opens},
        text + (", opens <think>" if opens else ""),
        name,
    )


def opens_think(template: str) -> bool:
    """Whether the prompt it makes for an answer ends in an open <think>, as QwQ's does.

    A search in the text behind the last `add_generation_prompt`: a <think> that nothing closes.
    The model's answer then lacks the tag, which is a common surprise.
    """
    _, found, tail = template.rpartition("add_generation_prompt")
    return bool(found) and tail.rfind("<think>") > tail.rfind("</think>")


# --- generation -------------------------------------------------------------------------------


def checkpoint_generation(checkpoint: Checkpoint, config: Mapping, tokens: list[str]) -> Section:
    """The settings that to-gguf would store, and the ids that end an answer."""
    problem, facts = "", ()
    try:
        generation = checkpoint.read_json("generation_config.json") or {}
        facts = _sampling_facts(sampling_from_generation_config(generation))
    except QwqQuantError as error:
        generation, problem = {}, reason(error)
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    text = ", ".join(_token_text(end, tokens) for end in ends[:8]) or "not stated"
    stops = Fact("stop_tokens", [plain(end) for end in ends], text, own=True)
    return Section("Generation", (*facts, stops), problem)


def gguf_generation(metadata: Metadata) -> Section:
    """The settings a GGUF file holds."""
    return Section("Generation", _sampling_facts(metadata))


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
    return tuple(
        plain_fact(name, value, labels.get(name, name)) for name, value in settings.items()
    )
