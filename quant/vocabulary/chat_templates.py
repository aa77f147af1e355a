"""Chat templates: the Jinja programs that turn messages into a prompt. Read as text, never run.

A checkpoint has one "default" and may have others by name, for tools or for retrieval. They came to
lie in three kinds of files over the years, and which of them counts is transformers' to say.
"""

from quant.errors import BadInput


def read_chat_templates(checkpoint) -> dict[str, str]:
    """Name -> Jinja text of every chat template; "default" is the one chat uses. Never rendered.

    As in transformers 5: template files, if there is any, replace what tokenizer_config.json holds.
    chat_template.json, a processor's file, counts only where there is nothing else.

    # ref: transformers, tokenization_utils_base.py, PreTrainedTokenizerBase._from_pretrained
    """
    files = {"default": "chat_template.jinja"}
    folder = checkpoint.folder / "additional_chat_templates"
    for path in sorted(folder.glob("*.jinja")):
        files[path.stem] = f"additional_chat_templates/{path.name}"
    texts = {name: checkpoint.read_text(file_name) for name, file_name in files.items()}
    found = {name: text for name, text in texts.items() if text is not None}
    for file_name in ("tokenizer_config.json", "chat_template.json"):
        if not found:
            content = checkpoint.read_json(file_name) or {}
            found = _templates_in(content.get("chat_template"), file_name)
    return found


def _templates_in(value: object, file_name: str) -> dict[str, str]:
    """A `chat_template` entry: one text, or a list of {"name": ..., "template": ...}."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        templates = {str(entry["name"]): entry["template"] for entry in value}
    except (TypeError, KeyError):
        templates = {"": None}
    if not all(isinstance(text, str) for text in templates.values()):
        raise BadInput(
            f"chat_template in {file_name} cannot be read.",
            "It is neither one text nor a list of names with templates.",
            f"Mend or delete that entry of {file_name}.",
        )
    return templates
