"""SentencePiece's BPE: ids equal to the sentencepiece library's, and to transformers' where it can.

Where llama.cpp departs from transformers, a test proves that it does and that the notes say so.
"""

import contextlib

import llama_oracle
import pytest
import sentencepiece
from tokenizer_makers import (
    N_TOKENS,
    make_sentencepiece,
    sample_texts,
    sentencepiece_model,
    write_gguf,
)
from vocabulary_helpers import (
    copy_of,
    different,
    edit,
    made,
    read,
    set_at,
    transformers_ids,
    with_tokens,
)

from quant.errors import BadInput
from quant.vocabulary.draft import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from quant.vocabulary.tokenizer_model import read_tokenizer_model

SPM_TOKENS = ["<s>", "</s>", "[INST]", "<think>", "[USER]"]


def test_sentencepiece_ids_equal_the_sentencepiece_library():
    folder, _, path = made("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = [text for text in sample_texts() if not any(token in text for token in SPM_TOKENS)]
    ids = llama_oracle.tokenize(path, texts, parse_special=False)
    assert different(texts, ids, processor.encode(texts)) == []


@pytest.mark.parametrize("add_special", [False, True])
def test_sentencepiece_ids_equal_transformers_where_it_keeps_to_sentencepiece(add_special):
    """transformers 5 puts no space before text that begins with one; SentencePiece does."""
    folder, vocabulary, path = made("sentencepiece")
    tokens = ["[INST]", "<think>", "[USER]"]
    texts = [*sample_texts(), *(f"Hi{token}there" for token in tokens), "[INST]Hi<s>Hi</s>"]
    ids = llama_oracle.tokenize(path, texts, add_special)
    found = different(texts, ids, transformers_ids(folder, texts, add_special))
    assert len(found) > 3
    assert all(text.startswith(" ") for text in found)
    assert "transformers 5 leaves it out before a space" in vocabulary.notes[0]


def test_sentencepiece_after_special_tokens_differs_where_legacy_is_false(tmp_path):
    n_tokens = make_sentencepiece(tmp_path, legacy=False)
    vocabulary = read(tmp_path, n_tokens)
    path = write_gguf(vocabulary, tmp_path / "v.gguf")
    texts = ["Hi", "Hi[INST]Hi", "[INST]Hi"]
    expected = transformers_ids(tmp_path, texts, False)
    assert different(texts, llama_oracle.tokenize(path, texts), expected) == texts[1:]
    assert "after special tokens" in vocabulary.notes[0]


@pytest.mark.parametrize("add_special", [False, True])
def test_sentencepiece_as_llama_2_has_it_in_tokenizer_json(add_special):
    folder, vocabulary, path = made("sentencepiece-json")
    assert not (folder / "tokenizer.model").exists()
    texts = with_tokens(sample_texts(), SPM_TOKENS)
    expected = transformers_ids(folder, texts, add_special)
    assert different(texts, llama_oracle.tokenize(path, texts, add_special), expected) == []
    assert vocabulary.notes == ()


def test_the_two_forms_of_a_sentencepiece_tokenizer_agree(tmp_path):
    _, model, _ = made("sentencepiece")
    _, both, _ = made("sentencepiece-json")
    assert both.tokens == model.tokens
    assert both.token_types == model.token_types
    assert both.flags == {k: v for k, v in model.flags.items() if k != "remove_extra_whitespaces"}
    n_rows = copy_of("sentencepiece-json", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    both = read(tmp_path, n_rows)
    assert both.scores == model.scores
    assert both.notes == ()


def test_sentencepiece_types_scores_and_flags():
    folder, vocabulary, _ = made("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert vocabulary.model == "llama"
    assert vocabulary.pre == "default"
    assert vocabulary.tokens[:N_TOKENS] == [processor.id_to_piece(i) for i in range(N_TOKENS)]
    assert vocabulary.scores[:N_TOKENS] == [processor.get_score(i) for i in range(N_TOKENS)]
    types = dict(zip(vocabulary.tokens, vocabulary.token_types, strict=True))
    assert types["<unk>"] == UNKNOWN
    assert types["<s>"] == types["[INST]"] == CONTROL
    assert types["[USER]"] == types["<think>"] == USER_DEFINED
    assert types["<0x0A>"] == BYTE
    assert types["▁"] == NORMAL
    assert vocabulary.special_ids == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "eot_token_id": 2,
    }
    assert vocabulary.flags == {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": True,
        "remove_extra_whitespaces": False,
    }


def test_sentencepiece_alone_says_enough(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(
        sentencepiece_model(add_dummy_prefix=False, remove_extra_whitespaces=True)
    )
    vocabulary = read(tmp_path, N_TOKENS)
    assert vocabulary.flags == {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": False,
        "remove_extra_whitespaces": True,
    }
    assert vocabulary.special_ids["bos_token_id"] == 1
    assert vocabulary.notes == ()


def test_a_model_that_changes_text_is_noted_and_does_differ(tmp_path):
    model = sentencepiece_model(normalization_rule_name="nmt_nfkc")
    (tmp_path / "tokenizer.model").write_bytes(model)
    vocabulary = read(tmp_path, N_TOKENS)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = llama_oracle.tokenize(write_gguf(vocabulary, tmp_path / "v.gguf"), ["ＡＢＣ"])
    assert ids != [processor.encode("ＡＢＣ")]
    assert any("NFKC" in note for note in vocabulary.notes)


def test_pieces_out_of_order_are_noted_and_do_differ(tmp_path):
    """transformers 5.23 makes merges of a tokenizer.model in the order of ids, not of scores."""
    n_tokens = make_sentencepiece(tmp_path)
    path = tmp_path / "tokenizer.model"
    data = bytearray(path.read_bytes())
    pieces = read_tokenizer_model(bytes(data)).pieces
    early = next(text for text, score, _ in pieces if score == -1.0)
    place = data.index(early.encode(), data.index(b"<0xFF>"))
    assert data[place + len(early.encode())] == 0x15  # field 2, the score
    start = place + len(early.encode()) + 1
    data[start : start + 4] = b"\x00\x00\x7a\xc4"  # -1000.0
    path.write_bytes(data)
    vocabulary = read(tmp_path, n_tokens)
    assert vocabulary.scores[vocabulary.tokens.index(early)] == -1000.0
    assert "in the order of their ids" in vocabulary.notes[-1]
    texts = [text for text in sample_texts() if not text.startswith(" ")]
    ids = llama_oracle.tokenize(write_gguf(vocabulary, tmp_path / "v.gguf"), texts)
    processor = sentencepiece.SentencePieceProcessor(model_proto=bytes(data))
    plain = [text for text in texts if not any(token in text for token in SPM_TOKENS)]
    ids = llama_oracle.tokenize(tmp_path / "v.gguf", plain, parse_special=False)
    assert different(plain, ids, processor.encode(plain)) == []
    assert different(plain, ids, transformers_ids(tmp_path, plain, False)) != []


def test_merges_that_llama_cpp_makes_more_of_are_noted(tmp_path):
    n_rows = copy_of("sentencepiece-json", tmp_path)

    def forget_merges(tokenizer):
        seen, merges = set(), []
        for left, right in tokenizer["model"]["merges"]:
            if left + right not in seen:
                merges.append([left, right])
            seen.add(left + right)
        tokenizer["model"]["merges"] = merges

    edit(tmp_path, "tokenizer.json", forget_merges)
    assert "llama.cpp also joins" in read(tmp_path, n_rows).notes[0]


def test_cuts_at_spaces_that_llama_cpp_does_not_make_are_noted_and_differ(tmp_path):
    n_rows = copy_of("sentencepiece-json", tmp_path)

    def cut_at_spaces(tokenizer):
        step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
        tokenizer["normalizer"], tokenizer["pre_tokenizer"] = None, step

    edit(tmp_path, "tokenizer.json", cut_at_spaces)
    vocabulary = read(tmp_path, n_rows)
    assert "cuts text at spaces" in vocabulary.notes[1]
    texts = ["a b", "a     b"]
    expected = transformers_ids(tmp_path, texts, False)
    ids = llama_oracle.tokenize(write_gguf(vocabulary, tmp_path / "v.gguf"), texts)
    assert different(texts, ids, expected) == texts[1:]


BAD_MODELS = {
    "unigram": (lambda: sentencepiece_model("unigram"), "unigram"),
    "characters": (lambda: sentencepiece_model("char", byte_fallback=False), "characters"),
    "no byte tokens": (lambda: sentencepiece_model(byte_fallback=False), "256 byte tokens"),
    "a space at the end": (
        lambda: sentencepiece_model(treat_whitespace_as_suffix=True),
        "space at a word's end",
    ),
    "tiktoken's file": (lambda: b"IQ== 0\nIg== 1\n", "not a SentencePiece model"),
    "cut short": (lambda: sentencepiece_model()[:5000], "not a SentencePiece model"),
    "empty": (lambda: b"", "not a SentencePiece model"),
}


@pytest.mark.parametrize(("data", "message"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_models_that_llama_cpp_cannot_reproduce_are_refused(tmp_path, data, message):
    (tmp_path / "tokenizer.model").write_bytes(data())
    with pytest.raises(BadInput, match=message):
        read(tmp_path, N_TOKENS)


def test_a_damaged_model_gives_an_error_of_ours_wherever_a_byte_is_wrong():
    data = sentencepiece_model()
    for place in range(0, len(data), 97):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        with contextlib.suppress(BadInput):
            read_tokenizer_model(bytes(damaged))


def lose_a_byte(tokenizer):
    vocab = tokenizer["model"]["vocab"]
    vocab["<lost>"] = vocab.pop("<0x00>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("normalizer", value={"type": "NFKC"}), "a step that llama.cpp cannot do"),
        (lose_a_byte, "lacks 1 of the 256 byte tokens, such as <0x00>"),
    ],
)
def test_other_steps_and_missing_bytes_are_refused(tmp_path, change, message):
    n_rows = copy_of("sentencepiece-json", tmp_path)
    edit(tmp_path, "tokenizer.json", change)
    with pytest.raises(BadInput, match=message):
        read(tmp_path, n_rows)
