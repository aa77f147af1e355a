"""Our samplers against llama.cpp's own, called through ctypes."""

import ctypes

import llama_cpp
import numpy as np
import pytest
from evaluation_helpers import to_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.errors import BadRecipe
from quant.evaluation.runners import open_runner
from quant.evaluation.sampler import DRY_BASE, DRY_BREAKERS, GREEDY, Sampler, softmax

N_VOCAB = 4096


@pytest.fixture(scope="module")
def runner(tiny_qwq, tmp_path_factory):
    path = to_gguf(tiny_qwq, "Q8_0", tmp_path_factory.mktemp("sampler") / "m.gguf")
    with open_runner(path) as runner:
        yield runner


def llama_sampler(name: str, s: dict, runner):
    """The sampler as common_sampler_init makes it."""
    llama = llama_cpp
    if name == "dry":
        breakers = (ctypes.c_char_p * len(DRY_BREAKERS))(*[c.encode() for c in DRY_BREAKERS])
        return llama.llama_sampler_init_dry(
            runner._vocab, s["dry_multiplier"], DRY_BASE, s["dry_allowed_length"],
            s["dry_penalty_last_n"], breakers, len(DRY_BREAKERS),
        )  # fmt: skip
    return {
        "penalties": lambda: llama.llama_sampler_init_penalties(
            N_VOCAB, s["penalty_last_n"], s["penalty_repeat"], s["frequency_penalty"],
            s["presence_penalty"],
        ),
        "top_k": lambda: llama.llama_sampler_init_top_k(s["top_k"]),
        "top_p": lambda: llama.llama_sampler_init_top_p(s["top_p"], 0),
        "min_p": lambda: llama.llama_sampler_init_min_p(s["min_p"], 0),
        "xtc": lambda: llama.llama_sampler_init_xtc(1.0, s["xtc_threshold"], 0, 1),
        "temperature": lambda: llama.llama_sampler_init_temp(s["temp"]),
    }[name]()  # fmt: skip


def by_llama(logits: np.ndarray, s: dict, history: list[int], runner) -> np.ndarray:
    """Logits after the chain, -infinity where a token is out."""
    data = (llama_cpp.llama_token_data * len(logits))()
    for i, x in enumerate(logits.tolist()):
        data[i].id, data[i].logit = i, x
    array = llama_cpp.llama_token_data_array(data, len(logits), -1, False)
    for name in s["sequence"].split(";"):
        sampler = llama_sampler(name, s, runner)
        for token in history:
            llama_cpp.llama_sampler_accept(sampler, token)
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
        llama_cpp.llama_sampler_free(sampler)
    found = np.full(len(logits), -np.inf)
    for i in range(array.size):
        found[array.data[i].id] = array.data[i].logit
    return found


def by_us(logits: np.ndarray, s: dict, history: list[int], runner) -> np.ndarray:
    sampler = Sampler(s, 0, runner.text)
    sampler.accept(history)
    logits = logits.astype(np.float64)
    for apply in sampler._chain:
        apply(sampler, logits)
    return logits


SETTINGS = {
    "temp": 0.6, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "penalty_last_n": 30,
    "penalty_repeat": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2,
    "dry_multiplier": 0.5, "dry_allowed_length": 2, "dry_penalty_last_n": 50,
    "xtc_probability": 1.0, "xtc_threshold": 0.1,
}  # fmt: skip

CHAINS = [
    "penalties", "dry", "top_k", "top_p", "min_p", "xtc", "temperature",
    "penalties;dry;top_k;top_p;min_p;xtc;temperature", "top_k;top_p;min_p;temperature;dry;xtc",
    "temperature;min_p;top_p;penalties",
]  # fmt: skip


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("seed", range(4))
def test_chains_agree_with_llama_cpp(runner, chain, seed):
    draw = np.random.default_rng(seed)
    logits = draw.normal(0, 4, N_VOCAB).astype(np.float32)
    some = runner.tokenize('a list: one, two\n"three" cats and dogs', True)
    history = draw.choice(some[: 3 + 3 * seed], 40).tolist() + 3 * some[-6:].tolist()
    logits[history[-5:]] += 6  # so that penalties act on tokens that matter
    s = {**SETTINGS, "sequence": chain}
    ours, theirs = by_us(logits, s, history, runner), by_llama(logits, s, history, runner)
    assert np.array_equal(np.isfinite(ours), np.isfinite(theirs))
    kept = np.isfinite(theirs)
    assert np.abs(ours[kept] - theirs[kept]).max() < 1e-4
    if chain in ("dry", "penalties"):
        assert not np.allclose(ours, logits)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 4))
@settings(max_examples=20, deadline=None)
def test_dry_agrees_on_any_history(runner, pattern, allowed):
    tokens = [int(runner.tokenize(text, True)[0]) for text in ("a", "b", "c", "\n")]
    history = [tokens[i] for i in pattern]
    s = {**SETTINGS, "sequence": "dry", "dry_allowed_length": allowed, "dry_penalty_last_n": 20}
    logits = np.zeros(N_VOCAB, np.float32)
    assert np.allclose(by_us(logits, s, history, runner), by_llama(logits, s, history, runner))


def test_temperature_zero_takes_the_likeliest(runner):
    logits = np.random.default_rng(1).normal(0, 1, N_VOCAB).astype(np.float32)
    sampler = Sampler(GREEDY, 0, runner.text)
    assert {sampler.draw(logits) for _ in range(5)} == {int(logits.argmax())}


def test_draws_follow_the_probabilities_and_the_seed():
    logits = np.log(np.array([0.5, 0.25, 0.25 - 1e-9, 1e-9]))
    s = {"sequence": "temperature", "temp": 1.0}
    first, again, other = (Sampler(s, seed, str) for seed in (7, 7, 8))
    drawn = [first.draw(logits) for _ in range(4000)]
    assert drawn == [again.draw(logits) for _ in range(4000)]
    assert drawn != [other.draw(logits) for _ in range(4000)]
    shares = np.bincount(drawn, minlength=4) / 4000
    assert np.abs(shares - softmax(logits)).max() < 4 * np.sqrt(0.25 / 4000)


@pytest.mark.parametrize("profile", [{"mirostat": 2}, {"sequence": "top_k;infill"}])
def test_what_cannot_be_done_is_refused(profile):
    with pytest.raises(BadRecipe):
        Sampler(profile, 0, str)
