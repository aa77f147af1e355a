"""Byte-level BPE from tokenizer.json: GPT-2's kind, and Llama 3's, Qwen's and QwQ's.

Text is cut into words (pre_tokenizers.py), each byte of a word is spelled as one of 256 letters (a
space is "Ġ"), and neighbours are merged, lowest rank first. Every text can be written so; there is
no unknown token. A GGUF file holds the pieces and the merges as they are ("gpt2"), and the name of
the way in which text is cut.
"""

from quant.errors import BadInput
from quant.vocabulary.draft import NORMAL, Draft, quoted
from quant.vocabulary.pre_tokenizers import choose_pre_tokenizer
from quant.vocabulary.tokenizer_json import flatten, read_bpe, read_merges, read_vocab


def is_byte_level(tokenizer: dict) -> bool:
    """Whether a tokenizer.json spells bytes as letters, on the way in or on the way out."""
    parts = flatten(tokenizer.get("pre_tokenizer"), "pretokenizers")
    parts += flatten(tokenizer.get("decoder"), "decoders")
    return any(part.get("type") == "ByteLevel" for part in parts)


def read_byte_level(tokenizer: dict, pre_tokenizer: str | None) -> Draft:
    """The pieces, the merges, and the name of the way text is cut. Raises BadInput."""
    model = read_bpe(tokenizer)
    pre, notes = choose_pre_tokenizer(tokenizer, pre_tokenizer)
    ids = read_vocab(model)
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise BadInput(
                f"tokenizer.json's model sets {key} to {quoted(model[key])}.",
                "llama.cpp's byte-level BPE has no such thing: its tokens would be others.",
            )
    notes = list(notes)
    if any(
        part.get("type") == "NFC" for part in flatten(tokenizer.get("normalizer"), "normalizers")
    ):
        notes.append(
            "The tokenizer composes characters first (NFC) and llama.cpp does not: letters with "
            "decomposed accents get other tokens there."
        )
    merges = [f"{left} {right}" for left, right in _reachable(read_merges(model, ids))]
    types = dict.fromkeys(ids.values(), NORMAL)
    return Draft("gpt2", pre, ids, types, merges=merges, notes=notes)


def _reachable(merges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Merges without those that hold a space: bytes are spelled as letters, a space as "Ġ".

    No text reaches them, and a GGUF file could not hold them, for it writes "left right". gguf-py
    writes "Ġ" for such a space instead, which makes another merge out of it, one that text does
    reach and whose result may not be in the vocabulary.
    """
    return [merge for merge in merges if " " not in merge[0] and " " not in merge[1]]
