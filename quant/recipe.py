"""Recipes: what is known of a model family and how to run it, as TOML data that speaks when wrong.

A recipe says by what a model of the family is known, which values its config.json should have,
which settings stretch its context, and one or more sampling profiles. Recipes ship with the package
(recipes/*.toml), each with comments that say what was measured and what was only read. A file of
one's own has the same form; an unknown key is an error, so that a misspelt one is never silent.
"""

import difflib
import re
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quant.display import printable
from quant.errors import BadRecipe, InputMissing
from quant.gguf_file import GgufFile, Metadata, Value
from quant.metadata_keys import SAMPLING
from quant.sampling import DEFAULT_SEQUENCE, PREFIX, check_sequence
from quant.source import Source

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class _Part(BaseModel):
    """Unknown keys are refused, and "0.6" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _setting(name: str):
    """An optional field with the meaning and the limits of a `general.sampling.*` key."""
    key = SAMPLING[name]
    whole = (-(2**31), 2**31 - 1)
    low, high = key.range or ((min(key.choices), max(key.choices)) if key.choices else whole)
    return Field(None, description=key.about, ge=low, le=high)


class Profile(_Part):
    """Sampling settings: the twelve a GGUF file can carry, and five that only programs take."""

    about: str = Field("", description="one line for people")
    sequence: str | None = Field(None, description=SAMPLING["sequence"].about)
    top_k: int | None = _setting("top_k")
    top_p: float | None = _setting("top_p")
    min_p: float | None = _setting("min_p")
    xtc_probability: float | None = _setting("xtc_probability")
    xtc_threshold: float | None = _setting("xtc_threshold")
    temp: float | None = _setting("temp")
    penalty_last_n: int | None = _setting("penalty_last_n")
    penalty_repeat: float | None = _setting("penalty_repeat")
    mirostat: int | None = _setting("mirostat")
    mirostat_tau: float | None = _setting("mirostat_tau")
    mirostat_eta: float | None = _setting("mirostat_eta")
    presence_penalty: float | None = Field(
        None, description="subtracted once from every token seen", ge=-2, le=2
    )
    frequency_penalty: float | None = Field(
        None, description="subtracted for each time a token was seen", ge=-2, le=2
    )
    dry_multiplier: float | None = Field(
        None, description="DRY's strength against repeated sequences; 0 is off", ge=0, le=100
    )
    dry_allowed_length: int | None = Field(
        None, description="longest sequence DRY lets be repeated", ge=0, le=2**31 - 1
    )
    dry_penalty_last_n: int | None = Field(
        None, description="tokens DRY looks back on", ge=0, le=2**31 - 1
    )

    @field_validator("sequence")
    @classmethod
    def _in_llama_cpps_names(cls, sequence: str | None) -> str | None:
        return None if sequence is None else check_sequence(sequence)[0]

    @model_validator(mode="after")
    def _every_penalty_acts(self) -> "Profile":
        for name, (sampler, off) in PENALTIES.items():
            value = getattr(self, name)
            if value is not None and value != off:
                self._require(name, value, sampler)
        return self

    def _require(self, name: str, value: float, sampler: str) -> None:
        """Raise BadRecipe unless the chain applies the penalty `name`."""
        if self.mirostat:
            why = "Mirostat replaces the whole sequence of samplers, penalties too."
            how = f"Set mirostat to 0, or leave {name} out."
        elif sampler not in (self.sequence or DEFAULT_SEQUENCE).split(";"):
            why = (
                f"llama.cpp runs only the samplers that the sequence names, and `{sampler}` is "
                f"none of {self.sequence}: the setting would be stored and do nothing."
            )
            how = f"Name {sampler} in the sequence, or leave {name} out."
        elif self.look_back(sampler) == 0:
            why = "It looks back on 0 tokens, so there is nothing to penalize."
            how = "Give penalty_last_n or dry_penalty_last_n a length, such as 64."
        else:
            return
        raise BadRecipe(f"{name} is {value:g}, but no sampler applies it.", why, how)

    def look_back(self, sampler: str) -> int | None:
        """Tokens that a penalizing sampler looks back on; None: the program's default."""
        return self.penalty_last_n if sampler == "penalties" else self.dry_penalty_last_n

    def metadata(self) -> Metadata:
        """The `general.sampling.*` keys; the settings that GGUF has no key for are left out."""
        types = {"f32": float, "i32": int, "str": str}
        return {
            PREFIX + name: Value(SAMPLING[name].types[0], types[SAMPLING[name].types[0]](value))
            for name, value in self.settings().items()
            if name in SAMPLING
        }

    def settings(self) -> dict[str, object]:
        """Every setting that the profile makes, by name."""
        return {n: v for n, v in self.model_dump(exclude={"about"}).items() if v is not None}

    def not_in_gguf(self) -> dict[str, object]:
        """The settings that a GGUF file cannot carry: each program has to be told."""
        return {name: value for name, value in self.settings().items() if name not in SAMPLING}


PENALTIES = {
    "penalty_repeat": ("penalties", 1.0),
    "presence_penalty": ("penalties", 0.0),
    "frequency_penalty": ("penalties", 0.0),
    "dry_multiplier": ("dry", 0.0),
}
"""A penalty, the sampler that applies it, and the value that turns it off.

# ref: common/sampling.cpp, common_sampler_init; https://github.com/ggml-org/llama.cpp/pull/10803
"""


class Identity(_Part):
    """By what a model of the family is known; both have to fit."""

    architectures: list[str] = Field(
        description="config.json's class, and general.architecture of GGUF"
    )
    name: str = Field(description="a regular expression found in the model's name, in any case")

    @field_validator("name")
    @classmethod
    def _is_an_expression(cls, name: str) -> str:
        try:
            re.compile(name)
        except re.error as error:
            raise ValueError(f"it is no regular expression: {error}") from None
        return name


Numbers = Annotated[list[float], Field(min_length=1)]


class Generation(_Part):
    """Values of generation_config.json that the makers' own files and cards have."""

    temperature: Numbers
    top_p: Numbers
    top_k: Numbers
    min_p: Numbers
    repetition_penalty: Numbers


class Expected(_Part):
    """Values that a model of the family has; another one is reported and never changed."""

    rms_norm_eps: Numbers
    rope_theta: Numbers
    pre_tokenizer: str | None = None
    add_bos: bool | None = None
    generation: Generation


class Yarn(_Part):
    """How the makers stretch the context, for long texts only."""

    factor: float = Field(gt=1, le=1000)
    original_context: int = Field(ge=1, le=2**31 - 1, description="context length in training")

    @property
    def reach(self) -> int:
        return round(self.factor * self.original_context)


WORD = r"^[a-z0-9][a-z0-9._-]*$"
"""Names that are printed into commands."""


class Recipe(_Part):
    """A family of models."""

    name: str = Field(pattern=WORD)
    title: str
    thinks: bool = Field(description="whether it thinks before it answers, between <think> tags")
    pad_tokens: list[str] = Field(description="texts for the pad token, best first")
    vllm_reasoning_parser: str | None = Field(None, pattern=WORD)
    identity: Identity
    expected: Expected
    yarn: Yarn | None = None
    profiles: dict[Annotated[str, Field(pattern=WORD)], Profile] = Field(
        min_length=1, description="the first is the default"
    )

    @property
    def default_profile(self) -> str:
        return next(iter(self.profiles))

    def profile(self, name: str | None) -> tuple[str, Profile]:
        """A profile by its name, or the default one. Raises BadRecipe."""
        name = self.default_profile if name is None else name
        if name not in self.profiles:
            raise _unknown("profile", name, list(self.profiles), f" in the recipe {self.name}")
        return name, self.profiles[name]


def json_schema() -> dict:
    """The form of a recipe, for editors that check TOML as it is typed."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


# --- reading ----------------------------------------------------------------------------------


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    files = resources.files("qwq_recipes").iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def read_recipe(name_or_file: str) -> Recipe:
    """A shipped recipe ("qwq-32b") or a TOML file ("./mine.toml").

    Raises InputMissing for a file that is not there, BadRecipe for an unknown name or what is no
    recipe, with the place and the nearest known key.
    """
    return _validated(Recipe, recipe_text(name_or_file), f"recipe {printable(name_or_file)}")


def recipe_text(name_or_file: str) -> str:
    """A recipe as it is written, comments and all; what ends in .toml or has a slash is a file."""
    if is_file_name(name_or_file):
        return read_toml_text(name_or_file, "a recipe")
    if name_or_file not in recipe_names():
        raise _unknown("recipe", name_or_file, recipe_names())
    file = resources.files("qwq_recipes") / f"{name_or_file}.toml"
    return file.read_text(encoding="utf-8")


def all_profiles() -> dict[str, Profile]:
    """Every profile of every shipped recipe; their names are unique."""
    recipes = map(read_recipe, recipe_names())
    return {name: profile for recipe in recipes for name, profile in recipe.profiles.items()}


def find_profile(name_or_file: str) -> Profile:
    """A profile of a shipped recipe, or of a TOML file that holds one profile and nothing else.

    Raises InputMissing or BadRecipe.
    """
    if not is_file_name(name_or_file):
        profiles = all_profiles()
        if name_or_file not in profiles:
            raise _unknown("sampling profile", name_or_file, list(profiles))
        return profiles[name_or_file]
    text = read_toml_text(name_or_file, "a sampling profile")
    return _validated(Profile, text, f"sampling profile {printable(name_or_file)}")


def read_profile(name_or_file: str) -> Metadata:
    """The keys of a recipe's profile ("qwen-official") or of a TOML file ("./mine.toml").

    Raises InputMissing for a file that is not there, BadRecipe for an unknown profile or key, a
    value out of range, or a penalty that no sampler applies.
    """
    return find_profile(name_or_file).metadata()


def is_file_name(name: str) -> bool:
    return name.endswith(".toml") or bool(set(name) & set("/\\"))


def read_toml_text(file_name: str, role: str) -> str:
    """The text of a user's file; never waits on a FIFO. Raises InputMissing or BadRecipe."""
    path, shown = Path(file_name), printable(file_name)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        exists = path.exists()
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise BadRecipe(f"{shown} cannot be read.", printable(error)) from None
    if exists:
        raise BadRecipe(f"{shown} is no regular file.", f"It was named as {role}.")
    raise InputMissing(
        f"There is no file {shown}.",
        f"It was named as {role}.",
        "See what ships with qwq-quant: qwq-quant recipes",
    )


def _validated(kind: type[_Part], text: str, what: str):
    """TOML text as a recipe or a profile. Raises BadRecipe for the first mistake."""
    try:
        return kind.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadRecipe(f"The {what} is no TOML.", printable(error)) from None
    except ValidationError as error:
        raise _explained(error, kind, what) from None


def _explained(error: ValidationError, kind: type[_Part], what: str) -> BadRecipe:
    """pydantic's first complaint in our words: the place, the value, and the nearest known key."""
    mistakes = error.errors(include_url=False)
    unknown = [m for m in mistakes if m["type"] == "extra_forbidden"]
    first = (unknown or mistakes)[0]  # a misspelt key is also a missing one
    place = printable(".".join(map(str, first["loc"])), 80)
    more = len(mistakes) - 1
    rest = f"Mistakes besides: {more}." if more else ""
    if first["type"] == "extra_forbidden":
        known = _keys_at(kind, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), [*known, *SPELLINGS], n=1)
        guess = f"Did you mean {SPELLINGS.get(near[0], near[0])}?" if near else rest
        return BadRecipe(
            f"The {what} has an unknown key {place}.", guess, f"Known: {', '.join(known)}."
        )
    if first["type"] == "missing":
        return BadRecipe(f"The {what} lacks {place}.", rest)
    value, message = printable(repr(first["input"]), 60), printable(first["msg"])
    return BadRecipe(f"In the {what}, {place} is {value}.", f"{message}.", rest)


SPELLINGS = {"temperature": "temp", "repetition_penalty": "penalty_repeat", "repeat_penalty":
             "penalty_repeat", "samplers": "sequence"}  # fmt: skip
"""Names from elsewhere, and what a profile calls them."""


def _keys_at(kind: type[_Part], place: tuple) -> list[str]:
    """The keys that may stand at a place of the file: ("profiles", "mine") -> Profile's."""
    for step in place:
        if kind is Recipe and step == "profiles":
            kind = Profile
        elif step in kind.model_fields:
            annotation = kind.model_fields[step].annotation
            parts = (annotation, *getattr(annotation, "__args__", ()))
            kind = next((p for p in parts if isinstance(p, type) and issubclass(p, _Part)), kind)
    return list(kind.model_fields)


def _unknown(what: str, name: str, known: list[str], where: str = "") -> BadRecipe:
    near = difflib.get_close_matches(name, known, n=1)
    return BadRecipe(
        f'There is no {what} "{printable(name)}"{where}.',
        f"Did you mean {near[0]}?" if near else "A file's name must end in .toml.",
        f"There are: {', '.join(known)}.",
    )


# --- choosing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """A recipe, and why it was taken: for people, with untrusted names in it."""

    recipe: Recipe
    why: str
    named: bool = False  # by the user, not by the model's own name


def choose_recipe(source: Source, named: str | None = None) -> Chosen | None:
    """The recipe that was named, else the one whose identity fits the model; None if none does.

    A model that two recipes fit gets neither: it has to be told. Raises BadRecipe or InputMissing
    for a recipe that was named.
    """
    if named is not None:
        return Chosen(read_recipe(named), "named", named=True)
    architecture, names = model_identity(source)
    fitting = [
        Chosen(recipe, f'for {architecture} called "{name}"')
        for recipe in map(read_recipe, recipe_names())
        if architecture in recipe.identity.architectures
        for name in names
        if re.search(recipe.identity.name, name, re.IGNORECASE)
    ]
    return fitting[0] if len({c.recipe.name for c in fitting}) == 1 else None


def model_identity(source: Source) -> tuple[str, list[str]]:
    """(architecture, names the model goes by). Untrusted text, cut to what a name can be."""
    if isinstance(source, GgufFile):
        keys = ("general.name", "general.basename", "general.base_model.0.name")
        values = [source.metadata[key].data for key in keys if key in source.metadata]
        architecture = source.metadata.get("general.architecture", Value("str", "")).data
        values.append(source.path.name)
    else:
        classes = source.config.get("architectures")
        architecture = classes[0] if isinstance(classes, list) and classes else ""
        values = [source.config.get("_name_or_path"), source.folder.resolve().name]
        values.append(source.name.rstrip("/").rpartition("/")[2])
    names = [value[-200:] for value in values if isinstance(value, str) and value]
    return str(architecture)[:200], list(dict.fromkeys(names))
