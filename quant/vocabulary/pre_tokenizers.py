"""How a byte-level BPE tokenizer cuts text into words, and llama.cpp's name for each way.

Before any merge, BPE cuts the text: "it's 42" -> "it", "'s", " ", "4", "2". Two tokenizers with one
vocabulary and different cuts give different ids: the model then reads words it never learned.
tokenizer.json holds the cuts as data (`pre_tokenizer`: regular expressions and flags). A GGUF file
holds only a name, `tokenizer.ggml.pre`, and llama.cpp has the expressions compiled in.

llama.cpp's converter finds the name by tokenizing one text and hashing the ids, so that a retrained
vocabulary is "not recognized" though its rules are old friends. Here the rules themselves are
compared: `read_steps` brings them to one spelling, `KNOWN` lists what each name does.

The normalizer: llama.cpp changes no text before it cuts. NFC (Qwen's) leaves nearly all text from
keyboards and web pages as it is, so it is passed over, as llama.cpp's converter does too; an "e"
with a combining accent typed as two characters gets other ids than in transformers. A normalizer
that changes ordinary text (lower case, NFKC) makes the rules unknown.

# ref: src/llama-vocab.cpp, llm_tokenizer_bpe and llama_vocab::impl::load; src/unicode.cpp
"""

import difflib
from dataclasses import dataclass

from quant.display import printable
from quant.errors import BadInput, UsageError
from quant.metadata_keys import PRE_TOKENIZERS
from quant.vocabulary.tokenizer_json import flatten

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CAPITALIZED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPERCASE = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_OTHERS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = "|".join([_CONTRACTION, _WORD, r"\p{N}{1,3}", _OTHERS])
QWEN2 = "|".join([_CONTRACTION, _WORD, r"\p{N}", _OTHERS])
QWEN35 = (
    _CONTRACTION
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
    + _SPACES
)
MINICPM5 = "|".join([_CONTRACTION, _WORD, r"\p{N}+", _OTHERS])
SEED_CODER = "|".join([_CONTRACTION, _WORD, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+", _SPACES])
TEKKEN = "|".join([_CAPITALIZED, _UPPERCASE, r"\p{N}", _OTHERS_SLASH])
GPT4O = (
    f"{_CAPITALIZED}{_CONTRACTION}?|{_UPPERCASE}{_CONTRACTION}?|" + r"\p{N}{1,3}|" + _OTHERS_SLASH
)
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES
)
_LATIN_GREEK_CYRILLIC = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-"
    "ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-"
    "ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)

COVERS_ALL_TEXT = {GPT2, LLAMA3, QWEN2, MINICPM5, SEED_CODER, TEKKEN, GPT4O}
"""Expressions one of whose parts matches at every character: letters, digits, spaces, the rest."""

SPELLINGS = (
    # Control characters inside a class, raw or escaped.
    ("\r", r"\r"),
    ("\n", r"\n"),
    # The same seven endings: no one is the beginning of another, so their order is free.
    (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTION),
    (r"'(?i:[sdmt]|ll|ve|re)", _CONTRACTION),
    # Possessive, as tiktoken writes it: what follows never needs a character given back.
    (r"[^\r\n\p{L}\p{N}]?+\p{L}+", _WORD),
    (r" ?[^\s\p{L}\p{N}]++[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n]*"),
    # \s* has taken all but the last line break, so one or several match the same text.
    (r"\s*[\r\n]|", r"\s*[\r\n]+|"),
    (r"\p{N}{1}|", r"\p{N}|"),
)
"""(spelling found, our spelling): differences that change no cut."""

_MARKS = (
    "llama.cpp's form of these rules leaves combining marks out of words: Hindi, and other scripts "
    "and languages that write with such marks, get other tokens than in transformers"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text, and the name under which llama.cpp cuts the same way.

    steps: what is applied in turn, each to every piece left by the one before: a regular expression
    whose matches become pieces of their own, or a named step. differs: where llama.cpp departs.
    """

    name: str
    steps: tuple[str, ...]
    ignore_merges: bool = False
    differs: str = ""


KNOWN = (
    PreTokenizer("qwen2", (QWEN2,)),
    PreTokenizer("llama-bpe", (LLAMA3,), ignore_merges=True),
    PreTokenizer("dbrx", (LLAMA3,)),  # also Phi-4's
    PreTokenizer("gpt-2", (GPT2,)),
    PreTokenizer("tekken", (TEKKEN,), ignore_merges=True, differs=_MARKS),
    PreTokenizer("gpt-4o", (GPT4O,), differs=_MARKS),
    PreTokenizer("qwen35", (QWEN35,)),
    PreTokenizer("smollm", (r"\p{N}", GPT2)),  # also StarCoder's and Command R's
    PreTokenizer(
        "deepseek-v3",
        (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK3),
    ),
    PreTokenizer(
        "deepseek-llm",
        (
            r"[\r\n]",
            r"\s?[" + _LATIN_GREEK_CYRILLIC + "]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
            # llama.cpp cuts at \p{N}+; no merge joins two digits in a vocabulary learned so.
            r"\p{N}",
        ),
    ),
    PreTokenizer(
        "deepseek-coder",
        (
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
            r"\p{N}",
        ),
    ),
    PreTokenizer(
        "falcon",
        ("Punctuation(Contiguous)", GPT2, "ByteLevel", r"\p{N}+", "[0-9][0-9][0-9]"),
    ),
    PreTokenizer("seed-coder", (SEED_CODER,)),
    PreTokenizer("minicpm5", (r"\p{N}{1,3}", MINICPM5), ignore_merges=True),
    PreTokenizer("ufakzeka", ("|".join([_WORD, r"\p{N}", _OTHERS]),)),
)
"""The rules that can be recognised. dbrx is Llama 3's without ignore_merges."""


def one_spelling(regex: str) -> str:
    """`regex` with the spelling differences that change no cut taken out (see SPELLINGS)."""
    for found, ours in SPELLINGS:
        regex = regex.replace(found, ours)
    return regex


def read_steps(tokenizer: dict) -> tuple[str, ...]:
    """The steps of a tokenizer.json's `normalizer` and `pre_tokenizer`, in KNOWN's spelling.

    What llama.cpp has no form for becomes a step that KNOWN does not hold, readable in a message.
    """
    steps = [
        f"normalizer {part.get('type')}"
        for part in flatten(tokenizer.get("normalizer"), "normalizers")
        if part.get("type") != "NFC"
    ]
    for part in flatten(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        steps += _read_step(part)
    # The map from bytes to letters is how every vocabulary of this kind is spelled, no cut.
    return tuple(steps[:-1] if steps and steps[-1] == "ByteLevel" else steps)


def _read_step(part: dict) -> list[str]:
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return [GPT2, "ByteLevel"] if part.get("use_regex", True) else ["ByteLevel"]
    if kind == "Digits":
        return [r"\p{N}" if part.get("individual_digits") else r"\p{N}+"]
    if kind == "Punctuation":
        return [f"Punctuation({part.get('behavior', 'Isolated')})"]
    pattern = part.get("pattern")
    if kind == "Split" and isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        regex = one_spelling(pattern["Regex"])
        behavior, invert = part.get("behavior"), part.get("invert")
        # Isolated: matches and what lies between them are pieces. Removed and inverted: what lies
        # between is thrown away, which is the same where nothing lies between.
        if behavior == "Isolated" or (
            behavior == "Removed" and invert and regex in COVERS_ALL_TEXT
        ):
            return [regex]
    return [" ".join(f"{key}={value!r}" for key, value in part.items())]


def choose_pre_tokenizer(tokenizer: dict, wanted: str | None) -> tuple[str, tuple[str, ...]]:
    """(tokenizer.ggml.pre, notes) for a byte-level tokenizer.json; `wanted` overrides its rules.

    Raises BadInput if the rules are unknown, UsageError if llama.cpp knows no `wanted`.
    """
    if wanted is not None:
        return check_name(wanted), ()
    steps = read_steps(tokenizer)
    rows = [row for row in KNOWN if row.steps == steps]
    if not rows:
        raise BadInput(
            "The rules by which this tokenizer cuts text are not among those llama.cpp knows: "
            + "; ".join(printable(step, 400) for step in steps or ("none",)),
            "llama.cpp has its rules compiled in, and wrong ones give wrong tokens without a word.",
            "If you know which of them fits, pass --pre-tokenizer NAME. Recognised: "
            + " ".join(row.name for row in KNOWN)
            + ". All: "
            + " ".join(PRE_TOKENIZERS),
        )
    ignores = bool(tokenizer["model"].get("ignore_merges"))
    row = next((row for row in rows if row.ignore_merges == ignores), rows[0])
    notes = [row.differs + "."] if row.differs else []
    if row.ignore_merges != ignores:
        notes.append(
            f"tokenizer.json sets ignore_merges {ignores}, llama.cpp's {row.name!r} "
            f"{row.ignore_merges}: words of the vocabulary that its merges cannot build differ."
        )
    return row.name, tuple(notes)


def check_name(wanted: str) -> str:
    """`wanted`, if llama.cpp knows a pre-tokenizer of that name. Raises UsageError."""
    if wanted in PRE_TOKENIZERS:
        return wanted
    near = difflib.get_close_matches(wanted, PRE_TOKENIZERS, n=1)
    raise UsageError(
        f"llama.cpp knows no pre-tokenizer '{printable(wanted)}'"
        + (f"; did you mean {near[0]!r}?" if near else "."),
        "A file that names another is refused when it is loaded.",
        "It knows: " + " ".join(PRE_TOKENIZERS),
    )
