"""Int8Cache inside transformers' generate, against transformers' own cache of the same numbers."""

import copy
import io

import pytest
import torch
from kv_cache_helpers import OracleCache, divergence, read_text, step_by_step
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer

from quant.errors import BadInput, QwqQuantError, UsageError
from quant.kv_cache import (
    Int8Cache,
    dequantize_cache_torch,
    enable_int8_attention,
    from_layer_past,
    quantize_cache_v,
    to_layer_past,
)
from quant.kv_cache.cache import Placeholder

PAD = 4091


@pytest.fixture(scope="module")
def model(tiny_qwq):
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(tiny_qwq, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokens(tiny_qwq, texts):
    """(1, 400) of held-out text."""
    return read_text(AutoTokenizer.from_pretrained(tiny_qwq), texts / "heldout.jsonl", 400)


@pytest.fixture(scope="module")
def batch(tokens):
    """Two prompts of 40 tokens, the first left-padded by 7."""
    prompts = torch.cat([tokens[:, :40], tokens[:, 40:80]])
    prompts[0, :7] = PAD
    return {"input_ids": prompts, "attention_mask": (prompts != PAD).long()}


def generate(model, inputs, cache, **options):
    torch.manual_seed(0)
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    return model.generate(**inputs, past_key_values=cache, **(settings | options))


# --- as transformers' own cache would, holding the same numbers -------------------------------

MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 7},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generates_what_the_oracle_generates(model, batch, mode, attention):
    inputs = batch
    if mode == "prompt lookup":  # of one sequence only
        inputs = {name: x[:1] for name, x in batch.items()}
    model.set_attn_implementation(attention)
    try:
        ours = generate(model, inputs, Int8Cache(model.config), **MODES[mode])
        expected = generate(model, inputs, OracleCache(model.config), **MODES[mode])
    finally:
        model.set_attn_implementation("sdpa")
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("options", [{}, {"reserve": 300}, {"value_bits": 4}])
def test_a_conversation_goes_on(model, tokens, options):
    """Three turns on one cache: the logits are the oracle's to the bit, across growth too."""
    cache = Int8Cache(model.config, **options)
    oracle = OracleCache(model.config, value_bits=options.get("value_bits", 8))
    text = tokens[:, :30]
    for turn in range(3):
        answers = [
            generate(model, {"input_ids": text}, c, max_new_tokens=30) for c in (cache, oracle)
        ]
        assert torch.equal(*answers)
        assert cache.get_seq_length() == oracle.get_seq_length() == answers[0].shape[1] - 1
        text = torch.cat([answers[0], tokens[:, 50 * turn : 50 * turn + 20]], dim=1)
    with torch.no_grad():
        last = text[:, cache.get_seq_length() :]
        logits = [model(last, past_key_values=c).logits for c in (cache, oracle)]
    assert torch.equal(*logits)


def test_reserve_is_allocated_once(model, tokens):
    cache = Int8Cache(model.config, reserve=128)
    generate(model, {"input_ids": tokens[:, :20]}, cache, max_new_tokens=5)
    buffers = [layer.kv.k.data_ptr() for layer in cache.int8_layers]
    allocated = cache.nbytes_allocated
    generate(model, {"input_ids": tokens[:, :60]}, cache, max_new_tokens=40)
    assert [layer.kv.k.data_ptr() for layer in cache.int8_layers] == buffers
    assert cache.nbytes_allocated == allocated == 6 * 2 * 128 * 2 * (64 + 4)


def test_a_copy_goes_its_own_way(model, tokens):
    cache = Int8Cache(model.config)
    with torch.no_grad():
        model(tokens[:, :50], past_key_values=cache)
        other = copy.deepcopy(cache)
        first = model(tokens[:, 50:51], past_key_values=cache).logits
        model(tokens[:, 90:95], past_key_values=cache)
        again = model(tokens[:, 50:51], past_key_values=other).logits
    assert torch.equal(first, again)
    assert (cache.get_seq_length(), other.get_seq_length()) == (56, 51)


def test_what_comes_out_of_a_pickle_goes_on(model, tokens):
    """Dequantized, since it knows no model any more; a copy knows the model of the original."""
    file = io.BytesIO()
    cache = Int8Cache(model.config)
    with torch.no_grad():
        model(tokens[:, :50], past_key_values=cache)
        torch.save(cache, file)
        file.seek(0)
        restored = torch.load(file, weights_only=False)
        expected = model(tokens[:, 50:51], past_key_values=copy.deepcopy(cache)).logits
        assert torch.equal(model(tokens[:, 50:51], past_key_values=restored).logits, expected)
        enable_int8_attention(model)
        try:
            k = torch.zeros(1, 2, 1, 64)
            copied = copy.deepcopy(cache).update(k, k, 0)[0]
            assert type(copied) is Placeholder
            assert type(restored.update(k, k, 0)[0]) is torch.Tensor
            assert model(tokens[:, 51:52], past_key_values=restored).logits.isfinite().all()
        finally:
            model.set_attn_implementation("sdpa")


def test_a_prompt_in_inference_mode_goes_on_outside(model, tokens):
    cache, other = Int8Cache(model.config), Int8Cache(model.config)
    with torch.inference_mode():
        model(tokens[:, :50].expand(2, -1), past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        model(tokens[:, :50].expand(2, -1), past_key_values=other)
        step = tokens[:, 50:51].expand(2, -1)
        logits = [model(step, past_key_values=c).logits for c in (cache, other)]
    assert torch.equal(*logits)


def test_training_on_a_stored_past(model, tokens):
    """Twice over: gradients end where the cache begins."""
    cache = Int8Cache(model.config)
    with torch.no_grad():
        model(tokens[:, :40], past_key_values=cache)
    for start in (40, 50):
        piece = tokens[:, start : start + 10]
        model(piece, past_key_values=cache, labels=piece).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    model.zero_grad()
    assert copy.deepcopy(cache).get_seq_length() == 60


@pytest.mark.parametrize("name", ["qwen3", "llama3", "qwen3moe"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_families_too(made_models, name, attention):
    """Left-padded beams as the oracle's; steps that read int8 close to it."""
    _, model = made_models(name)
    generator = torch.Generator().manual_seed(5)
    inputs = {"input_ids": torch.randint(0, 4000, (2, 20), generator=generator)}
    inputs["attention_mask"] = torch.ones(2, 20, dtype=torch.long)
    inputs["attention_mask"][0, :6] = 0
    model.set_attn_implementation(attention)
    try:
        ours, expected = (
            generate(model, inputs, c, num_beams=2, max_new_tokens=5, pad_token_id=0)
            for c in (Int8Cache(model.config), OracleCache(model.config))
        )
        assert torch.equal(ours, expected)
        oracle = step_by_step(model, inputs["input_ids"], OracleCache(model.config), 12)
        enable_int8_attention(model)
        logits = step_by_step(model, inputs["input_ids"], Int8Cache(model.config), 12)
    finally:
        model.set_attn_implementation("sdpa")
    assert (logits - oracle).abs().max() < 0.01 * oracle.abs().max()


# --- the layer's operations -------------------------------------------------------------------


def filled(layers=1, batch=2, tokens=40, dtype=torch.float32, **options):
    """An Int8Cache and the oracle, with the same random K and V."""
    config = Qwen2Config(
        num_hidden_layers=layers, hidden_size=128, num_attention_heads=4, num_key_value_heads=2
    )
    caches = Int8Cache(config, **options), OracleCache(config)
    generator = torch.Generator().manual_seed(3)
    for i in range(layers):
        for n in (tokens - 5, 5):
            k, v = torch.randn(2, batch, 2, n, 32, generator=generator).to(dtype)
            for cache in caches:
                cache.update(k, v, i)
    return caches


def same_next_step(ours, oracle, batch):
    k, v = torch.randn(2, batch, 2, 1, 32)
    return all(
        torch.equal(a, b) for a, b in zip(ours.update(k, v, 0), oracle.update(k, v, 0), strict=True)
    )


@pytest.mark.parametrize(
    ("operation", "argument", "batch"),
    [
        ("reorder_cache", torch.tensor([1, 1]), 2),
        ("reorder_cache", torch.tensor([1, 0]), 2),
        ("batch_select_indices", torch.tensor([1]), 1),
        ("batch_select_indices", torch.tensor([True, False]), 1),
        ("batch_repeat_interleave", 3, 6),
        ("crop", -7, 2),
        ("crop", 0, 2),
        ("crop", -39, 2),
    ],
)
def test_operations_are_those_of_the_stock_layer(operation, argument, batch):
    ours, oracle = filled()
    for cache in (ours, oracle):
        getattr(cache, operation)(argument)
    assert ours.get_seq_length() == oracle.get_seq_length()
    assert same_next_step(ours, oracle, batch)


def test_crop_to_nothing_and_reset_begin_anew():
    for forget in (lambda cache: cache.crop(-100), lambda cache: cache.reset()):
        ours, _ = filled()
        forget(ours)
        assert ours.get_seq_length() == 0 and ours.nbytes == 0
        k, v = torch.randn(2, 2, 2, 6, 32)
        assert torch.equal(ours.update(k, v, 0)[0], k)  # a prompt again, seen exactly
    with pytest.raises(UsageError, match="crop\\(-3\\)"):
        ours.crop(3)


def test_selected_buffers_have_no_gaps():
    """The kernels take none; a slice would leave some."""
    ours, _ = filled(batch=4)
    ours.batch_select_indices(slice(0, 4, 2))
    assert all(x.is_contiguous() for x in ours.int8_layers[0].kv.buffers)


@pytest.mark.parametrize("reads_int8", [False, True])
def test_no_new_tokens_are_no_trouble(reads_int8):
    ours, _ = filled()
    config = Qwen2Config()
    ours.int8_layers[0]._config = type(ours.int8_layers[0]._config)(config)
    config._attn_implementation = "int8_kv_sdpa" if reads_int8 else "sdpa"
    none = torch.zeros(2, 2, 0, 32)
    assert ours.update(none, none, 0)[0].shape == (2, 2, 40, 32)
    assert ours.get_seq_length() == 40


def test_offload_and_prefetch_keep_everything():
    ours, oracle = filled()
    layer = ours.int8_layers[0]
    layer.offload()
    assert all(x.device.type == "cpu" for x in layer.kv.buffers)
    layer.prefetch()
    assert same_next_step(ours, oracle, 2)


def test_layers_before_their_first_token_do_nothing():
    cache = Int8Cache(Qwen2Config(num_hidden_layers=2))
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes, cache.nbytes_allocated) == (0, 0, 0)


def test_other_kinds_of_layers_stay_as_they_are():
    config = Qwen2Config(
        num_hidden_layers=4, hidden_size=64, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, vocab_size=200, sliding_window=8, use_sliding_window=True,
        layer_types=["full_attention", "sliding_attention"] * 2,
    )  # fmt: skip
    cache = Int8Cache(config)
    stock = DynamicCache(config=config)
    assert [type(a) is type(b) for a, b in zip(cache.layers, stock.layers, strict=True)] == [
        False, True, False, True,
    ]  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    prompt = {"input_ids": torch.randint(0, 200, (2, 30))}
    ours = generate(model, prompt, cache, pad_token_id=0)
    assert torch.equal(ours, generate(model, prompt, OracleCache(config), pad_token_id=0))


# --- accuracy and bytes -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def bf16(tiny_qwq, tokens):
    """The model in bf16, its logits with a bf16 cache, and that cache's bytes. Teacher-forced: a
    prompt of 60 tokens of held-out text, then 196 steps of one."""
    model = AutoModelForCausalLM.from_pretrained(tiny_qwq, dtype=torch.bfloat16).eval()
    cache = DynamicCache(config=model.config)
    logits = step_by_step(model, tokens[:, :256], cache, 60)
    return model, logits, sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)


@pytest.mark.parametrize("enabled", [False, True], ids=["dequantized", "int8"])
def test_close_to_bf16_in_half_the_bytes(bf16, tokens, enabled):
    model, expected, stock_nbytes = bf16
    if enabled:
        enable_int8_attention(model)
    cache = Int8Cache(model.config, reserve=256)
    try:
        logits = step_by_step(model, tokens[:, :256], cache, 60)
    finally:
        model.set_attn_implementation("sdpa")
    kld, same = divergence(expected, logits)
    assert same >= 0.95 and kld < 1e-3
    assert cache.nbytes == cache.nbytes_allocated <= 0.54 * stock_nbytes


def test_four_bit_values_cost_less_and_lose_more(model, tokens):
    text = tokens[:, :160]
    expected = step_by_step(model, text, DynamicCache(config=model.config), 60)
    kld, nbytes = {}, {}
    for bits in (8, 4):
        cache = Int8Cache(model.config, value_bits=bits)
        kld[bits], _ = divergence(expected, step_by_step(model, text, cache, 60))
        nbytes[bits] = cache.nbytes
    assert nbytes[4] / nbytes[8] == (64 + 4 + 32 + 8) / (2 * (64 + 4))
    assert kld[8] * 3 < kld[4] < 1e-2


# --- Qwen's tuples ----------------------------------------------------------------------------


def test_layer_past_and_back():
    ours, _ = filled(layers=3)
    layer_past = to_layer_past(ours)
    assert len(layer_past) == 3
    (qk, sk, zk), _ = layer_past[0]
    kv = ours.int8_layers[0].kv
    expected = (kv.k[:, :, :40].float() - 128) * kv.k_scale[:, :, 0, :40, None]
    assert torch.equal(dequantize_cache_torch(qk, sk, zk), expected)
    again = from_layer_past(layer_past, Qwen2Config(num_hidden_layers=3))
    for a, b in zip(ours.int8_layers, again.int8_layers, strict=True):
        assert torch.equal(a.kv.k[:, :, :40], b.kv.k[:, :, :40])
        assert torch.equal(a.kv.v[:, :, :40], b.kv.v[:, :, :40])
        assert torch.allclose(a.kv.k_scale[..., :40], b.kv.k_scale[..., :40], rtol=1e-6, atol=0)


def test_layer_past_of_qwens_own_quantizer():
    k, v = torch.randn(2, 1, 2, 9, 32).bfloat16()
    layer_past = [(quantize_cache_v(k, 8, 255, 0), quantize_cache_v(v, 8, 255, 0))]
    config = Qwen2Config(num_hidden_layers=1)
    cache = from_layer_past(layer_past, config, dtype=torch.float32)
    new = torch.zeros(1, 2, 1, 32)
    seen_k, seen_v = cache.update(new, new, 0)
    assert (seen_k[:, :, :9] - k).abs().max() < 0.05 and (seen_v[:, :, :9] - v).abs().max() < 0.05
    with pytest.raises(BadInput, match="1 tuples"):
        from_layer_past(layer_past, Qwen2Config(num_hidden_layers=2))
    with pytest.raises(BadInput, match="is not \\(\\(qk"):
        from_layer_past([(k, v)], config)
    with pytest.raises(BadInput, match="is not \\(\\(qk"):
        from_layer_past([tuple((q, s[:, :1], z) for q, s, z in layer_past[0])], config)
    with pytest.raises(BadInput, match="no tokens"):
        to_layer_past(Int8Cache(config))


def test_what_is_no_layer_past_is_refused():
    """Qwen's own code has None for each layer before a model's first step."""
    config = Qwen2Config(num_hidden_layers=2)
    for wrong, words in (
        (None, "layer_past is a NoneType"),
        ([None] * 2, "Layer 0 of layer_past is a NoneType"),
        (torch.zeros(2, 2), "layer_past is a Tensor"),
    ):
        with pytest.raises(UsageError, match=words) as error:
            from_layer_past(wrong, config)
        assert "((qk, sk, zk), (qv, sv, zv)) for each layer" in error.value.why
        assert "run first" in error.value.next_step
    with pytest.raises(BadInput, match="is not \\(\\(qk"):
        from_layer_past([(None, None)] * 2, config)


def test_layer_past_of_four_bit_values():
    ours, _ = filled(value_bits=4)
    _, (qv, sv, zv) = to_layer_past(ours)[0]
    kv = ours.int8_layers[0].kv
    assert qv.shape == (2, 2, 40, 32) and sv.shape == zv.shape == (2, 2, 40, 1)
    assert dequantize_cache_torch(qv, sv, zv).isfinite().all() and kv.value_bits == 4


# --- what cannot be ---------------------------------------------------------------------------


def message(error) -> str:
    assert isinstance(error.value, QwqQuantError) and error.value.next_step
    return str(error.value)


@pytest.mark.parametrize(
    ("k", "words"),
    [
        (torch.zeros(3, 2, 1, 32), "batch size is 2, what came now has 3"),
        (torch.zeros(2, 4, 1, 32), "number of key heads is 2, what came now has 4"),
        (torch.zeros(2, 2, 1, 64), "key head size is 32, what came now has 64"),
        (torch.zeros(2, 2, 1, 32, dtype=torch.bfloat16), "dtype is torch.float32"),
        (torch.zeros(2, 2, 1, 32, device="meta"), "device is cpu, what came now has meta"),
    ],
)
def test_reuse_by_something_else_is_refused(k, words):
    ours, _ = filled()
    before = ours.get_seq_length()
    with pytest.raises(UsageError) as error:
        ours.update(k, k, 0)
    assert words in message(error)
    assert ours.get_seq_length() == before


def test_a_model_with_more_layers_is_refused(model, tokens):
    cache = Int8Cache(Qwen2Config(num_hidden_layers=2))
    with pytest.raises(UsageError) as error:
        model(tokens[:, :5], past_key_values=cache)
    assert "has 2 layers" in message(error)


@pytest.mark.parametrize(
    ("shape", "dtype", "bits", "words"),
    [
        ((1, 1, 1, 24), torch.float32, 8, "head size of 24 in 8 bits: it must be a multiple of 16"),
        ((1, 1, 1, 48), torch.float32, 4, "head size of 48 in 4 bits: it must be a multiple of 32"),
        ((1, 1, 1, 32), torch.float64, 8, "torch.float64"),
    ],
)
def test_models_that_do_not_fit_are_refused(shape, dtype, bits, words):
    cache = Int8Cache(Qwen2Config(num_hidden_layers=1), value_bits=bits)
    with pytest.raises(BadInput) as error:
        cache.update(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), 0)
    assert words in message(error)


def test_settings_that_cannot_be():
    from transformers import T5Config

    with pytest.raises(UsageError, match="value_bits=5"):
        Int8Cache(Qwen2Config(), value_bits=5)
    for reserve in (-1, 1.5):
        with pytest.raises(UsageError, match=f"reserve={reserve}"):
            Int8Cache(Qwen2Config(), reserve=reserve)
    with pytest.raises(UsageError, match="made from a dict") as error:
        Int8Cache({})
    assert "model.config" in error.value.next_step
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="offloading"):
            Int8Cache(Qwen2Config(), offloading=True)
    with pytest.raises(BadInput, match="decoder alone"):
        Int8Cache(T5Config())
    sliding = Qwen2Config(
        num_hidden_layers=2,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["sliding_attention"] * 2,
    )
    with pytest.raises(BadInput, match="None of its 2 layers"):
        Int8Cache(sliding)


def test_the_oracle_is_no_int8_cache():
    """The tests above compare two implementations, not one with itself."""
    assert all(isinstance(x, DynamicLayer) for x in OracleCache(Qwen2Config()).layers)
