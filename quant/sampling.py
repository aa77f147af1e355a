"""Sampling settings inside the file: the twelve `general.sampling.*` keys of GGUF.

A model that loops is often a model that is sampled wrongly: QwQ-32B run with llama.cpp's defaults
(temperature 0.8, min_p 0.05) is not the model its makers measured. These keys carry the makers'
settings in the file, where llama.cpp's programs take them unless the user says otherwise.

They come from `generation_config.json`, or from a profile: a table with the same twelve names in
one of the recipes that ship with the package (quant/recipe.py), or in a TOML file of one's own.
# ref: llama.cpp, common/common.cpp, common_init_sampler_from_model
"""

import difflib

from quant.display import printable
from quant.errors import BadInput, BadRecipe
from quant.gguf_file import Metadata, Value
from quant.metadata_keys import SAMPLING, objection

PREFIX = "general.sampling."

SAMPLERS = (
    "dry", "top_k", "top_p", "top_n_sigma", "typ_p", "min_p", "temperature", "xtc", "infill",
    "penalties", "adaptive_p",
)  # fmt: skip
"""# ref: common/sampling.cpp, common_sampler_types_from_names"""

ALIASES = {
    **{name.replace("_", "-"): name for name in SAMPLERS},
    **{name.replace("_", ""): name for name in SAMPLERS},
    "nucleus": "top_p",
    "temp": "temperature",
    "typ": "typ_p",
    **{name: name for name in SAMPLERS},
}
"""Every spelling llama.cpp accepts, in lower case, and the name it stands for."""

DEFAULT_SEQUENCE = "penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature"
"""# ref: common/common.h, common_params_sampling::samplers"""

LONGEST_SEQUENCE = 511  # llama.cpp reads it into char[512]

GENERATE_DEFAULTS = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""What transformers' generate() does about a field that generation_config.json leaves out.

# ref: transformers, GenerationConfig._get_default_generation_params; min_p is off there.
"""

GGUF_NAMES = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


def sampling_from_generation_config(generation_config: dict) -> Metadata:
    """The `general.sampling.*` keys that make llama.cpp sample as transformers' generate() would.

    A field that is left out is written with generate()'s default, because llama.cpp's own differs:
    QwQ-32B's generation_config.json has no min_p, generate() then uses none and so does Qwen's
    model card (MinP=0), but llama.cpp would drop every token below 5 % of the likeliest one.

    `do_sample: false` means that generate() takes the likeliest token and looks at none of the
    other fields but the repetition penalty: temperature 0. A file with neither `do_sample` nor a
    sampling field says nothing about sampling, and nothing is written: most base models' files
    hold only token ids. Raises BadInput for values that are no numbers or out of range.
    """
    given = {name: generation_config.get(name) for name in GGUF_NAMES}
    given = {name: value for name, value in given.items() if value is not None}
    do_sample = generation_config.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        raise BadInput(
            f'"do_sample" in generation_config.json is {printable(repr(do_sample), 40)}.',
            "It must be true or false.",
        )
    if do_sample or (do_sample is None and given.keys() - {"repetition_penalty"}):
        settings = {**GENERATE_DEFAULTS, **given}
    else:
        settings = {n: value for n, value in given.items() if n == "repetition_penalty"}
        if do_sample is False:
            settings["temperature"] = 0.0
    metadata = {}
    for name, value in settings.items():
        try:
            metadata[PREFIX + GGUF_NAMES[name]] = _typed(GGUF_NAMES[name], value)
        except ValueError as error:
            raise BadInput(f'"{name}" in generation_config.json {error}.') from None
    return metadata


def _typed(name: str, value: object) -> Value:
    """A plain value as the setting's GGUF type. Raises ValueError, worded to follow the name."""
    key = SAMPLING[name]
    kind = key.types[0]
    shown = printable(repr(value), 60)
    if kind == "str" and not isinstance(value, str):
        raise ValueError(f"is {shown}; text is needed")
    if kind != "str":
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"is {shown}; a number is needed")
        if not abs(value) < 2**31:  # NaN is not
            raise ValueError(f"is {shown}; a smaller, finite number is needed")
        if kind == "i32" and value != int(value):
            raise ValueError(f"is {shown}; a whole number is needed")
        value = int(value) if kind == "i32" else float(value)
    typed = Value(kind, value)
    why = objection(typed, key)
    if why:
        raise ValueError(f"is {shown}; it {why}")
    return typed


# --- the sequence of samplers -----------------------------------------------------------------


def check_sequence(text: str) -> tuple[str, list[str]]:
    """A sampler sequence in llama.cpp's own names, and warnings: "Top-K;temp" -> top_k;temperature.

    llama.cpp splits at ';' and drops every name it does not know with a warning in its log. One
    comma instead, and the whole text is one unknown name: an empty chain, no temperature, no
    top_k. So any name it does not know is refused here. Raises BadRecipe.
    """
    names = [_sampler(name, text) for name in text.split(";")]
    sequence = ";".join(names)
    if len(text.encode()) > LONGEST_SEQUENCE:
        raise BadRecipe(
            f"The sampler sequence is {len(text.encode())} bytes long.",
            f"llama.cpp reads {LONGEST_SEQUENCE} of it and drops the rest.",
            "Name each sampler once.",
        )
    warnings = [f"The sampler sequence names {n} twice." for n in SAMPLERS if names.count(n) > 1]
    if "temperature" not in names:
        warnings.append(
            "The sampler sequence has no temperature: the setting `temp` will have no effect."
        )
    return sequence, warnings


def _sampler(name: str, sequence: str) -> str:
    known = ALIASES.get(name.lower()) if name.isascii() else None  # C's tolower knows ASCII only
    if known is not None:
        return known
    shown = printable(name, 80)
    if not name:
        what = "The sampler sequence is empty." if not sequence else "It has an empty name."
        raise BadRecipe(what, f"Names are separated by one ';': {DEFAULT_SEQUENCE}")
    if any(separator in name for separator in ",:| \t\n/+"):
        raise BadRecipe(
            f'The sampler sequence has "{shown}" between two semicolons.',
            "Names are separated by ';' alone; llama.cpp would drop this part without an error, "
            "and sample without it.",
            f"For example: {DEFAULT_SEQUENCE}",
        )
    near = difflib.get_close_matches(name.lower(), ALIASES, n=1)
    raise BadRecipe(
        f'The sampler sequence names "{shown}", which llama.cpp does not know.',
        f"Did you mean {ALIASES[near[0]]}?" if near else "llama.cpp would leave it out.",
        f"It knows: {', '.join(SAMPLERS)}.",
    )


def check_sampling(metadata: Metadata) -> list[str]:
    """Warnings about `general.sampling.*` settings that cancel each other.

    Raises BadRecipe for a sequence that llama.cpp would not follow.
    """
    settings = {
        name: metadata[PREFIX + name].data for name in SAMPLING if PREFIX + name in metadata
    }
    names, warnings = set(DEFAULT_SEQUENCE.split(";")), []
    if "sequence" in settings:
        sequence, warnings = check_sequence(settings["sequence"])
        names = set(sequence.split(";"))
    if settings.get("mirostat", 0):
        ignored = {"sequence", "top_k", "top_p", "min_p", "penalty_repeat"} & settings.keys()
        if ignored:
            warnings.append(f"Mirostat replaces the sequence: {', '.join(sorted(ignored))} unused.")
        return warnings
    penalty = settings.get("penalty_repeat", 1.0)
    if penalty != 1.0 and "penalties" not in names:
        warnings.append(
            f"penalty_repeat {penalty:g} has no effect: `penalties` is not in the sampler sequence."
        )
    for name in ("top_k", "top_p", "min_p"):
        if name in settings and name not in names:
            warnings.append(f"{name} has no effect: it is not in the sampler sequence.")
    if settings.get("xtc_probability", 0.0) > 0 and "xtc" not in names:
        warnings.append("xtc_probability has no effect: `xtc` is not in the sampler sequence.")
    return warnings
