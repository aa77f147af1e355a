"""The engines behind the runner interface, held against each other."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from evaluation_helpers import to_gguf

from quant.errors import BadInput, InputMissing, QwqQuantError, Unavailable
from quant.evaluation import measuring
from quant.evaluation.chunks import Chunks, cut_chunks
from quant.evaluation.comparison import compare
from quant.evaluation.measuring import Wishes
from quant.evaluation.runners import folder as folder_room
from quant.evaluation.runners import open_runner
from quant.evaluation.runners.stored import count_weights, find_weights
from quant.evaluation.runners.streamed import StreamedRunner
from quant.texts import read_texts

PROMPT = "<|im_start|>user\nWhat is 33 + 89?<|im_end|>\n<|im_start|>assistant\n<think>\n"


@pytest.fixture(scope="module")
def f32(tiny_qwq, tmp_path_factory) -> Path:
    return to_gguf(tiny_qwq, "F32", tmp_path_factory.mktemp("f32") / "tiny-F32.gguf")


@pytest.fixture(scope="module")
def both(tiny_qwq, f32):
    """The same model in both engines."""
    with open_runner(tiny_qwq) as folder, open_runner(f32) as gguf:
        yield folder, gguf


def test_facts_agree(both):
    folder, gguf = both
    assert folder.n_vocab == gguf.n_vocab == 4096
    assert folder.bos is None and gguf.bos is None
    assert folder.eos == gguf.eos == (4093, 4091)
    assert (folder.name, gguf.name) == ("tiny-qwq", "tiny-F32.gguf")


def test_the_same_model_in_two_engines_does_not_diverge(both, texts):
    folder, gguf = both
    chunks = cut_chunks(gguf, read_texts(texts / "heldout.jsonl"), 256, n_tokens=1500)
    assert {*chunks.categories} == {"code", "english", "reasoning"}
    seen = []
    found = compare(folder, gguf, chunks, seen.append)
    assert seen == [1] * len(chunks)
    assert 0 <= found.kld.value < 1e-6 and found.kld_percentiles[100] < 1e-4
    assert found.same_top.value > 0.99 and found.n_positions == chunks.n_positions
    assert found.by_category["reasoning"].ppl.value < 5 < found.by_category["english"].ppl.value


def test_a_window_of_several_batches(both, texts):
    """600 tokens are read as 512 and 88; scored positions lie in both."""
    folder, gguf = both
    chunks = cut_chunks(gguf, read_texts(texts / "heldout.jsonl"), 600, n_tokens=600).part(0, 1)
    assert compare(folder, gguf, chunks).kld.value < 1e-6
    assert next(gguf.logits(chunks.inputs, 300)).shape == (299, 4096)


@pytest.mark.parametrize("special", [True, False])
def test_tokens_agree_and_spell_the_text(both, texts, special):
    folder, gguf = both
    for name in ("heldout.jsonl", "languages.jsonl"):
        for record in read_texts(texts / name).records[::5]:
            ids = folder.tokenize(record.text, special)
            assert np.array_equal(ids, gguf.tokenize(record.text, special))
            assert folder.text(ids.tolist()) == gguf.text(ids.tolist()) == record.text
    assert (4092 in folder.tokenize("<|im_start|>", special)) == special


def test_reading_on_gives_what_reading_at_once_gives(both):
    for runner in both:
        ids = runner.tokenize(PROMPT, special=True)
        whole = next(runner.logits(np.append(ids, 0)[None].astype(np.int32), 0))
        runner.begin(ids[:3], 64)  # of which nothing must remain
        stepwise = [runner.begin(ids[:5], 64).copy()]
        stepwise += [runner.go_on(int(t)).copy() for t in ids[5:]]
        assert np.abs(np.array(stepwise) - whole[4:]).max() < 0.02


def test_a_prompt_of_several_batches(both, texts):
    folder, gguf = both
    ids = gguf.tokenize(read_texts(texts / "heldout.jsonl").records[0].text * 3, True)[:700]
    assert len(ids) == 700
    assert np.abs(folder.begin(ids, 800) - gguf.begin(ids, 800)).max() < 0.05


@pytest.mark.parametrize("name", ["qwen3moe", "llama3"])
def test_other_architectures(made_models, tmp_path, name):
    folder, _ = made_models(name)
    gguf = to_gguf(folder, "F32", tmp_path / "m.gguf")
    tokens = np.random.default_rng(0).integers(0, 4090, (2, 64)).astype(np.int32)
    with open_runner(folder) as a, open_runner(gguf) as b:
        assert compare(a, b, Chunks(tokens, ("", ""), None)).kld.value < 1e-5


def test_a_model_that_wants_bos(tiny_qwq, tmp_path):
    folder = tmp_path / "bos"
    shutil.copytree(tiny_qwq, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [4091], "tokens": ["<|endoftext|>"]}
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"bos_token": "<|endoftext|>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with (
        open_runner(folder) as a,
        open_runner(to_gguf(folder, "F32", tmp_path / "bos.gguf")) as b,
    ):
        assert a.bos == b.bos == 4091
        assert np.array_equal(a.tokenize("Some text", True), b.tokenize("Some text", True))
        assert 4091 not in a.tokenize("Some text", True)


def test_bitsandbytes(tiny_qwq, texts, tmp_path, monkeypatch):
    """Plain NF4 loses what shared/fixtures says it loses, about .011; layer by layer the same."""
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_qwq, quantization_config=settings, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "nf4")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_qwq / name, tmp_path / "nf4")
    with open_runner(tiny_qwq) as a, open_runner(tmp_path / "nf4") as b:
        chunks = cut_chunks(a, read_texts(texts / "heldout.jsonl"), 256, n_tokens=1500)
        found = compare(a, b, chunks)
        assert 0.005 < found.kld.value < 0.02
        monkeypatch.setattr(folder_room, "_free_memory", lambda device: 14_000_000)
        with open_runner(tmp_path / "nf4") as c:  # 2.5 MB of it stay packed: it fits
            assert isinstance(c, folder_room.FolderRunner)
        monkeypatch.setattr(folder_room, "_free_memory", lambda device: 11_000_000)
        with open_runner(tmp_path / "nf4") as c:
            assert isinstance(c, StreamedRunner)
            same = compare(b, c, chunks)
            # bitsandbytes decodes to float32 here, and we to the bfloat16 that it decodes to in use
            assert same.kld.value < 1e-5 and same.same_top.value > 0.995
    assert count_weights(find_weights(tmp_path / "nf4")) == count_weights(find_weights(tiny_qwq))


def test_layer_by_layer(tiny_qwq, f32, texts, monkeypatch):
    """What does not fit in memory gives the same, and says that it cannot answer."""
    from quant.evaluation.runners import folder, streamed

    monkeypatch.setattr(folder, "_free_memory", lambda device: 0)
    monkeypatch.setattr(streamed, "LOGITS_NBYTES", 2 * 4 * 4096 * 127)  # two windows at a time
    with open_runner(tiny_qwq) as runner, open_runner(f32) as gguf:
        assert isinstance(runner, streamed.StreamedRunner)
        chunks = cut_chunks(runner, read_texts(texts / "heldout.jsonl"), 256, n_tokens=1200)
        assert compare(runner, gguf, chunks).kld.value < 1e-6 and len(chunks) == 5
        asks = Wishes(read_texts(texts / "heldout.jsonl"), tasks=("gsm8k",))
        with pytest.raises(Unavailable, match="layer by layer"):  # before it reads anything
            measuring._try_answering(runner, asks)
        measuring._try_answering(gguf, asks)


# --- what does not load -----------------------------------------------------------------------


def test_vocabularies_that_differ(both, tmp_path, made_models):
    from model_makers import make_model

    make_model("qwen2", tmp_path / "small", vocab_size=4095)
    chunks = Chunks(np.zeros((1, 16), np.int32), ("",), None)
    with (
        open_runner(tmp_path / "small") as small,
        pytest.raises(BadInput, match="4095 tokens instead of 4096"),
    ):
        compare(both[1], small, chunks)


def test_a_missing_model(tmp_path):
    with pytest.raises(InputMissing):
        open_runner(tmp_path / "none.gguf")


def test_neither_folder_nor_gguf(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(BadInput):
        open_runner(tmp_path / "model.bin")


@pytest.mark.parametrize("keep", [0, 3, 1000, 200_000, 20_000_000])
def test_a_truncated_gguf(f32, tmp_path, keep):
    path = tmp_path / "cut.gguf"
    path.write_bytes(f32.read_bytes()[:keep])
    with pytest.raises(BadInput):
        open_runner(path)


def test_a_gguf_llama_cpp_refuses_is_named_with_its_reason(f32, tmp_path):
    path = tmp_path / "odd.gguf"
    path.write_bytes(f32.read_bytes().replace(b"qwen2", b"qwen9"))  # every key and the value
    with pytest.raises(BadInput, match=r"(?s)cannot load.*qwen9"):
        open_runner(path)


def test_an_empty_folder(tmp_path):
    with pytest.raises(QwqQuantError):
        open_runner(tmp_path)


def test_a_folder_of_another_shape(tiny_qwq, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(tiny_qwq, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 512}))
    with pytest.raises(BadInput, match="cannot load"):
        open_runner(folder)


def test_remote_code_is_never_run(tiny_qwq, tmp_path):
    folder = tmp_path / "remote"
    shutil.copytree(tiny_qwq, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Model",
                                                  "AutoConfig": "mine.Config"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(QwqQuantError):
        open_runner(folder)
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_is_4_bit_in_part(tiny_qwq, tmp_path):
    """Its 16-bit linears stay bfloat16 however it is loaded; the rest computes in float32 here."""
    from dataclasses import replace

    from quant.checkpoint import Checkpoint
    from quant.dynamic_4bit import Budget, plan_4bit
    from quant.formats.nf4 import Bnb4bit
    from quant.write_4bit import write_4bit

    plan = plan_4bit(Checkpoint.open(tiny_qwq), Bnb4bit(), Budget("share", 0.0))
    plan = replace(plan, kept=frozenset({"model.layers.0.mlp.down_proj"}))
    write_4bit(plan, tmp_path / "mixed")
    inputs = np.arange(16, dtype=np.int32)[None]
    with open_runner(tmp_path / "mixed") as mixed, open_runner(tiny_qwq) as whole:
        found, exact = (next(runner.logits(inputs, 8)) for runner in (mixed, whole))
    assert found.shape == exact.shape
    assert 0 < np.abs(found - exact).max() < 0.2 * np.abs(exact).max()
