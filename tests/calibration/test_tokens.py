"""Texts and the sequences cut from them: what is refused, and what is read all the same."""

import codecs

import pytest

from quant.calibration.tokens import context_length, cut_tokens
from quant.checkpoint import Checkpoint
from quant.cli.calibrating import CHECKED_TOKENS, calibration_tokens, held_out_tokens
from quant.cli.measuring import check_enough, run_measurement
from quant.errors import BadInput, UsageError
from quant.formats.nf4 import Bnb4bit
from quant.texts import built_in_texts, read_texts


def test_no_sequence_is_longer_than_the_models_context(tiny_qwq):
    checkpoint = Checkpoint.open(tiny_qwq)
    assert context_length(checkpoint) == 2048
    assert cut_tokens(checkpoint, built_in_texts(), 2048, 2048).seq_len == 2048
    with pytest.raises(BadInput, match="2049 tokens are too long") as caught:
        cut_tokens(checkpoint, built_in_texts(), 4098, 2049)
    assert "max_position_embeddings 2048" in caught.value.why
    assert "--seq-len 2048" in caught.value.next_step


def test_less_than_one_sequence_is_not_rounded_up(tiny_qwq):
    checkpoint = Checkpoint.open(tiny_qwq)
    assert cut_tokens(checkpoint, built_in_texts(), 512, 512).n_tokens == 512
    with pytest.raises(UsageError, match="--tokens 511 is less than one sequence of 512") as caught:
        cut_tokens(checkpoint, built_in_texts(), 511, 512)
    assert "--seq-len 511" in caught.value.next_step


@pytest.mark.parametrize("stated", [None, "long", -1, True])
def test_a_model_that_states_no_context_has_none(made_models, stated):
    checkpoint = Checkpoint.open(made_models("qwen2")[0])
    checkpoint.config["max_position_embeddings"] = stated
    assert cut_tokens(checkpoint, built_in_texts(), 1024, 1024).seq_len == 1024


@pytest.mark.parametrize(("n_tokens", "seq_len"), [(255, 255), (128, 128), (255, 64)])
def test_too_few_tokens_to_measure_with(tiny_qwq, n_tokens, seq_len):
    checkpoint = Checkpoint.open(tiny_qwq)
    tokens = calibration_tokens(checkpoint, None, n_tokens, seq_len)
    with pytest.raises(BadInput, match=r"gives only \d+ tokens") as caught:
        check_enough(tokens)
    assert "At least 256" in caught.value.why
    run_measurement(checkpoint, Bnb4bit(), ["weight"], None, "cpu")


@pytest.mark.parametrize(("context", "seq_len"), [(512, 256), (100, 100)])
def test_the_check_sees_the_same_text_always(made_models, monkeypatch, context, seq_len):
    checkpoint = Checkpoint.open(made_models("qwen2")[0])
    checkpoint.config["max_position_embeddings"] = context
    seen = []

    def stop(checkpoint, texts, n_tokens, seq_len):
        seen.append((texts.name, n_tokens, seq_len))
        return cut_tokens(checkpoint, texts, n_tokens, seq_len)

    monkeypatch.setattr("quant.calibration.tokens.cut_tokens", stop)
    held_out_tokens(checkpoint)
    assert seen == [("built-in held-out", CHECKED_TOKENS, seq_len)]


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    line = b'{"text": "a"}\n{"text": "b"}\n'
    path = tmp_path / f"text.{suffix}"
    path.write_bytes(line)
    plain = read_texts(path).records
    path.write_bytes(codecs.BOM_UTF8 + line)
    assert read_texts(path).records == plain
