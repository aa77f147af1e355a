"""The rules by which text is cut, recognised; test_byte_level.py compares the cuts themselves."""

import pytest
from tokenizer_makers import PRE_TOKENIZERS, byte_level, sample_texts, sequence, split
from tokenizers import Regex, pre_tokenizers

from quant import metadata_keys
from quant.errors import BadInput, UsageError
from quant.vocabulary.pre_tokenizers import (
    COVERS_ALL_TEXT,
    GPT2,
    GPT4O,
    KNOWN,
    LLAMA3,
    QWEN2,
    SEED_CODER,
    choose_pre_tokenizer,
    one_spelling,
    read_steps,
)


def tokenizer_json(pre_tokenizer, normalizer=None, ignore_merges=False) -> dict:
    return {
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "model": {"type": "BPE", "ignore_merges": ignore_merges},
    }


def cuts(text: str, regex: str, behavior: str = "isolated", invert: bool = False) -> list[str]:
    step = pre_tokenizers.Split(Regex(regex), behavior, invert)
    return [piece for piece, _ in step.pre_tokenize_str(text)]


def test_the_table_and_the_releases_match_one_to_one():
    assert PRE_TOKENIZERS.keys() == {row.name for row in KNOWN}
    assert len({(row.steps, row.ignore_merges) for row in KNOWN}) == len(KNOWN)
    assert {row.name for row in KNOWN} <= set(metadata_keys.PRE_TOKENIZERS)


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: row.name)
def test_rules_are_recognised_as_releases_spell_them(row):
    tokenizer = tokenizer_json(PRE_TOKENIZERS[row.name], {"type": "NFC"}, row.ignore_merges)
    name, notes = choose_pre_tokenizer(tokenizer, None)
    assert name == row.name
    assert [note[:-1] for note in notes] == ([row.differs] if row.differs else [])


OTHER_SPELLINGS = {
    "llama.cpp's own, case by case": (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        LLAMA3,
    ),
    "tiktoken's, possessive": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        LLAMA3,
    ),
    "Ling's": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
        QWEN2,
    ),
    "line breaks as they are": (QWEN2.replace(r"\r\n", "\r\n"), QWEN2),
    "{1}": (SEED_CODER.replace(r"\p{N}|", r"\p{N}{1}|"), SEED_CODER),
}


@pytest.mark.parametrize(("regex", "ours"), OTHER_SPELLINGS.values(), ids=OTHER_SPELLINGS)
def test_spellings_taken_for_one_cut_every_text_alike(regex, ours):
    assert regex != ours
    assert one_spelling(regex) == ours
    for text in sample_texts():
        assert cuts(text, regex) == cuts(text, ours)


@pytest.mark.parametrize("regex", sorted(COVERS_ALL_TEXT))
def test_removing_what_lies_between_removes_nothing(regex):
    for text in sample_texts():
        assert cuts(text, regex, "removed", invert=True) == cuts(text, regex)


def test_removing_is_another_rule_where_something_lies_between():
    regex = r"\p{N}+"
    assert cuts("a1", regex, "removed", invert=True) != cuts("a1", regex)
    part = {**split(regex), "behavior": "Removed", "invert": True}
    assert read_steps(tokenizer_json(sequence(part, byte_level(False)))) != (regex,)


def test_gpt2_is_the_same_rule_inside_and_outside_of_bytelevel():
    outside = tokenizer_json(sequence(split(GPT2), byte_level(False)))
    assert choose_pre_tokenizer(outside, None) == choose_pre_tokenizer(
        tokenizer_json(byte_level(True)), None
    )
    for text in sample_texts():
        inside = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
        spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        spelled = [spelled.pre_tokenize_str(piece)[0][0] for piece in cuts(text, GPT2)]
        assert [piece for piece, _ in inside] == spelled


def test_ignore_merges_chooses_between_names_and_is_noted_where_no_name_has_it():
    llama3 = PRE_TOKENIZERS["llama-bpe"]
    assert choose_pre_tokenizer(tokenizer_json(llama3, ignore_merges=True), None)[0] == "llama-bpe"
    assert choose_pre_tokenizer(tokenizer_json(llama3), None) == ("dbrx", ())
    name, notes = choose_pre_tokenizer(
        tokenizer_json(PRE_TOKENIZERS["qwen2"], ignore_merges=True), None
    )
    assert name == "qwen2"
    assert "ignore_merges" in notes[0]


@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        {"type": "NFC"},
        {"type": "Sequence", "normalizers": []},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
    ],
)
def test_normalizers_that_leave_text_alone_are_passed_over(normalizer):
    tokenizer = tokenizer_json(PRE_TOKENIZERS["qwen2"], normalizer)
    assert choose_pre_tokenizer(tokenizer, None) == ("qwen2", ())


UNKNOWN = {
    "another expression": tokenizer_json(sequence(split(r"\p{L}{7}"), byte_level(False))),
    "lower case": tokenizer_json(PRE_TOKENIZERS["qwen2"], {"type": "Lowercase"}),
    "NFKC": tokenizer_json(
        PRE_TOKENIZERS["qwen2"], {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}
    ),
    "a space before text": tokenizer_json({**byte_level(True), "add_prefix_space": True}),
    "no cuts": tokenizer_json(byte_level(False)),
    "Metaspace": tokenizer_json(sequence({"type": "Metaspace"}, byte_level(False))),
    "the other order": tokenizer_json(
        sequence(byte_level(True), {"type": "Digits", "individual_digits": True})
    ),
    "merged with what precedes": tokenizer_json(
        sequence({**split(QWEN2), "behavior": "MergedWithPrevious"}, byte_level(False))
    ),
    "a plain string": tokenizer_json(
        sequence({**split(""), "pattern": {"String": " "}}, byte_level(False))
    ),
    "nothing": tokenizer_json(None),
}


@pytest.mark.parametrize("tokenizer", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_rules_are_refused_and_can_be_overridden(tokenizer):
    with pytest.raises(BadInput):
        choose_pre_tokenizer(tokenizer, None)
    assert choose_pre_tokenizer(tokenizer, "gpt-4o") == ("gpt-4o", ())


def test_the_refusal_shows_the_rules_and_the_way_out():
    regex = "\\p{L}{7}\x1b[2J"
    with pytest.raises(BadInput) as caught:
        choose_pre_tokenizer(tokenizer_json(sequence(split(regex), byte_level(False))), None)
    assert r"\p{L}{7}\x1b[2J" in caught.value.what
    assert "\x1b" not in str(caught.value)
    assert "--pre-tokenizer NAME" in caught.value.next_step
    for name in ("qwen2", "llama-bpe", "chatglm-bpe"):
        assert f" {name} " in caught.value.next_step


def test_a_name_that_llama_cpp_does_not_know_is_refused_with_the_nearest():
    tokenizer = tokenizer_json(PRE_TOKENIZERS["gpt-4o"])
    with pytest.raises(UsageError, match=r"did you mean 'qwen2'\?"):
        choose_pre_tokenizer(tokenizer, "qwen-2")
    with pytest.raises(UsageError, match="xxxxxxxx"):
        choose_pre_tokenizer(tokenizer, "xxxxxxxx")


def test_expressions_are_read_as_they_stand():
    assert read_steps(tokenizer_json(PRE_TOKENIZERS["gpt-4o"])) == (GPT4O,)
