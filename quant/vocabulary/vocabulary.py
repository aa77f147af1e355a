"""A Hugging Face tokenizer -> the vocabulary that a GGUF file carries.

llama.cpp has two tokenizers that matter here, and GGUF names each after its first model:

"gpt2"   byte-level BPE (GPT-2, Llama 3, Qwen, QwQ): byte_level.py
"llama"  SentencePiece BPE (Llama 2, Mistral 7B): sentencepiece.py

The aim is one thing: every text gets the same ids in llama.cpp as in transformers. Where a GGUF
file cannot say what Hugging Face's files say, a note says so in plain words; where the result would
be another tokenizer, it is an error.

# ref: src/llama-vocab.cpp, llama_vocab::impl::load; gguf-py, vocab.py
"""

import re
from dataclasses import dataclass

from quant.errors import BadInput, UsageError
from quant.gguf_file import Metadata, Value
from quant.strict_files import without_garbage_collection
from quant.vocabulary.added_tokens import note_lost_flags, place_added, read_added_tokens
from quant.vocabulary.byte_level import is_byte_level, read_byte_level
from quant.vocabulary.chat_templates import read_chat_templates
from quant.vocabulary.draft import NORMAL, UNLIKELY, UNUSED, Draft, quoted, some
from quant.vocabulary.sentencepiece import check_byte_tokens, read_sentencepiece
from quant.vocabulary.special_tokens import (
    END_TEXTS,
    read_bos_eos_flags,
    read_named_tokens,
    read_special_ids,
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


@without_garbage_collection()
def read_vocabulary(checkpoint, n_rows: int, pre_tokenizer: str | None = None) -> Vocabulary:
    """The vocabulary of a checkpoint whose embedding has `n_rows` rows.

    `pre_tokenizer` names llama.cpp's pre-tokenizer instead of recognising it (byte-level BPE only).
    Raises InputMissing without tokenizer.json and tokenizer.model, BadInput if they are damaged, do
    not fit the embedding or are of a kind that llama.cpp cannot reproduce.
    """
    tokenizer = checkpoint.read_json("tokenizer.json")
    config = checkpoint.read_json("tokenizer_config.json") or {}
    added = read_added_tokens(checkpoint, tokenizer, config)
    templates = read_chat_templates(checkpoint)
    if tokenizer is not None and is_byte_level(tokenizer):
        draft = read_byte_level(tokenizer, pre_tokenizer)
    elif pre_tokenizer is None:
        draft = read_sentencepiece(checkpoint, tokenizer, config)
    else:
        raise UsageError(
            "--pre-tokenizer does not apply to this tokenizer.",
            "It is of SentencePiece's kind, which does not cut text into words first.",
            "Leave the option out.",
        )
    draft.named |= read_named_tokens(checkpoint, config)
    place_added(draft, added)
    note_lost_flags(draft, added, tokenizer)
    if draft.model == "llama":
        check_byte_tokens(draft)
    tokens, types = _rows(draft, n_rows)
    _note_end_spellings(draft)
    flags = read_bos_eos_flags(draft, tokenizer, config) | draft.flags
    special_ids = read_special_ids(checkpoint, draft, templates.get("default", ""), n_rows)
    scores = draft.scores and [draft.scores.get(i, UNLIKELY) for i in range(n_rows)]
    return Vocabulary(
        draft.model, draft.pre, tokens, types, scores, draft.merges,
        special_ids, flags, templates, tuple(draft.notes),
    )  # fmt: skip


def _rows(draft: Draft, n_rows: int) -> tuple[list[str], list[int]]:
    """(tokens, types), one for each row of the embedding; rows without a token are UNUSED."""
    _check_rows(draft, n_rows)
    tokens, types = [""] * n_rows, [UNUSED] * n_rows
    for text, token in draft.ids.items():
        tokens[token], types[token] = text, draft.types[token]
    for token in [token for token, text in enumerate(tokens) if not text]:
        types[token], text = UNUSED, f"[PAD{token}]"  # a piece of no letters is in no text either
        while text in draft.ids:  # no two may be the same: llama.cpp would abort
            text += "_"
        tokens[token] = text
    return tokens, types


def _check_rows(draft: Draft, n_rows: int) -> None:
    """Raise BadInput if a token has no row, with the numbers of both, or holds a zero byte."""
    if "\0" in "".join(draft.ids):
        text, token = next((text, token) for text, token in draft.ids.items() if "\0" in text)
        raise BadInput(
            f"Token {token}, {quoted(text)}, holds a zero byte.",
            "llama.cpp reads a token only as far as its first zero byte.",
        )
    beyond = sorted((token, text) for text, token in draft.ids.items() if token >= n_rows)
    if beyond:
        raise BadInput(
            f"The tokenizer has {beyond[-1][0] + 1} tokens, the model's embedding {n_rows} rows.",
            f"{len(beyond)} tokens have no row, the first {quoted(beyond[0][1])} with id "
            f"{beyond[0][0]}.",
            "Use the tokenizer that the model was trained with, or resize the embedding to it.",
        )


def _note_end_spellings(draft: Draft) -> None:
    """Say which ordinary pieces llama.cpp takes for ends of text."""
    taken = [
        f"{quoted(text)} ({token})"
        for text, token in draft.ids.items()
        if text in END_TEXTS and draft.types[token] == NORMAL
    ]
    if taken:
        draft.notes.append(
            "Ordinary pieces of the vocabulary at which llama.cpp ends generation, because of "
            "their spelling: " + some(taken)
        )
