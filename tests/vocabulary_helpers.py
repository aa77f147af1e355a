"""Made tokenizers read by us, asked of transformers and of llama.cpp, and changed for one test.

tokenizer_makers.py makes their files; what is compared here is whole lists of ids.
"""

import contextlib
import json
import tempfile
from functools import lru_cache
from pathlib import Path

import llama_cpp
import llama_oracle
from tokenizer_makers import (
    CHATML,
    Style,
    added_token,
    make_byte_level,
    make_sentencepiece,
    make_sentencepiece_json,
    write_gguf,
)
from transformers import AutoTokenizer

from quant.checkpoint import Checkpoint
from quant.vocabulary import Vocabulary, read_vocabulary

_FOLDERS = tempfile.TemporaryDirectory()  # gone when Python ends


def checkpoint(folder: Path, **config) -> Checkpoint:
    return Checkpoint(folder, "test", None, config, {})


def read(folder: Path, n_rows: int, pre_tokenizer: str | None = None, **config) -> Vocabulary:
    return read_vocabulary(checkpoint(folder, **config), n_rows, pre_tokenizer)


@lru_cache
def made(name: str) -> tuple[Path, Vocabulary, Path]:
    """(folder, vocabulary, GGUF file) of one style, with five rows to spare; not to be changed."""
    folder = Path(_FOLDERS.name, name)
    makers = {"sentencepiece": make_sentencepiece, "sentencepiece-json": make_sentencepiece_json}
    n_tokens = makers[name](folder) if name in makers else make_byte_level(name, folder)
    vocabulary = read(folder, n_tokens + 5)
    return folder, vocabulary, write_gguf(vocabulary, folder / "vocabulary.gguf")


def copy_of(name: str, folder: Path) -> int:
    """The JSON files of a made tokenizer, to be changed in `folder`; returns its rows."""
    source, vocabulary, _ = made(name)
    for file in source.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return len(vocabulary.tokens)


def edit(folder: Path, name: str, change) -> None:
    """Rewrite folder/name as `change`, called with its content, leaves it."""
    path = folder / name
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def set_at(*path, value):
    """A change for `edit`: `value` at the keys of `path`."""

    def change(tokenizer):
        for key in path[:-1]:
            tokenizer = tokenizer[key]
        tokenizer[path[-1]] = value

    return change


def chatml(folder: Path, eos: str | None = "<|endoftext|>", **config) -> int:
    """A small ChatML tokenizer whose tokens are 3000 <|endoftext|>, 3001, 3002 <|im_end|>."""
    added = tuple(added_token(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    config = {"eos_token": eos, "chat_template": CHATML, **config}
    return make_byte_level("qwen2", folder, Style(added=added, config=config))


def with_tokens(texts: list[str], tokens: list[str]) -> list[str]:
    """The texts, and each token alone, in a row, between words, and glued to them."""
    for token in tokens:
        texts = [*texts, token, f"{token}{token}\n{token} ", f"a{token}b {token} c", f"{token}Hi"]
    return [*texts, "".join(tokens)]


def transformers_ids(folder: Path, texts: list[str], add_special: bool, **options):
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return [tokenizer.encode(text, add_special_tokens=add_special) for text in texts]


def different(texts: list[str], one: list, other: list) -> list[str]:
    return [text for text, a, b in zip(texts, one, other, strict=True) if a != b]


@contextlib.contextmanager
def llama_vocab(path: Path):
    with llama_oracle.loaded(path, vocab_only=True) as model:
        yield llama_cpp.llama_model_get_vocab(model)
