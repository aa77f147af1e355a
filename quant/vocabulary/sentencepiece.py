"""SentencePiece's BPE, as in Llama 2 and Mistral 7B: from tokenizer.model or tokenizer.json.

A space is "▁", and of all neighbours those are joined whose union has the highest score; what no
piece covers becomes byte tokens such as <0x0A>. A GGUF file ("llama") holds a score for each piece
and no merges. tokenizer.model has the scores; tokenizer.json has merges made from them, and their
ranks order the pieces in the same way.

transformers and llama.cpp part over spaces: which texts get one in front, and where text is cut.
"""

import re

from quant.display import printable
from quant.errors import BadInput, InputMissing
from quant.vocabulary.draft import BYTE, DAMAGED, NORMAL, UNKNOWN, UNLIKELY, Draft, quoted
from quant.vocabulary.tokenizer_json import flatten, read_bpe, read_merges, read_vocab
from quant.vocabulary.tokenizer_model import TokenizerModel, read_tokenizer_model


def read_sentencepiece(checkpoint, tokenizer: dict | None, config: dict) -> Draft:
    """SentencePiece's BPE from tokenizer.model, or from tokenizer.json where they differ.

    transformers reads tokenizer.json first; tokenizer.model has the scores that it was made from.
    """
    data = checkpoint.read_bytes("tokenizer.model")
    if data is not None:
        model = read_tokenizer_model(data)
        pieces = {(text, i) for i, (text, _, _) in enumerate(model.pieces)}
        if tokenizer is None or read_vocab(read_bpe(tokenizer)).items() <= pieces:
            return _from_model(model, tokenizer, config)
    if tokenizer is None:
        raise InputMissing(
            "There is no tokenizer: neither tokenizer.json nor tokenizer.model.",
            "A GGUF file carries its tokenizer.",
            "Download it, or have transformers write it: AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER)",
        )
    return _from_json(tokenizer, config)


def _from_model(model: TokenizerModel, tokenizer: dict | None, config: dict) -> Draft:
    texts = [text for text, _, _ in model.pieces]
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise BadInput(f"tokenizer.model holds {quoted(twice)} twice.", *DAMAGED)
    draft = Draft("llama", "default", {text: i for i, text in enumerate(texts)}, {}, {})
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


def _note_order(draft: Draft, model: TokenizerModel) -> None:
    scores = [score for _, score, kind in model.pieces if kind == NORMAL]
    if scores != sorted(scores, reverse=True):
        draft.notes.append(
            "Without a tokenizer.json transformers 5 joins pieces in the order of their ids; "
            "llama.cpp, as SentencePiece does, by their scores: some text gets other tokens."
        )


def _from_json(tokenizer: dict, config: dict) -> Draft:
    """SentencePiece's BPE as tokenizer.json spells it: merges in place of scores.

    A piece's score is minus the rank of the first merge that makes it. llama.cpp joins any two
    neighbours whose union is a piece, so the merges must be all that the vocabulary allows, which
    is how they are made from a SentencePiece model.
    """
    model = read_bpe(tokenizer)
    ids = read_vocab(model)
    rank: dict[str, int] = {}
    merges = read_merges(model, ids)
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    draft = Draft("llama", "default", ids, dict.fromkeys(ids.values(), NORMAL))
    draft.scores = {token: -float(rank[t]) if t in rank else UNLIKELY for t, token in ids.items()}
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


def _splits(rank: dict[str, int], ids: dict[str, int]) -> set[tuple[str, str]]:
    """Every way to join two pieces to one that some merge makes."""
    return {
        (text[:i], text[i:])
        for text in rank
        for i in range(1, len(text))
        if text[:i] in ids and text[i:] in ids
    }


def _read_spaces(draft: Draft, tokenizer: dict, config: dict) -> None:
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


def _set_prefix(draft: Draft, prefix: bool, exact: bool = False) -> None:
    """Whether "Hello" is read as "▁Hello"."""
    draft.flags["add_space_prefix"] = prefix
    if prefix and not exact:
        draft.notes.append(
            "llama.cpp puts a space before every stretch of text, as SentencePiece does: at the "
            "start, and after each special token. transformers 5 leaves it out before a space, and "
            "(`legacy` false) after special tokens: such text gets other tokens."
        )


def check_byte_tokens(draft: Draft) -> None:
    """llama.cpp stops with an error at a character that neither a piece nor byte tokens cover."""
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in draft.ids]
    if missing:
        raise BadInput(
            f"The tokenizer lacks {len(missing)} of the 256 byte tokens, such as {missing[0]}.",
            "It is neither byte-level nor SentencePiece with byte fallback; llama.cpp has no BPE "
            "that turns unknown text into one unknown token.",
        )
