"""Messages to prompts: a model's chat template, rendered where it can do no harm."""

from collections.abc import Mapping, Sequence

from quant.display import printable
from quant.doctor.sandbox import render
from quant.errors import BadInput

AT_ONCE = 100
"""Messages for one process of the sandbox, which has 3 seconds of processor time."""


def render_prompts(
    name: str, template: object, tokens: Mapping[str, str], messages: Sequence[str]
) -> list[str]:
    """Each message as the first of a chat; the messages themselves without a template.

    tokens: eos_token and the like, as templates name them. A template is a program that a stranger
    wrote: it runs in a process with limits. Raises BadInput if it fails, or does not end.
    """
    if not template:
        return list(messages)
    if not isinstance(template, str):
        raise _fails(name, "it is no text")
    prompts = []
    for start in range(0, len(messages), AT_ONCE):
        chats = [
            {
                **tokens,
                "messages": [{"role": "user", "content": message}],
                "add_generation_prompt": True,
            }
            for message in messages[start : start + AT_ONCE]
        ]
        for rendered in render(template, chats):
            if not rendered.text:
                raise _fails(name, rendered.problem or "it leaves nothing of a question")
            prompts.append(rendered.text)
    return prompts


def _fails(name: str, problem: str) -> BadInput:
    return BadInput(
        f"The chat template of {printable(name)} makes no prompts.",
        f"{printable(problem[:1].upper() + problem[1:])}.",
        "See what is wrong with it: qwq-quant doctor MODEL",
    )
