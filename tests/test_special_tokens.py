"""Special ids and the bos before every text, as the real llama.cpp sees them after loading."""

from dataclasses import replace
from pathlib import Path

import llama_cpp
import llama_oracle
import pytest
from tokenizer_makers import (
    STYLES,
    Style,
    added_token,
    byte_level,
    make_byte_level,
    template,
    write_folder,
    write_gguf,
)
from transformers import AutoTokenizer
from vocabulary_helpers import chatml, edit, llama_vocab, made, read, transformers_ids

from quant.errors import BadInput
from quant.vocabulary.draft import NORMAL
from quant.vocabulary.special_tokens import END_TEXTS


def llama_special(path: Path) -> dict[str, int | bool]:
    """The special tokens as the real llama.cpp sees them after loading."""
    functions = {
        "bos_token_id": llama_cpp.llama_vocab_bos,
        "eos_token_id": llama_cpp.llama_vocab_eos,
        "eot_token_id": llama_cpp.llama_vocab_eot,
        "padding_token_id": llama_cpp.llama_vocab_pad,
        "seperator_token_id": llama_cpp.llama_vocab_sep,
        "add_bos_token": llama_cpp.llama_vocab_get_add_bos,
        "add_eos_token": llama_cpp.llama_vocab_get_add_eos,
    }
    with llama_vocab(path) as vocab:
        return {key: function(vocab) for key, function in functions.items()}


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe", "tekken", "deepseek-v3", "sentencepiece"])
def test_llama_cpp_reads_the_special_ids_and_flags(name):
    _, vocabulary, path = made(name)
    seen = llama_special(path)
    written = {**vocabulary.special_ids, **vocabulary.flags}
    assert {key: written[key] for key in seen if key in written} == {
        key: value for key, value in seen.items() if key in written
    }
    assert {"bos_token_id", "eos_token_id", "add_bos_token", "add_eos_token"} <= written.keys()


def test_special_ids_of_qwq_and_llama_3():
    _, vocabulary, _ = made("qwen2")
    text = {key: vocabulary.tokens[token] for key, token in vocabulary.special_ids.items()}
    assert text["eos_token_id"] == text["eot_token_id"] == "<|im_end|>"
    assert text["padding_token_id"] == "<|endoftext|>"
    assert vocabulary.flags == {"add_bos_token": False, "add_eos_token": False}
    _, vocabulary, _ = made("llama-bpe")
    text = {key: vocabulary.tokens[token] for key, token in vocabulary.special_ids.items()}
    assert text == {
        "bos_token_id": "<|begin_of_text|>",
        "eos_token_id": "<|eot_id|>",
        "eot_token_id": "<|eot_id|>",
        "eom_token_id": "<|eom_id|>",
    }
    assert vocabulary.flags == {"add_bos_token": True, "add_eos_token": False}


TURNS = {
    "the token the template writes, not eos": ({}, 3002),
    "no template, a known eos": ({"chat_template": None}, 3000),
    "no template, an unknown eos": ({"chat_template": None, "eos_token": "<|im_start|>"}, None),
    "the template writes eos_token": ({"chat_template": "{{ m }}{{ eos_token }}"}, 3000),
    "the template writes eos by name": (
        {"chat_template": "<|im_start|>", "eos_token": "<|im_start|>"},
        3001,
    ),
    "a token that is not in the vocabulary": ({"chat_template": "<|eot_id|>"}, 3000),
}


@pytest.mark.parametrize(("config", "token"), TURNS.values(), ids=TURNS)
def test_the_end_of_a_turn_is_what_the_template_writes(tmp_path, config, token):
    n_tokens = chatml(tmp_path, **{"eos": config.pop("eos_token", "<|endoftext|>"), **config})
    assert read(tmp_path, n_tokens).special_ids.get("eot_token_id") == token


def test_two_turn_ends_in_one_template_are_not_guessed_at(tmp_path):
    added = tuple(added_token(text) for text in ("<eos>", "<|im_end|>", "<|end|>"))
    config = {"eos_token": "<eos>", "chat_template": "<|im_end|> <|end|>"}
    n_tokens = make_byte_level("gpt-2", tmp_path, Style(added=added, config=config))
    assert "eot_token_id" not in read(tmp_path, n_tokens).special_ids
    edit(tmp_path, "tokenizer_config.json", lambda config: config.update(eos_token="<|end|>"))
    assert read(tmp_path, n_tokens).special_ids["eot_token_id"] == 3002


def test_llama_cpp_would_guess_the_end_of_a_turn(tmp_path):
    """Why eot_token_id is written: without it some text that llama.cpp knows is taken."""
    n_tokens = chatml(tmp_path)
    vocabulary = read(tmp_path, n_tokens)
    ids = {k: v for k, v in vocabulary.special_ids.items() if k != "eot_token_id"}
    path = write_gguf(replace(vocabulary, special_ids=ids), tmp_path / "without.gguf")
    assert llama_special(path)["eot_token_id"] in (3000, 3002)
    path = write_gguf(vocabulary, tmp_path / "with.gguf")
    assert llama_special(path)["eot_token_id"] == 3002


@pytest.mark.parametrize("text", sorted(END_TEXTS))
def test_llama_cpp_ends_generation_at_these_texts(text, tmp_path):
    _, vocabulary, _ = made("gpt-2")
    tokens = [*vocabulary.tokens]
    tokens[-1] = text
    types = [*vocabulary.token_types[:-1], NORMAL]
    if text in vocabulary.tokens:
        tokens[vocabulary.tokens.index(text)] = "[moved]"
    altered = replace(vocabulary, tokens=tokens, token_types=types)
    with llama_vocab(write_gguf(altered, tmp_path / "v.gguf")) as vocab:
        assert llama_cpp.llama_vocab_is_eog(vocab, len(tokens) - 1)


def test_ids_of_the_config_files_serve_where_the_tokenizer_names_none(tmp_path):
    n_tokens = chatml(tmp_path, eos=None)
    write_folder(tmp_path, generation_config={"eos_token_id": [3002, 3000], "pad_token_id": 3000})
    vocabulary = read(tmp_path, n_tokens, eos_token_id=3000, bos_token_id=3001)
    assert vocabulary.special_ids == {
        "bos_token_id": 3001,
        "eos_token_id": 3002,
        "padding_token_id": 3000,
        "eot_token_id": 3002,
    }
    assert vocabulary.notes == (
        "config.json says eos_token_id 3000 (<|endoftext|>); 3002 (<|im_end|>) is written.",
    )
    nested = read(tmp_path, n_tokens, text_config={"bos_token_id": 3000})
    assert nested.special_ids["bos_token_id"] == 3000


def test_disagreements_and_further_ends_are_noted(tmp_path):
    n_tokens = chatml(tmp_path, eos="<|im_end|>", pad_token="<nowhere>")
    write_folder(tmp_path, generation_config={"eos_token_id": [3002, 3001]})
    vocabulary = read(tmp_path, n_tokens, eos_token_id=3000)
    assert vocabulary.special_ids["eos_token_id"] == 3002
    assert [note.split(";")[0] for note in vocabulary.notes] == [
        "config.json says eos_token_id 3000 (<|endoftext|>)",
        "pad_token '<nowhere>' is not in the vocabulary",
        "A GGUF file cannot say that generation also stops at <|im_start|> (3001).",
    ]


def test_special_tokens_map_serves_older_checkpoints(tmp_path):
    n_tokens = chatml(tmp_path)
    edit(tmp_path, "tokenizer_config.json", lambda config: config.pop("eos_token"))
    names = {"eos_token": {"content": "<|im_start|>"}, "pad_token": "<|im_end|>"}
    write_folder(tmp_path, special_tokens_map=names)
    special_ids = read(tmp_path, n_tokens).special_ids
    assert special_ids["eos_token_id"] == 3001
    assert special_ids["padding_token_id"] == 3002


def test_a_special_id_beyond_the_embedding_is_refused(tmp_path):
    n_tokens = make_byte_level("gpt-2", tmp_path)
    with pytest.raises(BadInput, match=f"pad token has id {n_tokens}.* {n_tokens} rows"):
        read(tmp_path, n_tokens, pad_token_id=n_tokens)
    assert "padding_token_id" not in read(tmp_path, n_tokens, pad_token_id=-1).special_ids


def test_without_bos_or_eos_llama_cpp_would_take_token_11(tmp_path):
    n_tokens = chatml(tmp_path, eos=None)
    vocabulary = read(tmp_path, n_tokens)
    bare = write_gguf(replace(vocabulary, special_ids={}), tmp_path / "bare.gguf")
    assert llama_special(bare)["bos_token_id"] == llama_special(bare)["eos_token_id"] == 11
    beyond = {"bos_token_id": n_tokens, "eos_token_id": 2**32 - 1}
    beyond = write_gguf(replace(vocabulary, special_ids=beyond), tmp_path / "beyond.gguf")
    assert llama_special(beyond)["bos_token_id"] == llama_special(beyond)["eos_token_id"] == 11

    assert vocabulary.special_ids == {
        "eos_token_id": 3000,
        "bos_token_id": 3000,
        "eot_token_id": 3002,
    }
    assert (
        "names no token that ends text; llama.cpp will stop at '<|endoftext|>'"
        in (vocabulary.notes[0])
    )
    seen = llama_special(write_gguf(vocabulary, tmp_path / "v.gguf"))
    assert seen["bos_token_id"] == seen["eos_token_id"] == 3000
    assert not seen["add_bos_token"]


def test_a_template_that_writes_a_bos_which_is_not_there_is_noted(tmp_path):
    n_tokens = chatml(tmp_path, chat_template="{{ bos_token }}<|im_end|>")
    vocabulary = read(tmp_path, n_tokens)
    assert "transformers writes nothing there" in vocabulary.notes[0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    message = {"role": "user", "content": "Hi"}
    assert tokenizer.apply_chat_template([message], tokenize=False) == "<|im_end|>"
    edit(tmp_path, "tokenizer_config.json", lambda c: c.update(bos_token="<|im_start|>"))
    assert read(tmp_path, n_tokens).notes == ()


ENDS = {  # config, post_processor, add_bos_token, whether ids are those of transformers
    "bos by the template": ({"bos_token": "<|im_start|>"}, template("<|im_start|>"), True, True),
    "nothing": ({"bos_token": "<|im_start|>"}, byte_level(True), False, True),
    "bos that only the template names": ({}, template("<|im_start|>"), True, True),
    "two tokens": (
        {"bos_token": "<|im_start|>"},
        template("<|im_end|>", "<|im_start|>"),
        False,
        False,
    ),
    "false in the config, not in the template": (
        {"bos_token": "<|im_start|>", "add_bos_token": False},
        template("<|im_start|>"),
        True,
        True,
    ),
}


@pytest.mark.parametrize(("config", "post_processor", "adds", "equal"), ENDS.values(), ids=ENDS)
def test_what_stands_before_every_text(tmp_path, config, post_processor, adds, equal):
    added = tuple(added_token(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    config = {"eos_token": "<|endoftext|>", **config}
    style = Style(added=added, config=config, post_processor=post_processor)
    vocabulary = read(tmp_path, make_byte_level("gpt-2", tmp_path, style))
    assert vocabulary.flags["add_bos_token"] == adds
    ids = llama_oracle.tokenize(write_gguf(vocabulary, tmp_path / "v.gguf"), ["", "Hi"], True)
    assert (ids == transformers_ids(tmp_path, ["", "Hi"], True)) == equal
    if not equal:
        assert "llama.cpp can put only the bos token there" in vocabulary.notes[0]


def test_add_bos_token_of_the_config_counts_without_a_template(tmp_path):
    """DeepSeek's distilled models: the Llama class of transformers 4 put it there, 5 does not."""
    style = STYLES["deepseek-v3"]
    style = replace(style, config={**style.config, "add_bos_token": True})
    vocabulary = read(tmp_path, make_byte_level("deepseek-v3", tmp_path, style))
    assert vocabulary.flags["add_bos_token"]
    assert vocabulary.notes == (
        "tokenizer_config.json says add_bos_token true, tokenizer.json's post_processor false; "
        "true is written.",
    )
    path = write_gguf(vocabulary, tmp_path / "v.gguf")
    bos = vocabulary.special_ids["bos_token_id"]
    without = transformers_ids(tmp_path, ["Hi"], True)[0]
    assert llama_oracle.tokenize(path, ["Hi"], True) == [[bos, *without]]
