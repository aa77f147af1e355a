"""Vocabularies as a whole: a token for each row, the types of keys, and what is refused."""

import contextlib
import json
from dataclasses import replace

import llama_cpp
import llama_oracle
import pytest
from tokenizer_makers import (
    CHATML,
    STYLES,
    Style,
    added_token,
    make_byte_level,
    sample_texts,
    write_gguf,
)
from transformers import AutoTokenizer
from vocabulary_helpers import (
    copy_of,
    different,
    edit,
    llama_vocab,
    made,
    read,
    set_at,
    transformers_ids,
    with_tokens,
)

from quant.errors import BadInput, InputMissing, UsageError
from quant.gguf_file import Value
from quant.vocabulary.draft import NORMAL, UNUSED, USER_DEFINED


def test_rows_without_a_token_are_filled(tmp_path):
    _, vocabulary, path = made("qwen2")
    n_rows = len(vocabulary.tokens)
    assert vocabulary.tokens[-5:] == [f"[PAD{i}]" for i in range(n_rows - 5, n_rows)]
    assert vocabulary.token_types[-6:] == [USER_DEFINED, *[UNUSED] * 5]
    with llama_vocab(path) as vocab:
        assert llama_cpp.llama_vocab_n_tokens(vocab) == n_rows


def test_a_token_that_looks_like_a_filler_keeps_its_text(tmp_path):
    n_tokens = make_byte_level("gpt-2", tmp_path, Style(added=(added_token("[PAD3003]"),)))
    vocabulary = read(tmp_path, n_tokens + 5)
    assert vocabulary.tokens.index("[PAD3003]") == 3000
    assert vocabulary.tokens[3003] == "[PAD3003]_"
    with llama_vocab(write_gguf(vocabulary, tmp_path / "v.gguf")):
        pass  # llama.cpp aborts the process if two tokens have one text


def test_an_empty_token_counts_but_is_no_text(tmp_path):
    make_byte_level("gpt-2", tmp_path)

    def add_empty(tokenizer):
        tokenizer["model"]["vocab"][""] = 3000
        for token in tokenizer["added_tokens"]:
            token["id"] += 1

    edit(tmp_path, "tokenizer.json", add_empty)
    edit(tmp_path, "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder"))
    vocabulary = read(tmp_path, 3003)
    assert vocabulary.tokens[3000:] == ["[PAD3000]", "<|endoftext|>", "<mark>"]
    assert vocabulary.token_types[3000] == UNUSED
    assert vocabulary.notes == ()
    assert transformers_ids(tmp_path, ["<mark>"], False) == [[3002]]


def test_holes_in_the_vocabulary_are_filled_and_ids_stay(tmp_path):
    make_byte_level("gpt-2", tmp_path)

    def make_hole(tokenizer):  # the last piece moves ten places up, the added tokens beyond it
        model = tokenizer["model"]
        last = max(model["vocab"], key=model["vocab"].get)
        model["vocab"][last] += 10
        tokenizer["added_tokens"] = [{**added_token("<|endoftext|>"), "id": 3000}]

    edit(tmp_path, "tokenizer.json", make_hole)
    edit(tmp_path, "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder"))
    vocabulary = read(tmp_path, 3020)
    assert vocabulary.tokens[2999] == "[PAD2999]"
    assert vocabulary.tokens[3000] == "<|endoftext|>"
    texts = with_tokens(sample_texts(), ["<|endoftext|>"])
    ids = llama_oracle.tokenize(write_gguf(vocabulary, tmp_path / "v.gguf"), texts)
    assert different(texts, ids, transformers_ids(tmp_path, texts, False)) == []


def test_what_no_file_can_say_of_a_piece_is_noted(tmp_path):
    """ "</s>", an ordinary piece of Qwen's vocabulary, ends generation in llama.cpp."""
    n_tokens = make_byte_level("qwen2", tmp_path, replace(STYLES["qwen2"], whole_words=("</s>",)))
    vocabulary = read(tmp_path, n_tokens)
    token = vocabulary.tokens.index("</s>")
    assert vocabulary.token_types[token] == NORMAL
    assert any(f"'</s>' ({token})" in note for note in vocabulary.notes)
    with llama_vocab(write_gguf(vocabulary, tmp_path / "v.gguf")) as vocab:
        assert llama_cpp.llama_vocab_is_eog(vocab, token)
        assert not llama_cpp.llama_vocab_is_eog(vocab, token - 1)


def test_files_that_transformers_5_saved_give_the_same_vocabulary(tmp_path):
    """It writes no added_tokens_decoder, the template as a file, and its class's own unk_token."""
    folder, vocabulary, _ = made("qwen2")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    saved = read(tmp_path, len(vocabulary.tokens))
    assert saved.special_ids.pop("unknown_token_id") == vocabulary.tokens.index("<|endoftext|>")
    assert saved == vocabulary


def test_metadata_has_the_types_that_llama_cpp_demands():
    _, vocabulary, _ = made("sentencepiece")
    types = {key: value.type for key, value in vocabulary.metadata().items()}
    assert types == {
        "tokenizer.ggml.model": "str",
        "tokenizer.ggml.pre": "str",
        "tokenizer.ggml.tokens": "arr[str]",
        "tokenizer.ggml.token_type": "arr[i32]",
        "tokenizer.ggml.scores": "arr[f32]",
        "tokenizer.ggml.bos_token_id": "u32",
        "tokenizer.ggml.eos_token_id": "u32",
        "tokenizer.ggml.unknown_token_id": "u32",
        "tokenizer.ggml.eot_token_id": "u32",
        "tokenizer.ggml.add_bos_token": "bool",
        "tokenizer.ggml.add_eos_token": "bool",
        "tokenizer.ggml.add_space_prefix": "bool",
        "tokenizer.ggml.remove_extra_whitespaces": "bool",
    }
    _, vocabulary, _ = made("qwen2")
    assert vocabulary.metadata()["tokenizer.ggml.merges"] == Value("arr[str]", vocabulary.merges)
    assert vocabulary.metadata()["tokenizer.chat_template"] == Value("str", CHATML)
    assert "tokenizer.ggml.scores" not in vocabulary.metadata()


BAD = {
    "no vocabulary": (set_at("model", "vocab", value={}), "no vocabulary"),
    "ids are text": (set_at("model", "vocab", "the", value="5"), "Token 'the'.* has id 5"),
    "ids are negative": (set_at("model", "vocab", "the", value=-1), "has id -1"),
    "one id twice": (set_at("model", "vocab", "the", value=0), "share the id 0: '!' and 'the'"),
    "no merges": (set_at("model", "merges", value=[]), "no merges"),
    "merges of three": (
        set_at("model", "merges", 3, value=["a", "b", "c"]),
        "merges.*cannot be read",
    ),
    "merges of numbers": (set_at("model", "merges", 3, value=7), "merges.*cannot be read"),
    "an unknown merge": (set_at("model", "merges", 3, value=["q", "\x1b"]), r"makes 'q\\x1b'"),
    "unigram": (set_at("model", "type", value="Unigram"), "type Unigram"),
    "no model": (set_at("model", value=None), "type None"),
    "word endings": (set_at("model", "end_of_word_suffix", value="</w>"), "end_of_word_suffix"),
    "added tokens": (set_at("added_tokens", value=[{"id": 5}]), "added tokens cannot be read"),
    "added ids": (set_at("added_tokens", 0, "id", value="5"), "added tokens cannot be read"),
    "a zero byte": (set_at("model", "vocab", "a\0b", value=3000), r"'a\\x00b', holds a zero"),
    "unknown rules": (set_at("pre_tokenizer", value={"type": "Whitespace"}), "cuts text"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_damaged_tokenizers_are_refused_in_plain_words(tmp_path, change, message):
    n_tokens = make_byte_level("gpt-2", tmp_path)
    edit(tmp_path, "tokenizer.json", change)
    with pytest.raises(BadInput, match=message):
        read(tmp_path, n_tokens + 1)


WRONG = (7, "x", [], ["x"], [7], [[]], {}, {"x": 7}, {"type": "x"}, {"x": {"x": 7}}, None, True)


def shrink(tokenizer: dict) -> None:
    """Keep three hundred pieces, for files that are read a thousand times."""
    model = tokenizer["model"]
    model["vocab"] = {text: i for text, i in model["vocab"].items() if i < 300}
    model["merges"] = [
        [left, right]
        for left, right in (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        if {left, right, left + right} <= model["vocab"].keys()
    ]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_files_of_the_wrong_shape_never_end_in_a_traceback(tmp_path, wrong):
    make_byte_level("llama-bpe", tmp_path)
    (tmp_path / "sentencepiece").mkdir()
    copy_of("sentencepiece-json", tmp_path / "sentencepiece")
    for folder in (tmp_path, tmp_path / "sentencepiece"):
        edit(folder, "tokenizer.json", shrink)
        assert len(read(folder, 310).merges or [1]) > 0
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            original = (folder / name).read_text("utf-8") if (folder / name).exists() else "{}"
            keys = [[key] for key in json.loads(original)]
            keys += [["eos_token_id"], ["add_bos_token"], ["additional_special_tokens"]]
            if name == "tokenizer.json":
                model = json.loads(original)["model"]
                keys += [["model", key] for key in model] + [["added_tokens", 0]]
                keys += [["added_tokens", 0, key] for key in ("id", "content", "special")]
                keys += [["post_processor", "processors"], ["post_processor", "single"]]
                keys += [["pre_tokenizer", "pretokenizers"], ["normalizer", "normalizers"]]
            for path in keys:
                content = json.loads(original)
                with contextlib.suppress(TypeError):  # a path through null
                    set_at(*path, value=wrong)(content)
                (folder / name).write_text(json.dumps(content), "utf-8")
                with contextlib.suppress(BadInput):
                    read(folder, 310, eos_token_id=wrong, text_config=wrong)
            (folder / name).write_text(original, "utf-8")


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_the_numbers(tmp_path):
    n_tokens = make_byte_level("gpt-2", tmp_path)
    assert len(read(tmp_path, n_tokens).tokens) == n_tokens
    with pytest.raises(BadInput, match=f"has {n_tokens} tokens.* {n_tokens - 2} rows") as caught:
        read(tmp_path, n_tokens - 2)
    assert "2 tokens have no row, the first '<|endoftext|>' with id 3000" in caught.value.why


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputMissing, match=r"neither tokenizer\.json nor tokenizer\.model"):
        read(tmp_path, 10)


def test_an_override_is_for_byte_level_tokenizers():
    folder, vocabulary, _ = made("qwen2")
    assert read(folder, len(vocabulary.tokens), "deepseek-r1-qwen").pre == "deepseek-r1-qwen"
    folder, vocabulary, _ = made("sentencepiece")
    with pytest.raises(UsageError, match="--pre-tokenizer does not apply"):
        read(folder, len(vocabulary.tokens), "qwen2")
