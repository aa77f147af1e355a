"""The chat template: what it makes of four small conversations, rendered in a child process."""

from collections.abc import Iterator

from quant.doctor.finding import CHECKPOINT, ERROR, GGUF, NOTE, WARNING, Check, Seen
from quant.doctor.patient import THOUGHT_FIELDS, Patient
from quant.errors import BadRecipe

CHATML = (
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' and message.content is string %}"
    "{{- '<|im_start|>assistant\\n' + message.content.split('</think>')[-1].lstrip('\\n') "
    "+ '<|im_end|>\\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""ChatML, the plain form that Qwen and many others were trained on: no tools, no default system."""

CHATML_THINKS = CHATML.replace(
    "assistant\\n' }}{%- endif %}", "assistant\\n<think>\\n' }}{%- endif %}"
)

_HAS_THOUGHT = " or ".join(
    ("'</think>' in message.content", *(f"message.{field}" for field in THOUGHT_FIELDS))
)
WITHOUT_THOUGHTS = (
    "{%- set ns = namespace(said=[], last=-1) %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' and loop.index0 < ns.last and message.content is string "
    f"and ({_HAS_THOUGHT}) %}}"
    "{%- set answer = message.content.split('</think>')[-1].lstrip('\\n') %}"
    "{%- if message.tool_calls %}"
    "{%- set ns.said = ns.said + "
    "[{'role': 'assistant', 'content': answer, 'tool_calls': message.tool_calls}] %}"
    "{%- else %}"
    "{%- set ns.said = ns.said + [{'role': 'assistant', 'content': answer}] %}"
    "{%- endif %}"
    "{%- else %}{%- set ns.said = ns.said + [message] %}{%- endif %}"
    "{%- endfor %}"
    "{%- set messages = ns.said %}"
)
"""Put before a template: it then sees the answers before the last question without their thoughts.

What was thought since then stays: between calls of tools it is needed.
"""


def missing(patient: Patient) -> Iterator[Seen]:
    if patient.template is None:
        found = ", ".join(sorted(patient.templates)) or "none"
        yield Seen(
            "There is no chat template.", patient.template_place, f"templates found: {found}"
        )


def unsafe(patient: Patient) -> Iterator[Seen]:
    for rendered in _renders(patient):
        if rendered.unsafe or rendered.insides:
            stopped = f"{rendered.problem} It was stopped by the sandbox."
            hidden = f"it names {rendered.insides}, where a plain conversation does not lead"
            yield Seen(
                "The chat template reaches for the insides of Python.",
                patient.template_place,
                stopped if rendered.unsafe else hidden,
            )
            return


def fails(patient: Patient) -> Iterator[Seen]:
    """Only a plain question is demanded of every template; some refuse other conversations."""
    for rendered in _renders(patient)[:2]:
        if rendered.problem and not rendered.unsafe:
            yield Seen(
                "The chat template makes no prompt of a plain question.",
                patient.template_place,
                rendered.problem,
            )
            return


def _renders(patient: Patient) -> list:
    if patient.template is None:
        return []
    return [patient.talk.bare, patient.talk.prompt, patient.talk.history]


def write_chatml(repair, patient: Patient) -> None:
    if not {"<|im_start|>", "<|im_end|>"} <= patient.ids.keys():
        raise BadRecipe(
            "A chat template cannot be made up for this model.",
            "Its vocabulary has no <|im_start|> and <|im_end|>, so it was trained on another form.",
            "Take the template of the model that it was made from.",
        )
    repair.template = CHATML_THINKS if patient.thinks else CHATML


def no_prompt(patient: Patient) -> Iterator[Seen]:
    if patient.template is None:
        return
    opener, tail = patient.talk.opener, patient.talk.tail
    if opener and tail is not None and not patient.talk.opens_answer:
        yield Seen(
            "With add_generation_prompt the prompt does not open the assistant's turn.",
            patient.template_place,
            f"it ends {tail[-60:]!r}; answers in its own history begin after {opener[-60:]!r}",
        )


def add_prompt(repair, patient: Patient) -> None:
    """Append what stands before an answer in the history and is missing from the prompt."""
    opener, tail = patient.talk.opener, patient.talk.tail
    shared = next(n for n in range(len(opener), -1, -1) if tail.endswith(opener[:n]))
    text = opener[shared:].replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    addition = f"{{%- if add_generation_prompt %}}{{{{- '{text}' }}}}{{%- endif %}}"
    mended = (patient.template or "").rstrip("\n") + addition
    repair.take_template(
        mended, lambda t: t.tail is not None and t.tail.startswith(opener.rstrip())
    )


def keeps_thoughts(patient: Patient) -> Iterator[Seen]:
    if patient.template is None or not patient.thinks:
        return
    kept = patient.talk.kept_thought(patient.template)
    if kept is not None:
        yield Seen(
            "Thoughts of earlier answers stay in the prompt.",
            patient.template_place,
            f"the second question's prompt still holds {kept[-80:]!r}",
        )


def drop_thoughts(repair, patient: Patient) -> None:
    mended = WITHOUT_THOUGHTS + (patient.template or "")
    repair.take_template(
        mended, lambda talk: bool(talk.history.text) and talk.kept_thought(mended) is None
    )


def forces_think(patient: Patient) -> Iterator[Seen]:
    if patient.template is not None and patient.talk.opens_think:
        yield Seen(
            "The prompt itself opens <think>, so answers lack the opening tag.",
            patient.template_place,
            f"it ends {(patient.talk.tail or '')[-40:]!r}",
        )


def strip_think(repair, patient: Patient) -> None:
    """Take the tag out of the generation prompt; the model then has to open it by itself."""
    text = patient.template or ""
    head, mark, tail = text.rpartition("add_generation_prompt")
    for spelled in ("<think>\\n", "<think>\n", "<think>"):
        mended = head + mark + tail.replace(spelled, "", 1)
        if spelled in tail:
            repair.take_template(mended, lambda talk: bool(talk.tail) and not talk.opens_think)
            return
    raise BadRecipe(
        "The <think> of the chat template could not be taken out.",
        "It does not stand behind the last add_generation_prompt.",
        "Edit the template by hand.",
    )


BOTH = (CHECKPOINT, GGUF)
IN_GGUF = "For a .gguf file: to-gguf FILE -o NEW --chat-template TEMPLATE.jinja."

CHECKS = (
    Check(
        "template-missing", WARNING, BOTH, "there is a chat template", missing,
        "Chat programs then guess a form of prompt, mostly ChatML or Llama 2's. With another form "
        "than the trained one a model answers badly or does not stop. A base model needs none.",
        f"fix writes ChatML where the vocabulary has its tokens. {IN_GGUF}",
        write_chatml,
    ),
    Check(
        "template-unsafe", ERROR, BOTH, "the chat template stays in its sandbox", unsafe,
        "A program that renders it without a sandbox runs whatever it says with the user's rights "
        "(CVE-2024-34359, CVE-2026-5760). No honest template does this.",
        f"fix writes ChatML instead. Do not trust the rest of this model either. {IN_GGUF}",
        write_chatml,
    ),
    Check(
        "template-fails", ERROR, BOTH, "the chat template renders a plain question", fails,
        "Every chat with this model ends in an error, or hangs the server.",
        f"fix writes ChatML instead, where the vocabulary has its tokens. {IN_GGUF}",
        write_chatml,
    ),
    Check(
        "template-no-prompt", WARNING, BOTH, "the prompt opens the assistant's turn", no_prompt,
        "The model is left to guess whose turn it is: it goes on with the user's words, or writes "
        "the opening of a turn into its answer.",
        f"fix appends the opening that the template itself puts before answers. {IN_GGUF}",
        add_prompt,
    ),
    Check(
        "template-keeps-thoughts", WARNING, BOTH, "old thoughts are dropped", keeps_thoughts,
        "Each turn adds thousands of tokens of stale thought; the context fills up, and models "
        "that were trained without them drift and repeat. Qwen and DeepSeek ask to leave them out.",
        f"fix puts lines before the template that take the thoughts out. {IN_GGUF}",
        drop_thoughts,
    ),
    Check(
        "template-opens-think", NOTE, BOTH, "who opens <think>", forces_think,
        "It makes sure that the model thinks. But a program that splits thought from answer at "
        "<think> finds none, and shows the thought as the answer, or nothing.",
        "Only a note: QwQ's makers meant it so. Programs can be told: llama.cpp --jinja "
        "--reasoning-format deepseek, vLLM --reasoning-parser deepseek_r1. fix --template-think "
        "strip takes the tag out; the model may then answer without thinking.",
        strip_think, opinion=True,
    ),
)  # fmt: skip
