"""Rotary settings: YaRN with a field missing is not an error anywhere, only a worse model."""

from collections.abc import Iterator

from quant.architectures import find_architecture
from quant.doctor.finding import CHECKPOINT, ERROR, NOTE, WARNING, Check, Seen
from quant.doctor.patient import SETTINGS, Patient
from quant.errors import BadRecipe, QwqQuantError
from quant.inspection.facts import as_object, reason
from quant.rope import DEFAULT_THETA, rope_metadata

FIELDS = ("factor", "original_max_position_embeddings")


def stated_rope(config: dict) -> dict:
    """transformers 4's rope_scaling and 5's rope_parameters as one, nulls dropped."""
    stated = {**as_object(config.get("rope_scaling")), **as_object(config.get("rope_parameters"))}
    if config.get("rope_theta") is not None:
        stated.setdefault("rope_theta", config["rope_theta"])
    stated.setdefault("rope_type", stated.get("type", "default"))
    return {name: value for name, value in stated.items() if value is not None}


def is_number(value: object) -> bool:
    """Whether it can be a setting: finite, and no true. JSON has numbers without a limit."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def unreadable(patient: Patient) -> Iterator[Seen]:
    if _missing(patient):
        return  # told by the next check
    problem = _contradiction(patient.config)
    if problem:
        yield Seen(
            "The rotary settings contradict each other or are out of range.",
            f"{SETTINGS}: rope_parameters, rope_scaling, rope_theta",
            problem,
        )


def _contradiction(config: dict) -> str:
    """What is wrong, or "". Of what we do not convert, only that two places agree is known."""
    try:
        rope_metadata(config, find_architecture(config).gguf_name)
    except QwqQuantError as error:
        if _is_ours(config):
            return reason(error)
    new, old = (as_object(config.get(name)) for name in ("rope_parameters", "rope_scaling"))
    old = {"rope_theta": config.get("rope_theta"), **old}
    differ = [
        f"{name} is {new[name]} in rope_parameters, {old[name]} outside"
        for name in ("rope_theta", *FIELDS)
        if None not in (new.get(name), old.get(name)) and new[name] != old[name]
    ]
    return "; ".join(differ)


def _is_ours(config: dict) -> bool:
    try:
        find_architecture(config)
    except QwqQuantError:
        return False
    return True


def incomplete(patient: Patient) -> Iterator[Seen]:
    for name, instead in _missing(patient).items():
        yield Seen(
            f"The rotary settings lack {name}.",
            f"{SETTINGS}: {_place(patient.config, name)}",
            f"they are {_shown(stated_rope(patient.config))}; transformers takes {instead}",
        )


def _missing(patient: Patient) -> dict[str, str]:
    """Fields that a loader would fill in silently -> with what."""
    config, rope, found = patient.config, stated_rope(patient.config), {}
    scaled = rope["rope_type"] not in ("default", None)
    if "rope_theta" not in rope and _always_states_theta(patient, scaled):
        default = DEFAULT_THETA.get(str(config.get("model_type")), 10000.0)
        found["rope_theta"] = f"{default:g}"
    if rope["rope_type"] == "yarn":
        if "factor" not in rope:
            found["factor"] = "none: it fails, or does not scale"
        if "original_max_position_embeddings" not in rope:
            longest = config.get("max_position_embeddings")
            found["original_max_position_embeddings"] = f"max_position_embeddings, {longest}"
    return found


def _always_states_theta(patient: Patient, scaled: bool) -> bool:
    """Whether a missing theta was lost. Llama 2 and older models mean 10000 by saying nothing."""
    config = patient.config
    if patient.recipe is not None:
        return scaled or 10000.0 not in patient.recipe.expected.rope_theta
    in_new_form = as_object(config.get("rope_parameters")) and _is_ours(config)
    return scaled and bool(in_new_form or str(config.get("model_type")).startswith("qwen"))


def _place(config: dict, name: str = "") -> str:
    """Where the settings stand, or where `name` would: "rope_scaling.factor", "rope_theta"."""
    places = [p for p in ("rope_parameters", "rope_scaling") if as_object(config.get(p))]
    return ".".join(filter(None, [*places[:1], name])) or "rope_scaling"


def _shown(rope: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in rope.items())


def complete(repair, patient: Patient) -> None:
    """Write all four fields, where the recipe or the other fields settle them."""
    config, recipe = patient.config, patient.recipe
    rope, yarn = stated_rope(config), recipe.yarn if recipe else None
    theta = _positive(rope.get("rope_theta"))
    if theta is None:
        known = recipe.expected.rope_theta if recipe else []
        if len(known) != 1:
            raise BadRecipe(
                "rope_theta is missing and not known for this model.",
                "A wrong one makes every position wrong.",
                "Take it from the model that this one was made from; edit config.json by hand.",
            )
        theta = known[0]
    if rope["rope_type"] != "yarn":
        repair.edit(SETTINGS)["rope_theta"] = theta
        for name in ("rope_parameters", "rope_scaling"):
            if as_object(config.get(name)):
                repair.edit(SETTINGS)[name] = {**config[name], "rope_theta": theta}
        return
    longest = _positive(config.get("max_position_embeddings"))
    factor, original = (_positive(rope.get(name)) for name in FIELDS)
    if original is None:
        original = yarn.original_context if yarn else factor and longest and round(longest / factor)
    if factor is None:
        factor = yarn.factor if yarn else original and longest and longest / original
    if not factor or not original:
        raise BadRecipe(
            "YaRN's factor and original context are not known for this model.",
            "Neither config.json nor a recipe states them.",
            "Name a recipe with --recipe, or state both in config.json.",
        )
    write_yarn(repair.edit(SETTINGS), theta, factor, original)


def _positive(value: object) -> float | None:
    """The number, if it can be a theta, a factor or a length."""
    return value if is_number(value) and value > 0 else None


def write_yarn(config: dict, theta: float, factor: float, original: int) -> None:
    """All four fields in transformers 4's form, which 5 and vLLM read too; `type` for the oldest.

    max_position_embeddings becomes what YaRN reaches, for that is the context that programs offer.
    """
    config.pop("rope_parameters", None)
    config["rope_theta"] = theta
    config["rope_scaling"] = {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": int(original),
    }
    config["max_position_embeddings"] = round(original * factor)


def _yarn(patient: Patient) -> tuple[float, int, int] | None:
    """(factor, original context, max_position_embeddings) of whole YaRN settings."""
    rope = stated_rope(patient.config)
    numbers = (*map(rope.get, FIELDS), patient.config.get("max_position_embeddings"))
    usable = all(is_number(n) and n > 0 for n in numbers)
    return numbers if rope["rope_type"] == "yarn" and usable else None


def factor_differs(patient: Patient) -> Iterator[Seen]:
    if (yarn := _yarn(patient)) is None or _useless(*yarn):
        return
    factor, original, longest = yarn
    if round(factor * original) != longest:
        yield Seen(
            "YaRN's factor does not fit the context length.",
            f"{SETTINGS}: max_position_embeddings",
            f"{original} x {factor:g} = {factor * original:g}, but it is {longest}",
        )


def mend_factor(repair, patient: Patient) -> None:
    factor, original, _ = _yarn(patient)
    repair.edit(SETTINGS)["max_position_embeddings"] = round(factor * original)


def _useless(factor: float, original: int, longest: int) -> bool:
    return factor <= 1 or longest <= original


def unneeded(patient: Patient) -> Iterator[Seen]:
    yarn = _yarn(patient)
    if yarn is not None and _useless(*yarn):
        factor, original, longest = yarn
        yield Seen(
            "YaRN is on, and no context needs it.",
            f"{SETTINGS}: {_place(patient.config)}",
            f"factor {factor:g} over {original} tokens, for a context of {longest}",
        )


def always_on(patient: Patient) -> Iterator[Seen]:
    yarn = _yarn(patient)
    if yarn is not None and not _useless(*yarn):
        yield Seen(
            "YaRN is on for every text, also for short ones.",
            f"{SETTINGS}: {_place(patient.config)}",
            f"factor {yarn[0]:g} over {yarn[1]} tokens",
        )


def remove_scaling(repair, patient: Patient) -> None:
    yarn = _yarn(patient)
    theta = stated_rope(patient.config).get("rope_theta")
    config = repair.edit(SETTINGS)
    config.pop("rope_parameters", None)
    config["rope_scaling"] = None
    if theta is not None:
        config["rope_theta"] = theta
    config["max_position_embeddings"] = min(yarn[1:])


FOLDER = (CHECKPOINT,)

CHECKS = (
    Check(
        "rope-incomplete", ERROR, FOLDER, "rotary settings are whole", incomplete,
        "No program complains: transformers 5 fills the gap with a default of its own (theta 10000 "
        "instead of QwQ's 1,000,000, say). The model reads positions it was not trained on.",
        "fix writes theta, type, factor and original context, in the form that transformers 4, 5 "
        "and vLLM read, where the recipe settles them.",
        complete,
    ),
    Check(
        "rope-contradiction", ERROR, FOLDER, "rotary settings agree", unreadable,
        "They stand in two places, and programs differ in which they read: the same model is "
        "another one in another program.",
        "Not mended: nothing tells which is right. Compare with the model it was made from.",
    ),
    Check(
        "rope-factor", WARNING, FOLDER, "YaRN's factor fits the context length", factor_differs,
        "Programs offer max_position_embeddings as the context; YaRN is tuned for its own reach. "
        "transformers only warns, and one of the two numbers is not what was meant.",
        "fix sets max_position_embeddings to original x factor.",
        mend_factor,
    ),
    Check(
        "yarn-unneeded", WARNING, FOLDER, "YaRN is for contexts that need it", unneeded,
        "It changes attention in every text, and gives nothing for it.",
        "fix takes the scaling out and keeps theta.",
        remove_scaling,
    ),
    Check(
        "yarn-always", NOTE, FOLDER, "whether YaRN is always on", always_on,
        "transformers, vLLM and llama.cpp stretch every text alike, whatever its length; the "
        "makers warn that short texts may lose by it.",
        "Only a note: it is right for a model that is kept for long texts. fix --apply yarn-always "
        "takes it out.",
        remove_scaling, opinion=True,
    ),
)  # fmt: skip
