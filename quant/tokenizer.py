"""A Hugging Face tokenizer -> the vocabulary that a GGUF file carries.

llama.cpp has two tokenizers that matter here, and GGUF names each after its first model:

"gpt2"   byte-level BPE (GPT-2, Llama 3, Qwen, QwQ): text is cut into words (pre_tokenizers.py),
         bytes are spelled as 256 letters, and neighbours are merged, lowest rank first.
"llama"  SentencePiece BPE (Llama 2, Mistral 7B): a space is "▁", and the neighbours whose union has
         the highest score are joined; what no piece covers becomes byte tokens such as <0x0A>.

The aim is one thing: every text gets the same ids in llama.cpp as in transformers. Where a GGUF
file cannot say what Hugging Face's files say, a note says so in plain words; where the result would
be another tokenizer, it is an error.

tokenizer.json is read as JSON: 152,000 tokens take a third of a second, and nothing is imported.

# ref: src/llama-vocab.cpp, llama_vocab::impl::load and tokenizer_st_partition; gguf-py, vocab.py
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

from quant.display import printable
from quant.errors import BadInput, InputMissing, UsageError
from quant.gguf_file import Metadata, Value
from quant.pre_tokenizers import choose_pre_tokenizer, flatten

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's token types; SentencePiece numbers its pieces the same way.

CONTROL tokens are found in text only where special tokens are asked for, and print as nothing;
USER_DEFINED ones are found always and print as they are: Hugging Face's added tokens with `special`
true and false. UNUSED fill the rows of the embedding that no token has.
"""

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

_UNLIKELY = -1e9
"""The score of a piece that must never be chosen to join two others."""

_DAMAGED = (
    "The file is damaged, or was made by hand.",
    "Download it again, or save it with the program that made it.",
)


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about tokens; `tokens` has one entry for each row of the embedding.

    special_ids: GGUF key -> id, "eos_token_id": 151645; flags: GGUF key -> bool, "add_bos_token".
    chat_templates: name -> Jinja text, "default" for the one that chat uses. notes: what llama.cpp
    does otherwise than transformers, for the user to read.
    """

    model: str  # "gpt2" or "llama"
    pre: str
    tokens: list[str]
    token_types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special_ids: dict[str, int]
    flags: dict[str, bool]
    chat_templates: dict[str, str]
    notes: tuple[str, ...]

    def metadata(self) -> Metadata:
        """Every `tokenizer.*` key, typed as llama.cpp's loader demands.

        # ref: gguf-py, GGUFWriter.add_chat_template, for the names of further templates
        """
        pairs = {
            "ggml.model": Value("str", self.model),
            "ggml.pre": Value("str", self.pre),
            "ggml.tokens": Value("arr[str]", self.tokens),
            "ggml.token_type": Value("arr[i32]", self.token_types),
        }
        if self.scores is not None:
            pairs["ggml.scores"] = Value("arr[f32]", self.scores)
        if self.merges is not None:
            pairs["ggml.merges"] = Value("arr[str]", self.merges)
        pairs |= {f"ggml.{key}": Value("u32", token) for key, token in self.special_ids.items()}
        pairs |= {f"ggml.{key}": Value("bool", flag) for key, flag in self.flags.items()}
        named = {
            re.sub(r"[^A-Za-z0-9]", "_", name): text
            for name, text in self.chat_templates.items()
            if name
        }
        if "default" in named:
            pairs["chat_template"] = Value("str", named.pop("default"))
        if named:
            pairs["chat_templates"] = Value("arr[str]", list(named))
        pairs |= {f"chat_template.{name}": Value("str", text) for name, text in named.items()}
        return {f"tokenizer.{key}": value for key, value in pairs.items()}


def read_vocabulary(checkpoint, n_rows: int, pre_tokenizer: str | None = None) -> Vocabulary:
    """The vocabulary of a checkpoint whose embedding has `n_rows` rows.

    `pre_tokenizer` names llama.cpp's pre-tokenizer instead of recognising it (byte-level BPE only).
    Raises InputMissing without tokenizer.json and tokenizer.model, BadInput if they are damaged, do
    not fit the embedding or are of a kind that llama.cpp cannot reproduce.
    """
    tokenizer = checkpoint.read_json("tokenizer.json")
    config = checkpoint.read_json("tokenizer_config.json") or {}
    added = _read_added_tokens(checkpoint, tokenizer, config)
    templates = read_chat_templates(checkpoint)
    if tokenizer is not None and _is_byte_level(tokenizer):
        draft = _byte_level(tokenizer, pre_tokenizer)
    elif pre_tokenizer is None:
        draft = _sentencepiece(checkpoint, tokenizer, config)
    else:
        raise UsageError(
            "--pre-tokenizer does not apply to this tokenizer.",
            "It is of SentencePiece's kind, which does not cut text into words first.",
            "Leave the option out.",
        )
    draft.named |= _named_tokens(checkpoint, config)
    _place_added(draft, added)
    _note_flags(draft, added, tokenizer)
    if draft.model == "llama":
        _check_byte_tokens(draft)
    tokens, types = _rows(draft, n_rows)
    flags = _read_ends(draft, tokenizer, config) | draft.flags
    special_ids = _special_ids(checkpoint, draft, templates.get("default", ""), n_rows)
    scores = draft.scores and [draft.scores.get(i, _UNLIKELY) for i in range(n_rows)]
    return Vocabulary(
        draft.model, draft.pre, tokens, types, scores, draft.merges,
        special_ids, flags, templates, tuple(draft.notes),
    )  # fmt: skip


def read_chat_templates(checkpoint) -> dict[str, str]:
    """Name -> Jinja text of every chat template; "default" is the one chat uses. Never rendered.

    As in transformers 5: template files, if there is any, replace what tokenizer_config.json holds.
    chat_template.json, a processor's file, counts only where there is nothing else.

    # ref: transformers, tokenization_utils_base.py, PreTrainedTokenizerBase._from_pretrained
    """
    files = {"default": "chat_template.jinja"}
    folder = checkpoint.folder / "additional_chat_templates"
    for path in sorted(folder.glob("*.jinja")):
        files[path.stem] = f"additional_chat_templates/{path.name}"
    texts = {name: checkpoint.read_text(file_name) for name, file_name in files.items()}
    found = {name: text for name, text in texts.items() if text is not None}
    for file_name in ("tokenizer_config.json", "chat_template.json"):
        if not found:
            content = checkpoint.read_json(file_name) or {}
            found = _templates_in(content.get("chat_template"), file_name)
    return found


def _templates_in(value: object, file_name: str) -> dict[str, str]:
    """A `chat_template` entry: one text, or a list of {"name": ..., "template": ...}."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        templates = {str(entry["name"]): entry["template"] for entry in value}
    except (TypeError, KeyError):
        templates = {"": None}
    if not all(isinstance(text, str) for text in templates.values()):
        raise BadInput(
            f"chat_template in {file_name} cannot be read.",
            "It is neither one text nor a list of names with templates.",
            f"Mend or delete that entry of {file_name}.",
        )
    return templates


# ---- the two kinds ------------------------------------------------------------------------------


@dataclass
class _Draft:
    """A vocabulary while it is being put together."""

    model: str
    pre: str
    ids: dict[str, int]  # text -> id
    types: dict[int, int]
    scores: dict[int, float] | None = None
    merges: list[str] | None = None
    flags: dict[str, bool] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)  # "eos" -> its text
    keeps_places: bool = False  # added tokens may take the place of a piece
    notes: list[str] = field(default_factory=list)


def _is_byte_level(tokenizer: dict) -> bool:
    parts = flatten(tokenizer.get("pre_tokenizer"), "pretokenizers")
    parts += flatten(tokenizer.get("decoder"), "decoders")
    return any(part.get("type") == "ByteLevel" for part in parts)


def _byte_level(tokenizer: dict, pre_tokenizer: str | None) -> _Draft:
    """Byte-level BPE: vocabulary and merges of tokenizer.json's model."""
    model = _bpe_model(tokenizer)
    pre, notes = choose_pre_tokenizer(tokenizer, pre_tokenizer)
    ids = _checked_vocab(model)
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise BadInput(
                f"tokenizer.json's model sets {key} to {_quoted(model[key])}.",
                "llama.cpp's byte-level BPE has no such thing: its tokens would be others.",
            )
    merges = [f"{left} {right}" for left, right in _reachable(_checked_merges(model, ids))]
    types = dict.fromkeys(ids.values(), NORMAL)
    return _Draft("gpt2", pre, ids, types, merges=merges, notes=list(notes))


def _bpe_model(tokenizer: dict) -> dict:
    model = tokenizer.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if kind != "BPE":
        raise BadInput(
            f"tokenizer.json holds a tokenizer of type {printable(kind)}.",
            "For these models llama.cpp reproduces byte-level BPE and SentencePiece's BPE only.",
        )
    return model


def _checked_vocab(model: dict) -> dict[str, int]:
    """`model.vocab`: text -> id, every id a whole number of its own."""
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise BadInput("tokenizer.json has no vocabulary (model.vocab).", *_DAMAGED)
    for text, token in vocab.items():
        if type(token) is not int or token < 0:
            raise BadInput(
                f"Token {_quoted(text)} of tokenizer.json has id {printable(token)}.",
                *_DAMAGED,
            )
    if len(set(vocab.values())) < len(vocab):
        by_id: dict[int, str] = {}
        for text, token in vocab.items():
            if token in by_id:
                raise _same_id(by_id[token], text, token)
            by_id[token] = text
    return vocab


def _quoted(text: object) -> str:
    return f"'{printable(text)}'"


def _same_id(one: str, other: str, token: int) -> BadInput:
    return BadInput(
        f"Two tokens share the id {token}: {_quoted(one)} and {_quoted(other)}.",
        *_DAMAGED,
    )


def _checked_merges(model: dict, ids: dict[str, int]) -> list[tuple[str, str]]:
    """`model.merges` in order of rank; written "a b" (old) or ["a", "b"].

    Of a pair that is listed twice the last counts, as in the tokenizers library.
    """
    listed = model.get("merges")
    if not isinstance(listed, list) or not listed:
        raise BadInput(
            "tokenizer.json has no merges.",
            "Without them every byte is a token of its own: not the tokenizer that was trained.",
            _DAMAGED[1],
        )
    try:
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in listed]
        unknown = next((left + right for left, right in merges if left + right not in ids), None)
    except (TypeError, ValueError):
        raise BadInput(
            "The merges of tokenizer.json cannot be read.",
            'Each has to be two pieces of text, "a b" or ["a", "b"].',
            _DAMAGED[1],
        ) from None
    if unknown is not None:
        raise BadInput(
            f"A merge of tokenizer.json makes {_quoted(unknown)}, which is not in its vocabulary.",
            *_DAMAGED,
        )
    if len(set(merges)) < len(merges):
        merges = list(dict.fromkeys(reversed(merges)))[::-1]
    return merges


def _reachable(merges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Merges without those that hold a space: bytes are spelled as letters, a space as "Ġ".

    No text reaches them, and a GGUF file could not hold them, for it writes "left right". gguf-py
    writes "Ġ" for such a space instead, which makes another merge out of it, one that text does
    reach and whose result may not be in the vocabulary.
    """
    return [merge for merge in merges if " " not in merge[0] and " " not in merge[1]]


def _sentencepiece(checkpoint, tokenizer: dict | None, config: dict) -> _Draft:
    """SentencePiece's BPE from tokenizer.model, or from tokenizer.json where they differ.

    transformers reads tokenizer.json first; tokenizer.model has the scores that it was made from.
    """
    data = checkpoint.read_bytes("tokenizer.model")
    if data is not None:
        model = read_sentencepiece(data)
        pieces = {(text, i) for i, (text, _, _) in enumerate(model.pieces)}
        if tokenizer is None or _checked_vocab(_bpe_model(tokenizer)).items() <= pieces:
            return _from_model(model, tokenizer, config)
    if tokenizer is None:
        raise InputMissing(
            "There is no tokenizer: neither tokenizer.json nor tokenizer.model.",
            "A GGUF file carries its tokenizer.",
            "Download it, or have transformers write it: AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER)",
        )
    return _from_json(tokenizer, config)


def _from_model(model: "SentencePiece", tokenizer: dict | None, config: dict) -> _Draft:
    texts = [text for text, _, _ in model.pieces]
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise BadInput(f"tokenizer.model holds {_quoted(twice)} twice.", *_DAMAGED)
    draft = _Draft("llama", "default", {text: i for i, text in enumerate(texts)}, {}, {})
    for i, (_, score, kind) in enumerate(model.pieces):
        draft.types[i], draft.scores[i] = kind, score
    draft.named = {kind: texts[i] for kind, i in model.ids.items() if 0 <= i < len(texts)}
    draft.keeps_places = True
    if model.changes_text:
        draft.notes.append(
            "tokenizer.model changes text before it cuts it (as NFKC does), which llama.cpp does "
            "not: full-width letters and the like keep their own form."
        )
    if tokenizer is not None:
        _read_spaces(draft, tokenizer, config)
    else:
        _set_prefix(draft, model.add_dummy_prefix and config.get("add_prefix_space") is not False)
        _note_order(draft, model)
    draft.flags["remove_extra_whitespaces"] = model.remove_extra_whitespaces
    return draft


def _note_order(draft: _Draft, model: "SentencePiece") -> None:
    scores = [score for _, score, kind in model.pieces if kind == NORMAL]
    if scores != sorted(scores, reverse=True):
        draft.notes.append(
            "Without a tokenizer.json transformers 5 joins pieces in the order of their ids; "
            "llama.cpp, as SentencePiece does, by their scores: some text gets other tokens."
        )


def _check_byte_tokens(draft: _Draft) -> None:
    """llama.cpp stops with an error at a character that neither a piece nor byte tokens cover."""
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in draft.ids]
    if missing:
        raise BadInput(
            f"The tokenizer lacks {len(missing)} of the 256 byte tokens, such as {missing[0]}.",
            "It is neither byte-level nor SentencePiece with byte fallback; llama.cpp has no BPE "
            "that turns unknown text into one unknown token.",
        )


def _set_prefix(draft: _Draft, prefix: bool, exact: bool = False) -> None:
    """Whether "Hello" is read as "▁Hello"."""
    draft.flags["add_space_prefix"] = prefix
    if prefix and not exact:
        draft.notes.append(
            "llama.cpp puts a space before every stretch of text, as SentencePiece does: at the "
            "start, and after each special token. transformers 5 leaves it out before a space, and "
            "(`legacy` false) after special tokens: such text gets other tokens."
        )


def _from_json(tokenizer: dict, config: dict) -> _Draft:
    """SentencePiece's BPE as tokenizer.json spells it: merges in place of scores.

    A piece's score is minus the rank of the first merge that makes it. llama.cpp joins any two
    neighbours whose union is a piece, so the merges must be all that the vocabulary allows, which
    is how they are made from a SentencePiece model.
    """
    model = _bpe_model(tokenizer)
    ids = _checked_vocab(model)
    rank: dict[str, int] = {}
    merges = _checked_merges(model, ids)
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    draft = _Draft("llama", "default", ids, dict.fromkeys(ids.values(), NORMAL))
    draft.scores = {token: -float(rank[t]) if t in rank else _UNLIKELY for t, token in ids.items()}
    for text, token in ids.items():
        if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            draft.types[token] = BYTE
    unknown = model.get("unk_token")
    if isinstance(unknown, str) and unknown in ids:
        draft.types[ids[unknown]] = UNKNOWN
        draft.named["unk"] = unknown
    missing = _splits(rank, ids) - set(merges)
    if missing:
        draft.notes.append(
            f"llama.cpp also joins {len(missing)} pairs of pieces that tokenizer.json's merges do "
            "not: some words get other tokens."
        )
    _read_spaces(draft, tokenizer, config)
    return draft


def _read_spaces(draft: _Draft, tokenizer: dict, config: dict) -> None:
    """How tokenizer.json's steps treat spaces: a prefix, and "▁" for each. Raises BadInput."""
    parts = flatten(tokenizer.get("normalizer"), "normalizers")
    parts += flatten(tokenizer.get("pre_tokenizer"), "pretokenizers")
    prefixes = [_prefix(part) for part in parts]
    # Classes of Llama's name rebuild these steps in transformers 5, whatever the file says.
    rebuilt = "Llama" in str(config.get("tokenizer_class"))
    _set_prefix(draft, any(prefixes), exact="Prepend" in prefixes and not rebuilt)
    if any(part.get("type") == "Metaspace" and part.get("split", True) for part in parts):
        draft.notes.append(
            "tokenizer.json cuts text at spaces before it joins pieces, llama.cpp does not: runs "
            "of spaces get other tokens."
        )


def _splits(rank: dict[str, int], ids: dict[str, int]) -> set[tuple[str, str]]:
    """Every way to join two pieces to one that some merge makes."""
    return {
        (text[:i], text[i:])
        for text in rank
        for i in range(1, len(text))
        if text[:i] in ids and text[i:] in ids
    }


def _prefix(part: dict) -> str | None:
    """The type of a step that puts a space before text, None for others. Raises BadInput."""
    kind = part.get("type")
    if kind == "Prepend" and part.get("prepend") == "▁":
        return kind
    if kind == "Metaspace" and part.get("replacement", "▁") == "▁":
        without = part.get("prepend_scheme") == "never" or part.get("add_prefix_space") is False
        return None if without else kind
    if kind == "Replace" and part.get("pattern") == {"String": " "} and part.get("content") == "▁":
        return None
    if kind == "Split" and part.get("pattern") == {"String": " "}:
        return None  # Gemma's: the spaces are "▁" by then, and it never cuts
    raise BadInput(
        f"tokenizer.json has a step that llama.cpp cannot do: {printable(part)}",
        "Its SentencePiece tokenizer turns spaces into '▁' and changes nothing else.",
    )


# ---- added and special tokens -------------------------------------------------------------------


@dataclass(frozen=True)
class _AddedToken:
    """A token beside the model's own pieces, looked for in the text before it is cut."""

    content: str
    id: int  # as its file states it
    special: bool
    normalized: bool
    trims: bool  # takes the spaces beside it (lstrip, rstrip) or needs a word of its own


def _read_added_tokens(checkpoint, tokenizer: dict | None, config: dict) -> list[_AddedToken]:
    """Added tokens in the order in which transformers adds them, each text once."""
    decoder = config.get("added_tokens_decoder")
    if not decoder:  # before transformers 4.34
        older = checkpoint.read_json("added_tokens.json") or {}
        decoder = {token: {"content": text} for text, token in older.items()}
    try:
        listed = list((tokenizer or {}).get("added_tokens") or [])
        later = [{**entry, "id": int(token)} for token, entry in decoder.items()]
        listed += sorted(later, key=lambda entry: entry["id"])
        tokens = {}
        for entry in listed:
            token = _added_token(entry)
            first = tokens.setdefault(token.content, token)
            if token.special:  # once special, always
                tokens[token.content] = replace(first, special=True)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput("The list of added tokens cannot be read.", *_DAMAGED) from error
    return [token for token in tokens.values() if token.content]


def _added_token(entry: dict) -> _AddedToken:
    if type(entry["id"]) is not int or not isinstance(entry["content"], str):
        raise TypeError("an added token has a number and a text")
    trims = any(entry.get(flag) for flag in ("lstrip", "rstrip", "single_word"))
    special, normalized = bool(entry.get("special")), bool(entry.get("normalized"))
    return _AddedToken(entry["content"], entry["id"], special, normalized, trims)


def _named_tokens(checkpoint, config: dict) -> dict[str, str]:
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


def _place_added(draft: _Draft, added: list[_AddedToken]) -> None:
    """Give the added tokens their ids and types, as the tokenizers library does.

    It takes the id of the vocabulary, else the next free one, and does not look at the id that the
    file states: text gets that id in transformers, so it is the one the model knows.
    """
    # The last two llama.cpp makes control tokens itself, and warns that the file is at fault.
    special = {*draft.named.values(), *END_TEXTS, *FIM_KEYS}
    by_id = {token: text for text, token in draft.ids.items()}
    n_pieces, highest = len(by_id), -1
    moved = []
    for token in added:
        if token.content in draft.ids:
            number = draft.ids[token.content]
        elif draft.keeps_places and token.id in by_id:
            number = token.id
            del draft.ids[by_id[number]], draft.types[number]
        else:
            number = highest + 1 if highest >= n_pieces else n_pieces
            if number in by_id:
                raise _same_id(by_id[number], token.content, number)
        if number != token.id:
            moved.append(f"{_quoted(token.content)} {token.id} -> {number}")
        draft.ids[token.content], by_id[number] = number, token.content
        highest = max(highest, number)
        if draft.types.get(number) not in (UNKNOWN, BYTE):
            control = token.special or token.content in special
            draft.types[number] = CONTROL if control else USER_DEFINED
    if moved:
        draft.notes.append(
            "Ids of added tokens that the tokenizers library gives otherwise than the file states "
            "(and so does this file): " + _some(moved)
        )


def _note_flags(draft: _Draft, added: list[_AddedToken], tokenizer: dict | None) -> None:
    """Say which added tokens are looked for in a way that llama.cpp does not have."""
    trims = [_quoted(token.content) for token in added if token.trims]
    if trims:
        draft.notes.append(
            "Added tokens that in transformers take the spaces beside them or stand only between "
            "words, which llama.cpp cannot do: " + _some(trims)
        )
    steps = flatten((tokenizer or {}).get("normalizer"), "normalizers")
    normalized = [_quoted(token.content) for token in added if token.normalized]
    if normalized and any(step.get("type") == "Prepend" for step in steps):
        draft.notes.append(
            "Added tokens that transformers finds only after a space (`normalized` true), "
            "llama.cpp everywhere: " + _some(normalized)
        )


def _some(items: list[str]) -> str:
    """The first three of a list, and how many more there are."""
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more + "."


def _rows(draft: _Draft, n_rows: int) -> tuple[list[str], list[int]]:
    """(tokens, types), one for each row of the embedding; rows without a token are UNUSED."""
    beyond = sorted((token, text) for text, token in draft.ids.items() if token >= n_rows)
    if beyond:
        raise BadInput(
            f"The tokenizer has {beyond[-1][0] + 1} tokens, the model's embedding {n_rows} rows.",
            f"{len(beyond)} tokens have no row, the first {_quoted(beyond[0][1])} with id "
            f"{beyond[0][0]}.",
            "Use the tokenizer that the model was trained with, or resize the embedding to it.",
        )
    tokens = [f"[PAD{i}]" for i in range(n_rows)]
    types = [UNUSED] * n_rows
    for text, token in draft.ids.items():
        if text:  # the empty one is in no text; its row is an unused one
            tokens[token], types[token] = text, draft.types[token]
        if "\0" in text:
            raise BadInput(
                f"Token {token}, {_quoted(text)}, holds a zero byte.",
                "llama.cpp reads a token only as far as its first zero byte.",
            )
    for token in range(n_rows):  # no two texts may be the same: llama.cpp would abort
        while types[token] == UNUSED and draft.ids.get(tokens[token], token) != token:
            tokens[token] += "_"
    taken = [
        f"{_quoted(text)} ({token})"
        for text, token in draft.ids.items()
        if text in END_TEXTS and draft.types[token] == NORMAL
    ]
    if taken:
        draft.notes.append(
            "Ordinary pieces of the vocabulary at which llama.cpp ends generation, because of "
            "their spelling: " + _some(taken)
        )
    return tokens, types


def _read_ends(draft: _Draft, tokenizer: dict | None, config: dict) -> dict[str, bool]:
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
            draft.notes.append(
                f"tokenizer_config.json says {key} {str(stated).lower()}, tokenizer.json's "
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


def _special_ids(checkpoint, draft: _Draft, template: str, n_rows: int) -> dict[str, int]:
    """GGUF key -> id. The tokenizer's own names come first, then the ids of the config files."""
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
        token = draft.ids.get(draft.named.get(kind))
        if kind in draft.named and token is None:
            draft.notes.append(
                f"{kind}_token {_quoted(draft.named[kind])} is not in the vocabulary; "
                "it is left out."
            )
        if token is None:
            token = next(chain(*stated.values()), None)
        if token is None:
            continue
        if token >= n_rows:
            raise BadInput(
                f"The {kind} token has id {token}, the model's embedding {n_rows} rows.",
                "generation_config.json or config.json states an id that the model does not have.",
                f"Correct {kind}_token_id there.",
            )
        special_ids[key] = token
        for file_name, ids in stated.items():
            if ids and token not in ids:
                draft.notes.append(
                    f"{file_name} says {kind}_token_id {ids[0]} ({printable(texts.get(ids[0]))}); "
                    f"{token} ({printable(texts.get(token))}) is written."
                )
    _add_missing_ends(draft, special_ids, template)
    special_ids |= _turn_ends(draft, special_ids, texts, template)
    for text, key in FIM_KEYS.items():
        if draft.types.get(draft.ids.get(text)) == CONTROL:
            special_ids.setdefault(key, draft.ids[text])
    ends = {special_ids.get(f"{kind}_token_id") for kind in ("eos", "eot", "eom")}
    unknown = [
        f"{printable(texts.get(token))} ({token})"
        for token in _ids(generation.get("eos_token_id"))
        if token not in ends and texts.get(token) not in END_TEXTS
    ]
    if unknown:
        draft.notes.append("A GGUF file cannot say that generation also stops at " + _some(unknown))
    return special_ids


def _ids(value: object) -> list[int]:
    """The ids in a config entry: a number, a list of numbers, or nothing usable."""
    values = value if isinstance(value, list) else [value]
    return [token for token in values if type(token) is int and token >= 0]


def _add_missing_ends(draft: _Draft, special_ids: dict[str, int], template: str) -> None:
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
            + (f"{_quoted(text)}." if text else "its default: token 11, or 2 of SentencePiece.")
        )
    if "bos" not in draft.named and "bos_token" in template:
        draft.notes.append(
            "The chat template writes bos_token, and the tokenizer has none: transformers writes "
            "nothing there, llama.cpp some token."
        )
    if "eos_token_id" in special_ids:
        special_ids.setdefault("bos_token_id", special_ids["eos_token_id"])


def _turn_ends(
    draft: _Draft, special_ids: dict[str, int], texts: dict[int, str], template: str
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


# ---- tokenizer.model ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SentencePiece:
    """What a tokenizer.model says. pieces: (text, score, type); ids: -1 where there is none."""

    pieces: list[tuple[str, float, int]]
    ids: dict[str, int]
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    changes_text: bool


def read_sentencepiece(data: bytes) -> SentencePiece:
    """The parts of a SentencePiece model that a GGUF file needs. Raises BadInput.

    The sentencepiece library reads pieces, but not which algorithm a model is for (BPE or unigram)
    nor what it does to text; its own reader for those needs protobuf. The format is that simple.

    # ref: google/sentencepiece, src/sentencepiece_model.proto
    """
    try:
        sections = list(_fields(data))
        pieces = [_piece(value) for number, value in sections if number == 1]
        trainer = dict(_fields(dict(sections).get(2, b"")))
        normalizer = dict(_fields(dict(sections).get(3, b"")))
        if not pieces:
            raise ValueError("no pieces")
    except (ValueError, TypeError, struct.error, UnicodeDecodeError) as error:
        raise BadInput(
            "tokenizer.model is not a SentencePiece model.",
            "It is damaged, or it is tiktoken's file of the same name.",
            "Download it again; if there is a tokenizer.json too, delete tokenizer.model.",
        ) from error
    kind = trainer.get(3, 1)
    if kind != 2 or trainer.get(24):
        raise BadInput(
            "tokenizer.model is for an algorithm that llama.cpp has not for this model: "
            + {1: "unigram", 2: "BPE with the space at a word's end", 3: "words"}.get(
                kind, "characters"
            ),
            "llama.cpp's 'llama' tokenizer is SentencePiece's BPE.",
        )
    ids = {name: _signed(trainer.get(40 + i, i if i < 3 else -1)) for i, name in _OWN_IDS}
    return SentencePiece(
        pieces, ids, bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)), bool(normalizer.get(2))
    )


_OWN_IDS = ((0, "unk"), (1, "bos"), (2, "eos"), (3, "pad"))


def _piece(data: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(data))
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    kind = fields.get(3, NORMAL)
    if not NORMAL <= kind <= BYTE:
        raise ValueError(f"piece type {kind}")
    return bytes(fields.get(1, b"")).decode(), score, kind


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one protobuf message: numbers, and bytes for all else."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire_type == 2:
            length, position = _varint(data, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if position + length > len(data):
            raise ValueError("message ends early")
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError("number ends early")
        byte = data[position]
        value |= (byte & 127) << shift
        position += 1
        if byte < 128:
            return value, position
        shift += 7
