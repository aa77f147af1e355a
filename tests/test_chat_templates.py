"""Chat templates: the files that count, as in transformers, and the names that llama.cpp reads."""

import json
from pathlib import Path

import llama_oracle
import pytest
from tokenizer_makers import make_byte_level, write_gguf
from transformers import AutoTokenizer
from vocabulary_helpers import checkpoint, edit, read

from quant.errors import BadInput
from quant.gguf_file import Value
from quant.vocabulary.chat_templates import read_chat_templates

NAMED = [{"name": "default", "template": "D"}, {"name": "tool use", "template": "T"}]

TEMPLATES = {
    "none": ({}, {}),
    "text in the config": ({"tokenizer_config.json": "C"}, {"default": "C"}),
    "a list in the config": ({"tokenizer_config.json": NAMED}, {"default": "D", "tool use": "T"}),
    "a file before the config": (
        {"tokenizer_config.json": NAMED, "chat_template.jinja": "J"},
        {"default": "J"},
    ),
    "further files": (
        {
            "tokenizer_config.json": "C",
            "chat_template.jinja": "J",
            "additional_chat_templates/rag.jinja": "R",
        },
        {"default": "J", "rag": "R"},
    ),
    "further files alone": (
        {"tokenizer_config.json": "C", "additional_chat_templates/rag.jinja": "R"},
        {"rag": "R"},
    ),
}


def write_templates(folder: Path, files: dict) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if name == "tokenizer_config.json":
            edit(folder, name, lambda config, content=content: config.update(chat_template=content))
        elif name.endswith(".json"):
            path.write_text(json.dumps({"chat_template": content}), "utf-8")
        else:
            path.write_text(content, "utf-8")


@pytest.mark.parametrize(("files", "expected"), TEMPLATES.values(), ids=TEMPLATES)
def test_chat_templates_have_the_precedence_of_transformers(tmp_path, files, expected):
    make_byte_level("gpt-2", tmp_path)
    write_templates(tmp_path, files)
    assert read_chat_templates(checkpoint(tmp_path)) == expected
    theirs = AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert expected == ({"default": theirs} if isinstance(theirs, str) else theirs or {})


def test_a_processors_template_counts_where_there_is_no_other(tmp_path):
    make_byte_level("gpt-2", tmp_path)
    write_templates(tmp_path, {"chat_template.json": "P"})
    assert read_chat_templates(checkpoint(tmp_path)) == {"default": "P"}
    write_templates(tmp_path, {"tokenizer_config.json": "C"})
    assert read_chat_templates(checkpoint(tmp_path)) == {"default": "C"}


@pytest.mark.parametrize("value", [7, ["a"], [{"name": "default"}], [{"name": "a", "template": 1}]])
def test_a_chat_template_that_is_none_is_refused(tmp_path, value):
    make_byte_level("gpt-2", tmp_path)
    write_templates(tmp_path, {"tokenizer_config.json": value})
    with pytest.raises(BadInput, match=r"chat_template in tokenizer_config\.json"):
        read_chat_templates(checkpoint(tmp_path))


def test_templates_reach_llama_cpp_under_gguf_pys_names(tmp_path):
    n_tokens = make_byte_level("gpt-2", tmp_path)
    named = [*NAMED, {"name": "tool_use", "template": "U é"}]
    write_templates(tmp_path, {"tokenizer_config.json": named})
    vocabulary = read(tmp_path, n_tokens)
    path = write_gguf(vocabulary, tmp_path / "v.gguf")
    assert llama_oracle.chat_template(path) == "D"
    assert llama_oracle.chat_template(path, "tool_use") == "U é"
    metadata = vocabulary.metadata()
    assert metadata["tokenizer.chat_templates"] == Value("arr[str]", ["tool_use"])
