"""README.md of a 4-bit folder: what it is, how it was chosen, what it lost, how to run it.

# ref: https://huggingface.co/docs/hub/model-cards (base_model_relation)
"""

import json
import re
from collections.abc import Sequence

from quant import __version__
from quant.budget import Budget
from quant.calibration.tokens import Tokens
from quant.checkpoint import Checkpoint
from quant.display import human_bytes, printable
from quant.dynamic_4bit import Plan4bit
from quant.report.choice import Result
from quant.sensitivity import METRICS

_LICENSE = re.compile(r"^(license|license_name|license_link|language): *(.+)$", re.MULTILINE)

MADE_WITH = (
    f"Made with qwq-quant {__version__}; `qwq-quant.json` holds the command, versions and hashes."
)


LOAD_WITH_TRANSFORMERS = (
    "```python",
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    'model = AutoModelForCausalLM.from_pretrained("FOLDER", device_map="auto")',
    'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    "```",
    "",
)


def model_card(
    plan: Plan4bit,
    nbytes: int,
    results: Sequence[Result],
    base_model: str | None,
    tokens: Tokens | None = None,
) -> str:
    """Markdown with the hub's front matter.

    base_model: org/name, or None if it has none. tokens: that errors were fed back on.
    """
    n_kept, n = len(plan.kept), len(plan.groups)
    name = printable(base_model or plan.checkpoint.folder.resolve().name)
    title, tags = f"4-bit (bitsandbytes {plan.format.quant_type})", "bitsandbytes, 4-bit"
    if n_kept == n:
        title, tags = "16-bit copy", "safetensors"
    elif n_kept:
        title, tags = f"dynamic {title}", f"{tags}, dynamic-4bit"
    lines = [
        *front_matter(plan.checkpoint, base_model, tags),
        f"# {escaped(name.rpartition('/')[2])}, {title}",
        "",
        f"{human_bytes(nbytes)}. {n - n_kept} of {n} groups of linear layers are 4-bit; {n_kept} "
        "stay 16-bit, and so do embeddings, norms and the output layer.",
        "",
        *_how_chosen(plan),
        *([f"{plan.format_name}. {calibrated_on(tokens)}", ""] if plan.feedback else []),
        *results_table(results),
        *_use(plan),
        MADE_WITH,
    ]
    return "\n".join(lines) + "\n"


def calibrated_on(tokens: Tokens) -> str:
    """How error feedback came by its inputs."""
    return (
        f"Calibrated on {tokens.n_tokens} tokens of {escaped(printable(tokens.text_name))}, layer "
        "by layer, each on the outputs of the quantized layers before it."
    )


def escaped(text: str) -> str:
    """A name that cannot be taken for Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", text)


def front_matter(checkpoint: Checkpoint, base_model: str | None, tags: str) -> list[str]:
    """Strings as JSON, which is YAML: a name from a checkpoint cannot break out."""
    lines = ["---", "library_name: transformers"]
    if base_model:
        lines += [f"base_model: {json.dumps(base_model)}", "base_model_relation: quantized"]
    card = checkpoint.read_text("README.md") or ""
    if card.startswith("---\n"):
        head = card[4:].partition("\n---")[0]
        for key, value in _LICENSE.findall(head):
            if re.fullmatch(r"[\w.:/-]+", value):
                lines.append(f"{key}: {value}")
    return [*lines, f"tags: [{tags}, qwq-quant]", "---", ""]


def _how_chosen(plan: Plan4bit) -> list[str]:
    if plan.choice is None:
        return []
    s = plan.sensitivity
    text = "weights alone"
    if s.calibration:
        text = f"{s.calibration['n_tokens']} tokens of {escaped(printable(s.calibration['name']))}"
    metric = METRICS[plan.choice.metric]
    kept = [group.name for group in plan.groups if group.name in plan.kept]
    return [
        f"Chosen by `{metric.name}` ({metric.about}; measured on {text}) as {_optimum(plan)} "
        f"{_under(plan.budget)}. Kept in 16 bits:",
        "",
        *(f"- `{printable(name)}`" for name in kept),
        "",
        "All measurements are in `sensitivity.json`, drawn in `figures/report.html`.",
        "",
    ]


def _optimum(plan: Plan4bit) -> str:
    return "the exact optimum" if plan.solution.exact else "the best choice that was found"


def _under(budget: Budget) -> str:
    if budget.unit == "bits_per_weight":
        return f"under {budget} of the decoder's linears"
    return f"under a budget of {budget} over plain 4-bit"


def results_table(results: Sequence[Result]) -> list[str]:
    if not results:
        return []
    lines = [
        f"Against the source, on {results[0].n_tokens} tokens of held-out text:",
        "",
        "| model | weights | perplexity | KL divergence | same top token |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        kld = "" if r.kld is None else f"{r.kld:.5f} ± {r.kld_error:.5f}"
        same = "" if r.same_top is None else f"{100 * r.same_top:.2f} %"
        lines.append(
            f"| {r.name} | {human_bytes(r.nbytes)} | {r.perplexity:.3f} ± {r.perplexity_error:.3f} "
            f"| {kld} | {same} |"
        )
    return [*lines, ""]


def _use(plan: Plan4bit) -> list[str]:
    if all(not t.is_4bit for t in plan.tensors):
        return []
    return [
        *LOAD_WITH_TRANSFORMERS,
        "By its source code vLLM 0.7.3 to 0.27 loads it as it is, without tensor parallelism; from "
        "0.28 on with `pip install vllm-bnb-plugin`.",
        "",
    ]
