"""Ollama: a Modelfile, and the `params` and `template` files that `ollama run hf.co/...` reads.

Grammar: one instruction a line, a value with line breaks between triple quotes, # for comments.
Ollama's own parser, CreateRequest, template.Parse and thinking.InferTags (its Go packages of August
2026, run on their own) took every shipped profile's Modelfile. `ollama create` itself was not run.
# ref: https://docs.ollama.com/modelfile; ollama, parser/parser.go, commit fb30760
"""

import json
import os
import textwrap
from pathlib import Path

from quant.display import printable
from quant.doctor.patient import QUESTION
from quant.runtime.llama_cpp import as_word, to_gguf_command
from quant.runtime.ollama_templates import go_template
from quant.runtime.run import Launch, Run

REQUIRES = "0.14.0"
"""The version that Ollama's documentation of REQUIRES names; older ones do not know the word."""

PARAMETERS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repeat_penalty",
    "penalty_last_n": "repeat_last_n",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
"""Our setting -> Ollama's PARAMETER. The last two are in its api/types.go, not in its manual."""


def launch(run: Run) -> Launch:
    """`ollama create` with a Modelfile that leaves nothing to a default."""
    gguf = run.model if run.is_gguf else f"{run.slug}-Q4_K_M.gguf"
    commands = [] if run.is_gguf else [to_gguf_command(run, gguf)]
    modelfile = as_word(str(run.folder / "Modelfile"))
    commands += [f"ollama create {run.slug} -f {modelfile}", f"ollama run {run.slug}"]
    parameters, notes = _parameters(run), _notes(run)
    opener = run.patient.talk.opener if run.patient.template is not None else None
    opens = run.patient.template is not None and run.patient.talk.opens_think
    template = go_template(opener or "", run.patient.thinks, opens)
    files = {"Modelfile": _modelfile(run, gguf, template, parameters, notes)}
    files["params"] = json.dumps(parameters, indent=2, ensure_ascii=False) + "\n"
    if template is not None:
        files["template"] = template
    else:
        notes.append(
            "The chat template has a form of its own, so no TEMPLATE is written: see whether "
            "Ollama recognised it (ollama show --template)."
        )
    return Launch(tuple(commands), files, tuple(notes))


def _parameters(run: Run) -> dict:
    """Every PARAMETER that the run settles, under Ollama's names; an integer stays one."""
    settings = run.profile.settings()
    found: dict = {"num_ctx": run.context, "num_predict": run.context}
    found |= {theirs: settings[ours] for ours, theirs in PARAMETERS.items() if ours in settings}
    found.setdefault("repeat_penalty", 1.0)  # 1.1 was the default until August 2026
    found.setdefault("min_p", 0.0)
    if stops := _stops(run):
        found["stop"] = stops
    return found


def _stops(run: Run) -> list[str]:
    """The marks of turns, but for bos and the tags of thoughts and tools, which answers hold."""
    text = (run.patient.talk.history.text or "") if run.patient.template is not None else ""
    bos = run.patient.named.get("bos")
    found = [
        mark
        for mark in run.patient.special_texts
        if mark in text and mark != bos and mark.startswith("<") and mark.endswith(("|>", "｜>"))
    ]
    return sorted(mark for mark in found if mark.isprintable() and '"' not in mark)


def _modelfile(
    run: Run, gguf: str, template: str | None, parameters: dict, notes: list[str]
) -> str:
    lines = [f"# {run.slug}, profile {printable(run.profile_name)}. Made by qwq-quant runtime."]
    lines += [f"# {line}" for note in notes for line in _wrapped(note)]
    lines += [f"FROM {_from(gguf, run.folder)}", f"REQUIRES {REQUIRES}", ""]
    if template is not None:
        lines += [f'TEMPLATE """{template}"""', ""]
    system = default_system(run)
    if system is not None:
        lines += [f'SYSTEM """{system}"""', ""]
    for name, value in parameters.items():
        values = [f'"{stop}"' for stop in value] if name == "stop" else [str(value)]
        lines += [f"PARAMETER {name} {text}" for text in values]
    return "\n".join(lines) + "\n"


def _from(gguf: str, folder: Path) -> str:
    """A path that Ollama takes for a file: absolute, or from the Modelfile's folder on."""
    path = Path(gguf)
    text = str(path) if path.is_absolute() else f"./{os.path.relpath(path, folder)}"
    return text if text == text.strip() else f'"{text}"'


def default_system(run: Run) -> str | None:
    """The system message that the Jinja template adds by itself, as Qwen2.5's does."""
    text = run.patient.talk.prompt.text if run.patient.template is not None else None
    before = (text or "").partition(QUESTION)[0]
    _, found, rest = before.partition("<|im_start|>system\n")
    system, ended, _ = rest.partition("<|im_end|>")
    # The text is a stranger's: not with quotes that would end it early, or odd characters.
    fine = system.replace("\n", "").isprintable() and '"""' not in system
    return system if found and ended and system.strip() and fine else None


def _notes(run: Run) -> list[str]:
    notes = [
        "The order of samplers has no PARAMETER: releases that run llama.cpp's server take it from "
        "the file (general.sampling.sequence), older ones have a fixed order.",
    ]
    lost = sorted(run.profile.settings().keys() - PARAMETERS.keys() - {"sequence"})
    if lost:
        notes.append(f"Ollama has no PARAMETER for {', '.join(lost)}: without effect here.")
    if run.patient.thinks:
        notes.append(
            "Ollama has no reasoning budget; num_predict ends thought and answer together."
        )
    if run.yarn is not None:
        notes.append(
            "Ollama cannot turn YaRN on: write it into the file with to-gguf --rope-scaling yarn "
            f"--rope-factor {run.yarn.factor:g} --rope-original-context "
            f"{run.yarn.original_context}."
        )
    return notes


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 76, break_on_hyphens=False)
