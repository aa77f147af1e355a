"""Values that the model's recipe expects: told where they differ, for fine-tuners may mean it."""

import math
from collections.abc import Iterator

from quant.doctor.finding import CHECKPOINT, GGUF, WARNING, Check, Seen
from quant.doctor.patient import GENERATION, SETTINGS, Patient
from quant.doctor.rope import is_number, stated_rope
from quant.inspection.architecture import IN_CONFIG, IN_GGUF, read_sizes
from quant.inspection.facts import text_at
from quant.sampling import GGUF_NAMES, PREFIX, sampling_from_generation_config


def norm_eps(patient: Patient) -> Iterator[Seen]:
    stated, place = _stated_eps(patient)
    yield from _unlike("The norm epsilon", place, stated, patient.recipe.expected.rms_norm_eps)


def _stated_eps(patient: Patient) -> tuple[object, str]:
    if patient.container == CHECKPOINT:
        return read_sizes(patient.config, IN_CONFIG)["norm_eps"], f"{SETTINGS}: rms_norm_eps"
    keys = _gguf_keys(patient)
    return read_sizes(keys, IN_GGUF)[
        "norm_eps"
    ], f"{_arch(patient)}.attention.layer_norm_rms_epsilon"


def rope_theta(patient: Patient) -> Iterator[Seen]:
    if patient.container == CHECKPOINT:
        stated, place = stated_rope(patient.config).get("rope_theta"), f"{SETTINGS}: rope_theta"
    else:
        stated = _gguf_keys(patient).get("rope.freq_base")
        place = f"{_arch(patient)}.rope.freq_base"
    yield from _unlike("The rotary base", place, stated, patient.recipe.expected.rope_theta)


def _arch(patient: Patient) -> str:
    return text_at(patient.metadata, "general.architecture") or ""


def _gguf_keys(patient: Patient) -> dict:
    prefix = f"{_arch(patient)}."
    pairs = patient.metadata.items()
    return {k.removeprefix(prefix): v.data for k, v in pairs if k.startswith(prefix)}


def _unlike(what: str, place: str, stated: object, known: list[float]) -> Iterator[Seen]:
    if stated is not None and not (is_number(stated) and _among(stated, known)):
        shown = " or ".join(f"{value:g}" for value in known)
        yield Seen(f"{what} is not its family's.", place, f"{stated}; the family has {shown}")


def _among(value: float, known: list[float]) -> bool:
    return any(math.isclose(value, number, rel_tol=1e-4, abs_tol=1e-9) for number in known)


def generation(patient: Patient) -> Iterator[Seen]:
    """Effective settings: what generate() does about a field that is left out counts too."""
    if patient.generation is None:
        yield Seen(
            "There are no generation settings.",
            GENERATION,
            "the file is missing; generate() then takes the likeliest token every time",
        )
        return
    stated = {
        key.removeprefix(PREFIX): value.data
        for key, value in sampling_from_generation_config(patient.generation).items()
    }
    known = patient.recipe.expected.generation.model_dump()
    if stated.get("temp", 0.0) == 0.0:
        temperatures = " or ".join(f"{t:g}" for t in known["temperature"])
        yield Seen(
            "The likeliest token is taken every time (greedy decoding).",
            f"{GENERATION}: do_sample",
            f"do_sample {patient.generation.get('do_sample')}; the model card has temperature "
            f"{temperatures}",
        )
        return
    for name, key in GGUF_NAMES.items():
        if not _among(stated[key], known[name]):
            card = " or ".join(f"{value:g}" for value in known[name])
            given = patient.generation.get(name)
            shown = f"{given}" if given is not None else f"not stated, so {stated[key]:g}"
            yield Seen(
                f"{name} is not the model card's.",
                f"{GENERATION}: {name}",
                f"{shown}; card: {card}",
            )


def mend_generation(repair, patient: Patient) -> None:
    """The recipe's default profile under generate()'s names; a min_p of 0 is generate()'s own."""
    name, profile = patient.recipe.profile(None)
    settings, content = profile.settings(), repair.edit(GENERATION)
    content["do_sample"] = True
    for theirs, ours in GGUF_NAMES.items():
        content[theirs] = settings[ours]
    if not content["min_p"]:
        del content["min_p"]
    repair.say(f"{GENERATION}: the settings of profile {name}")


CHECKS = (
    Check(
        "norm-eps", WARNING, (CHECKPOINT, GGUF), "the norm epsilon is the family's", norm_eps,
        "The epsilon was part of training. Another one shifts every layer a little, most where "
        "activations are small.",
        "Not mended: a fine-tune may have been trained so. Unsloth tried 1e-6 against QwQ's loops "
        "and found that it did not help.",
        needs_recipe=True,
    ),
    Check(
        "rope-theta", WARNING, (CHECKPOINT, GGUF), "the rotary base is the family's", rope_theta,
        "With another base every position is turned by another angle: fluent for some words, then "
        "nonsense; unless the model was trained so.",
        "Not mended: a long-context fine-tune may have been trained so. For a .gguf file that was "
        "converted wrongly: to-gguf --rope-theta.",
        needs_recipe=True,
    ),
    Check(
        "generation-unlike", WARNING, (CHECKPOINT,), "sampling settings are the model card's",
        generation,
        "The makers measured the model with their settings. Thinking models loop without end under "
        "greedy decoding and at low temperatures.",
        "fix writes the settings of the recipe's first profile.",
        mend_generation, needs_recipe=True,
    ),
)  # fmt: skip
