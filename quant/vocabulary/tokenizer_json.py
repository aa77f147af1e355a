"""tokenizer.json: its BPE model, and the chains of steps around it.

The tokenizers library writes five parts that matter here. `model` is the table: `vocab`, text ->
id, and `merges`, pairs of pieces in the order in which BPE joins them. Around it stand chains of
steps: `normalizer` changes text, `pre_tokenizer` cuts it into words, `post_processor` puts special
tokens at its ends, `decoder` turns pieces back into text. Each is null, one step {"type": ...}, or
a Sequence of steps that may hold further Sequences.

The file is read as JSON: 152,000 tokens take a third of a second, and nothing is imported. It is
untrusted text, so every id and merge is checked before anything is made of it.

# ref: huggingface/tokenizers, models/bpe/serialization.rs
"""

from quant.display import printable
from quant.errors import BadInput
from quant.vocabulary.draft import DAMAGED, quoted, same_id


def read_bpe(tokenizer: dict) -> dict:
    """`model`, the table of BPE. Raises BadInput for another algorithm."""
    model = tokenizer.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if kind != "BPE":
        raise BadInput(
            f"tokenizer.json holds a tokenizer of type {printable(kind)}.",
            "For these models llama.cpp reproduces byte-level BPE and SentencePiece's BPE only.",
        )
    return model


def read_vocab(model: dict) -> dict[str, int]:
    """`model.vocab`: text -> id, every id a whole number of its own. Raises BadInput."""
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise BadInput("tokenizer.json has no vocabulary (model.vocab).", *DAMAGED)
    for text, token in vocab.items():
        if type(token) is not int or token < 0:
            raise BadInput(
                f"Token {quoted(text)} of tokenizer.json has id {printable(token)}.",
                *DAMAGED,
            )
    if len(set(vocab.values())) < len(vocab):
        by_id: dict[int, str] = {}
        for text, token in vocab.items():
            if token in by_id:
                raise same_id(by_id[token], text, token)
            by_id[token] = text
    return vocab


def read_merges(model: dict, ids: dict[str, int]) -> list[tuple[str, str]]:
    """`model.merges` in order of rank; written "a b" (old) or ["a", "b"].

    Of a pair that is listed twice the last counts, as in the tokenizers library. Raises BadInput
    for a merge that makes no piece of `ids`.
    """
    listed = model.get("merges")
    if not isinstance(listed, list) or not listed:
        raise BadInput(
            "tokenizer.json has no merges.",
            "Without them every byte is a token of its own: not the tokenizer that was trained.",
            DAMAGED[1],
        )
    try:
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in listed]
        unknown = next((left + right for left, right in merges if left + right not in ids), None)
    except (TypeError, ValueError):
        raise BadInput(
            "The merges of tokenizer.json cannot be read.",
            'Each has to be two pieces of text, "a b" or ["a", "b"].',
            DAMAGED[1],
        ) from None
    if unknown is not None:
        raise BadInput(
            f"A merge of tokenizer.json makes {quoted(unknown)}, which is not in its vocabulary.",
            *DAMAGED,
        )
    if len(set(merges)) < len(merges):
        merges = list(dict.fromkeys(reversed(merges)))[::-1]
    return merges


def flatten(part: dict | None, children: str) -> list[dict]:
    """A component of tokenizer.json as the list of its simple parts, Sequences opened.

    Raises BadInput for a Sequence without a list.
    """
    if not isinstance(part, dict):
        return []
    if part.get("type") != "Sequence":
        return [part]
    if not isinstance(part.get(children), list):
        raise BadInput(f"In tokenizer.json a Sequence has no list of {children}.")
    return [leaf for child in part[children] for leaf in flatten(child, children)]
