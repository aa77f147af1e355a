"""Special tokens: those with a part to play, such as bos before a text, eos and eot after it.

They decide where generation stops and how a prompt begins. tokenizer_config.json and
special_tokens_map.json name them by text, generation_config.json and config.json by id. A GGUF file
holds one id for each part, and llama.cpp guesses what it does not hold: by texts that it knows, in
no fixed order, or by numbers of its own. So what a checkpoint says is written, what it leaves open
is settled where it is certain, and where its files disagree a note says which one was followed.

# ref: src/llama-vocab.cpp, llama_vocab::impl::load
"""

from itertools import chain

from quant.display import printable
from quant.errors import BadInput
from quant.vocabulary.draft import CONTROL, Draft, quoted, some
from quant.vocabulary.tokenizer_json import flatten

SPECIAL_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # GGUF's spelling
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
"""tokenizer_config.json's `<kind>_token` -> the GGUF key that holds its id."""

TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|eot|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
)
"""Tokens that end a turn in chat templates, and nothing else."""

END_TEXTS = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
        "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
        "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
        "<｜end▁of▁sentence｜>", "[e~[",
    )
)  # fmt: skip
"""Tokens at which llama.cpp stops generating because of their text, whatever a file says."""

FIM_KEYS = {
    "<|fim_prefix|>": "fim_pre_token_id",
    "<|fim_suffix|>": "fim_suf_token_id",
    "<|fim_middle|>": "fim_mid_token_id",
    "<|fim_pad|>": "fim_pad_token_id",
    "<|repo_name|>": "fim_rep_token_id",
    "<|file_sep|>": "fim_sep_token_id",
    "<fim_prefix>": "fim_pre_token_id",
    "<fim_suffix>": "fim_suf_token_id",
    "<fim_middle>": "fim_mid_token_id",
    "<fim_pad>": "fim_pad_token_id",
    "<｜fim▁begin｜>": "fim_pre_token_id",
    "<｜fim▁hole｜>": "fim_suf_token_id",
    "<｜fim▁end｜>": "fim_mid_token_id",
}
"""Tokens for filling in the middle of code (Qwen's, StarCoder's, DeepSeek's) -> their GGUF keys."""


def read_named_tokens(checkpoint, config: dict) -> dict[str, str]:
    """Kind -> text of the tokens that tokenizer_config.json gives a part: {"eos": "<|im_end|>"}."""
    older = checkpoint.read_json("special_tokens_map.json") or {}
    named = {
        kind: _content(config.get(f"{kind}_token", older.get(f"{kind}_token")))
        for kind in SPECIAL_KEYS
    }
    return {kind: text for kind, text in named.items() if text}


def _content(entry: object) -> str | None:
    """The text of a token written as text or as {"content": text}."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def read_special_ids(checkpoint, draft: Draft, template: str, n_rows: int) -> dict[str, int]:
    """GGUF key -> id. The tokenizer's own names come first, then the ids of the config files.

    `template` is the chat template, or "". Raises BadInput for an id of no row.
    """
    generation = checkpoint.read_json("generation_config.json") or {}
    nested = checkpoint.config.get("text_config")
    config = {**(nested if isinstance(nested, dict) else {}), **checkpoint.config}
    texts = {token: text for text, token in draft.ids.items()}
    special_ids = {}
    for kind, key in SPECIAL_KEYS.items():
        stated = {
            "generation_config.json": _ids(generation.get(f"{kind}_token_id")),
            "config.json": _ids(config.get(f"{kind}_token_id")),
        }
        token = _named_or_stated(draft, kind, stated)
        if token is None:
            continue
        if token >= n_rows:
            raise BadInput(
                f"The {kind} token has id {token}, the model's embedding {n_rows} rows.",
                "generation_config.json or config.json states an id that the model does not have.",
                f"Correct {kind}_token_id there.",
            )
        special_ids[key] = token
        draft.notes += [
            f"{file_name} says {kind}_token_id {ids[0]} ({printable(texts.get(ids[0]))}); "
            f"{token} ({printable(texts.get(token))}) is written."
            for file_name, ids in stated.items()
            if ids and token not in ids
        ]
    _add_missing_ends(draft, special_ids, template)
    special_ids |= _turn_ends(draft, special_ids, texts, template)
    for text, key in FIM_KEYS.items():
        if draft.types.get(draft.ids.get(text)) == CONTROL:
            special_ids.setdefault(key, draft.ids[text])
    _note_further_ends(draft, special_ids, texts, _ids(generation.get("eos_token_id")))
    return special_ids


def _ids(value: object) -> list[int]:
    """The ids in a config entry: a number, a list of numbers, or nothing usable."""
    values = value if isinstance(value, list) else [value]
    return [token for token in values if type(token) is int and token >= 0]


def _named_or_stated(draft: Draft, kind: str, stated: dict[str, list[int]]) -> int | None:
    """The id of the token that the tokenizer names, else the first that a config file states."""
    token = draft.ids.get(draft.named.get(kind))
    if kind in draft.named and token is None:
        draft.notes.append(
            f"{kind}_token {quoted(draft.named[kind])} is not in the vocabulary; it is left out."
        )
    return next(chain(*stated.values()), None) if token is None else token


def _add_missing_ends(draft: Draft, special_ids: dict[str, int], template: str) -> None:
    """Name an eos and a bos where the checkpoint has none, for llama.cpp would take token 11.

    That is its default in byte-level vocabularies ("," in GPT-2's): generation would stop at every
    comma, and a chat template that writes `bos_token` would write one. A file cannot say "none":
    ids out of range are ignored. So the end of text is a control token, and the beginning is the
    end, which stands between documents in training; it is put before no prompt, for
    add_bos_token is false without a bos.

    # ref: llama-vocab.cpp, special_bos_id = 11; common/chat.cpp, common_chat_templates_init
    """
    if "eos_token_id" not in special_ids:
        controls = [text for text, token in draft.ids.items() if draft.types[token] == CONTROL]
        text = next((text for text in controls if text in END_TEXTS), *controls[:1] or [None])
        if text is not None:
            special_ids["eos_token_id"] = draft.ids[text]
        draft.notes.append(
            "The checkpoint names no token that ends text; llama.cpp will stop at "
            + (f"{quoted(text)}." if text else "its default: token 11, or 2 of SentencePiece.")
        )
    if "bos" not in draft.named and "bos_token" in template:
        draft.notes.append(
            "The chat template writes bos_token, and the tokenizer has none: transformers writes "
            "nothing there, llama.cpp some token."
        )
    if "eos_token_id" in special_ids:
        special_ids.setdefault("bos_token_id", special_ids["eos_token_id"])


def _turn_ends(
    draft: Draft, special_ids: dict[str, int], texts: dict[int, str], template: str
) -> dict[str, int]:
    """eot_token_id and eom_token_id, where they are certain.

    Without them llama.cpp takes the first text it knows in the order of a hash table: for a Qwen
    model <|im_end|> on one machine and <|endoftext|> on another.
    """
    found = {}
    if "<|eom_id|>" in draft.ids:  # Llama 3.1: the end of a message that calls a tool
        found["eom_token_id"] = draft.ids["<|eom_id|>"]
    eos = special_ids.get("eos_token_id")
    written = [text for text in TURN_ENDS if text in template and text in draft.ids]
    if len(written) == 1:
        found["eot_token_id"] = draft.ids[written[0]]
    elif texts.get(eos) in written or (not written and _ends_with_eos(texts.get(eos), template)):
        found["eot_token_id"] = eos
    return found


def _ends_with_eos(eos: str | None, template: str) -> bool:
    """Whether a turn ends with the end-of-text token, as far as the template's text shows."""
    return eos in END_TEXTS or (eos is not None and ("eos_token" in template or eos in template))


def _note_further_ends(
    draft: Draft, special_ids: dict[str, int], texts: dict[int, str], stops: list[int]
) -> None:
    """Say at which of generation_config.json's `stops` llama.cpp will not stop."""
    ends = {special_ids.get(f"{kind}_token_id") for kind in ("eos", "eot", "eom")}
    unknown = [
        f"{printable(texts.get(token))} ({token})"
        for token in stops
        if token not in ends and texts.get(token) not in END_TEXTS
    ]
    if unknown:
        draft.notes.append("A GGUF file cannot say that generation also stops at " + some(unknown))


def read_bos_eos_flags(draft: Draft, tokenizer: dict | None, config: dict) -> dict[str, bool]:
    """add_bos_token and add_eos_token: what is put around every text. May name the two tokens.

    Either place counts. tokenizer.json's post_processor is what transformers applies; but the
    Llama class of transformers 4, for which DeepSeek's distilled models were published, applied
    `add_bos_token` of tokenizer_config.json without it.
    """
    flags = {}
    ends = _template_ends(tokenizer or {})
    for kind, where in (("bos", "before"), ("eos", "after")):
        texts, key = ends[kind], f"add_{kind}_token"
        if len(texts) == 1:
            draft.named.setdefault(kind, texts[0])
        stated = config.get(key, tokenizer is None and kind == "bos")
        applied = bool(texts) and texts == [draft.named.get(kind)]
        flags[key] = draft.named.get(kind) in draft.ids and (
            applied or (stated is True and not texts)
        )
        if texts and not applied:
            draft.notes.append(
                f"transformers puts {printable(' '.join(texts))} {where} every text; llama.cpp can "
                f"put only the {kind} token there, so nothing is put."
            )
        if tokenizer is not None and key in config and stated is not applied:
            said = printable(stated, 40).lower()
            draft.notes.append(
                f"tokenizer_config.json says {key} {said}, tokenizer.json's "
                f"post_processor {str(applied).lower()}; {str(flags[key]).lower()} is written."
            )
    return flags


def _template_ends(tokenizer: dict) -> dict[str, list[str]]:
    """The special tokens that the post_processor puts before ("bos") and after ("eos") a text."""
    before, after = [], []
    for part in flatten(tokenizer.get("post_processor"), "processors"):
        side = before
        single = part.get("single")
        for entry in single if isinstance(single, list) else []:
            token = entry.get("SpecialToken") if isinstance(entry, dict) else None
            if isinstance(token, dict):
                side.append(str(token.get("id")))
            else:  # {"Sequence": ...}, the text itself
                side = after
    return {"bos": before, "eos": after}
