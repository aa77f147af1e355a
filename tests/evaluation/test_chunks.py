"""Windows of tokens as llama-perplexity cuts them."""

import json

import numpy as np
import pytest

from quant.errors import BadInput
from quant.evaluation.chunks import cut_chunks
from quant.texts import Record, Texts, read_texts


class Bytes:
    """A tokenizer of bytes, with one special token, written <s>."""

    def __init__(self, bos=None):
        self.bos = bos

    def tokenize(self, text, special):
        pieces = text.split("<s>") if special else [text]
        ids = []
        for piece in pieces:
            ids += [*([256] if ids or piece is not pieces[0] else []), *piece.encode()]
        return np.array(ids, np.int32)


def plain(text: str) -> Texts:
    return Texts("a.txt", "", (Record(text),))


def test_the_second_half_is_scored_with_the_tokens_that_came_next():
    text = "".join(chr(65 + i % 26) for i in range(35))
    chunks = cut_chunks(Bytes(), plain(text), n_ctx=16)
    assert len(chunks) == 2 and chunks.n_ctx == 16  # three tokens are left over
    assert chunks.first == 8 and chunks.n_scored == 7 and chunks.n_positions == 14
    assert bytes(chunks.targets[0].astype(np.uint8)).decode() == text[9:16]
    assert chunks.targets.shape == (2, 7)
    assert np.array_equal(chunks.inputs, chunks.tokens) and chunks.categories == ("", "")


def test_an_odd_window():
    chunks = cut_chunks(Bytes(), plain("x" * 9), n_ctx=9)
    assert (chunks.first, chunks.n_scored) == (4, 4)


def test_bos_begins_the_text_and_takes_each_windows_first_place():
    text = "".join(chr(65 + i % 26) for i in range(40))
    chunks = cut_chunks(Bytes(bos=300), plain(text), n_ctx=16)
    assert chunks.tokens[0].tolist() == [300, *text[:15].encode()]
    assert chunks.tokens[1].tolist() == list(text[15:31].encode())  # as the base file has it
    assert chunks.inputs[1].tolist() == [300, *text[16:31].encode()]
    assert chunks.targets[1].tolist() == list(text[24:31].encode())


def test_one_newline_at_the_end_is_dropped_and_special_tokens_are_spelled_out():
    chunks = cut_chunks(Bytes(), plain("0123<s>\n\n"), n_ctx=8)
    assert bytes(chunks.tokens[0].astype(np.uint8)) == b"0123<s>\n"
    with pytest.raises(BadInput, match="too short"):
        cut_chunks(Bytes(), plain("0123456\n"), n_ctx=8)


def test_json_lines_keep_categories_apart_and_know_special_tokens(tmp_path):
    lines = [("b", "b" * 10), ("a", "a" * 20), ("b", "<s>" + "B" * 9), ("short", "no")]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"category": c, "text": t}) + "\n" for c, t in lines))
    chunks = cut_chunks(Bytes(), read_texts(path), n_ctx=8)
    assert chunks.categories == ("b", "b", "a", "a")
    joined = [*b"b" * 10, *b"\n\n", 256, *b"B" * 9]
    assert chunks.tokens[:2].ravel().tolist() == joined[:16]
    part = chunks.part(1, 3)
    assert part.categories == ("b", "a") and np.array_equal(part.tokens, chunks.tokens[1:3])


def test_n_tokens_is_shared_out(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        "".join(
            json.dumps({"category": c, "text": c * n}) + "\n" for c, n in (("a", 800), ("b", 80))
        )
    )
    found = cut_chunks(Bytes(), read_texts(path), n_ctx=8, n_tokens=220).categories
    assert (found.count("a"), found.count("b")) == (25, 2)
    assert set(cut_chunks(Bytes(), read_texts(path), n_ctx=8, n_tokens=8).categories) == {"a", "b"}
    assert len(cut_chunks(Bytes(), read_texts(path), n_ctx=8, n_tokens=10**9)) == 110


def test_too_little_text_is_refused():
    with pytest.raises(BadInput, match="too short"):
        cut_chunks(Bytes(), plain("x" * 15), n_ctx=16)
