"""README.md of a GPTQ folder: what it is, what it was calibrated on and lost, how to run it."""

from collections.abc import Sequence

from quant.calibration.tokens import Tokens
from quant.display import human_bytes, printable
from quant.formats.gptq import WHOLE_ROW
from quant.gptq_model import METRIC, GptqPlan
from quant.model_card import (
    LOAD_WITH_TRANSFORMERS,
    MADE_WITH,
    calibrated_on,
    escaped,
    front_matter,
    results_table,
)
from quant.report.choice import Result
from quant.sensitivity import METRICS


def gptq_card(
    plan: GptqPlan,
    nbytes: int,
    tokens: Tokens,
    results: Sequence[Result],
    base_model: str | None,
) -> str:
    """Markdown with the hub's front matter. base_model: org/name, or None if it has none."""
    name = printable(base_model or plan.checkpoint.folder.resolve().name).rpartition("/")[2]
    lines = [
        *front_matter(plan.checkpoint, base_model, _tags(plan)),
        f"# {escaped(name)}, {_title(plan)}",
        "",
        f"{human_bytes(nbytes)}, {plan.bits_per_weight:.2f} bits per weight of the decoder's "
        "linear layers. Embeddings, norms and the output layer are 16-bit.",
        "",
        *_about_integers(plan, tokens),
        *_how_chosen(plan),
        *results_table(results),
        *_use(plan),
        *(f"Note: {note}.\n" for note in plan.notes),
        MADE_WITH,
    ]
    return "\n".join(lines) + "\n"


def _tags(plan: GptqPlan) -> str:
    return f"gptq, {plan.fewest_bits}-bit" if plan.quantized else "16-bit"


def _title(plan: GptqPlan) -> str:
    if not plan.quantized:
        return "16-bit copy"
    return f"GPTQ Int{plan.fewest_bits}" + (", mixed precision" if plan.is_mixed else "")


def _about_integers(plan: GptqPlan, tokens: Tokens) -> list[str]:
    if not plan.quantized:
        return []
    bits, size = plan.fewest_bits, plan.format.group_size
    kind = "symmetric" if plan.format.symmetric else "asymmetric"
    groups = "a row" if size == WHOLE_ROW else f"{size} weights"
    which = "All linear layers but those below" if plan.is_mixed else "The linear layers"
    return [
        f"{which} are {bits}-bit {kind} integers, a scale for each {groups}. "
        f"{calibrated_on(tokens)}",
        "",
    ]


def _how_chosen(plan: GptqPlan) -> list[str]:
    if plan.choice is None:
        return []
    metric = METRICS[METRIC]
    return [
        f"More bits went where they are worth most, by `{metric.name}` ({metric.about}; measured "
        "on the same text), as the exact optimum under a budget of "
        f"{plan.budget} over {plan.format.bits} bits for all:",
        "",
        *(f"- `{printable(name)}`: {bits}-bit" for name, bits in plan.bits.items()),
        "",
    ]


def _use(plan: GptqPlan) -> list[str]:
    if not plan.quantized:
        return list(LOAD_WITH_TRANSFORMERS)
    if plan.mixes_integers:
        return [
            "```python",
            "from gptqmodel import GPTQModel  # pip install gptqmodel",
            'model = GPTQModel.load("FOLDER")',
            "```",
            "",
        ]
    return [
        *LOAD_WITH_TRANSFORMERS,
        "transformers needs `pip install optimum gptqmodel` for it.",
        "",
    ]
