"""Chat templates are programs of strangers: they run in a sandbox, and cannot hang `evaluate`."""

import json
import shutil
from pathlib import Path

import pytest
from evaluation_helpers import to_gguf

from quant.errors import BadInput
from quant.evaluation.prompts import AT_ONCE, render_prompts
from quant.evaluation.runners import open_runner

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def with_template(source: Path, output: Path, template: str) -> Path:
    shutil.copytree(source, output)
    config = json.loads((output / "tokenizer_config.json").read_text())
    (output / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return output


def test_many_messages_and_the_tokens_of_the_model():
    template = "{{ bos_token }}{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
    messages = [f"question {i}" for i in range(AT_ONCE + 3)]
    found = render_prompts("m", template, {"bos_token": "<s>"}, messages)
    assert found == [f"<s>{message}>" for message in messages]


def test_without_a_template_a_message_is_its_prompt():
    assert render_prompts("m", None, {}, ["a"]) == render_prompts("m", "", {}, ["a"]) == ["a"]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (ENDLESS, "processor time"),
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ raise_exception('no') }}", "no"),
        ("{% for", "TemplateSyntaxError"),
        ("{# nothing #}", "leaves nothing"),
        (7, "no text"),
    ],
    ids=["endless", "memory", "unsafe", "raises", "syntax", "empty", "number"],
)
def test_what_fails_is_named_with_its_reason(template, why):
    with pytest.raises(BadInput, match="template of m makes no prompts") as caught:
        render_prompts("m", template, {}, ["a"])
    assert why.lower() in caught.value.why.lower()


def test_both_engines_use_it(tiny_qwq, tmp_path):
    folder = with_template(tiny_qwq, tmp_path / "m", "{{ 'a' * 10**10 }}")
    for path in (folder, to_gguf(folder, "Q8_0", tmp_path / "m.gguf")):
        with open_runner(path) as runner, pytest.raises(BadInput, match="512 MiB"):
            runner.prompts(["a"])
