"""Two runners, or a runner and a stored reference, on the same windows of text."""

from collections.abc import Callable

from quant.display import printable
from quant.errors import BadInput
from quant.evaluation.chunks import Chunks
from quant.evaluation.divergence import Accumulator, Statistics, compare_logits
from quant.evaluation.runners import Runner


def compare(
    reference: Runner,
    candidate: Runner,
    chunks: Chunks,
    on_window: Callable[[int], object] = lambda n: None,
) -> Statistics:
    """Both models on every window, side by side in memory.

    on_window: called with 1 after each. Raises BadInput if their vocabularies differ.
    """
    check_vocabularies(reference, candidate)
    accumulator = Accumulator()
    both = zip(
        chunks.categories,
        chunks.targets,
        reference.logits(chunks.inputs, chunks.first),
        candidate.logits(chunks.inputs, chunks.first),
        strict=True,
    )
    for category, targets, p, q in both:
        accumulator.add(compare_logits(p, q, targets), category)
        on_window(1)
    return accumulator.statistics()


def check_vocabularies(reference: Runner, candidate: Runner) -> None:
    if reference.n_vocab != candidate.n_vocab:
        raise BadInput(
            f"{printable(candidate.name)} cannot be held against {printable(reference.name)}.",
            f"Its vocabulary has {candidate.n_vocab} tokens instead of {reference.n_vocab}.",
            "Compare models that were made from the same one.",
        )
