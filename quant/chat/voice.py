"""A model that can be talked with: its engine, its own template, and the room it has.

Everything that can be known from small files is settled first, so that a model that cannot chat is
told before 20 GB of weights are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quant.chat.spelling import OPEN
from quant.display import printable
from quant.doctor.opening import open_small
from quant.doctor.patient import THOUGHT, Patient
from quant.doctor.sandbox import render
from quant.errors import BadInput, Unavailable, UsageError
from quant.evaluation.loops import CLOSE
from quant.evaluation.runners import Runner, open_runner
from quant.hub import resolve
from quant.runtime.run import Run, settle

GREETING = "Hello"


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    said: str  # all that the model wrote, its thought with both tags

    @property
    def answer(self) -> str:
        """What stands behind the thought, cut as Qwen's template cuts it; "" if it never ended."""
        if CLOSE not in self.said and self.said.lstrip().startswith(OPEN):
            return ""
        return self.said.rpartition(CLOSE)[2].lstrip("\n")


@dataclass(frozen=True)
class Found:
    """A model on the disk whose small files allow a chat; its weights are not read yet."""

    path: Path
    name: str
    run: Run


def find_model(
    model: str,
    where: dict,
    recipe: str | None = None,
    profile: str | None = None,
    context: int | None = None,
) -> Found:
    """MODEL, with a template that renders. where: options of quant.hub.resolve.

    Raises one of quant.errors; UsageError for a context that its files do not allow.
    """
    found = resolve(model, **where)
    run = settle(open_small(found), model, recipe, profile, context)
    if run.yarn is not None:
        raise UsageError(
            f"--context {run.context} needs YaRN, which this model's files do not turn on.",
            "It would answer, but worse with every token behind those it was trained on.",
            f"Take up to {run.yarn.original_context}, or stretch it: qwq-quant fix MODEL "
            "-o LONG --yarn 4 (for a .gguf file: to-gguf --rope-scaling yarn)",
        )
    _check_template(run.patient)
    name = found.name if found.revision else found.path.resolve().name
    return Found(found.path, name, run)


def _check_template(patient: Patient) -> None:
    """Raise BadInput unless there is a template that makes a prompt of a question."""
    if patient.template is None:
        how = (
            "to-gguf FILE -o NEW --chat-template TEMPLATE.jinja"
            if patient.container == "gguf"
            else "fix MODEL -o NEW --apply template-missing"
        )
        raise BadInput(
            f"{printable(patient.name)} has no chat template, so it is not known how to ask it.",
            "A base model has none: it goes on with a text, and cannot be chatted with.",
            f"If it was trained for chats, give it one: qwq-quant {how}",
        )
    if patient.talk.tail is None:
        problem = patient.talk.prompt.problem or "It leaves the question out."
        raise BadInput(
            f"The chat template of {printable(patient.name)} makes no prompt of a question.",
            printable(problem),
            "See what is wrong with it: qwq-quant doctor MODEL",
        )


class Voice:
    """A loaded model, and what its prompts are made of.

    context: tokens that history, question and answer may have together.
    """

    def __init__(self, found: Found, runner: Runner):
        patient = found.run.patient
        self.name, self.context, self.runner = found.name, found.run.context, runner
        self.opens_think = patient.talk.opens_think
        self._template = patient.template
        self._tokens = {f"{kind}_token": text for kind, text in patient.named.items()}
        self._cuts_thoughts = THOUGHT not in (patient.talk.history.text or THOUGHT)

    def prompt(self, turns: Sequence[Turn], question: str) -> np.ndarray:
        """Token ids int32 (n,) of the conversation so far and a question.

        The template is given earlier answers whole if it cuts their thoughts out itself, as QwQ's
        does, else without. Raises BadInput for what it makes no prompt of.
        """
        messages = []
        for turn in turns:
            said = turn.said if self._cuts_thoughts else turn.answer
            messages += [_message("user", turn.question), _message("assistant", said)]
        messages.append(_message("user", question))
        variables = {**self._tokens, "messages": messages, "add_generation_prompt": True}
        rendered = render(self._template, [variables])[0]
        if not rendered.text:
            raise BadInput(
                f"The chat template of {printable(self.name)} makes no prompt of this.",
                printable(rendered.problem or "It leaves nothing of it."),
            )
        ids = self.runner.tokenize(rendered.text, special=True)
        if self.runner.bos is not None and ids[:1].tolist() != [self.runner.bos]:
            ids = np.concatenate([np.array([self.runner.bos], np.int32), ids])
        return ids

    def turn(self, question: str, text: str) -> Turn:
        """What was asked and what came."""
        return Turn(question, f"{OPEN}\n{text}" if self.opens_think else text)


def _message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def load(found: Found) -> Voice:
    """The model in memory, and one prompt read: what cannot run is told before the first question.

    Raises BadInput or Unavailable.
    """
    voice = Voice(found, open_runner(found.path))
    prompt = voice.prompt([], GREETING)
    spelled = voice.runner.text(prompt.tolist())
    if GREETING not in spelled:  # a tokenizer.json without its words
        raise BadInput(
            f"The tokenizer of {printable(found.name)} loses what it is given.",
            f'The prompt of "{GREETING}" comes out as {printable(repr(spelled), 80)}.',
            "Files of it, such as tokenizer.json, may be missing: see qwq-quant doctor MODEL",
        )
    try:
        voice.runner.begin(prompt, voice.context)
    except Unavailable as error:
        raise Unavailable(
            f"{printable(found.name)} does not fit in memory as it is.",
            "It could be run layer by layer, but each token would need all of it from the disk.",
            "Make it smaller, for example: qwq-quant to-gguf MODEL -o . --type Q4_K_M",
        ) from error
    return voice
