"""Small real tokenizers, trained on tests/texts by the libraries that releases are made with.

`STYLES` holds one way of making a byte-level tokenizer for each entry of pre_tokenizers.KNOWN, its
files spelled as the release of that kind spells them; `make_sentencepiece` makes Llama 2's kind.
"""

import io
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import gguf
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from quant.vocabulary.pre_tokenizers import KNOWN

TEXTS = Path(__file__).parent / "texts"
N_TOKENS = 3000

BY_HAND = (
    "", " ", "  ", "   a", "a  b   c\n\n\n d\n \n", "\r\n\r\nx\r\ny \r\n z", "\t\ttab\t x", "\n",
    "a \n", "👩‍👩‍👧‍👦 🏳️‍🌈🚀 ✅",
    "1 12 123 1234 12345 1234567 3.14 1,000,000", "Ⅷ ½ ²³ ①",
    "I'm you're WE'VE he'll SHE'D It'S 'tis ''s don’t", "helloWorld FOOBar HTTPServer2Go",
    "for(i=0;i<10;i++){x[i]+=1;}//c", "http://a.b/c?d=e&f=g#h", "a_b__c $100 ~`^|", "...!!!???",
    "a\u00a0b\u3000c\u2003d", "\u200b\ufeffx", "é à ü ñ", "\x1c\n\xa0\n", "𝔘𝔫𝔦 𠜎𠜱",
    "नमस्ते दुनिया", "สวัสดีชาวโลก", "مَرْحَبًا", "приветМир ΓειάΣου",
)  # fmt: skip


def rows(name: str) -> list[dict]:
    lines = (TEXTS / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@lru_cache
def sample_texts() -> list[str]:
    """What ids are compared on: eight languages, code, prose, and what goes wrong by hand."""
    held_out = [row["text"] for row in rows("heldout")]
    return [*BY_HAND, *(row["text"] for row in rows("languages")), *held_out[::2]]


@lru_cache
def training_texts() -> list[str]:
    return [row["text"] for name in ("calibration", "languages") for row in rows(name)] * 2


# ---- byte-level BPE -----------------------------------------------------------------------------


def split(regex: str) -> dict:
    pattern = {"Regex": regex}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def byte_level(use_regex: bool, trim_offsets: bool = True) -> dict:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": trim_offsets,
        "use_regex": use_regex,
    }


def digits(individual: bool) -> dict:
    return {"type": "Digits", "individual_digits": individual}


def sequence(*parts: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def _steps(name: str) -> list[dict]:
    """Splits at the expressions of KNOWN, for those too long to write twice."""
    steps = next(row.steps for row in KNOWN if row.name == name)
    return [split(step) for step in steps if step != r"\p{N}"]


_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_NAME = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CAPS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_LLAMA3 = _ENDINGS + _WORD + r"|\p{N}{1,3}" + _REST
_QWEN2 = _ENDINGS + _WORD + r"|\p{N}" + _REST
_TEKKEN = _NAME + "|" + _CAPS + r"|\p{N}" + _REST_SLASH
_GPT4O = f"{_NAME}{_ENDINGS}?|{_CAPS}{_ENDINGS}?" + r"|\p{N}{1,3}" + _REST_SLASH
_QWEN35 = (
    _ENDINGS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    + r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED = (  # with real line breaks in the classes, as its file has them
    _ENDINGS
    + "|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}"
    + "| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
_MINICPM5 = _ENDINGS + _WORD + r"|\p{N}+" + _REST
_UFAKZEKA = _WORD[1:] + r"|\p{N}" + _REST

PRE_TOKENIZERS = {
    "qwen2": sequence(split(_QWEN2), byte_level(False, trim_offsets=False)),
    "llama-bpe": sequence(split(_LLAMA3), byte_level(False)),
    "dbrx": sequence(split(_LLAMA3), byte_level(False)),
    "gpt-2": byte_level(True),
    "tekken": sequence(split(_TEKKEN), byte_level(False)),
    "gpt-4o": sequence({**split(_GPT4O), "behavior": "Removed", "invert": True}, byte_level(False)),
    "qwen35": sequence(split(_QWEN35), byte_level(False, trim_offsets=False)),
    "smollm": sequence(digits(True), byte_level(True)),
    "deepseek-v3": sequence(*_steps("deepseek-v3"), byte_level(False)),
    "deepseek-llm": sequence(*_steps("deepseek-llm"), digits(True), byte_level(False)),
    "deepseek-coder": sequence(*_steps("deepseek-coder"), digits(True), byte_level(False)),
    "falcon": sequence(
        {"type": "Punctuation", "behavior": "Contiguous"},
        byte_level(True),
        digits(False),
        split("[0-9][0-9][0-9]"),
    ),
    "seed-coder": sequence(split(_SEED), byte_level(False)),
    "minicpm5": sequence(split(r"\p{N}{1,3}"), split(_MINICPM5), byte_level(False)),
    "ufakzeka": sequence(split(_UFAKZEKA), byte_level(False)),
}
"""llama.cpp's name -> `pre_tokenizer` as the releases of that kind have it in tokenizer.json."""


def added_token(content: str, special: bool = True, **flags) -> dict:
    token = {"content": content, "lstrip": False, "normalized": False, "rstrip": False}
    return {**token, "single_word": False, "special": special, **flags}


def template(*before: str) -> dict:
    """A post_processor that puts tokens before a text; ids are filled in by `make_byte_level`."""
    single = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before]
    single.append({"Sequence": {"id": "A", "type_id": 0}})
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "tokens": [token]} for token in before},
    }


@dataclass(frozen=True)
class Style:
    """How the files of one kind of release look, beside the vocabulary."""

    added: tuple[dict, ...] = (added_token("<|endoftext|>"), added_token("<mark>", special=False))
    config: dict = field(default_factory=lambda: {"eos_token": "<|endoftext|>"})
    post_processor: dict | None = None
    normalizer: dict | None = None
    merges_are_pairs: bool = True
    whole_words: tuple[str, ...] = ()  # in the vocabulary, but no merge makes them


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"

STYLES = {row.name: Style() for row in KNOWN} | {
    "qwen2": Style(
        added=(
            added_token("<|endoftext|>"),
            added_token("<|im_start|>"),
            added_token("<|im_end|>"),
            added_token("<|fim_prefix|>", special=False),
            added_token("<think>", special=False),
            added_token("</think>", special=False),
        ),
        config={
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "chat_template": CHATML,
        },
        post_processor=byte_level(False, trim_offsets=False),
        normalizer={"type": "NFC"},
    ),
    "llama-bpe": Style(
        added=tuple(
            added_token(text)
            for text in ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
        ),
        config={
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}<|eot_id|>"
            "{% endfor %}",
        },
        post_processor={
            "type": "Sequence",
            "processors": [byte_level(True), template("<|begin_of_text|>")],
        },
        merges_are_pairs=False,
        whole_words=("Ġunbuildable", "ĠXyzzy"),
    ),
    "dbrx": Style(whole_words=("Ġunbuildable",)),
    "tekken": Style(
        added=(
            added_token("<unk>"),
            added_token("<s>"),
            added_token("</s>"),
            added_token("[INST]"),
        ),
        config={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        post_processor=template("<s>"),
    ),
    "deepseek-v3": Style(
        added=(
            added_token("<｜begin▁of▁sentence｜>", normalized=True),
            added_token("<｜end▁of▁sentence｜>", normalized=True),
            added_token("<｜User｜>", special=False, normalized=True),
        ),
        config={"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
        post_processor=byte_level(True, trim_offsets=False),
        normalizer={"type": "Sequence", "normalizers": []},
    ),
}


@lru_cache
def _trained(name: str) -> tuple[dict[str, int], list]:
    """(vocabulary, merges) learned with the cuts of PRE_TOKENIZERS[name]."""
    skeleton = json.loads(Tokenizer(models.BPE()).to_str())
    skeleton["pre_tokenizer"] = PRE_TOKENIZERS[name]
    tokenizer = Tokenizer.from_str(json.dumps(skeleton))
    trainer = trainers.BpeTrainer(
        vocab_size=N_TOKENS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], model["merges"]


def make_byte_level(name: str, folder: Path, style: Style | None = None) -> int:
    """Write tokenizer.json, tokenizer_config.json and config.json; returns the number of tokens."""
    style = style or STYLES[name]
    vocab, merges = _trained(name)
    vocab = dict(vocab)
    for word in style.whole_words:
        vocab.setdefault(word, len(vocab))
    added = [{"id": len(vocab) + i, **token} for i, token in enumerate(style.added)]
    ids = {token["content"]: token["id"] for token in added}
    post_processor = json.loads(json.dumps(style.post_processor))
    for part in (post_processor or {}).get("processors", [post_processor or {}]):
        for token, entry in part.get("special_tokens", {}).items():
            entry["ids"] = [ids[token]]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": style.normalizer,
        "pre_tokenizer": PRE_TOKENIZERS[name],
        "post_processor": post_processor,
        "decoder": byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": next(row.ignore_merges for row in KNOWN if row.name == name),
            "vocab": vocab,
            "merges": merges if style.merges_are_pairs else [" ".join(pair) for pair in merges],
        },
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **style.config}
    config["added_tokens_decoder"] = {
        str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added
    }
    write_folder(folder, tokenizer=tokenizer, tokenizer_config=config)
    return len(vocab) + len(added)


def write_folder(folder: Path, **files) -> None:
    """folder/<name>.json for each file, and a config.json, without which transformers is lost."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"config": {"model_type": "llama"}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")


# ---- SentencePiece ------------------------------------------------------------------------------


@lru_cache
def sentencepiece_model(kind: str = "bpe", **options) -> bytes:
    """The bytes of a tokenizer.model with N_TOKENS pieces, byte tokens and one user's symbol."""
    lines = [line for text in training_texts() for line in text.split("\n") if line.strip()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=kind,
        minloglevel=2,
        **{
            "vocab_size": N_TOKENS,
            "byte_fallback": True,
            "character_coverage": 0.99,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "split_digits": True,
            "allow_whitespace_only_pieces": True,
            "user_defined_symbols": "[USER]",
            **options,
        },
    )
    return model.getvalue()


def make_sentencepiece(folder: Path, **config) -> int:
    """Llama 2's files without tokenizer.json; returns the number of tokens."""
    named = {0: "<unk>", 1: "<s>", 2: "</s>", N_TOKENS: "[INST]"}
    decoder = {str(token): added_token(text) for token, text in named.items()}
    decoder[str(N_TOKENS + 1)] = added_token("<think>", special=False)
    tokenizer_config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": True,
        "added_tokens_decoder": decoder,
    }
    write_folder(folder, tokenizer_config={**tokenizer_config, **config})
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    return N_TOKENS + 2


def make_sentencepiece_json(folder: Path) -> int:
    """The same tokenizer as Llama 2's release has it in tokenizer.json: merges, "▁" prepended."""
    from transformers import AutoTokenizer

    n_tokens = make_sentencepiece(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = {"type": "Prepend", "prepend": "▁"}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [prefix, space]}
    tokenizer["pre_tokenizer"] = None
    tokenizer["model"]["unk_token"] = "<unk>"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write_folder(folder, tokenizer=tokenizer, tokenizer_config={**config, "unk_token": "<unk>"})
    return n_tokens


# ---- a vocabulary for llama.cpp -----------------------------------------------------------------


def write_gguf(vocabulary, path: Path) -> Path:
    """A GGUF file that holds only the vocabulary, by gguf-py's writer."""
    kinds = gguf.GGUFValueType
    types = {
        "str": kinds.STRING,
        "u32": kinds.UINT32,
        "i32": kinds.INT32,
        "f32": kinds.FLOAT32,
        "bool": kinds.BOOL,
    }
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in vocabulary.metadata().items():
        if value.type.startswith("arr"):
            writer.add_key_value(key, list(value.data), kinds.ARRAY, types[value.type[4:-1]])
        else:
            writer.add_key_value(key, value.data, types[value.type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
