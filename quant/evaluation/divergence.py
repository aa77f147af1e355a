"""How far one distribution over the next token is from another, under llama.cpp's definitions.

At every scored position stand two distributions over the vocabulary, p of the reference and q of
the candidate, and the token t that really came next:

    nll = -ln p(t)                     perplexity = exp(mean nll)
    kld = sum over i of p_i * (ln p_i - ln q_i)
    dp  = q(t) - p(t)                  same top = argmax p == argmax q

Standard errors are those of a mean over positions, carried on linearly (the error of exp(x) is
exp(x) times x's), and treat positions as independent, as llama.cpp does; neighbouring tokens are
not quite that, so true errors are somewhat larger.
# ref: llama.cpp, tools/perplexity/perplexity.cpp, kl_divergence

What others need: `compare_logits` makes PositionScores of two arrays of logits; whoever never
holds a row of logits may fill PositionScores by itself. `Accumulator.add` takes either's, with a
category, and `Accumulator.statistics()` gives the Statistics.
"""

from dataclasses import dataclass, field, fields

import numpy as np

from quant.errors import BadInput

BLOCK_SIZE = 1 << 20
"""Logits that are worked on at a time: 8 MB in float64, and some five such arrays are alive."""

NEGLIGIBLE = -16.0
"""llama.cpp leaves out tokens that the reference gives ln p <= -16 (1.1e-7); its file of 16-bit
log-probabilities cannot tell them apart."""

KLD_PERCENTILES = (100.0, 99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1, 0.0)
DP_PERCENTILES = (100.0, 99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1, 0.0)

_FEWEST_FOR_ERRORS = 10


@dataclass(frozen=True)
class PositionScores:
    """What two models say at each scored position. Every array is (n_positions,)."""

    nll_reference: np.ndarray  # float64, nats, of the token that really came next
    nll_candidate: np.ndarray  # float64, nats
    kld: np.ndarray  # float64, nats
    same_top: np.ndarray  # bool: both find the same token likeliest

    def __post_init__(self):
        if len({getattr(self, f.name).shape for f in fields(self)}) != 1 or self.kld.ndim != 1:
            raise ValueError("every array must be (n_positions,)")

    def __len__(self) -> int:
        return len(self.kld)

    @property
    def p_reference(self) -> np.ndarray:
        """Probability of the token that came next."""
        return np.exp(-self.nll_reference)

    @property
    def p_candidate(self) -> np.ndarray:
        return np.exp(-self.nll_candidate)

    @staticmethod
    def join(parts: "list[PositionScores]") -> "PositionScores":
        """All positions of `parts`, in order."""
        names = [f.name for f in fields(PositionScores)]
        return PositionScores(*(np.concatenate([getattr(p, n) for p in parts]) for n in names))


# --- from logits ------------------------------------------------------------------------------


def compare_logits(
    reference: np.ndarray, candidate: np.ndarray, targets: np.ndarray
) -> PositionScores:
    """Scores of two models' logits, each float (n, n_vocab); targets (n,) are the next tokens.

    The KL divergence is the whole sum; llama.cpp's leaves out what is NEGLIGIBLE (see base_file).
    Raises BadInput for logits that are not finite.
    """
    if reference.shape != candidate.shape or targets.shape != reference.shape[:1]:
        raise ValueError(f"{reference.shape}, {candidate.shape}, {targets.shape} do not fit")
    n_rows = max(1, BLOCK_SIZE // reference.shape[1])
    return PositionScores.join(
        [
            compare_log_probs(
                log_softmax(reference[start : start + n_rows]),
                candidate[start : start + n_rows],
                targets[start : start + n_rows],
            )
            for start in range(0, len(targets), n_rows)
        ]
    )


def compare_log_probs(
    reference: np.ndarray, candidate: np.ndarray, targets: np.ndarray, least: float = -np.inf
) -> PositionScores:
    """As compare_logits, of a few rows, with the reference as ln p, float64 (n, n_vocab).

    Tokens of ln p <= `least` do not count towards the KL divergence.
    """
    log_q = log_softmax(candidate)
    rows = np.arange(len(targets))
    kld_terms = np.exp(reference)
    kld_terms[reference <= least] = 0
    nll_reference, nll_candidate = -reference[rows, targets], -log_q[rows, targets]
    same_top = reference.argmax(axis=1) == log_q.argmax(axis=1)
    kld_terms *= np.subtract(reference, log_q, out=log_q)
    return PositionScores(nll_reference, nll_candidate, kld_terms.sum(axis=1), same_top)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """ln p of each row of logits, in float64. Raises BadInput for NaN and infinity."""
    require_finite(logits)
    log_p = logits.astype(np.float64)
    log_p -= log_p.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    return log_p


def nll_of(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-ln p of the tokens that came next, float64 (n,), after logits (n, n_vocab)."""
    nll = np.empty(len(targets))
    n_rows = max(1, BLOCK_SIZE // logits.shape[1])
    for start in range(0, len(targets), n_rows):
        part = slice(start, start + n_rows)
        log_p = log_softmax(logits[part])
        nll[part] = -log_p[np.arange(len(log_p)), targets[part]]
    return nll


def require_finite(logits: np.ndarray) -> None:
    if not np.isfinite(logits).all():
        raise BadInput(
            "The model's output is not finite.",
            "It gives NaN or infinity instead of probabilities: its weights are damaged, or they "
            "overflow in the type it is computed in.",
        )


# --- statistics -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard error."""

    value: float
    error: float


LLAMA_NAMES = (
    ("Mean PPL(Q)", "ppl", 1),
    ("Mean PPL(base)", "ppl_reference", 1),
    ("Mean ln(PPL(Q)/PPL(base))", "ln_ppl_ratio", 1),
    ("Mean PPL(Q)/PPL(base)", "ppl_ratio", 1),
    ("Mean PPL(Q)-PPL(base)", "ppl_difference", 1),
    ("Mean KLD", "kld", 1),
    ("Mean Δp", "dp", 100),
    ("RMS Δp", "dp_rms", 100),
    ("Same top p", "same_top", 100),
)
"""llama-perplexity's name of each Estimate, and what it multiplies it with: it prints percents."""


def _percentile_name(percent: float, of: str) -> str:
    special = {100.0: "Maximum", 50.0: "Median", 0.0: "Minimum"}
    return f"{special.get(percent, f'{percent:.1f}%')} {of}"


@dataclass(frozen=True)
class Statistics:
    """Candidate (Q) against reference (base) over n positions; `rows` has llama.cpp's names.

    Divergences are in nats; probabilities, and dp, their change, are fractions.
    """

    n_positions: int
    ppl: Estimate
    ppl_reference: Estimate
    correlation: float  # of the two models' nll; 1: they stumble over the same tokens
    ln_ppl_ratio: Estimate
    ppl_ratio: Estimate
    ppl_difference: Estimate
    kld: Estimate
    kld_percentiles: dict[float, float]  # 100 is the maximum, 50 the median, 0 the minimum
    dp: Estimate
    dp_percentiles: dict[float, float]
    dp_rms: Estimate
    same_top: Estimate
    by_category: "dict[str, Statistics]" = field(default_factory=dict)

    def rows(self) -> list[tuple[str, float, float | None]]:
        """(llama-perplexity's name, value, standard error), in its order and its units."""
        single = [
            (name, getattr(self, attribute), factor) for name, attribute, factor in LLAMA_NAMES
        ]
        before = [(n, f * x.value, f * x.error) for n, x, f in single[:5]]
        before.insert(2, ("Cor(ln(PPL(Q)), ln(PPL(base)))", 100 * self.correlation, None))
        kld, dp, *after = [(n, f * x.value, f * x.error) for n, x, f in single[5:]]
        return [
            *before,
            kld,
            *((_percentile_name(k, "KLD"), x, None) for k, x in self.kld_percentiles.items()),
            dp,
            *((_percentile_name(k, "Δp"), 100 * x, None) for k, x in self.dp_percentiles.items()),
            *after,
        ]

    def as_json(self) -> dict:
        """Plain values: an Estimate is {"value", "error"}, a percentile's key is its number."""
        answer = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Estimate):
                value = {"value": value.value, "error": value.error}
            elif each.name == "by_category":
                value = {name: statistics.as_json() for name, statistics in value.items()}
            elif isinstance(value, dict):
                value = {f"{percent:g}": x for percent, x in value.items()}
            answer[each.name] = value
        return answer


class Accumulator:
    """Collects scores, a category at a time; 25 bytes a position."""

    def __init__(self):
        self._parts: dict[str, list[PositionScores]] = {}

    def add(self, scores: PositionScores, category: str = "") -> None:
        self._parts.setdefault(category, []).append(scores)

    def scores(self) -> PositionScores:
        """Every position, a category after the other."""
        return PositionScores.join([s for parts in self._parts.values() for s in parts])

    def statistics(self) -> Statistics:
        """Over everything, with those of each category where there is more than one."""
        by_category = {}
        if len(self._parts) > 1:
            by_category = {
                name: statistics(PositionScores.join(parts)) for name, parts in self._parts.items()
            }
        return statistics(self.scores(), by_category)


def statistics(
    scores: PositionScores, by_category: dict[str, Statistics] | None = None
) -> Statistics:
    """llama-perplexity's figures over all positions of `scores`. Raises ValueError without any."""
    n = len(scores)
    if n == 0:
        raise ValueError("there are no positions")
    ln_q, ln_base = _mean(scores.nll_candidate), _mean(scores.nll_reference)
    covariance = _covariance_of_means(scores.nll_candidate, scores.nll_reference)
    spread = ln_q.error * ln_base.error
    ln_ratio = Estimate(
        ln_q.value - ln_base.value, _difference_error(ln_q.error, ln_base.error, covariance)
    )
    q, base = _exponential(ln_q), _exponential(ln_base)
    dp = scores.p_candidate - scores.p_reference
    mean_square = _mean(dp**2)
    rms = float(np.sqrt(mean_square.value))
    same = float(np.mean(scores.same_top))
    return Statistics(
        n_positions=n,
        ppl=q,
        ppl_reference=base,
        correlation=covariance / spread if spread else 1.0,
        ln_ppl_ratio=ln_ratio,
        ppl_ratio=_exponential(ln_ratio),
        ppl_difference=Estimate(
            q.value - base.value,
            _difference_error(q.error, base.error, q.value * base.value * covariance),
        ),
        kld=_mean(scores.kld),
        kld_percentiles=_percentiles(scores.kld, KLD_PERCENTILES),
        dp=_mean(dp),
        dp_percentiles=_percentiles(dp, DP_PERCENTILES),
        dp_rms=Estimate(rms, 0.5 / rms * mean_square.error if rms else 0.0),
        same_top=Estimate(same, float(np.sqrt(same * (1 - same) / max(n - 1, 1)))),
        by_category=by_category or {},
    )


def perplexity(nll: np.ndarray) -> Estimate:
    """Of positions' nll (n,) alone."""
    return _exponential(_mean(nll))


def _mean(x: np.ndarray) -> Estimate:
    """# ref: mean_and_uncertainty; the variance is divided by n, its mean's by n - 1."""
    error = np.sqrt(x.var() / (len(x) - 1)) if len(x) > _FEWEST_FOR_ERRORS else 0.0
    return Estimate(float(x.mean()), float(error))


def _covariance_of_means(a: np.ndarray, b: np.ndarray) -> float:
    if len(a) < _FEWEST_FOR_ERRORS:
        return 0.0
    return float(np.mean((a - a.mean()) * (b - b.mean())) / (len(a) - 1))


def _difference_error(a: float, b: float, covariance: float) -> float:
    """Standard error of a difference; rounding may take equal things below zero."""
    return float(np.sqrt(max(a**2 + b**2 - 2 * covariance, 0.0)))


def _exponential(x: Estimate) -> Estimate:
    with np.errstate(over="ignore"):  # a broken model's perplexity may be beyond float64
        value = float(np.exp(x.value))
    return Estimate(value, value * x.error)


def _percentiles(x: np.ndarray, percents: tuple[float, ...]) -> dict[float, float]:
    """Interpolated between neighbours, as llama.cpp's and numpy's linear method do."""
    return dict(zip(percents, np.percentile(x, percents).tolist(), strict=True))
