"""Attention registered with transformers: int8 for steps, the model's own for all else."""

import copy
import warnings

import pytest
import torch
from kv_cache_helpers import divergence, read_text, step_by_step
from qwq_kernels import decode_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, flash_attention_mask

from quant.errors import Unavailable
from quant.kv_cache import Int8Cache, attention, enable_int8_attention
from quant.kv_cache import cache as cache_module

PAD = 4091


@pytest.fixture(scope="module")
def loaded(tiny_qwq):
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(tiny_qwq, dtype=torch.float32).eval()


@pytest.fixture
def model(loaded):
    """Its attention is sdpa again after every test."""
    yield loaded
    loaded.set_attn_implementation("sdpa")


@pytest.fixture(scope="module")
def tokens(tiny_qwq, texts):
    return read_text(AutoTokenizer.from_pretrained(tiny_qwq), texts / "heldout.jsonl", 200)


@pytest.fixture
def calls(monkeypatch):
    """The queries of each call of decode_attention."""
    seen = []
    real = attention.decode_attention

    def counting(query, *args):
        seen.append(query.shape[2])
        return real(query, *args)

    monkeypatch.setattr(attention, "decode_attention", counting)
    return seen


def logits_of(model, tokens, cache, sizes, mask=None):
    """Logits (tokens, vocabulary) of a text fed in pieces of these sizes."""
    start, out = 0, []
    with torch.no_grad():
        for n in sizes:
            seen = None if mask is None else mask[:, : start + n]
            piece = tokens[:, start : start + n]
            out.append(model(piece, past_key_values=cache, attention_mask=seen).logits)
            start += n
    return torch.cat(out, dim=1).flatten(0, 1).double()


@pytest.mark.parametrize("own", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_steps_read_int8_and_agree(model, tokens, calls, own, padded):
    """Prompts, chunks, drafts and single tokens; left padding too."""
    sizes = (30, 20, 1, 5, 16, 1, 17)
    text = torch.cat([tokens[:, :90], tokens[:, 90:180]])
    mask = torch.ones_like(text)
    if padded:
        mask[0, :11] = 0
    model.set_attn_implementation(own)
    expected = logits_of(model, text, DynamicCache(config=model.config), sizes, mask)
    enable_int8_attention(model)
    assert model.config._attn_implementation == f"int8_kv_{own}"
    logits = logits_of(model, text, Int8Cache(model.config), sizes, mask)
    keep = mask.flatten().bool()
    kld, same = divergence(expected[keep], logits[keep])
    assert kld < 1e-4 and same > 0.97
    assert calls == [n for n in sizes[1:] if n <= 16 for _ in range(6)]


def test_a_prompt_sees_itself_exactly(model, tokens, calls):
    """A short one too, which is no longer than a step may be; and nothing is copied."""
    enable_int8_attention(model)
    cache = Int8Cache(model.config)
    with torch.no_grad():
        logits = model(tokens[:, :10], past_key_values=cache).logits
        expected = model(tokens[:, :10], past_key_values=DynamicCache(config=model.config)).logits
    assert torch.equal(logits, expected) and not calls
    k = torch.randn(1, 2, 10, 64)
    assert Int8Cache(model.config).update(k, k, 0)[0] is k


@pytest.mark.parametrize(
    ("function", "padding", "alone"),
    [
        (causal_mask_function, torch.tensor([[False, True, True, True]]), True),
        (causal_mask_function, None, True),
        (causal_mask_function, torch.ones(1, 9, dtype=torch.bool), False),  # of a longer cache
        (lambda *args: True, torch.ones(1, 4, dtype=torch.bool), False),  # some other pattern
    ],
)
def test_padding_alone_says_all_only_if_the_rest_is_causal(function, padding, alone):
    mask = torch.ones(1, 1, 2, 4, dtype=torch.bool).tril(2)
    made = attention.MaskFunction(lambda **kwargs: mask.clone())(
        q_length=2, kv_length=4, mask_function=function, attention_mask=padding
    )
    assert torch.equal(made, mask)
    numbers = made.as_numbers
    if not alone:
        assert torch.equal(numbers, torch.where(mask, 0.0, -torch.inf))
    elif padding is None:
        assert numbers is None
    else:
        assert numbers.tolist() == [[-torch.inf, 0.0, 0.0, 0.0]]


def test_generate_reads_int8(model, tokens, calls):
    enable_int8_attention(model)
    model.generate(tokens[:, :20], past_key_values=Int8Cache(model.config), max_new_tokens=9,
                   do_sample=False, eos_token_id=None, pad_token_id=PAD)  # fmt: skip
    assert calls == [1] * 8 * 6
    calls.clear()
    model.generate(tokens[:, :60], past_key_values=Int8Cache(model.config), max_new_tokens=9,
                   do_sample=False, eos_token_id=None, pad_token_id=PAD,
                   prompt_lookup_num_tokens=4)  # fmt: skip
    assert calls and max(calls) > 1  # drafts


def test_other_caches_work_as_before(model, tokens, calls):
    sizes = (30, 5, 1, 1)
    expected = logits_of(model, tokens, DynamicCache(config=model.config), sizes)
    enable_int8_attention(model)
    logits = logits_of(model, tokens, DynamicCache(config=model.config), sizes)
    assert torch.equal(logits, expected) and not calls


def test_it_can_be_undone_and_done_twice(model, tokens, calls):
    enable_int8_attention(model)
    enable_int8_attention(model)
    assert model.config._attn_implementation == "int8_kv_sdpa"
    cache = Int8Cache(model.config)
    logits_of(model, tokens, cache, (30, 1))
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        model(tokens[:, 31:32], past_key_values=cache)
        model(tokens[:, 32:33], past_key_values=copy.deepcopy(cache))
    assert len(calls) == 6


def test_flash_attention_serves_the_prompt(model, tokens, calls):
    """Its masks have two dimensions or are None; it asks the module for its own name."""
    names = []

    def flash_attention_stand_in(module, query, key, value, mask, **kwargs):
        names.append(module.config._attn_implementation)
        if mask is not None:  # as unpadding does
            causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
            causal = causal.tril(key.shape[2] - query.shape[2])
            mask = mask[:, None, None].bool() & causal
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("stand_in_flash", flash_attention_stand_in)
    AttentionMaskInterface.register("stand_in_flash", flash_attention_mask)
    text = torch.cat([tokens[:, :60], tokens[:, 60:120]])
    mask = torch.ones_like(text)
    mask[1, :9] = 0
    sizes = (54, 1, 4, 1)
    expected = logits_of(model, text, DynamicCache(config=model.config), sizes, mask)
    model.config._attn_implementation = "stand_in_flash"
    enable_int8_attention(model)
    logits = logits_of(model, text, Int8Cache(model.config), sizes, mask)
    keep = mask.flatten().bool()
    assert divergence(expected[keep], logits[keep])[0] < 1e-4
    assert names == ["stand_in_flash"] * 6 and calls == [1] * 6 + [4] * 6 + [1] * 6


def test_what_it_cannot_goes_to_the_models_own(model, tokens, calls, monkeypatch):
    """A window on a full layer, 4-bit values of few channels, gradients: one warning each."""
    cache_module._warned.clear()
    enable_int8_attention(model)
    module = model.model.layers[0].self_attn
    cache = Int8Cache(model.config)
    logits_of(model, tokens, cache, (30,))
    module.sliding_window = 4096
    try:
        with pytest.warns(UserWarning, match="it knows nothing of sliding_window"):
            logits_of(model, tokens[:, 30:], cache, (1,))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logits_of(model, tokens[:, 31:], cache, (1,))
    finally:
        module.sliding_window = None
    assert calls == [1] * 10  # all but the first layer, twice
    monkeypatch.setitem(decode_attention.MIN_HEAD_SIZE, 4, 96)
    small = Int8Cache(model.config, value_bits=4)
    with pytest.warns(UserWarning, match="head size 64 with values in 4 bits"):
        logits_of(model, tokens, small, (30, 1))
    with pytest.warns(UserWarning, match="no gradients"):
        model(tokens[:, 32:33], past_key_values=cache)


def test_a_models_own_mask_of_numbers_is_honoured(model, tokens, calls):
    """A 4-D mask is taken as it is: here one that hides the last token but one."""
    expected_cache, cache = DynamicCache(config=model.config), Int8Cache(model.config)
    hide = torch.zeros(1, 1, 1, 31)
    hide[..., 29] = torch.finfo(torch.float32).min
    with torch.no_grad():
        model(tokens[:, :30], past_key_values=expected_cache)
        seen = model(tokens[:, 30:31], past_key_values=copy.deepcopy(expected_cache)).logits
        expected = model(
            tokens[:, 30:31], past_key_values=expected_cache, attention_mask=hide
        ).logits
        enable_int8_attention(model)
        model(tokens[:, :30], past_key_values=cache)
        logits = model(tokens[:, 30:31], past_key_values=cache, attention_mask=hide).logits
    assert len(calls) == 6
    ours, other = (divergence(x[0].double(), logits[0].double())[0] for x in (expected, seen))
    assert ours < 1e-4 < other


def test_a_model_that_computes_with_cached_keys_gets_them(model, tokens):
    """As one that does not read int8 does, given the cache of one that does."""
    cache_module._warned.clear()
    config = copy.deepcopy(model.config)
    config._attn_implementation = "int8_kv_sdpa"
    followed, cache = Int8Cache(model.config), Int8Cache(config)
    expected = logits_of(model, tokens, followed, (30, 1))
    with pytest.warns(UserWarning, match="on keys or values after it has cached them"):
        logits = logits_of(model, tokens, cache, (30, 1))
    assert torch.equal(logits, expected)


def test_keys_that_are_widened_behind_the_cache():
    """DeepSeek's latent attention, with and without int8 attention: the same to the bit."""
    cache_module._warned.clear()
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=96, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4,
        n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
        kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).eval()
    tokens = torch.randint(0, 96, (1, 40))
    expected = logits_of(model, tokens, Int8Cache(config), (30, 1, 4))
    enable_int8_attention(model)
    cache = Int8Cache(model.config)
    with pytest.warns(UserWarning, match="int8 attention is not used"):
        logits = logits_of(model, tokens, cache, (30, 1, 4))
    assert torch.equal(logits, expected)
    assert [layer.get_seq_length() for layer in cache.layers] == [35, 35, 35]


def test_values_that_are_halved_behind_the_cache():
    """DiffLlama's keys are as they were cached, its values are not."""
    cache_module._warned.clear()
    torch.manual_seed(0)
    config = DiffLlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model = DiffLlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 96, (1, 40))
    expected = logits_of(model, tokens, Int8Cache(config), (30, 1, 4))
    enable_int8_attention(model)
    with pytest.warns(UserWarning, match="it calls chunk on keys or values"):
        logits = logits_of(model, tokens, Int8Cache(model.config), (30, 1, 4))
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("how", ["mT", "data", "real"])
def test_a_property_that_shows_contents_is_no_fact(how):
    new = torch.randn(1, 2, 1, 64)
    layer = Int8Cache(Qwen2Config(head_dim=64)).layers[0]
    layer.update(new.expand(-1, -1, 5, -1), new.expand(-1, -1, 5, -1))
    layer._config.attention = lambda: "int8_kv_sdpa"
    key, value = layer.update(new, new)
    assert type(key) is type(value) is cache_module.Placeholder
    cache_module._warned.clear()
    with pytest.warns(UserWarning, match="int8 attention is not used"):
        shown, sum_ = getattr(key, how), value + 0
    assert torch.equal(shown.mT if how == "mT" else shown, key.exact())
    assert torch.equal(sum_, value.exact())


def test_a_cache_of_an_equal_config_object_says_why_it_is_slow(model, tokens, calls):
    cache_module._warned.clear()
    config = copy.deepcopy(model.config)
    enable_int8_attention(model)
    with pytest.warns(UserWarning, match="follows another config object"):
        logits_of(model, tokens, Int8Cache(config), (30, 1))
    assert calls == []


def test_a_model_with_heads_of_16_channels():
    """Too narrow for the kernel: the model's own attention, and a word about it."""
    cache_module._warned.clear()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    tokens = torch.randint(0, 96, (1, 40))
    expected = logits_of(model, tokens, Int8Cache(config), (30, 1))
    enable_int8_attention(model)
    with pytest.warns(UserWarning, match="head size 16 with values in 8 bits; 32 to 256 are"):
        logits = logits_of(model, tokens, Int8Cache(model.config), (30, 1))
    assert torch.equal(logits, expected)


def test_step_by_step_as_in_generate(model, tokens, calls):
    expected = step_by_step(model, tokens[:, :60], DynamicCache(config=model.config), 30)
    enable_int8_attention(model)
    cache = Int8Cache(model.config)
    kld, same = divergence(expected, step_by_step(model, tokens[:, :60], cache, 30))
    assert kld < 1e-4 and same > 0.96 and len(calls) == 30 * 6


def test_models_without_the_interface_are_refused():
    class Model:
        config = Qwen2Config()
        device = torch.device("cpu")

        def _can_set_attn_implementation(self):
            return False

    with pytest.raises(Unavailable, match="Model cannot read an int8 cache") as error:
        enable_int8_attention(Model())
    assert "Int8Cache works without it" in error.value.next_step
