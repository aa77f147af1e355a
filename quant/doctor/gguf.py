"""A GGUF file: what llama.cpp would ignore without a word, guess, or do twice."""

from collections.abc import Iterator

from quant.display import printable
from quant.doctor.finding import ERROR, GGUF, NOTE, WARNING, Check, Seen
from quant.doctor.patient import Patient
from quant.errors import BadRecipe
from quant.gguf_file import GgufFile
from quant.inspection.conversation import SPECIAL
from quant.inspection.facts import text_at
from quant.metadata_checks import check_metadata
from quant.metadata_keys import PRE_TOKENIZERS, SAMPLING
from quant.overrides import number
from quant.rope import yarn_magnitude
from quant.sampling import PREFIX, check_sampling, check_sequence

PRE, ADD_BOS = "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token"


def _arch(patient: Patient) -> str:
    return text_at(patient.metadata, "general.architecture") or ""


# --- sampling ---------------------------------------------------------------------------------


def sequence(patient: Patient) -> Iterator[Seen]:
    text = text_at(patient.metadata, PREFIX + "sequence")
    if text is None:
        return
    try:
        check_sequence(text)
    except BadRecipe as error:
        yield Seen(error.what, PREFIX + "sequence", f"{text!r}. {error.why}")


def idle_settings(patient: Patient) -> Iterator[Seen]:
    """Only where the sequence itself is in order."""
    stored = {k: v for k, v in patient.metadata.items() if k.startswith(PREFIX)}
    try:
        warnings = check_sampling(stored)
    except BadRecipe:
        return
    for warning in warnings:
        order = text_at(patient.metadata, PREFIX + "sequence") or "llama.cpp's default sequence"
        yield Seen(warning, PREFIX + "*", order)


def no_sampling(patient: Patient) -> Iterator[Seen]:
    if not any(key.startswith(PREFIX) for key in patient.metadata):
        yield Seen(
            "The file carries no sampling settings.",
            PREFIX + "*",
            "none of the twelve keys is there",
        )


def sampling_unlike(patient: Patient) -> Iterator[Seen]:
    """Against the model card's values and those of every profile of the recipe."""
    recipe = patient.recipe
    card = recipe.expected.generation.model_dump()
    names = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}
    for name in ("temp", "top_k", "top_p", "min_p", "penalty_repeat"):
        key = PREFIX + name
        if key not in patient.metadata or patient.metadata[key].type not in SAMPLING[name].types:
            continue
        profiles = [profile.settings().get(name) for profile in recipe.profiles.values()]
        known = {float(v) for v in [*card[names.get(name, name)], *profiles] if v is not None}
        stored = patient.metadata[key].data
        if all(abs(stored - value) > 1e-4 * max(1, abs(value)) for value in known):
            shown = " or ".join(f"{value:g}" for value in sorted(known))
            yield Seen(
                f"{name} is neither the model card's nor of a profile of its recipe.",
                key,
                f"{stored:g}; known: {shown}",
            )


# --- positions --------------------------------------------------------------------------------


def attn_factor(patient: Patient) -> Iterator[Seen]:
    prefix = f"{_arch(patient)}.rope.scaling."
    stored, factor = (number(patient.metadata, prefix + n) for n in ("attn_factor", "factor"))
    if stored is None or factor is None or text_at(patient.metadata, prefix + "type") != "yarn":
        return
    own = yarn_magnitude(max(factor, 1))
    if own > 1 and abs(stored - own) < 1e-3 * own:
        yield Seen(
            "YaRN's magnitude is applied twice.",
            prefix + "attn_factor",
            f"{stored:.4f} on top of llama.cpp's own 1 + 0.1 ln({factor:g}) = {own:.4f}: "
            f"{stored * own:.4f} in effect",
        )


# --- tokenizer --------------------------------------------------------------------------------


def pre_tokenizer(patient: Patient) -> Iterator[Seen]:
    if text_at(patient.metadata, "tokenizer.ggml.model") != "gpt2":
        return
    pre = text_at(patient.metadata, PRE)
    expected = patient.recipe.expected.pre_tokenizer if patient.recipe else None
    if pre is None:
        yield Seen("The pre-tokenizer is not named.", PRE, "the key is missing")
    elif pre not in PRE_TOKENIZERS:
        yield Seen("llama.cpp does not know the pre-tokenizer.", PRE, pre)
    elif expected is not None and pre != expected:
        yield Seen(
            "The pre-tokenizer is not the family's.", PRE, f"{pre}; the family's is {expected}"
        )


def add_bos(patient: Patient) -> Iterator[Seen]:
    expected = patient.recipe.expected.add_bos
    stored = patient.metadata.get(ADD_BOS)
    if expected is None or stored is None or stored.type != "bool" or stored.data is expected:
        return
    bos = patient.named.get("bos", "no bos token")
    yield Seen(
        f"Every text is {'' if stored.data else 'not '}begun with the bos token.",
        ADD_BOS,
        f"{str(stored.data).lower()} ({bos}); the family has {str(expected).lower()}",
    )


def no_eot(patient: Patient) -> Iterator[Seen]:
    if patient.ids and SPECIAL["eot"] not in patient.metadata and patient.turn_end is not None:
        eos = patient.named.get("eos")
        if patient.turn_end != eos:
            yield Seen(
                "The token that ends a turn is left to llama.cpp to guess.",
                SPECIAL["eot"],
                f"the key is missing; a turn ends with {patient.turn_end}, text with {eos}",
            )


# --- the rest ---------------------------------------------------------------------------------


def file_type(patient: Patient) -> Iterator[Seen]:
    """general.file_type names a mixture; most weights should be of its format."""
    from quant.mixtures import MIXTURES

    stated = number(patient.metadata, "general.file_type")
    mixture = next((m for m in MIXTURES.values() if m.file_type == stated), None)
    weights: dict[str, int] = {}
    for info in patient.source.tensors.values():
        weights[info.dtype] = weights.get(info.dtype, 0) + info.n_weights
    if not weights or stated is None or mixture is None:
        return
    main = max(weights, key=weights.__getitem__)
    if not _fits(main, mixture.name):
        yield Seen(
            "The file is not of the type it names.",
            "general.file_type",
            f"{stated} ({mixture.name}), but most weights are {main}",
        )


def _fits(main: str, mixture: str) -> bool:
    """Whether a file of this mixture may hold mostly this type: mixtures step up and down by one.

    Q3_K_M is mostly Q3_K, Q2_K_S of an odd model mostly something larger, IQ2_M mostly IQ2_S.
    """
    bits = {c for c in mixture if c.isdigit()}
    dense = {"F32", "F16", "BF16"}
    if main in dense or mixture in dense:
        return main == mixture
    return any(abs(int(a) - int(b)) <= 1 for a in bits for b in main if b.isdigit())


def other_metadata(patient: Patient) -> Iterator[Seen]:
    """What the checks of to-gguf say of the keys that no other check looks at, or could read."""
    own = (PREFIX, f"{_arch(patient)}.rope.scaling.attn_factor", *SPECIAL.values())
    rest = {
        key: value
        for key, value in patient.source.metadata.items()
        if not key.startswith(own) or key not in patient.metadata
    }
    try:
        warnings = check_metadata(rest, _arch(patient), patient.n_rows, force=True)
    except BadRecipe as error:
        warnings = [f"{error.what} {error.why}"]
    for warning in warnings:
        yield Seen("A setting is ignored or odd.", "metadata", warning)


def refused(patient: Patient) -> Iterator[Seen]:
    from quant.doctor.llama import load_problem

    assert isinstance(patient.source, GgufFile)
    problem = load_problem(patient.source.path)
    if problem:
        yield Seen(
            "llama.cpp does not load the vocabulary.", printable(patient.source.path), problem
        )


FILE = (GGUF,)

CHECKS = (
    Check(
        "sampling-sequence", ERROR, FILE, "llama.cpp follows the sampler sequence", sequence,
        "llama.cpp drops every name it does not know with one line in its log. A comma for a "
        "semicolon leaves no sampler at all: no temperature, no top-k, no penalty.",
        "to-gguf FILE -o NEW --sampling PROFILE writes a whole set of settings.",
    ),
    Check(
        "sampling-idle", WARNING, FILE, "every stored sampling setting acts", idle_settings,
        "Somebody set it and believes that it works. A repetition penalty that no sampler applies "
        "is why the published cure for QwQ's loops did not cure them.",
        "to-gguf FILE -o NEW --sampling PROFILE writes a set that acts.",
    ),
    Check(
        "sampling-none", NOTE, FILE, "sampling settings travel in the file", no_sampling,
        "llama.cpp then takes its own: temperature 0.8, top-k 40, min-p 0.05.",
        "Only a note: settings can be given on the command line (qwq-quant runtime). to-gguf FILE "
        "-o NEW --sampling PROFILE stores them.",
    ),
    Check(
        "sampling-unlike", WARNING, FILE, "stored settings are the model card's or a profile's",
        sampling_unlike,
        "The makers measured the model with their settings; others may loop or ramble.",
        "to-gguf FILE -o NEW --sampling PROFILE.",
        needs_recipe=True,
    ),
    Check(
        "attn-factor-twice", ERROR, FILE, "YaRN's magnitude is applied once", attn_factor,
        "A circulated recipe says attn_factor 1.1386. llama.cpp multiplies by YaRN's own factor "
        "besides, so attention is too sharp at every length.",
        "to-gguf FILE -o NEW --rope-scaling yarn --rope-factor F --rope-original-context N writes "
        "the scaling anew, without the key.",
    ),
    Check(
        "gguf-pre-tokenizer", ERROR, FILE, "text is cut as in training", pre_tokenizer,
        "Numbers, spaces and contractions are cut elsewhere than in training: other tokens, worse "
        "answers, and no message. A name that llama.cpp does not know keeps the file from loading.",
        "to-gguf FILE -o NEW --pre-tokenizer NAME.",
    ),
    Check(
        "gguf-add-bos", ERROR, FILE, "bos stands where it stood in training", add_bos,
        "A bos token that was not there in training (or is missing) shifts the first, most looked "
        "at, position of every text.",
        "to-gguf FILE -o NEW --override tokenizer.ggml.add_bos_token=bool:VALUE.",
        needs_recipe=True,
    ),
    Check(
        "gguf-no-eot", WARNING, FILE, "the end of a turn is named", no_eot,
        "llama.cpp takes the first text it knows in the order of a hash table: the same file may "
        "stop in one build and run on in another.",
        "to-gguf FILE -o NEW --override tokenizer.ggml.eot_token_id=u32:ID.",
    ),
    Check(
        "gguf-file-type", NOTE, FILE, "the file is of the type it names", file_type,
        "Programs print it and people choose by it; nothing computes with it.",
        "Only a note. to-gguf FILE -o NEW --override general.file_type=u32:N.",
    ),
    Check(
        "gguf-metadata", WARNING, FILE, "other keys are read and sensible", other_metadata,
        "llama.cpp skips a key it does not know, and computes on with one that is off.",
        "to-gguf FILE -o NEW --override KEY=TYPE:VALUE.",
    ),
    Check(
        "llama-cpp-refuses", ERROR, FILE, "the real llama.cpp loads the vocabulary", refused,
        "No program built on llama.cpp can open the file.",
        "Convert it again: to-gguf CHECKPOINT -o NEW.",
        deep=True,
    ),
)  # fmt: skip
