"""Added tokens: texts such as <|im_start|> that get one id each, found before anything else is cut.

They stand beside the model's own pieces, in tokenizer.json's `added_tokens`, and again in
tokenizer_config.json's `added_tokens_decoder`; transformers adds both, in that order. A special one
becomes CONTROL, another USER_DEFINED. Hugging Face's files can say more of a token: that it takes
the spaces beside it, needs a word of its own, or is looked for in text that the normalizer has
changed. llama.cpp looks for all of them in the text as it is; where that differs, a note says so.

# ref: src/llama-vocab.cpp, tokenizer_st_partition; huggingface/tokenizers, added_vocabulary.rs
"""

from dataclasses import dataclass, replace

from quant.errors import BadInput
from quant.vocabulary.draft import (
    BYTE,
    CONTROL,
    DAMAGED,
    UNKNOWN,
    USER_DEFINED,
    Draft,
    quoted,
    same_id,
    some,
)
from quant.vocabulary.special_tokens import END_TEXTS, FIM_KEYS
from quant.vocabulary.tokenizer_json import flatten


@dataclass(frozen=True)
class AddedToken:
    """A token beside the model's own pieces, looked for in the text before it is cut."""

    content: str
    id: int  # as its file states it
    special: bool
    normalized: bool
    trims: bool  # takes the spaces beside it (lstrip, rstrip) or needs a word of its own


def read_added_tokens(checkpoint, tokenizer: dict | None, config: dict) -> list[AddedToken]:
    """Each added token once, in the order in which transformers adds them. Raises BadInput."""
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
        raise BadInput("The list of added tokens cannot be read.", *DAMAGED) from error
    return [token for token in tokens.values() if token.content]


def _added_token(entry: dict) -> AddedToken:
    if type(entry["id"]) is not int or not isinstance(entry["content"], str):
        raise TypeError("an added token has a number and a text")
    trims = any(entry.get(flag) for flag in ("lstrip", "rstrip", "single_word"))
    special, normalized = bool(entry.get("special")), bool(entry.get("normalized"))
    return AddedToken(entry["content"], entry["id"], special, normalized, trims)


def place_added(draft: Draft, added: list[AddedToken]) -> None:
    """Give the added tokens their ids and types, as the tokenizers library does.

    It takes the id of the vocabulary, else the next free one, and does not look at the id that the
    file states: text gets that id in transformers, so it is the one the model knows. Raises
    BadInput where a piece has that id already.
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
                raise same_id(by_id[number], token.content, number)
        if number != token.id:
            moved.append(f"{quoted(token.content)} {token.id} -> {number}")
        draft.ids[token.content], by_id[number] = number, token.content
        highest = max(highest, number)
        if draft.types.get(number) not in (UNKNOWN, BYTE):
            control = token.special or token.content in special
            draft.types[number] = CONTROL if control else USER_DEFINED
    if moved:
        draft.notes.append(
            "Ids of added tokens that the tokenizers library gives otherwise than the file states "
            "(and so does this file): " + some(moved)
        )


def note_lost_flags(draft: Draft, added: list[AddedToken], tokenizer: dict | None) -> None:
    """Say which added tokens are looked for in a way that llama.cpp does not have."""
    trims = [quoted(token.content) for token in added if token.trims]
    if trims:
        draft.notes.append(
            "Added tokens that in transformers take the spaces beside them or stand only between "
            "words, which llama.cpp cannot do: " + some(trims)
        )
    steps = flatten((tokenizer or {}).get("normalizer"), "normalizers")
    normalized = [quoted(token.content) for token in added if token.normalized]
    if normalized and any(step.get("type") == "Prepend" for step in steps):
        draft.notes.append(
            "Added tokens that transformers finds only after a space (`normalized` true), "
            "llama.cpp everywhere: " + some(normalized)
        )
