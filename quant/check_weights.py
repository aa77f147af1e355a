"""How much other weights lose against a source: both run on held-out text, layer by layer."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from quant.calibration.hidden_states import HiddenStates
from quant.calibration.passes import UNKEPT, Passes
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens
from quant.calibration.weights import Weights
from quant.checkpoint import Checkpoint
from quant.evaluation.divergence import Statistics, statistics
from quant.evaluation.streamed import compare_streamed
from quant.report.choice import Result

RESULTS = "check"
"""The name, among the passes of an output, of the last comparison."""


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
    passes: Passes = UNKEPT,
) -> tuple[Result, ...]:
    """The source and the candidates: perplexity, KL divergence, top-1 agreement.

    The second half of each sequence is scored. Calls progress(1) after each layer of each model.
    """

    def make() -> list[dict]:
        source = StreamedModel(checkpoint, device=device)
        reference = _final_states(source, tokens, passes, "check source", progress)
        states = []
        for i, c in enumerate(candidates):
            model = StreamedModel(checkpoint, c.weights, device=device)
            states.append(_final_states(model, tokens, passes, f"check {i}", progress))
        scores = compare_streamed(source, reference, states, tokens.ids, tokens.seq_len // 2)
        found = [statistics(each) for each in scores]
        nbytes = sum(2 * info.n_weights for info in checkpoint.tensors.values())
        rows = [_result(c, s) for c, s in zip(candidates, found, strict=True)]
        return [asdict(row) for row in (_source_result(nbytes, found[0]), *rows)]

    return tuple(Result(**row) for row in passes.once(RESULTS, make))


def _final_states(
    model: StreamedModel,
    tokens: Tokens,
    passes: Passes,
    name: str,
    progress: Callable[[int], None],
) -> HiddenStates:
    """The last layer's output, kept until all models have been compared."""
    walk = passes.begin(name, model.n_layers, until=RESULTS)
    hidden = model.embed(tokens.ids)
    walk.restore("hidden", hidden.tensor)
    if walk.n_done:
        progress(walk.n_done)
    for layer in model.layers(tokens.seq_len, n_done=walk.n_done):
        layer.run(hidden, hidden)
        walk.done({}, {"hidden": hidden.tensor})
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
