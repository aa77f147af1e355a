"""Added tokens: their ids and types as transformers and llama.cpp have them, and what is lost."""

from dataclasses import replace

import llama_cpp
import llama_oracle
import pytest
from tokenizer_makers import (
    N_TOKENS,
    STYLES,
    Style,
    added_token,
    make_byte_level,
    make_sentencepiece,
    write_folder,
    write_gguf,
)
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

from quant.errors import BadInput
from quant.vocabulary.draft import CONTROL, USER_DEFINED


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe", "deepseek-v3"])
def test_special_tokens_are_text_where_they_are_not_asked_for(name):
    """CONTROL and USER_DEFINED are `special` true and false, told apart by split_special_tokens."""
    folder, _, path = made(name)
    tokens = [t["content"] for t in STYLES[name].added if "fim" not in t["content"]]
    texts = with_tokens([], tokens)
    expected = transformers_ids(folder, texts, False, split_special_tokens=True)
    ids = llama_oracle.tokenize(path, texts, parse_special=False)
    assert different(texts, ids, expected) == []
    assert different(texts, ids, llama_oracle.tokenize(path, texts)) != []


def test_added_tokens_get_the_ids_that_the_tokenizers_library_gives(tmp_path):
    n_tokens = make_byte_level("gpt-2", tmp_path)

    def state_other_ids(tokenizer):
        tokenizer["added_tokens"][1]["id"] += 7

    edit(tmp_path, "tokenizer.json", state_other_ids)
    edit(tmp_path, "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder"))
    vocabulary = read(tmp_path, n_tokens + 10)
    expected = transformers_ids(tmp_path, ["<mark>"], False)[0]
    assert [vocabulary.tokens.index("<mark>")] == expected == [3001]
    assert "'<mark>' 3008 -> 3001" in vocabulary.notes[0]


def test_tokens_named_only_in_tokenizer_config_are_added(tmp_path):
    n_tokens = make_byte_level("gpt-2", tmp_path)

    def add(config):
        config["added_tokens_decoder"]["3002"] = added_token("<extra>", special=False)

    edit(tmp_path, "tokenizer_config.json", add)
    vocabulary = read(tmp_path, n_tokens + 1)
    assert transformers_ids(tmp_path, ["<extra>"], False) == [[3002]]
    assert vocabulary.tokens[3002] == "<extra>"
    assert vocabulary.token_types[3000:] == [CONTROL, USER_DEFINED, USER_DEFINED]


SPECIAL = {  # tokenizer.json, tokenizer_config.json, further config, whether it is special
    "in neither": (False, False, {}, False),
    "in the config alone": (False, True, {}, True),
    "in tokenizer.json alone": (True, False, {}, True),
    "by its part": (False, False, {"eos_token": "<mark>"}, True),
    "in a list of further ones": (False, False, {"additional_special_tokens": ["<mark>"]}, False),
}


@pytest.mark.parametrize(("file", "config", "more", "special"), SPECIAL.values(), ids=SPECIAL)
def test_a_token_is_special_where_transformers_takes_it_so(tmp_path, file, config, more, special):
    added = (added_token("<|endoftext|>"), added_token("<mark>", special=file))
    style = Style(added=added, config={"eos_token": "<|endoftext|>", **more})
    n_tokens = make_byte_level("gpt-2", tmp_path, style)
    edit(
        tmp_path,
        "tokenizer_config.json",
        lambda c: c["added_tokens_decoder"]["3001"].update(special=config),
    )
    theirs = transformers_ids(tmp_path, ["<mark>"], False, split_special_tokens=True)
    assert (theirs != [[3001]]) == special
    assert (read(tmp_path, n_tokens).token_types[3001] == CONTROL) == special


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
@pytest.mark.parametrize("value", [True, -1, 3.5, "<mark>", {"a": 1}, [7, None]], ids=str)
def test_junk_for_a_list_of_further_special_tokens_is_passed_over(tmp_path, key, value):
    """Neither list is read; transformers raises TypeError for most of these."""
    n_rows = copy_of("qwen2", tmp_path)
    write_folder(tmp_path, special_tokens_map={})
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edit(tmp_path, name, set_at(key, value=value))
        assert read(tmp_path, n_rows) == made("qwen2")[1]


def test_tokens_that_llama_cpp_makes_control_tokens_itself_are_written_so(tmp_path):
    _, vocabulary, _ = made("qwen2")
    token = vocabulary.tokens.index("<|fim_prefix|>")  # `special` false in Qwen's files
    assert vocabulary.token_types[token] == CONTROL
    assert vocabulary.special_ids["fim_pre_token_id"] == token
    types = [*vocabulary.token_types]
    types[token] = USER_DEFINED
    ids = {k: v for k, v in vocabulary.special_ids.items() if k != "fim_pre_token_id"}
    altered = replace(vocabulary, token_types=types, special_ids=ids)
    with llama_vocab(write_gguf(altered, tmp_path / "v.gguf")) as vocab:
        assert llama_cpp.llama_vocab_is_control(vocab, token)
        assert llama_cpp.llama_vocab_fim_pre(vocab) == token
    assert "control-looking token" in "".join(llama_oracle.LOG)


def test_an_added_token_on_the_id_of_a_piece_is_refused(tmp_path):
    """The vocabulary has a hole, and the tokenizers library counts pieces, not ids."""
    n_tokens = make_byte_level("gpt-2", tmp_path)

    def make_hole(tokenizer):
        vocab = tokenizer["model"]["vocab"]
        vocab[max(vocab, key=vocab.get)] += 1

    edit(tmp_path, "tokenizer.json", make_hole)
    with pytest.raises(BadInput, match=r"share the id 3000.*<\|endoftext\|>"):
        read(tmp_path, n_tokens + 1)


def test_an_added_token_takes_the_place_of_a_piece(tmp_path):
    """Mistral keeps pieces free: "[control_5]" in the model, "[TOOL]" in the config."""
    n_tokens, place = make_sentencepiece(tmp_path), N_TOKENS - 1
    piece = read(tmp_path, n_tokens).tokens[place]
    decoder = {str(place): added_token("[TOOL]")}
    edit(tmp_path, "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=decoder))
    vocabulary = read(tmp_path, n_tokens)
    assert vocabulary.tokens[place] == "[TOOL]"
    assert vocabulary.token_types[place] == CONTROL
    assert piece not in vocabulary.tokens


def test_added_tokens_json_serves_older_checkpoints(tmp_path):
    make_sentencepiece(tmp_path)
    edit(tmp_path, "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder"))
    write_folder(tmp_path, added_tokens={"<pad>": N_TOKENS})
    vocabulary = read(tmp_path, N_TOKENS + 1)
    assert vocabulary.tokens[N_TOKENS] == "<pad>"
    assert vocabulary.token_types[N_TOKENS] == USER_DEFINED


def test_flags_that_llama_cpp_lacks_are_noted_and_do_differ(tmp_path):
    style = Style(added=(added_token("<|endoftext|>"), added_token("<mask>", lstrip=True)))
    n_tokens = make_byte_level("gpt-2", tmp_path, style)
    vocabulary = read(tmp_path, n_tokens)
    texts = ["a <mask>b"]
    ids = llama_oracle.tokenize(write_gguf(vocabulary, tmp_path / "v.gguf"), texts)
    assert ids != transformers_ids(tmp_path, texts, False)
    assert "'<mask>'" in vocabulary.notes[0]


def test_normalized_tokens_are_noted_and_differ(tmp_path):
    """transformers looks for "▁<think>" in "▁a<think>b", and finds it in neither."""
    n_rows = copy_of("sentencepiece-json", tmp_path)

    def normalize(tokenizer):
        tokenizer["added_tokens"][-1]["normalized"] = True

    edit(tmp_path, "tokenizer.json", normalize)
    vocabulary = read(tmp_path, n_rows)
    assert "finds only after a space (`normalized` true)" in vocabulary.notes[0]
    texts = ["a[INST]b", "a<think>b"]
    expected = transformers_ids(tmp_path, texts, False)
    ids = llama_oracle.tokenize(write_gguf(vocabulary, tmp_path / "v.gguf"), texts)
    assert different(texts, ids, expected) == texts[1:]
