"""Byte-level BPE: the same ids in transformers and in the real llama.cpp.

Tokenizers are trained here (tokenizer_makers.py), one for each way of cutting text.
"""

import json
import unicodedata
from dataclasses import replace

import llama_oracle
import pytest
from tokenizer_makers import N_TOKENS, STYLES, make_byte_level, sample_texts, write_gguf
from vocabulary_helpers import different, edit, made, read, transformers_ids, with_tokens

from quant.vocabulary.draft import CONTROL, USER_DEFINED
from quant.vocabulary.pre_tokenizers import KNOWN

EXACT = [row.name for row in KNOWN if not row.differs]
DIFFERS = [row.name for row in KNOWN if row.differs]


@pytest.mark.parametrize("add_special", [False, True])
@pytest.mark.parametrize("name", EXACT)
def test_ids_equal_transformers(name, add_special):
    folder, vocabulary, path = made(name)
    words = [word.replace("Ġ", " ") for word in STYLES[name].whole_words]
    texts = with_tokens(sample_texts(), [token["content"] for token in STYLES[name].added])
    texts += [word * n for word in words for n in (1, 2)]
    expected = transformers_ids(folder, texts, add_special)
    ids = llama_oracle.tokenize(path, texts, add_special)
    assert different(texts, ids, expected) == []
    assert all("(NFC)" in note for note in vocabulary.notes)
    assert vocabulary.pre == name


@pytest.mark.parametrize("name", DIFFERS)
def test_ids_differ_only_in_words_with_combining_marks(name):
    """llama.cpp's tekken and gpt-4o say [^a-z] where the releases say \\p{Lu}...\\p{M}."""
    folder, vocabulary, path = made(name)
    texts = with_tokens(sample_texts(), [token["content"] for token in STYLES[name].added])
    expected = transformers_ids(folder, texts, True)
    found = different(texts, llama_oracle.tokenize(path, texts, True), expected)
    assert len(found) >= 3
    for text in found:
        assert any(unicodedata.category(character)[0] == "M" for character in text)
    assert "combining marks" in vocabulary.notes[0]


def test_words_that_no_merge_makes_are_whole_only_where_merges_are_ignored():
    for name, whole in (("llama-bpe", True), ("dbrx", False)):
        _, vocabulary, path = made(name)
        ids = llama_oracle.tokenize(path, [" unbuildable"])[0]
        assert (ids == [vocabulary.tokens.index("Ġunbuildable")]) == whole


def test_ids_of_the_example_model_equal_transformers(tiny_qwq, tmp_path):
    vocabulary = read(tiny_qwq, 4096)
    path = write_gguf(vocabulary, tmp_path / "v.gguf")
    texts = with_tokens(sample_texts(), vocabulary.tokens[-5:])
    expected = transformers_ids(tiny_qwq, texts, True)
    assert different(texts, llama_oracle.tokenize(path, texts, True), expected) == []
    types = dict(zip(vocabulary.tokens, vocabulary.token_types, strict=True))
    assert types["<|im_end|>"] == CONTROL
    assert types["<think>"] == types["</think>"] == USER_DEFINED


def test_both_spellings_of_merges_read_alike(tmp_path):
    _, vocabulary, _ = made("qwen2")
    n_tokens = make_byte_level("qwen2", tmp_path, replace(STYLES["qwen2"], merges_are_pairs=False))
    merges = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
    assert isinstance(merges[0], str)
    assert read(tmp_path, n_tokens).merges == vocabulary.merges == merges


def test_a_merge_listed_twice_has_its_last_rank(tmp_path):
    n_tokens = make_byte_level("qwen2", tmp_path)

    def repeat_first_merges(tokenizer):
        merges = tokenizer["model"]["merges"]
        merges += merges[:40]

    edit(tmp_path, "tokenizer.json", repeat_first_merges)
    vocabulary = read(tmp_path, n_tokens)
    assert len(set(vocabulary.merges)) == len(vocabulary.merges)
    texts = sample_texts()
    ids = llama_oracle.tokenize(write_gguf(vocabulary, tmp_path / "v.gguf"), texts)
    assert different(texts, ids, transformers_ids(tmp_path, texts, False)) == []
    assert different(texts, ids, transformers_ids(made("qwen2")[0], texts, False)) != []


def test_merges_with_a_space_reach_no_text_and_are_left_out(tmp_path):
    _, original, _ = made("gpt-2")
    make_byte_level("gpt-2", tmp_path)

    def add_spaces(tokenizer):
        vocab = tokenizer["model"]["vocab"]
        vocab |= {" ": len(vocab), "  ": len(vocab) + 1, " e": len(vocab) + 2}
        tokenizer["model"]["merges"][:0] = [[" ", " "], [" ", "e"]]
        for i, token in enumerate(tokenizer["added_tokens"]):
            token["id"] = len(vocab) + i

    edit(tmp_path, "tokenizer.json", add_spaces)
    edit(tmp_path, "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder"))
    vocabulary = read(tmp_path, N_TOKENS + 5)
    assert vocabulary.merges == original.merges
    texts = sample_texts()
    ids = llama_oracle.tokenize(write_gguf(vocabulary, tmp_path / "v.gguf"), texts)
    assert different(texts, ids, transformers_ids(tmp_path, texts, False)) == []


def test_decomposed_accents_get_other_tokens_and_a_note_says_so():
    """Qwen2 composes characters first (NFC); llama.cpp normalises no byte-level text."""
    folder, vocabulary, path = made("qwen2")
    (composed,), (decomposed,) = (transformers_ids(folder, [t], False) for t in ("é", "e\u0301"))
    assert composed == decomposed
    ours = llama_oracle.tokenize(path, ["é", "e\u0301"])
    assert ours[0] == composed and ours[1] != composed
    assert any("decomposed accents" in note for note in vocabulary.notes)
