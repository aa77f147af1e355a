"""The statistics' formulas against numbers worked out one at a time, as perplexity.cpp does."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.errors import BadInput
from quant.evaluation import divergence
from quant.evaluation.divergence import (
    Accumulator,
    PositionScores,
    compare_log_probs,
    compare_logits,
    log_softmax,
    statistics,
)


def logits_of(seed: int, n: int = 40, n_vocab: int = 50) -> tuple[np.ndarray, ...]:
    draw = np.random.default_rng(seed)
    p = draw.normal(0, 3, (n, n_vocab)).astype(np.float32)
    q = p + draw.normal(0, 0.3, p.shape).astype(np.float32)
    return p, q, draw.integers(0, n_vocab, n)


def restated(p: list[list[float]], q: list[list[float]], targets: list[int]) -> dict:
    """kl_divergence of perplexity.cpp, a number at a time, with sums as it keeps them."""
    sums = dict.fromkeys(("q", "q2", "b", "b2", "qb", "k", "k2", "d", "d2", "d4", "top"), 0.0)
    klds, dps = [], []
    for p_row, q_row, t in zip(p, q, targets, strict=True):
        log_p = [x - math.log(sum(math.exp(y) for y in p_row)) for x in p_row]
        log_q = [x - math.log(sum(math.exp(y) for y in q_row)) for x in q_row]
        kld = sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
        d = math.exp(log_q[t]) - math.exp(log_p[t])
        klds.append(kld)
        dps.append(d)
        for name, x in (
            ("q", -log_q[t]), ("q2", log_q[t] ** 2), ("b", -log_p[t]), ("b2", log_p[t] ** 2),
            ("qb", log_q[t] * log_p[t]), ("k", kld), ("k2", kld**2), ("d", d), ("d2", d**2),
            ("d4", d**4), ("top", p_row.index(max(p_row)) == q_row.index(max(q_row))),
        ):  # fmt: skip
            sums[name] += x
    n = len(klds)

    def mean(a, b):
        f = sums[a] / n
        return f, math.sqrt((sums[b] / n - f * f) / (n - 1))

    ln_q, ln_b, d2 = mean("q", "q2"), mean("b", "b2"), mean("d2", "d4")
    cov = (sums["qb"] / n - sums["q"] / n * sums["b"] / n) / (n - 1)
    ratio = ln_q[0] - ln_b[0], math.sqrt(ln_q[1] ** 2 + ln_b[1] ** 2 - 2 * cov)
    ppl = [(math.exp(x), math.exp(x) * e) for x, e in (ln_q, ln_b, ratio)]
    difference = math.sqrt(ppl[0][1] ** 2 + ppl[1][1] ** 2 - 2 * ppl[0][0] * ppl[1][0] * cov)
    same = sums["top"] / n
    rms = math.sqrt(d2[0])
    return {
        "Mean PPL(Q)": ppl[0],
        "Mean PPL(base)": ppl[1],
        "Cor(ln(PPL(Q)), ln(PPL(base)))": (100 * cov / (ln_q[1] * ln_b[1]), None),
        "Mean ln(PPL(Q)/PPL(base))": ratio,
        "Mean PPL(Q)/PPL(base)": ppl[2],
        "Mean PPL(Q)-PPL(base)": (ppl[0][0] - ppl[1][0], difference),
        "Mean KLD": mean("k", "k2"),
        "Maximum KLD": (max(klds), None),
        "99.9% KLD": (percentile(klds, 0.999), None),
        "5.0% KLD": (percentile(klds, 0.05), None),
        "Median KLD": (median(klds), None),
        "Minimum KLD": (min(klds), None),
        "Mean Δp": tuple(100 * x for x in mean("d", "d2")),
        "75.0% Δp": (100 * percentile(dps, 0.75), None),
        "Median Δp": (100 * median(dps), None),
        "0.1% Δp": (100 * percentile(dps, 0.001), None),
        "RMS Δp": (100 * rms, 100 * 0.5 / rms * d2[1]),
        "Same top p": (100 * same, 100 * math.sqrt(same * (1 - same) / (n - 1))),
    }


def percentile(values: list[float], fraction: float) -> float:
    values = sorted(values)
    p = fraction * (len(values) - 1)
    i = int(p)
    p -= i
    return (1 - p) * values[i] + p * values[min(i + 1, len(values) - 1)]


def median(values: list[float]) -> float:
    values, half = sorted(values), len(values) // 2
    return values[half] if len(values) % 2 else 0.5 * (values[half] + values[half - 1])


@pytest.mark.parametrize("n", [40, 41])
def test_every_figure_is_that_of_perplexity_cpp(n):
    p, q, targets = logits_of(n, n)
    expected = restated(p.tolist(), q.tolist(), targets.tolist())
    found = {name: (x, e) for name, x, e in statistics(compare_logits(p, q, targets)).rows()}
    assert expected.keys() <= found.keys() and len(found) == 10 + 11 + 13
    for name, (value, error) in expected.items():
        assert found[name][0] == pytest.approx(value, rel=1e-9, abs=1e-12), name
        assert found[name][1] == (error if error is None else pytest.approx(error, rel=1e-6)), name


def test_row_blocks_do_not_change_anything(monkeypatch):
    p, q, targets = logits_of(1)
    whole = compare_logits(p, q, targets)
    monkeypatch.setattr(divergence, "BLOCK_SIZE", 150)  # three rows
    blocks = compare_logits(p, q, targets)
    for name in ("nll_reference", "nll_candidate", "kld", "same_top"):
        assert np.array_equal(getattr(whole, name), getattr(blocks, name))


@given(st.integers(0, 1000), st.floats(0.001, 30))
@settings(max_examples=30, deadline=None)
def test_divergence_is_never_negative_and_zero_only_of_equals(seed, scale):
    draw = np.random.default_rng(seed)
    p, q = draw.normal(0, scale, (2, 5, 64))
    targets = draw.integers(0, 64, 5)
    assert (compare_logits(p, q, targets).kld > 0).all()
    same = compare_logits(p, p + 100, targets)  # softmax does not see a constant
    assert np.abs(same.kld).max() < 1e-12 and same.same_top.all()
    assert np.allclose(same.nll_reference, same.nll_candidate)


def test_negligible_tokens_do_not_count():
    """A token of ln p <= -16 with a wildly other q."""
    p = log_softmax(np.array([[0.0, 0.0, -20.0]]))
    q = np.array([[0.0, 0.0, -600.0]])
    whole = compare_log_probs(p, q, np.array([0]))
    cut = compare_log_probs(p, q, np.array([0]), least=-16)
    assert whole.kld[0] == pytest.approx(math.exp(p[0, 2]) * 580, rel=1e-2)
    assert abs(cut.kld[0]) < 2e-9


def test_the_top_token_of_a_tie_is_the_first():
    p = np.array([[1.0, 2.0, 2.0]])
    q = np.array([[1.0, 2.1, 2.0], [1.0, 2.0, 2.1]])
    targets = np.array([0])
    assert compare_logits(p, q[:1], targets).same_top[0]
    assert not compare_logits(p, q[1:], targets).same_top[0]


def test_large_logits_do_not_overflow():
    p = np.array([[3e38, 0, -3e38]], np.float32)
    found = compare_logits(p, p, np.array([0]))
    assert found.kld[0] == 0 and found.nll_candidate[0] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_logits_that_are_not_finite_are_refused(bad, which):
    arrays = list(logits_of(3)[:2])
    arrays[which][7, 3] = bad
    with pytest.raises(BadInput, match="not finite"):
        compare_logits(*arrays, np.zeros(40, np.int64))


def test_shapes_must_fit():
    p, q, targets = logits_of(4)
    with pytest.raises(ValueError, match="do not fit"):
        compare_logits(p, q[:, :-1], targets)
    with pytest.raises(ValueError, match="n_positions"):
        PositionScores(np.zeros(3), np.zeros(3), np.zeros(2), np.zeros(3, bool))
    with pytest.raises(ValueError, match="no positions"):
        statistics(PositionScores(*np.zeros((3, 0)), np.zeros(0, bool)))


def test_categories_are_told_apart_and_together_are_the_whole():
    accumulator = Accumulator()
    parts = {}
    for i, name in enumerate(("code", "english", "code")):
        scores = compare_logits(*logits_of(i))
        accumulator.add(scores, name)
        parts.setdefault(name, []).append(scores)
    found = accumulator.statistics()
    assert list(found.by_category) == ["code", "english"]
    assert found.n_positions == 120 and found.by_category["code"].n_positions == 80
    for name, scores in parts.items():
        assert found.by_category[name] == statistics(PositionScores.join(scores))
    assert found.kld.value == pytest.approx(
        (80 * found.by_category["code"].kld.value + 40 * found.by_category["english"].kld.value)
        / 120
    )
    as_json = found.as_json()
    assert as_json["by_category"]["code"]["kld"].keys() == {"value", "error"}
    assert as_json["kld_percentiles"]["99.9"] <= as_json["kld_percentiles"]["100"]


def test_one_category_has_no_breakdown_and_few_positions_no_error():
    accumulator = Accumulator()
    accumulator.add(compare_logits(*logits_of(1, n=9)), "code")
    found = accumulator.statistics()
    assert found.by_category == {} and found.kld.error == 0 and found.kld.value > 0
