"""What was chosen and what came of it: names and numbers, no tensors."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """One row of the table of results: a model, its size, and how far it is from the source.

    What was not measured, or is 0 by definition as the source's own divergence, is None.
    """

    name: str  # "source", "plain NF4", "dynamic 4-bit"
    nbytes: int
    n_tokens: int = 0  # that were scored
    perplexity: float | None = None
    perplexity_error: float | None = None  # standard error
    kld: float | None = None  # mean KL divergence from the source, nats a token
    kld_error: float | None = None
    same_top: float | None = None  # share of tokens where the source's first choice is first, too


@dataclass(frozen=True)
class Choice:
    """Which groups keep 16 bits, by which metric, and what every other size would have cost.

    `curve` holds the best choice at every size, (nbytes, predicted damage), smallest first: its
    first point keeps nothing (plain 4 bits), its last keeps everything (damage 0).
    Groups above `threshold` may be quantized all the same, where they take too many bytes.
    """

    metric: str  # a name of quant.sensitivity.METRICS
    kept: tuple[str, ...]  # names of groups
    curve: tuple[tuple[int, float], ...]
    chosen: tuple[int, float]
    threshold: float | None = None  # the least value of the metric among the kept
    results: tuple[Result, ...] = ()
