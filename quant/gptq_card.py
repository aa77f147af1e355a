"""README.md of a GPTQ folder: what it is, what it was calibrated on and lost, how to run it."""

from collections.abc import Sequence

from quant.calibration.tokens import Tokens
from quant.display import human_bytes, printable
from quant.formats.gptq import WHOLE_ROW
from quant.gptq_model import GptqPlan
from quant.model_card import (
    LOAD_WITH_TRANSFORMERS,
    MADE_WITH,
    escaped,
    front_matter,
    results_table,
)
from quant.report.choice import Result


def gptq_card(
    plan: GptqPlan,
    nbytes: int,
    tokens: Tokens,
    results: Sequence[Result],
    base_model: str | None,
) -> str:
    """Markdown with the hub's front matter. base_model: org/name, or None if it has none."""
    bits, size = plan.format.bits, plan.format.group_size
    name = printable(base_model or plan.checkpoint.folder.resolve().name).rpartition("/")[2]
    kind = "symmetric" if plan.format.symmetric else "asymmetric"
    groups = "a row" if size == WHOLE_ROW else f"{size} weights"
    lines = [
        *front_matter(plan.checkpoint, base_model, f"gptq, {bits}-bit"),
        f"# {escaped(name)}, GPTQ Int{bits}",
        "",
        f"{human_bytes(nbytes)}. The linear layers of the decoder are {bits}-bit {kind} integers, "
        f"a scale for each {groups}: {plan.bits_per_weight:.2f} bits per weight. Embeddings, norms "
        "and the output layer stay 16-bit.",
        "",
        f"Calibrated on {tokens.n_tokens} tokens of {escaped(printable(tokens.text_name))}, layer "
        "by layer, each on the outputs of the quantized layers before it.",
        "",
        *results_table(results),
        *LOAD_WITH_TRANSFORMERS,
        "transformers needs `pip install optimum gptqmodel` for it.",
        "",
        *(f"Note: {note}.\n" for note in plan.notes),
        MADE_WITH,
    ]
    return "\n".join(lines) + "\n"
