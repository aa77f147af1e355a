"""Channel scales of K: they cure key biases; files of them are checked."""

from types import SimpleNamespace

import pytest
import torch
from kv_cache_helpers import divergence, read_text, step_by_step
from qwq_kernels.kv_int8 import ChannelScales
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
from transformers.cache_utils import DynamicCache

from quant.errors import BadInput, InputMissing, UsageError
from quant.kv_cache import (
    Int8Cache,
    KvScales,
    RecordingCache,
    enable_int8_attention,
    read_scales,
    write_scales,
)

BIASES = {28: 150, 29: -120, 30: 167, 31: 90, 60: -160, 61: 110, 62: -140, 63: 80}
"""Of k_proj, on channels that rotary embedding hardly turns, as in Qwen2.5's first layer."""


@pytest.fixture(scope="module")
def tokens(tiny_qwq, texts):
    return read_text(AutoTokenizer.from_pretrained(tiny_qwq), texts / "heldout.jsonl", 360)


@pytest.fixture(scope="module")
def biased(tiny_qwq):
    """tiny-qwq with Qwen2.5's biases. Every key is moved alike, so attention hardly changes."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwq, dtype=torch.float32).eval()
    for layer in (0, 5):
        bias = model.model.layers[layer].self_attn.k_proj.bias.data.view(2, 64)
        for channel, value in BIASES.items():
            bias[:, channel] += value
    return model


@pytest.fixture(scope="module")
def scales(biased, tokens):
    cache = RecordingCache(biased.config)
    with torch.no_grad():
        for sequence in (tokens[:, 160:260], tokens[:, 260:]):  # not those of the tests
            biased(sequence, past_key_values=cache)
    return cache.scales()


@pytest.mark.parametrize("enabled", [False, True], ids=["dequantized", "int8"])
def test_centring_saves_a_model_with_key_biases(biased, tokens, scales, enabled):
    text = tokens[:, :130]
    expected = step_by_step(biased, text, DynamicCache(config=biased.config), 30)
    if enabled:
        enable_int8_attention(biased)
    try:
        plain, centred = (
            divergence(expected, step_by_step(biased, text, cache, 30))
            for cache in (Int8Cache(biased.config), Int8Cache(biased.config, scales=scales))
        )
    finally:
        biased.set_attn_implementation("sdpa")
    assert centred[0] * 10 < plain[0]
    assert centred[1] >= 0.98 and centred[0] < 1e-3


def test_recording_changes_nothing_and_sees_everything(biased, tokens):
    cache = RecordingCache(biased.config)
    with torch.no_grad():
        expected = biased(tokens[:, :50]).logits
        assert torch.equal(biased(tokens[:, :50], past_key_values=cache).logits, expected)
        assert cache.get_seq_length() == 0
        biased(tokens[:, 50:90], past_key_values=cache)
    stock = DynamicCache(config=biased.config)
    other = DynamicCache(config=biased.config)
    with torch.no_grad():
        biased(tokens[:, :50], past_key_values=stock)
        biased(tokens[:, 50:90], past_key_values=other)
    for i, channels in cache.scales().layers.items():
        keys = torch.cat([stock.layers[i].keys, other.layers[i].keys], dim=2)[0]  # (heads, 90, 64)
        half = (keys.amax(1) - keys.amin(1)) / 2
        assert torch.allclose(channels.mid, (keys.amax(1) + keys.amin(1)) / 2)
        assert torch.allclose(
            channels.range, (half / half.amax(-1, keepdim=True)).clamp_min(2**-10)
        )
        assert channels.range.max() == 1
        assert ((keys - channels.mid[:, None]) / channels.range[:, None]).isfinite().all()


def test_recording_takes_layers_one_by_one():
    """As the layer-by-layer engine calls it; one that saw nothing is named."""
    cache = RecordingCache(Qwen2Config(num_hidden_layers=2))
    k = torch.randn(1, 2, 9, 16)
    assert cache.update(k, k, 0)[0] is k
    with pytest.raises(UsageError, match="Layer 1 saw no key"):
        cache.scales()
    cache.update(torch.zeros(1, 2, 9, 16), k, 1)  # a head whose keys never moved
    assert (
        (cache.scales().layers[1].range == 1)
        .logical_or(cache.scales().layers[1].range == 2**-10)
        .all()
    )


def test_files_of_scales(tmp_path, scales, biased):
    path = tmp_path / "kv-scales.safetensors"
    write_scales(path, scales)
    again = read_scales(path)
    assert again.model_type == "qwen2" and again.layers.keys() == scales.layers.keys()
    for i in scales.layers:
        assert torch.equal(again.layers[i].mid, scales.layers[i].mid)
        assert torch.equal(again.layers[i].range, scales.layers[i].range)
    cache = Int8Cache(biased.config, scales=str(path))
    assert torch.equal(cache.int8_layers[5].channels.mid, scales.layers[5].mid)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.pop("layers.0.k_mid"), "Layer 0 lacks one of"),
        (lambda x: x.update({"layers.0.k_mid": torch.zeros(2, 63)}), "Layer 0 lacks one of"),
        (lambda x: x.update({"a\x1b[2J": torch.zeros(2)}), r"named a\\x1b\[2J"),
        (lambda x: x["layers.0.k_mid"].fill_(torch.nan), "numbers that no key has"),
        (lambda x: x["layers.0.k_mid"].fill_(1e30), "numbers that no key has"),
        (lambda x: x["layers.0.k_range"].zero_(), "numbers below"),
        (lambda x: x.update({"layers.0.k_mid": torch.zeros(2, 64).half()}), "is torch.float16"),
        (lambda x: x.clear(), "It holds no layer"),
    ],
)
def test_damaged_files_are_refused(tmp_path, scales, change, words):
    path = tmp_path / "kv-scales.safetensors"
    write_scales(path, scales)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "qwq-kv-scales", "model_type": "qwen2"})
    with pytest.raises(BadInput, match=words) as error:
        read_scales(path)
    assert "kv-calibrate" in error.value.next_step


def test_what_is_no_file_of_scales(tmp_path, tiny_qwq):
    with pytest.raises(InputMissing):
        read_scales(tmp_path / "none")
    with pytest.raises(BadInput, match="Its format is not"):
        read_scales(tiny_qwq / "model.safetensors")
    (tmp_path / "text").write_text("scales")
    with pytest.raises(BadInput, match="cannot be read"):
        read_scales(tmp_path / "text")


ONES = torch.ones(2, 64)


def with_one(value: float) -> torch.Tensor:
    x = ONES.clone()
    x[1, 3] = value
    return x


@pytest.mark.parametrize(
    ("mid", "half", "words"),
    [
        (ONES[:, :63], ONES, "k_mid is (2, 63), k_range (2, 64)"),
        (ONES, ONES[:1], "k_mid is (2, 64), k_range (1, 64)"),
        (ONES.half(), ONES, "k_mid is torch.float16 (2, 64)"),
        (ONES, ONES.double(), "k_range is torch.float64 (2, 64)"),
        (ONES[0], ONES[0], "k_mid is torch.float32 (64,), k_range is torch.float32 (64,)"),
        (ONES, with_one(0.0), "k_range holds numbers below"),
        (ONES, with_one(-1.0), "k_range holds numbers below"),
        (ONES, with_one(torch.nan), "k_range holds numbers that no key has"),
        (with_one(torch.inf), ONES, "k_mid holds numbers that no key has"),
    ],
)
def test_scales_made_in_python_are_checked_as_files_are(mid, half, words):
    config = Qwen2Config(num_hidden_layers=1, num_key_value_heads=2)
    with pytest.raises(BadInput, match="no scales of keys") as error:
        Int8Cache(config, scales=KvScales("qwen2", {0: ChannelScales(mid, half)}))
    assert f"Layer 0: {words}" in error.value.why
    assert "kv-calibrate" in error.value.next_step


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Qwen2Config(num_hidden_layers=5, num_key_value_heads=2), "of 6 layers, this has 5"),
        (Qwen2Config(num_hidden_layers=6, num_key_value_heads=4), "of 2 key heads, this has 4"),
        (SimpleNamespace(model_type="llama"), "of a qwen2, this is a llama"),
    ],
)
def test_scales_of_another_model_are_refused(scales, config, words):
    from quant.kv_cache.scales import check_scales

    with pytest.raises(UsageError, match="belong to another model") as error:
        check_scales(scales, config, range(getattr(config, "num_hidden_layers", 6)))
    assert words in error.value.why


def test_scales_of_another_head_size_are_refused():
    scales = KvScales("qwen2", {0: ChannelScales(torch.zeros(2, 32), torch.ones(2, 32))})
    cache = Int8Cache(Qwen2Config(num_hidden_layers=1, num_key_value_heads=2), scales=scales)
    k = torch.zeros(1, 2, 1, 64)
    with pytest.raises(UsageError, match="2 heads of 32, the model's keys are 2 heads of 64"):
        cache.update(k, k, 0)
