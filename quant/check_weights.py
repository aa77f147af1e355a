"""How much other weights lose against a source: both run on held-out text, layer by layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quant.calibration.hidden_states import HiddenStates
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens
from quant.calibration.weights import Weights
from quant.checkpoint import Checkpoint
from quant.evaluation.divergence import Statistics, statistics
from quant.evaluation.streamed import compare_streamed
from quant.report.choice import Result


@dataclass(frozen=True)
class Candidate:
    """A row of the table of results: other weights for the source's config."""

    name: str  # "plain NF4"
    nbytes: int
    weights: Weights


def check_weights(
    checkpoint: Checkpoint,
    candidates: Sequence[Candidate],
    tokens: Tokens,
    device: str,
    progress: Callable[[int], None] = lambda n: None,
) -> tuple[Result, ...]:
    """The source and the candidates: perplexity, KL divergence, top-1 agreement.

    The second half of each sequence is scored. Calls progress(1) after each layer of each model.
    """
    source = StreamedModel(checkpoint, device=device)
    reference = _final_states(source, tokens, progress)
    states = [
        _final_states(StreamedModel(checkpoint, c.weights, device=device), tokens, progress)
        for c in candidates
    ]
    scores = compare_streamed(source, reference, states, tokens.ids, tokens.seq_len // 2)
    found = [statistics(each) for each in scores]
    nbytes = sum(2 * info.n_weights for info in checkpoint.tensors.values())
    return (
        _source_result(nbytes, found[0]),
        *(_result(c, s) for c, s in zip(candidates, found, strict=True)),
    )


def _final_states(
    model: StreamedModel, tokens: Tokens, progress: Callable[[int], None]
) -> HiddenStates:
    hidden = model.embed(tokens.ids)
    for layer in model.layers(tokens.seq_len):
        layer.run(hidden, hidden)
        progress(1)
    return hidden


def _source_result(nbytes: int, s: Statistics) -> Result:
    return Result("source", nbytes, s.n_positions, s.ppl_reference.value, s.ppl_reference.error)


def _result(candidate: Candidate, s: Statistics) -> Result:
    return Result(
        candidate.name,
        candidate.nbytes,
        s.n_positions,
        s.ppl.value,
        s.ppl.error,
        s.kld.value,
        s.kld.error,
        s.same_top.value,
    )
