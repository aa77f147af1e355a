"""What is to be run and how: settled once, then said in each engine's own words."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from quant.checkpoint import Checkpoint
from quant.display import printable
from quant.doctor.patient import SETTINGS, Patient
from quant.doctor.rope import is_number, stated_rope
from quant.errors import BadInput, UsageError
from quant.inspection.architecture import IN_CONFIG, IN_GGUF, read_sizes
from quant.inspection.facts import is_count, text_at
from quant.metadata_keys import SAMPLING
from quant.recipe import Profile, Yarn, choose_recipe, find_profile
from quant.sampling import DEFAULT_SEQUENCE, PREFIX, sampling_from_generation_config
from quant.source import Source

OWN = "the model's own"
"""What stands for a profile's name where the model's files settle the sampling."""

USUAL_CONTEXT = 32768
"""Long enough for a thought; a KV cache for QwQ's 131072 would take 34 GB."""


@dataclass(frozen=True)
class Run:
    """A model, its sampling settings, and its context."""

    patient: Patient
    model: str  # a path, or org/name; printable
    revision: str | None  # of org/name, if one was asked for
    profile_name: str
    profile: Profile
    context: int
    yarn: Yarn | None  # to be turned on for this context
    theta: float | None
    recipe_name: str | None = None  # as it was named, a file perhaps; None: by the model's identity
    folder: Path = Path()  # where the files that go with it will lie

    @property
    def is_gguf(self) -> bool:
        return not isinstance(self.patient.source, Checkpoint)

    @property
    def slug(self) -> str:
        """A short name for a local model: letters, digits, dots and dashes."""
        last = self.model.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
        return re.sub(r"[^a-z0-9.]+", "-", last.lower())[:60].strip("-.") or "model"

    @property
    def sequence(self) -> str:
        return self.profile.sequence or DEFAULT_SEQUENCE

    @property
    def reasoning_budget(self) -> int:
        """Tokens for a thought: three quarters of the context, the rest for prompt and answer."""
        return self.context * 3 // 4


@dataclass(frozen=True)
class Launch:
    """What to type, files by name, and what this engine cannot do."""

    commands: tuple[str, ...]
    files: dict[str, str]
    notes: tuple[str, ...]


def settle(
    source: Source,
    model: str,
    recipe: str | None = None,
    profile: str | None = None,
    context: int | None = None,
    revision: str | None = None,
    folder: Path = Path(),
) -> Run:
    """Choose the profile, and YaRN where the context needs it.

    model: as it was typed; folder: where files will be written. Raises UsageError for a context
    that the model does not reach, BadRecipe for an unknown profile.
    """
    for name in (model, str(folder)):
        if not name.isprintable():
            raise BadInput(
                f"The name {printable(name)} has characters that cannot be typed.",
                "It would stand in a command or a file that programs read line by line.",
                "Rename it.",
            )
    chosen = choose_recipe(source, recipe)
    patient = Patient(source, chosen)
    profile_name, settings = _settings(patient, profile)
    context, yarn = _context(patient, context)
    theta = stated_rope(patient.config).get("rope_theta") if patient.container != "gguf" else None
    if isinstance(source, Checkpoint) and source.revision is not None:
        typed = model.removeprefix("hf://").partition("@")[2]
        model, revision = source.name, typed or revision
    else:
        model, revision = os.path.expanduser(model), None
    return Run(
        patient,
        model,
        revision,
        profile_name,
        settings,
        context,
        yarn,
        theta if is_number(theta) else None,
        recipe,
        folder,
    )


def _settings(patient: Patient, name: str | None) -> tuple[str, Profile]:
    """The named profile, else the recipe's first, else what the model's own files say."""
    recipe = patient.recipe
    if recipe is not None and (name is None or name in recipe.profiles):
        return recipe.profile(name)
    if name is not None:
        return name, find_profile(name)
    if patient.container == "gguf":
        keys = {k: v for k, v in patient.metadata.items() if k.startswith(PREFIX)}
    else:
        keys = sampling_from_generation_config(patient.generation or {})
    own = {k.removeprefix(PREFIX): v.data for k, v in keys.items()}
    try:
        return OWN, Profile(**{k: v for k, v in own.items() if k in SAMPLING})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadInput(
            f"The model's own setting {printable('.'.join(map(str, first['loc'])), 60)} is "
            f"{printable(repr(first['input']), 60)}.",
            f"{printable(first['msg'])}.",
            "Choose other settings with --profile; qwq-quant recipes lists them.",
        ) from None


def _context(patient: Patient, wanted: int | None) -> tuple[int, Yarn | None]:
    """(context, the YaRN that it needs). Raises UsageError for one out of reach."""
    stated, scaled = _stated_context(patient)
    context = min(stated, USUAL_CONTEXT) if wanted is None else wanted
    yarn = patient.recipe.yarn if patient.recipe else None
    if yarn is not None and stated > yarn.reach:
        yarn = None  # trained for longer texts than the family that its name fits
    if yarn is not None:
        yarn = Yarn(factor=yarn.factor, original_context=min(yarn.original_context, stated))
    if context < 16:
        raise UsageError(f"--context {context} is too short for a prompt.")
    if scaled or yarn is None:
        if context > stated:
            raise UsageError(
                f"--context {context} is more than the model's {stated}.",
                "It was not trained for longer texts, and no recipe says how to stretch it.",
                f"Take up to {stated}.",
            )
        return context, None
    if context <= yarn.original_context:
        return context, None
    factor = math.ceil(context / yarn.original_context)
    if factor > yarn.factor:
        raise UsageError(
            f"--context {context} is more than YaRN's {yarn.reach}.",
            f"The makers stretch {yarn.original_context} tokens by {yarn.factor:g}, not more.",
            f"Take up to {yarn.reach}.",
        )
    return context, Yarn(factor=float(factor), original_context=yarn.original_context)


def _stated_context(patient: Patient) -> tuple[int, bool]:
    """(the context that the model's files state, whether it is stretched already)."""
    if patient.container == "gguf":
        arch = text_at(patient.metadata, "general.architecture") or ""
        pairs = patient.metadata.items()
        keys = {k.removeprefix(f"{arch}."): v.data for k, v in pairs if k.startswith(f"{arch}.")}
        stated = read_sizes(keys, IN_GGUF)["context"]
        scaled = text_at(patient.metadata, f"{arch}.rope.scaling.type") not in (None, "none")
        where = f"{arch}.context_length"
    else:
        stated = read_sizes(patient.config, IN_CONFIG)["context"]
        scaled = stated_rope(patient.config)["rope_type"] != "default"
        where = f"{SETTINGS}: max_position_embeddings"
    if not is_count(stated):
        raise BadInput(f"The model's context length is not known ({printable(where)}).")
    return stated, scaled
