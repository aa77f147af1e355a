"""tokenizer.model: a SentencePiece model, read from its protobuf message.

A protobuf message is a row of fields, each a key (field number << 3 | wire type) and a value: a
varint, 4 or 8 bytes, or a length and that many bytes, which may be a message again. Of the model's
message three fields matter here:

1  pieces, once for each: 1 text, 2 score, 3 type, numbered as llama.cpp numbers token types
2  how it was trained: 3 the algorithm, 24 whether a space stands at a word's end, 40-43 own ids
3  what it does to text: 2 a compiled map of characters, 3 a space in front, 4 fewer spaces

The sentencepiece library reads pieces, but not which algorithm a model is for (BPE or unigram) nor
what it does to text; its own reader for those needs protobuf. The format is that simple.

# ref: google/sentencepiece, src/sentencepiece_model.proto; protobuf.dev, Encoding
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from quant.errors import BadInput
from quant.vocabulary.draft import BYTE, NORMAL

_OWN_IDS = ((0, "unk"), (1, "bos"), (2, "eos"), (3, "pad"))


@dataclass(frozen=True)
class TokenizerModel:
    """What a tokenizer.model says. pieces: (text, score, type); ids: -1 where there is none."""

    pieces: list[tuple[str, float, int]]
    ids: dict[str, int]
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    changes_text: bool


def read_tokenizer_model(data: bytes) -> TokenizerModel:
    """The parts of a SentencePiece model that a GGUF file needs.

    Raises BadInput for a message that ends early, and for any algorithm but BPE.
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
    return TokenizerModel(
        pieces, ids, bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)), bool(normalizer.get(2))
    )


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
