"""Vocabularies: the same ids in transformers and in the real llama.cpp, plain words for the rest.

Tokenizers are trained here (tokenizer_makers.py); where llama.cpp departs from transformers, a test
proves that it does and that the vocabulary's notes say so.
"""

import contextlib
import json
import unicodedata
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import llama_cpp
import llama_oracle
import pytest
import sentencepiece
from tokenizer_makers import (
    CHATML,
    N_TOKENS,
    STYLES,
    Style,
    added_token,
    byte_level,
    make_byte_level,
    make_sentencepiece,
    make_sentencepiece_json,
    sample_texts,
    sentencepiece_model,
    template,
    write_folder,
    write_gguf,
)
from transformers import AutoTokenizer

from quant.checkpoint import Checkpoint
from quant.errors import BadInput, InputMissing, UsageError
from quant.gguf_file import Value
from quant.pre_tokenizers import KNOWN
from quant.tokenizer import (
    BYTE,
    CONTROL,
    END_TEXTS,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    read_chat_templates,
    read_sentencepiece,
    read_vocabulary,
)

EXACT = [row.name for row in KNOWN if not row.differs]
DIFFERS = [row.name for row in KNOWN if row.differs]


def checkpoint(folder: Path, **config) -> Checkpoint:
    return Checkpoint(folder, "test", None, config, {})


def read(folder: Path, n_rows: int, pre_tokenizer: str | None = None, **config) -> Vocabulary:
    return read_vocabulary(checkpoint(folder, **config), n_rows, pre_tokenizer)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> (folder, vocabulary, GGUF file) of one style, with five rows to spare."""

    @lru_cache
    def get(name: str) -> tuple[Path, Vocabulary, Path]:
        folder = tmp_path_factory.mktemp(name)
        makers = {
            "sentencepiece": make_sentencepiece,
            "sentencepiece-json": make_sentencepiece_json,
        }
        n_tokens = makers[name](folder) if name in makers else make_byte_level(name, folder)
        vocabulary = read(folder, n_tokens + 5)
        return folder, vocabulary, write_gguf(vocabulary, folder / "vocabulary.gguf")

    return get


def edit(folder: Path, name: str, change) -> None:
    """Rewrite folder/name as `change`, called with its content, leaves it."""
    path = folder / name
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def copy_of(made: tuple[Path, Vocabulary, Path], folder: Path) -> int:
    """The JSON files of a made tokenizer, to be changed in `folder`; returns its rows."""
    for file in made[0].glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return len(made[1].tokens)


def with_tokens(texts: list[str], tokens: list[str]) -> list[str]:
    """The texts, and each token alone, in a row, between words, and glued to them."""
    for token in tokens:
        texts = [*texts, token, f"{token}{token}\n{token} ", f"a{token}b {token} c", f"{token}Hi"]
    return [*texts, "".join(tokens)]


def transformers_ids(folder: Path, texts: list[str], add_special: bool, **options):
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return [tokenizer.encode(text, add_special_tokens=add_special) for text in texts]


def different(texts: list[str], one: list, other: list) -> list[str]:
    return [text for text, a, b in zip(texts, one, other, strict=True) if a != b]


@contextlib.contextmanager
def llama_vocab(path: Path):
    with llama_oracle.loaded(path, vocab_only=True) as model:
        yield llama_cpp.llama_model_get_vocab(model)


# ---- byte-level BPE: ids ------------------------------------------------------------------------


@pytest.mark.parametrize("add_special", [False, True])
@pytest.mark.parametrize("name", EXACT)
def test_ids_equal_transformers(made, name, add_special):
    folder, vocabulary, path = made(name)
    words = [word.replace("Ġ", " ") for word in STYLES[name].whole_words]
    texts = with_tokens(sample_texts(), [token["content"] for token in STYLES[name].added])
    texts += [word * n for word in words for n in (1, 2)]
    expected = transformers_ids(folder, texts, add_special)
    ids = llama_oracle.tokenize(path, texts, add_special)
    assert different(texts, ids, expected) == []
    assert vocabulary.notes == ()
    assert vocabulary.pre == name


@pytest.mark.parametrize("name", DIFFERS)
def test_ids_differ_only_in_words_with_combining_marks(made, name):
    """llama.cpp's tekken and gpt-4o say [^a-z] where the releases say \\p{Lu}...\\p{M}."""
    folder, vocabulary, path = made(name)
    texts = with_tokens(sample_texts(), [token["content"] for token in STYLES[name].added])
    expected = transformers_ids(folder, texts, True)
    found = different(texts, llama_oracle.tokenize(path, texts, True), expected)
    assert len(found) >= 3
    for text in found:
        assert any(unicodedata.category(character)[0] == "M" for character in text)
    assert "combining marks" in vocabulary.notes[0]


def test_words_that_no_merge_makes_are_whole_only_where_merges_are_ignored(made):
    for name, whole in (("llama-bpe", True), ("dbrx", False)):
        _, vocabulary, path = made(name)
        ids = llama_oracle.tokenize(path, [" unbuildable"])[0]
        assert (ids == [vocabulary.tokens.index("Ġunbuildable")]) == whole


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe", "deepseek-v3"])
def test_special_tokens_are_text_where_they_are_not_asked_for(made, name):
    """CONTROL and USER_DEFINED are `special` true and false, told apart by split_special_tokens."""
    folder, _, path = made(name)
    tokens = [t["content"] for t in STYLES[name].added if "fim" not in t["content"]]
    texts = with_tokens([], tokens)
    expected = transformers_ids(folder, texts, False, split_special_tokens=True)
    ids = llama_oracle.tokenize(path, texts, parse_special=False)
    assert different(texts, ids, expected) == []
    assert different(texts, ids, llama_oracle.tokenize(path, texts)) != []


def test_ids_of_the_example_model_equal_transformers(tiny_qwq, tmp_path):
    vocabulary = read(tiny_qwq, 4096)
    path = write_gguf(vocabulary, tmp_path / "v.gguf")
    texts = with_tokens(sample_texts(), vocabulary.tokens[-5:])
    expected = transformers_ids(tiny_qwq, texts, True)
    assert different(texts, llama_oracle.tokenize(path, texts, True), expected) == []
    types = dict(zip(vocabulary.tokens, vocabulary.token_types, strict=True))
    assert types["<|im_end|>"] == CONTROL
    assert types["<think>"] == types["</think>"] == USER_DEFINED


def test_files_that_transformers_5_saved_give_the_same_vocabulary(made, tmp_path):
    """It writes no added_tokens_decoder, the template as a file, and its class's own unk_token."""
    folder, vocabulary, _ = made("qwen2")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    saved = read(tmp_path, len(vocabulary.tokens))
    assert saved.special_ids.pop("unknown_token_id") == vocabulary.tokens.index("<|endoftext|>")
    assert saved == vocabulary


def test_what_no_file_can_say_of_a_piece_is_noted(made, tmp_path):
    """ "</s>", an ordinary piece of Qwen's vocabulary, ends generation in llama.cpp."""
    n_tokens = make_byte_level("qwen2", tmp_path, replace(STYLES["qwen2"], whole_words=("</s>",)))
    vocabulary = read(tmp_path, n_tokens)
    token = vocabulary.tokens.index("</s>")
    assert vocabulary.token_types[token] == NORMAL
    assert f"'</s>' ({token})" in vocabulary.notes[0]
    with llama_vocab(write_gguf(vocabulary, tmp_path / "v.gguf")) as vocab:
        assert llama_cpp.llama_vocab_is_eog(vocab, token)
        assert not llama_cpp.llama_vocab_is_eog(vocab, token - 1)


def test_tokens_that_llama_cpp_makes_control_tokens_itself_are_written_so(made, tmp_path):
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


@pytest.mark.parametrize("text", sorted(END_TEXTS))
def test_llama_cpp_ends_generation_at_these_texts(text, tmp_path, made):
    _, vocabulary, _ = made("gpt-2")
    tokens = [*vocabulary.tokens]
    tokens[-1] = text
    types = [*vocabulary.token_types[:-1], NORMAL]
    if text in vocabulary.tokens:
        tokens[vocabulary.tokens.index(text)] = "[moved]"
    altered = replace(vocabulary, tokens=tokens, token_types=types)
    with llama_vocab(write_gguf(altered, tmp_path / "v.gguf")) as vocab:
        assert llama_cpp.llama_vocab_is_eog(vocab, len(tokens) - 1)


# ---- byte-level BPE: merges and rows ------------------------------------------------------------


def test_both_spellings_of_merges_read_alike(made, tmp_path):
    _, vocabulary, _ = made("qwen2")
    n_tokens = make_byte_level("qwen2", tmp_path, replace(STYLES["qwen2"], merges_are_pairs=False))
    merges = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
    assert isinstance(merges[0], str)
    assert read(tmp_path, n_tokens).merges == vocabulary.merges == merges


def test_a_merge_listed_twice_has_its_last_rank(made, tmp_path):
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


def test_merges_with_a_space_reach_no_text_and_are_left_out(made, tmp_path):
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


def test_rows_without_a_token_are_filled(made, tmp_path):
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


def test_flags_that_llama_cpp_lacks_are_noted_and_do_differ(tmp_path):
    style = Style(added=(added_token("<|endoftext|>"), added_token("<mask>", lstrip=True)))
    n_tokens = make_byte_level("gpt-2", tmp_path, style)
    vocabulary = read(tmp_path, n_tokens)
    texts = ["a <mask>b"]
    ids = llama_oracle.tokenize(write_gguf(vocabulary, tmp_path / "v.gguf"), texts)
    assert ids != transformers_ids(tmp_path, texts, False)
    assert "'<mask>'" in vocabulary.notes[0]


# ---- what is refused ----------------------------------------------------------------------------


def _set(*path, value):
    def change(tokenizer):
        for key in path[:-1]:
            tokenizer = tokenizer[key]
        tokenizer[path[-1]] = value

    return change


BAD = {
    "no vocabulary": (_set("model", "vocab", value={}), "no vocabulary"),
    "ids are text": (_set("model", "vocab", "the", value="5"), "Token 'the'.* has id 5"),
    "ids are negative": (_set("model", "vocab", "the", value=-1), "has id -1"),
    "one id twice": (_set("model", "vocab", "the", value=0), "share the id 0: '!' and 'the'"),
    "no merges": (_set("model", "merges", value=[]), "no merges"),
    "merges of three": (
        _set("model", "merges", 3, value=["a", "b", "c"]),
        "merges.*cannot be read",
    ),
    "merges of numbers": (_set("model", "merges", 3, value=7), "merges.*cannot be read"),
    "an unknown merge": (_set("model", "merges", 3, value=["q", "\x1b"]), r"makes 'q\\x1b'"),
    "unigram": (_set("model", "type", value="Unigram"), "type Unigram"),
    "no model": (_set("model", value=None), "type None"),
    "word endings": (_set("model", "end_of_word_suffix", value="</w>"), "end_of_word_suffix"),
    "added tokens": (_set("added_tokens", value=[{"id": 5}]), "added tokens cannot be read"),
    "added ids": (_set("added_tokens", 0, "id", value="5"), "added tokens cannot be read"),
    "a zero byte": (_set("model", "vocab", "a\0b", value=3000), r"'a\\x00b', holds a zero"),
    "unknown rules": (_set("pre_tokenizer", value={"type": "Whitespace"}), "cuts text"),
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
def test_files_of_the_wrong_shape_never_end_in_a_traceback(made, tmp_path, wrong):
    make_byte_level("llama-bpe", tmp_path)
    (tmp_path / "sentencepiece").mkdir()
    copy_of(made("sentencepiece-json"), tmp_path / "sentencepiece")
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
                    _set(*path, value=wrong)(content)
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


def test_a_special_id_beyond_the_embedding_is_refused(tmp_path):
    n_tokens = make_byte_level("gpt-2", tmp_path)
    with pytest.raises(BadInput, match=f"pad token has id {n_tokens}.* {n_tokens} rows"):
        read(tmp_path, n_tokens, pad_token_id=n_tokens)
    assert "padding_token_id" not in read(tmp_path, n_tokens, pad_token_id=-1).special_ids


def test_an_added_token_on_the_id_of_a_piece_is_refused(tmp_path):
    """The vocabulary has a hole, and the tokenizers library counts pieces, not ids."""
    n_tokens = make_byte_level("gpt-2", tmp_path)

    def make_hole(tokenizer):
        vocab = tokenizer["model"]["vocab"]
        vocab[max(vocab, key=vocab.get)] += 1

    edit(tmp_path, "tokenizer.json", make_hole)
    with pytest.raises(BadInput, match=r"share the id 3000.*<\|endoftext\|>"):
        read(tmp_path, n_tokens + 1)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputMissing, match=r"neither tokenizer\.json nor tokenizer\.model"):
        read(tmp_path, 10)


def test_an_override_is_for_byte_level_tokenizers(made):
    folder, vocabulary, _ = made("qwen2")
    assert read(folder, len(vocabulary.tokens), "deepseek-r1-qwen").pre == "deepseek-r1-qwen"
    folder, vocabulary, _ = made("sentencepiece")
    with pytest.raises(UsageError, match="--pre-tokenizer does not apply"):
        read(folder, len(vocabulary.tokens), "qwen2")


# ---- special ids --------------------------------------------------------------------------------


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
def test_llama_cpp_reads_the_special_ids_and_flags(made, name):
    _, vocabulary, path = made(name)
    seen = llama_special(path)
    written = {**vocabulary.special_ids, **vocabulary.flags}
    assert {key: written[key] for key in seen if key in written} == {
        key: value for key, value in seen.items() if key in written
    }
    assert {"bos_token_id", "eos_token_id", "add_bos_token", "add_eos_token"} <= written.keys()


def test_special_ids_of_qwq_and_llama_3(made):
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


def chatml(folder: Path, eos: str | None = "<|endoftext|>", **config) -> int:
    """A small ChatML tokenizer whose tokens are 3000 <|endoftext|>, 3001, 3002 <|im_end|>."""
    added = tuple(added_token(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    config = {"eos_token": eos, "chat_template": CHATML, **config}
    return make_byte_level("qwen2", folder, Style(added=added, config=config))


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


# ---- beginning and end of every text ------------------------------------------------------------


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


# ---- SentencePiece ------------------------------------------------------------------------------


SPM_TOKENS = ["<s>", "</s>", "[INST]", "<think>", "[USER]"]


def test_sentencepiece_ids_equal_the_sentencepiece_library(made):
    folder, _, path = made("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = [text for text in sample_texts() if not any(token in text for token in SPM_TOKENS)]
    ids = llama_oracle.tokenize(path, texts, parse_special=False)
    assert different(texts, ids, processor.encode(texts)) == []


@pytest.mark.parametrize("add_special", [False, True])
def test_sentencepiece_ids_equal_transformers_where_it_keeps_to_sentencepiece(made, add_special):
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
def test_sentencepiece_as_llama_2_has_it_in_tokenizer_json(made, add_special):
    folder, vocabulary, path = made("sentencepiece-json")
    assert not (folder / "tokenizer.model").exists()
    texts = with_tokens(sample_texts(), SPM_TOKENS)
    expected = transformers_ids(folder, texts, add_special)
    assert different(texts, llama_oracle.tokenize(path, texts, add_special), expected) == []
    assert vocabulary.notes == ()


def test_the_two_forms_of_a_sentencepiece_tokenizer_agree(made, tmp_path):
    _, model, _ = made("sentencepiece")
    _, both, _ = made("sentencepiece-json")
    assert both.tokens == model.tokens
    assert both.token_types == model.token_types
    assert both.flags == {k: v for k, v in model.flags.items() if k != "remove_extra_whitespaces"}
    n_rows = copy_of(made("sentencepiece-json"), tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    both = read(tmp_path, n_rows)
    assert both.scores == model.scores
    assert both.notes == ()


def test_sentencepiece_types_scores_and_flags(made):
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
    pieces = read_sentencepiece(bytes(data)).pieces
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
            read_sentencepiece(bytes(damaged))


def lose_a_byte(tokenizer):
    vocab = tokenizer["model"]["vocab"]
    vocab["<lost>"] = vocab.pop("<0x00>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("normalizer", value={"type": "NFKC"}), "a step that llama.cpp cannot do"),
        (lose_a_byte, "lacks 1 of the 256 byte tokens, such as <0x00>"),
    ],
)
def test_other_steps_and_missing_bytes_are_refused(made, tmp_path, change, message):
    n_rows = copy_of(made("sentencepiece-json"), tmp_path)
    edit(tmp_path, "tokenizer.json", change)
    with pytest.raises(BadInput, match=message):
        read(tmp_path, n_rows)


def test_merges_that_llama_cpp_makes_more_of_are_noted(made, tmp_path):
    n_rows = copy_of(made("sentencepiece-json"), tmp_path)

    def forget_merges(tokenizer):
        seen, merges = set(), []
        for left, right in tokenizer["model"]["merges"]:
            if left + right not in seen:
                merges.append([left, right])
            seen.add(left + right)
        tokenizer["model"]["merges"] = merges

    edit(tmp_path, "tokenizer.json", forget_merges)
    assert "llama.cpp also joins" in read(tmp_path, n_rows).notes[0]


def test_cuts_at_spaces_that_llama_cpp_does_not_make_are_noted_and_differ(made, tmp_path):
    n_rows = copy_of(made("sentencepiece-json"), tmp_path)

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


def test_normalized_tokens_are_noted_and_differ(made, tmp_path):
    """transformers looks for "▁<think>" in "▁a<think>b", and finds it in neither."""
    n_rows = copy_of(made("sentencepiece-json"), tmp_path)

    def normalize(tokenizer):
        tokenizer["added_tokens"][-1]["normalized"] = True

    edit(tmp_path, "tokenizer.json", normalize)
    vocabulary = read(tmp_path, n_rows)
    assert "finds only after a space (`normalized` true)" in vocabulary.notes[0]
    texts = ["a[INST]b", "a<think>b"]
    expected = transformers_ids(tmp_path, texts, False)
    ids = llama_oracle.tokenize(write_gguf(vocabulary, tmp_path / "v.gguf"), texts)
    assert different(texts, ids, expected) == texts[1:]


# ---- chat templates and metadata ----------------------------------------------------------------


NAMED = [{"name": "default", "template": "D"}, {"name": "tool use", "template": "T"}]

TEMPLATES = {
    "none": ({}, {}),
    "text in the config": ({"tokenizer_config.json": "C"}, {"default": "C"}),
    "a list in the config": ({"tokenizer_config.json": NAMED}, {"default": "D", "tool use": "T"}),
    "a file before the config": (
        {"tokenizer_config.json": NAMED, "chat_template.jinja": "J"},
        {"default": "J"},
    ),
    "further files": (
        {
            "tokenizer_config.json": "C",
            "chat_template.jinja": "J",
            "additional_chat_templates/rag.jinja": "R",
        },
        {"default": "J", "rag": "R"},
    ),
    "further files alone": (
        {"tokenizer_config.json": "C", "additional_chat_templates/rag.jinja": "R"},
        {"rag": "R"},
    ),
}


def write_templates(folder: Path, files: dict) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if name == "tokenizer_config.json":
            edit(folder, name, lambda config, content=content: config.update(chat_template=content))
        elif name.endswith(".json"):
            path.write_text(json.dumps({"chat_template": content}), "utf-8")
        else:
            path.write_text(content, "utf-8")


@pytest.mark.parametrize(("files", "expected"), TEMPLATES.values(), ids=TEMPLATES)
def test_chat_templates_have_the_precedence_of_transformers(tmp_path, files, expected):
    make_byte_level("gpt-2", tmp_path)
    write_templates(tmp_path, files)
    assert read_chat_templates(checkpoint(tmp_path)) == expected
    theirs = AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert expected == ({"default": theirs} if isinstance(theirs, str) else theirs or {})


def test_a_processors_template_counts_where_there_is_no_other(tmp_path):
    make_byte_level("gpt-2", tmp_path)
    write_templates(tmp_path, {"chat_template.json": "P"})
    assert read_chat_templates(checkpoint(tmp_path)) == {"default": "P"}
    write_templates(tmp_path, {"tokenizer_config.json": "C"})
    assert read_chat_templates(checkpoint(tmp_path)) == {"default": "C"}


@pytest.mark.parametrize("value", [7, ["a"], [{"name": "default"}], [{"name": "a", "template": 1}]])
def test_a_chat_template_that_is_none_is_refused(tmp_path, value):
    make_byte_level("gpt-2", tmp_path)
    write_templates(tmp_path, {"tokenizer_config.json": value})
    with pytest.raises(BadInput, match=r"chat_template in tokenizer_config\.json"):
        read_chat_templates(checkpoint(tmp_path))


def test_templates_reach_llama_cpp_under_gguf_pys_names(tmp_path):
    n_tokens = make_byte_level("gpt-2", tmp_path)
    named = [*NAMED, {"name": "tool_use", "template": "U é"}]
    write_templates(tmp_path, {"tokenizer_config.json": named})
    vocabulary = read(tmp_path, n_tokens)
    path = write_gguf(vocabulary, tmp_path / "v.gguf")
    assert llama_oracle.chat_template(path) == "D"
    assert llama_oracle.chat_template(path, "tool_use") == "U é"
    metadata = vocabulary.metadata()
    assert metadata["tokenizer.chat_templates"] == Value("arr[str]", ["tool_use"])


def test_metadata_has_the_types_that_llama_cpp_demands(made):
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
