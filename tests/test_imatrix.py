"""The importance matrix of a checkpoint against transformers' whole model and llama.cpp."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens, cut_tokens
from quant.checkpoint import Checkpoint
from quant.cli import cli
from quant.errors import BadInput
from quant.imatrix import measure_importance
from quant.importance import read_importance
from quant.texts import Record, Texts, built_in_texts, read_texts


def run(*words) -> object:
    return CliRunner().invoke(cli, [str(w) for w in words])


def whole_model_squares(model, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Sums of squared inputs of every linear, by hooks on transformers' own model."""
    squares = {}

    def add(name, x):
        total = x.double().square().sum(dim=(0, 1)).numpy()
        squares[name] = squares.get(name, 0) + total

    hooks = [  # removed again: other tests use the model, too
        module.register_forward_pre_hook(lambda _, x, name=name: add(name, x[0]))
        for name, module in model.model.layers.named_modules()
        if type(module) is torch.nn.Linear
    ]
    with torch.no_grad():
        model(torch.from_numpy(ids))
    for hook in hooks:
        hook.remove()
    return squares


NAMES = {
    "self_attn.o_proj": "attn_output",
    "mlp.down_proj": "ffn_down",
    "self_attn.k_proj": "attn_k",
}


def test_dense_sums_equal_the_whole_models(made_models):
    folder, model = made_models("llama3")
    ids = np.random.default_rng(1).integers(0, 4090, (6, 32))
    squares, counts = measure_importance(
        StreamedModel(Checkpoint.open(folder)), Tokens(ids, "random", "")
    )
    reference = whole_model_squares(model, ids)
    assert len(squares) == 7 * 3
    for layer in range(3):
        for ours, theirs in NAMES.items():
            name = f"blk.{layer}.{theirs}.weight"
            np.testing.assert_allclose(squares[name][0], reference[f"{layer}.{ours}"], rtol=1e-4)
            assert counts[name].tolist() == [6 * 32]


def test_experts_have_a_row_each(made_models):
    folder, _ = made_models("qwen3moe")
    ids = np.random.default_rng(1).integers(0, 4090, (6, 32))
    squares, counts = measure_importance(
        StreamedModel(Checkpoint.open(folder)), Tokens(ids, "random", "")
    )
    assert squares["blk.1.ffn_down_exps.weight"].shape == (4, 96)
    assert counts["blk.1.ffn_down_exps.weight"].sum() == 2 * 6 * 32
    # What all experts of a layer were given is what the layer was given, twice.
    gate = squares["blk.1.ffn_gate_exps.weight"].sum(0)
    assert gate.shape == (128,) and (gate > 0).all()
    assert not any("gate_inp" in name for name in squares)


def test_command_and_what_it_is_good_for(tiny_qwq, tmp_path):
    matrix, file = tmp_path / "m.gguf", tmp_path / "q.gguf"
    made = run("imatrix", tiny_qwq, "-o", matrix, "--tokens", 2048, "--seq-len", 256)
    assert made.exit_code == 0, made.output
    assert "42 weights seen by 2048 tokens of built-in" in made.output
    read = read_importance(matrix)
    assert read.chunk_size == 256 and read.n_chunks == 8 and read.datasets == ("built-in",)
    used = run("to-gguf", tiny_qwq, "-o", file, "--type", "IQ2_M", "--imatrix", matrix)
    assert used.exit_code == 0, used.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b"too short", "has only"),
        (b"\xff\xfe\x00", "is no UTF-8 text"),
        (b"a\0b", "is no text"),
    ],
)
def test_bad_calibration_text(tiny_qwq, tmp_path, content, message):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    for more in ((), ("--dry-run",)):
        result = run("imatrix", tiny_qwq, "-o", tmp_path / "m.gguf", "--calibration", text, *more)
        assert result.exit_code == 65, more
    assert result.exit_code == 65 and message in result.output
    assert not (tmp_path / "m.gguf").exists()


def test_bad_json_line_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n{"words": "b"}\n')
    with pytest.raises(BadInput, match="Line 2 of"):
        read_texts(path)
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(BadInput, match="Line 2 of"):
        read_texts(path)


def test_a_gguf_file_cannot_be_run(tiny_qwq, tmp_path):
    run("to-gguf", tiny_qwq, "-o", tmp_path / "a.gguf")
    result = run("imatrix", tmp_path / "a.gguf", "-o", tmp_path / "m.gguf")
    assert result.exit_code == 2 and "needs the checkpoint" in result.output


def test_an_output_that_exists_is_kept(tiny_qwq, tmp_path):
    precious = tmp_path / "m.gguf"
    precious.write_bytes(b"precious")
    result = run("imatrix", tiny_qwq, "-o", precious, "--force")
    assert result.exit_code == 73 and precious.read_bytes() == b"precious"


def test_sequences_are_spread_over_the_text(tiny_qwq):
    checkpoint = Checkpoint.open(tiny_qwq)
    texts = Texts("t", "", (Record("one " * 400), Record("two " * 400)))
    few = cut_tokens(checkpoint, texts, 64, 32)
    everything = cut_tokens(checkpoint, texts, 10**9, 32)
    assert few.ids.shape == (2, 32)
    assert everything.n_tokens > 64
    middle = len(everything.ids) // 2
    assert np.array_equal(few.ids, everything.ids[[0, middle]])


def test_a_long_text_is_tokenized_in_pieces_and_not_whole(tiny_qwq, monkeypatch):
    from quant.calibration import tokens as room

    lines = "".join(f"the number {i} is followed by the number {i + 1}\n" for i in range(400))
    checkpoint, texts = Checkpoint.open(tiny_qwq), Texts("t", "", (Record(lines),))
    whole = cut_tokens(checkpoint, texts, 10**9, 32)
    monkeypatch.setattr(room, "PIECE", 1000)
    in_pieces = cut_tokens(checkpoint, texts, 10**9, 32)
    assert np.array_equal(in_pieces.ids, whole.ids)  # lines of this tokenizer end with a token
    monkeypatch.setattr(room, "LEAST", 4000)
    seen = []
    monkeypatch.setattr(
        room, "_spread", lambda p, n, spread=room._spread: seen.append(spread(p, n)) or seen[-1]
    )
    some = cut_tokens(checkpoint, texts, 64, 32)
    assert some.ids.shape == (2, 32) and len(seen[0]) == 5
    assert seen[0][0] == lines[: len(seen[0][0])] and seen[0][-1] in lines[-5000:]


def test_bos_begins_every_sequence_where_the_model_has_one(made_models, tmp_path):
    """examples/tiny-qwq has none; a tokenizer that puts one before a text gets it everywhere."""
    import json
    import shutil

    folder, _ = made_models("qwen2")
    copy = tmp_path / "bos"
    shutil.copytree(folder, copy)
    data = json.loads((copy / "tokenizer.json").read_text())
    start, a, b = (
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}},
    )
    token = {"id": "<|im_start|>", "ids": [4092], "tokens": ["<|im_start|>"]}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, a],
        "pair": [a, b],
        "special_tokens": {"<|im_start|>": token},
    }
    (copy / "tokenizer.json").write_text(json.dumps(data))
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings["bos_token"] = "<|im_start|>"
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    texts = Texts("t", "", (Record("some words to be cut into pieces " * 20),))
    ids = cut_tokens(Checkpoint.open(copy), texts, 64, 16).ids
    plain = cut_tokens(Checkpoint.open(folder), texts, 64, 16).ids
    assert (ids[:, 0] == ids[0, 0]).all() and ids.shape == plain.shape
    assert np.array_equal(ids[0, 1:], plain[0, :15])


def test_the_built_in_text_has_all_kinds():
    texts = built_in_texts()
    assert texts.name == "built-in"
    assert {"code", "reasoning", "language"} <= set(texts.categories)
