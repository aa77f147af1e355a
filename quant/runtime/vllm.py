"""vLLM: one command; what every request gets by default goes into the generation config.

# ref: https://docs.vllm.ai/en/stable/features/context_extension/
"""

import json
import shlex

from quant.errors import UsageError
from quant.runtime.llama_cpp import as_word, folded
from quant.runtime.run import Launch, Run

GENERATION_NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def launch(run: Run) -> Launch:
    """`vllm serve` with the profile; --hf-overrides where the context needs YaRN."""
    if run.is_gguf:
        raise UsageError(
            "vLLM runs checkpoints; a .gguf file is for llama.cpp and Ollama.",
            "",
            "Name the folder or the repository that the file was made from.",
        )
    settings = run.profile.settings()
    defaults = {t: settings[o] for o, t in GENERATION_NAMES.items() if o in settings}
    words = ["vllm", "serve", as_word(run.model)]
    if run.revision is not None:
        words += ["--revision", shlex.quote(run.revision)]
    words += ["--max-model-len", str(run.context)]
    words += ["--override-generation-config", shlex.quote(json.dumps(defaults))]
    recipe, notes = run.patient.recipe, []
    if recipe is not None and recipe.vllm_reasoning_parser:
        words += ["--reasoning-parser", recipe.vllm_reasoning_parser]
    if run.yarn is not None:
        words += ["--hf-overrides", shlex.quote(json.dumps(yarn_overrides(run)))]
        notes.append("vLLM's YaRN stretches every text, also short ones: leave it out for those.")
    per_request = {
        k: settings[k] for k in ("presence_penalty", "frequency_penalty") if k in settings
    }
    if per_request:
        notes.append(f"To be sent with each request: {json.dumps(per_request)}")
    lost = sorted(settings.keys() - GENERATION_NAMES.keys() - per_request.keys())
    if lost:
        notes.append(
            f"vLLM has a fixed order of samplers and nothing for: {', '.join(lost)}. What it has: "
            "penalties, then temperature, then min-p, top-k and top-p."
        )
    return Launch((folded(words),), {}, tuple(notes))


def yarn_overrides(run: Run) -> dict:
    """All four fields: with one missing, another default would be taken silently."""
    parameters = {
        "rope_type": "yarn",
        "factor": run.yarn.factor,
        "original_max_position_embeddings": run.yarn.original_context,
    }
    if run.theta is not None:
        parameters["rope_theta"] = run.theta
    reach = round(run.yarn.factor * run.yarn.original_context)
    return {"rope_parameters": parameters, "max_position_embeddings": reach}
