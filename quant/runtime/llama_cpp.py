"""llama.cpp: everything can be said on the command line.

--samplers, never --sampler-seq: the latter does not count as the user's choice, so a sequence in
the file would win over it.
# ref: common/arg.cpp, common_params_parser_init (llama.cpp of October 2026)
"""

import shlex

from quant.checkpoint import read_config
from quant.runtime.run import OWN, Launch, Run

FLAGS = {
    "temp": "--temp",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "xtc_probability": "--xtc-probability",
    "xtc_threshold": "--xtc-threshold",
    "penalty_repeat": "--repeat-penalty",
    "penalty_last_n": "--repeat-last-n",
    "presence_penalty": "--presence-penalty",
    "frequency_penalty": "--frequency-penalty",
    "dry_multiplier": "--dry-multiplier",
    "dry_allowed_length": "--dry-allowed-length",
    "dry_penalty_last_n": "--dry-penalty-last-n",
    "mirostat": "--mirostat",
    "mirostat_tau": "--mirostat-ent",
    "mirostat_eta": "--mirostat-lr",
}


def launch(run: Run) -> Launch:
    """llama-server with the profile, a reasoning budget, and YaRN where the context needs it."""
    gguf, notes = run.model, []
    commands = []
    if not run.is_gguf:
        gguf = f"{run.slug}-Q4_K_M.gguf"
        commands.append(to_gguf_command(run, gguf))
    words = ["llama-server", "-m", as_word(gguf), "--jinja", "-c", str(run.context), "-ngl", "99"]
    words += ["--samplers", shlex.quote(run.sequence)]
    settings = run.profile.settings()
    for name, flag in FLAGS.items():
        if name in settings:
            words += [flag, str(settings[name])]
    if run.patient.thinks:
        words += ["--reasoning-format", "deepseek"]
        words += ["--reasoning-budget", str(run.reasoning_budget)]
        notes.append(
            f"--reasoning-budget ends a thought after {run.reasoning_budget} tokens, and the model "
            "answers with what it has: the sure cure for an endless one."
        )
    if run.yarn is not None:
        words += ["--rope-scaling", "yarn", "--rope-scale", f"{run.yarn.factor:g}"]
        words += ["--yarn-orig-ctx", str(run.yarn.original_context)]
        notes.append("YaRN stretches every text alike; leave it out for short ones.")
    commands.append(folded(words))
    notes.append(
        "llama-cli takes the same options. -ngl 99: all layers on the GPU, if there is one."
    )
    return Launch(tuple(commands), {}, tuple(notes))


def to_gguf_command(run: Run, gguf: str) -> str:
    """The conversion that has to come first, with the profile's keys in the file.

    Raises BadInput for a folder that is quantized already.
    """
    read_config(run.patient.checkpoint.folder)
    model = run.model if run.revision is None else f"{run.model}@{run.revision}"
    words = ["qwq-quant", "to-gguf", as_word(model), "-o", as_word(gguf), "--type", "Q4_K_M"]
    if run.recipe_name is not None:
        words += ["--recipe", as_word(run.recipe_name)]
    if run.profile_name != OWN:
        words += ["--sampling", as_word(run.profile_name)]
    return " ".join(words)


def as_word(path: str) -> str:
    """A path for a command line: one that begins with a dash is no option."""
    return shlex.quote(f"./{path}" if path.startswith("-") else path)


def folded(words: list[str]) -> str:
    """One command in lines of at most 80 columns, options beside their values."""
    lines, line = [], ""
    for i, word in enumerate(words):
        begins = word.startswith("-") and not word[1:2].isdigit()
        pair = " ".join(words[i : i + 2]) if begins else word
        if begins and line and len(line) + len(pair) > 76:
            lines.append(line)
            line = "   "
        line += f" {word}" if line else word
    return " \\\n".join([*lines, line])
