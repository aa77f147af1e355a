"""The streamed model against transformers' whole model, and what it holds in memory."""

import numpy as np
import pytest
import torch
from model_makers import MODELS, make_model
from transformers import AutoModelForCausalLM

from quant.calibration import hidden_states
from quant.calibration.hidden_states import HiddenStates, StatesFile
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.weights import ChangedWeights, CheckpointWeights
from quant.checkpoint import Checkpoint
from quant.errors import BadInput, OutputFailed


def random_tokens(shape=(5, 48), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4090, shape)


def last_states(model: StreamedModel, tokens: np.ndarray) -> torch.Tensor:
    hidden = model.embed(tokens)
    for layer in model.layers(tokens.shape[1]):
        layer.run(hidden, hidden)
    with torch.no_grad():
        return model.norm(hidden.tensor)


def whole_model_states(model, tokens: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model.model(torch.from_numpy(tokens)).last_hidden_state


@pytest.mark.parametrize("name", MODELS)
def test_layer_by_layer_equals_the_whole_model(made_models, name):
    folder, model = made_models(name)
    tokens = random_tokens()
    streamed = last_states(StreamedModel(Checkpoint.open(folder)), tokens)
    torch.testing.assert_close(streamed, whole_model_states(model, tokens), rtol=1e-5, atol=1e-5)


def test_sliding_window_is_applied(tmp_path):
    model = make_model("mistral", tmp_path, sliding_window=16)
    tokens = random_tokens()
    streamed = last_states(StreamedModel(Checkpoint.open(tmp_path)), tokens)
    torch.testing.assert_close(streamed, whole_model_states(model, tokens), rtol=1e-5, atol=1e-5)


def test_trained_bf16_model_in_its_own_type(tiny_qwq):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwq, dtype=torch.bfloat16)
    tokens = random_tokens()
    own = StreamedModel(Checkpoint.open(tiny_qwq), dtype=torch.bfloat16)
    torch.testing.assert_close(last_states(own, tokens), whole_model_states(model, tokens))


def test_logits_from_blocks_of_the_head(made_models, monkeypatch):
    monkeypatch.setattr("quant.calibration.streamed_model.HEAD_BLOCK_NBYTES", 1000 * 4 * 128)
    for name in ("qwen2", "qwen2-tied"):
        folder, model = made_models(name)
        tokens = random_tokens((1, 8))
        streamed = StreamedModel(Checkpoint.open(folder))
        states = last_states(streamed, tokens)
        blocks = list(streamed.head_blocks())
        assert [start for start, _ in blocks] == [0, 1000, 2000, 3000, 4000]
        logits = torch.cat([states @ w.T for _, w in blocks], dim=-1)
        with torch.no_grad():
            whole = model(torch.from_numpy(tokens)).logits
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


def test_backwards_gives_the_same_layers(tiny_qwq):
    model = StreamedModel(Checkpoint.open(tiny_qwq))
    forwards = {la.index: la.module.mlp.up_proj.weight.sum().item() for la in model.layers(8)}
    backwards = {
        la.index: la.module.mlp.up_proj.weight.sum().item() for la in model.layers(8, True)
    }
    assert list(backwards) == [5, 4, 3, 2, 1, 0]
    assert forwards == backwards


def test_only_one_layer_has_weights(tiny_qwq):
    model = StreamedModel(Checkpoint.open(tiny_qwq))
    for layer in model.layers(8):
        real = [
            i for i, m in enumerate(model._layers) if next(m.parameters()).device.type != "meta"
        ]
        assert real == [layer.index]
    assert all(p.device.type == "meta" for m in model._layers for p in m.parameters())


@pytest.mark.parametrize("n_at_once", [1, 2, 5])
def test_micro_batches_do_not_change_the_result(tiny_qwq, monkeypatch, n_at_once):
    tokens = random_tokens((5, 16))
    whole = last_states(StreamedModel(Checkpoint.open(tiny_qwq)), tokens)
    monkeypatch.setattr(
        "quant.calibration.streamed_model.ACTIVATION_NBYTES", n_at_once * 6 * 16 * 1024 * 4
    )
    model = StreamedModel(Checkpoint.open(tiny_qwq))
    assert next(model.layers(16)).n_at_once == n_at_once
    torch.testing.assert_close(last_states(model, tokens), whole, rtol=1e-4, atol=1e-4)


def test_hooks_see_every_linear_of_dense_and_expert_layers(made_models):
    for name, n_linears in (("qwen3", 7), ("qwen3moe", 4 + 4 * 3)):
        folder, _ = made_models(name)
        seen: dict[str, int] = {}
        model = StreamedModel(Checkpoint.open(folder))
        layer = next(model.layers(48))
        hidden = model.embed(random_tokens())
        with layer.watched(lambda n, x, seen=seen: seen.update({n: x.shape[-1]})):
            watched = hidden.like()
            layer.run(hidden, watched)
        assert len(seen) == n_linears
        assert all(n.startswith("model.layers.0.") for n in seen)
        plain = hidden.like()
        layer.run(hidden, plain)  # the hooks are gone, and the experts run as before
        torch.testing.assert_close(watched.tensor, plain.tensor, rtol=1e-4, atol=1e-4)


def test_expert_inputs_are_the_tokens_sent_to_it(made_models):
    folder, _ = made_models("qwen2moe")
    counts: dict[str, int] = {}

    def count(name, x):
        counts[name] = counts.get(name, 0) + x.reshape(-1, x.shape[-1]).shape[0]

    model = StreamedModel(Checkpoint.open(folder))
    layer = next(model.layers(48))
    with layer.watched(count):
        hidden = model.embed(random_tokens())
        layer.run(hidden, hidden)
    per_expert = [counts.get(f"model.layers.0.mlp.experts.{e}.down_proj", 0) for e in range(4)]
    assert sum(per_expert) == 2 * 5 * 48  # two experts a token
    assert counts["model.layers.0.mlp.shared_expert.up_proj"] == 5 * 48


def test_changed_weights_change_the_result_and_are_put_back(tiny_qwq):
    model = StreamedModel(Checkpoint.open(tiny_qwq))
    layer = next(model.layers(48))
    hidden = model.embed(random_tokens())
    before, changed, after = hidden.like(), hidden.like(), hidden.like()
    layer.run(hidden, before)
    name = "model.layers.0.mlp.down_proj"
    with layer.changed({name: torch.zeros(256, 768, dtype=torch.bfloat16)}):
        layer.run(hidden, changed)
    layer.run(hidden, after)
    assert (changed.tensor - before.tensor).abs().max() > 0.1
    assert torch.equal(before.tensor, after.tensor)


def test_weights_that_pass_through_a_rounding(tiny_qwq):
    checkpoint = Checkpoint.open(tiny_qwq)
    name = "model.layers.2.mlp.down_proj.weight"
    doubled = ChangedWeights(CheckpointWeights(checkpoint), frozenset([name]), lambda n, w: 2 * w)
    plain = CheckpointWeights(checkpoint)
    assert torch.equal(doubled.read(name), 2 * plain.read(name))
    other = name.replace("down", "up")
    assert torch.equal(doubled.read(other), plain.read(other))


def test_large_states_are_kept_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(hidden_states, "available_memory", lambda: 100)
    states = HiddenStates((2, 3, 4), torch.float32, tmp_path)
    states.tensor[:] = 7
    assert states.in_file
    assert states.like().in_file
    assert not list(tmp_path.glob("*.gguf"))
    del states
    assert not any(tmp_path.iterdir())  # the files go with the states


def test_all_states_share_one_budget(monkeypatch):
    """A quarter of 4000 bytes: one of 600 fits, two do not."""
    monkeypatch.setattr(hidden_states, "_held", {})
    monkeypatch.setattr(hidden_states, "available_memory", lambda: 4000)
    first = HiddenStates((5, 5, 6), torch.float32)
    second, third = first.like(), first.like()
    assert [first.in_file, second.in_file, third.in_file] == [False, True, True]
    del first
    assert not second.like().in_file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_come_back_from_their_file(dtype, tmp_path):
    states = HiddenStates((5, 3, 4), dtype)
    file = StatesFile(3, states, tmp_path)
    written = [torch.randn(5, 3, 4).to(dtype) for _ in range(3)]
    for i, values in enumerate(written):
        states.tensor[:] = values
        file.write(i, states)
    states.tensor.zero_()
    for i in (2, 1, 0):
        for part in (slice(0, 5), slice(1, 3), slice(4, 9)):
            assert torch.equal(file[i].read(part), written[i][part])
        assert file[i].n_sequences == 5
    assert not any(tmp_path.iterdir())  # it has no name: nothing is left whatever happens


def test_a_full_disk_is_an_error_and_not_a_crash(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hidden_states, "available_memory", lambda: 0)
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutputFailed, match="no room for them"):
        HiddenStates((1, 1, 1), torch.float32)
    monkeypatch.setattr(hidden_states, "available_memory", lambda: 10**9)
    with pytest.raises(OutputFailed) as caught:
        StatesFile(2, HiddenStates((1, 1, 1), torch.float32))
    assert "TMPDIR" in caught.value.next_step


def test_nan_weights_are_named(tmp_path):
    model = make_model("qwen2", tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    streamed = StreamedModel(Checkpoint.open(tmp_path))
    with pytest.raises(BadInput, match=r"layers\.1\.mlp\.up_proj\.weight has 1 NaN"):
        last_states(streamed, random_tokens())


def test_a_weight_of_another_shape_is_named(tmp_path):
    make_model("qwen2", tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"intermediate_size": 192', '"intermediate_size": 96')
    )
    with pytest.raises(BadInput, match=r"has the shape \[192, 128\]"):
        last_states(StreamedModel(Checkpoint.open(tmp_path)), random_tokens())


def test_a_token_beyond_the_embedding_is_refused(tiny_qwq):
    model = StreamedModel(Checkpoint.open(tiny_qwq))
    with pytest.raises(BadInput, match="do not belong together"):
        model.embed(np.array([[1, 4096]]))
