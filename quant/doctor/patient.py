"""An opened model and what the checks ask of it: small files read once, prompts rendered once."""

import re
from dataclasses import dataclass
from functools import cached_property

from quant.checkpoint import Checkpoint
from quant.doctor.finding import CHECKPOINT, GGUF
from quant.doctor.sandbox import Rendered, render
from quant.gguf_file import GgufFile, Metadata
from quant.inspection.conversation import SPECIAL
from quant.inspection.facts import as_object, text_at
from quant.inspection.tensor_kinds import vocabulary_rows
from quant.metadata_keys import expected
from quant.recipe import Chosen, Recipe
from quant.source import Source
from quant.vocabulary.added_tokens import AddedToken, place_added, read_added_tokens
from quant.vocabulary.byte_level import is_byte_level, read_byte_level
from quant.vocabulary.chat_templates import read_chat_templates
from quant.vocabulary.draft import CONTROL, USER_DEFINED
from quant.vocabulary.sentencepiece import read_sentencepiece
from quant.vocabulary.special_tokens import END_TEXTS, read_named_tokens

SETTINGS, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"

SYSTEM, QUESTION, THOUGHT, ANSWER = "Zsystem0", "Zquestion1", "Zthought2", "Zanswer3"
"""Words that no template holds, to be found again in a prompt."""

THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""What a message calls its thought, where a server has parted it from the answer."""


PACKED = ("U8", "I8", "I32", "U32")
"""Types that quantized weights of a checkpoint are packed in, in shapes of their own."""


@dataclass(frozen=True)
class Talk:
    """What a template makes of four conversations."""

    bare: Rendered  # a question
    prompt: Rendered  # a question, with the generation prompt
    history: Rendered  # a question, an answer with its thought, a question; generation prompt
    apart: Rendered  # the same, the thought in fields of its own and not in the answer

    @property
    def opener(self) -> str | None:
        """What stands between a question and its answer: "...<|im_start|>assistant\\n"."""
        text = self.history.text
        if text is None or QUESTION not in text or ANSWER not in text:
            return None
        between = text.partition(QUESTION)[2].partition(ANSWER)[0]
        return between.partition(THOUGHT)[0].partition("<think>")[0]

    @property
    def tail(self) -> str | None:
        """What the generation prompt ends with, from the question on."""
        return _behind_question(self.prompt)

    @property
    def opens_answer(self) -> bool:
        """Whether the prompt goes on, behind the user's turn, as answers in the history begin.

        Not always as far: gpt-oss and GLM leave channel and thought to the model.
        """
        opener, tail = self.opener or "", self.tail or ""
        turn_end = _n_shared(_behind_question(self.bare) or "", opener)
        return tail.startswith(opener.rstrip()) or _n_shared(tail, opener) > turn_end

    def kept_thought(self, template: str) -> str | None:
        """What stands before the old answer, if its thought still does.

        A template that reads thoughts from a field of the message is given them there.
        """
        field = rf"\b({'|'.join(THOUGHT_FIELDS)})\b"
        rendered = self.apart if re.search(field, template) else self.history
        before = (rendered.text or "").partition(QUESTION)[2].partition(ANSWER)[0]
        return before if THOUGHT in before else None

    @property
    def opens_think(self) -> bool:
        """Whether the answer begins inside a thought whose opening tag is in the prompt."""
        tail = self.tail or ""
        return tail.rfind("<think>") > tail.rfind("</think>")


def _behind_question(rendered: Rendered) -> str | None:
    text = rendered.text
    return None if text is None or QUESTION not in text else text.rpartition(QUESTION)[2]


def _n_shared(a: str, b: str) -> int:
    """Characters that both begin with."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(a), len(b)))


class Patient:
    """A model under examination. What cannot be read raises BadInput, for one check to tell."""

    def __init__(self, source: Source, chosen: Chosen | None = None):
        self.source = source
        self.chosen = chosen
        self.container = GGUF if isinstance(source, GgufFile) else CHECKPOINT

    @property
    def name(self) -> str:
        return str(self.source.path) if isinstance(self.source, GgufFile) else self.source.name

    @property
    def recipe(self) -> Recipe | None:
        return self.chosen.recipe if self.chosen else None

    # --- small files ---

    @property
    def checkpoint(self) -> Checkpoint:
        assert isinstance(self.source, Checkpoint)
        return self.source

    @cached_property
    def metadata(self) -> Metadata:
        """A GGUF file's keys but those of a type that no reader takes; gguf-metadata tells them."""
        if not isinstance(self.source, GgufFile):
            return {}
        arch = text_at(self.source.metadata, "general.architecture") or ""
        known = {key: expected(key, arch) for key in self.source.metadata}
        return {
            key: value
            for key, value in self.source.metadata.items()
            if known[key] is None or value.type in known[key].types
        }

    @cached_property
    def config(self) -> dict:
        """config.json; of a model that also sees, its text half is laid over it."""
        config = self.checkpoint.config
        return {**config, **as_object(config.get("text_config"))}

    @cached_property
    def generation(self) -> dict | None:
        return self.checkpoint.read_json(GENERATION)

    @cached_property
    def tokenizer_config(self) -> dict:
        return self.checkpoint.read_json(TOKENIZER) or {}

    @cached_property
    def tokenizer(self) -> dict | None:
        return self.checkpoint.read_json("tokenizer.json")

    # --- tokens ---

    @cached_property
    def n_rows(self) -> int | None:
        """Rows of the token embedding; None where a quantized one does not show them."""
        plain = (info for info in self.source.tensors.values() if info.dtype not in PACKED)
        return vocabulary_rows(plain)

    @cached_property
    def added(self) -> list[AddedToken]:
        return read_added_tokens(self.checkpoint, self.tokenizer, self.tokenizer_config)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Text -> id of every token."""
        if self.container == GGUF:
            return {text: i for i, text in enumerate(self._tokens)}
        if self.tokenizer is not None and is_byte_level(self.tokenizer):
            draft = read_byte_level(self.tokenizer, "default")
        else:
            draft = read_sentencepiece(self.checkpoint, self.tokenizer, self.tokenizer_config)
        draft.named |= self.named
        place_added(draft, self.added)
        return draft.ids

    @cached_property
    def texts(self) -> dict[int, str]:
        return {token: text for text, token in self.ids.items()}

    @property
    def _tokens(self) -> list[str]:
        value = self.metadata.get("tokenizer.ggml.tokens")
        return value.data if value is not None and value.type == "arr[str]" else []

    @cached_property
    def named(self) -> dict[str, str]:
        """Kind -> text of the tokens with a part to play: {"eos": "<|im_end|>"}."""
        if self.container == CHECKPOINT:
            return read_named_tokens(self.checkpoint, self.tokenizer_config)
        return {
            kind: self.texts[self.metadata[key].data]
            for kind, key in SPECIAL.items()
            if key in self.metadata and self.metadata[key].data in self.texts
        }

    @cached_property
    def special_texts(self) -> list[str]:
        """Texts of the tokens beside the model's own pieces, longest first."""
        if self.container == CHECKPOINT:
            found = {token.content for token in self.added} | set(self.named.values())
        else:
            types = self.metadata.get("tokenizer.ggml.token_type")
            types = [] if types is None else list(types.data)
            pairs = zip(self._tokens, types, strict=False)
            found = {text for text, kind in pairs if kind in (CONTROL, USER_DEFINED)}
        return sorted(found, key=len, reverse=True)

    def describe(self, token: object) -> str:
        """An id with its text: "4093 <|im_end|>"."""
        text = self.texts.get(token) if isinstance(token, int) else None
        return f"{token} {text}" if text is not None else f"{token} (no such token)"

    @cached_property
    def stops(self) -> dict[str, list[int]]:
        """Where an end is stated -> the ids that end an answer there."""
        if self.container == GGUF:
            keys = ("eos", "eot")
            stated = {SPECIAL[k]: ids_in(self._value(SPECIAL[k])) for k in keys}
            stated["tokenizer.ggml.eom_token_id"] = ids_in(
                self._value("tokenizer.ggml.eom_token_id")
            )
            known = [self.ids[text] for text in END_TEXTS if text in self.ids]
            stated["llama.cpp's own list of texts"] = known
        else:
            eos = self.ids.get(self.named.get("eos"))
            stated = {
                f"{TOKENIZER}: eos_token": ids_in(eos),
                f"{SETTINGS}: eos_token_id": ids_in(self.config.get("eos_token_id")),
                f"{GENERATION}: eos_token_id": ids_in((self.generation or {}).get("eos_token_id")),
            }
        return {where: ids for where, ids in stated.items() if ids}

    def _value(self, key: str) -> object:
        value = self.metadata.get(key)
        return None if value is None else value.data

    @cached_property
    def turn_end(self) -> str | None:
        """The token that the chat template writes behind an answer."""
        text = self.talk.history.text if self.template is not None else None
        if text is None or ANSWER not in text:
            return None
        behind = text.partition(ANSWER)[2].lstrip()
        return next((t for t in self.special_texts if t and behind.startswith(t)), None)

    # --- chat template ---

    @cached_property
    def templates(self) -> dict[str, str]:
        if self.container == CHECKPOINT:
            return read_chat_templates(self.checkpoint)
        text = self._value("tokenizer.chat_template")
        return {"default": text} if isinstance(text, str) else {}

    @property
    def template(self) -> str | None:
        return self.templates.get("default")

    @cached_property
    def template_place(self) -> str:
        if self.container == GGUF:
            return "tokenizer.chat_template"
        if self.checkpoint.read_text("chat_template.jinja") is not None:
            return "chat_template.jinja"
        inside = self.tokenizer_config.get("chat_template") is not None or self.template is None
        return f"{TOKENIZER if inside else 'chat_template.json'}: chat_template"

    @cached_property
    def talk(self) -> Talk:
        return self.talk_of(self.template or "")

    def talk_of(self, template: str) -> Talk:
        """What a template would make of four conversations, with this model's own tokens."""
        question = {"role": "user", "content": QUESTION}
        answer = {
            "role": "assistant",
            "content": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}",
        }
        apart = {**answer, "content": ANSWER, **dict.fromkeys(THOUGHT_FIELDS, THOUGHT)}
        variables = {f"{kind}_token": text for kind, text in self.named.items()}
        conversations = [
            {**variables, "messages": messages, "add_generation_prompt": prompt}
            for messages, prompt in (
                ([question], False),
                ([question], True),
                ([question, answer, question], True),
                ([question, apart, question], True),
            )
        ]
        return Talk(*render(template, conversations))

    @property
    def thinks(self) -> bool:
        """Whether it thinks before it answers: its template says so, and its recipe or tokens.

        Qwen3's vocabulary has <think> in models that never think too; their recipe knows.
        """
        known = self.recipe.thinks if self.recipe is not None else "<think>" in self.ids
        return known or "<think>" in (self.template or "")


def ids_in(value: object) -> list[int]:
    """The ids in a config entry: a number, a list of numbers, or nothing usable."""
    values = value if isinstance(value, list) else [value]
    return [token for token in values if type(token) is int]
