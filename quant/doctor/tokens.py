"""Pad, end and other special tokens: the defects that fine-tuning and stopping trip over."""

from collections.abc import Iterator

from quant.doctor.finding import CHECKPOINT, ERROR, GGUF, NOTE, WARNING, Check, Seen
from quant.doctor.patient import GENERATION, SETTINGS, TOKENIZER, Patient, ids_in
from quant.metadata_keys import SPECIAL_IDS
from quant.vocabulary.special_tokens import END_TEXTS, SPECIAL_KEYS, TURN_ENDS

# --- the pad token ----------------------------------------------------------------------------


def pad_missing(patient: Patient) -> Iterator[Seen]:
    if "pad" not in patient.named:
        stated = patient.config.get("pad_token_id")
        evidence = f"no pad_token; {SETTINGS} says pad_token_id {stated}"
        yield Seen("The tokenizer names no pad token.", f"{TOKENIZER}: pad_token", evidence)


def pad_is_eos(patient: Patient) -> Iterator[Seen]:
    pad, eos = patient.named.get("pad"), patient.named.get("eos")
    if pad is not None and pad == eos:
        yield Seen(
            "The pad token is the token that ends an answer.",
            f"{TOKENIZER}: pad_token",
            f"pad_token {pad} = eos_token {eos}",
        )


def pad_outside(patient: Patient) -> Iterator[Seen]:
    pad = patient.named.get("pad")
    if pad is not None and pad not in patient.ids:
        yield Seen(
            "The pad token is not in the vocabulary.", f"{TOKENIZER}: pad_token", f"pad_token {pad}"
        )
    for where, stated in (
        (SETTINGS, patient.config.get("pad_token_id")),
        (GENERATION, (patient.generation or {}).get("pad_token_id")),
        (TOKENIZER, patient.ids.get(pad)),
    ):
        for token in ids_in(stated):
            if _outside(patient, token):
                yield Seen(
                    "The pad token has no row in the embedding.",
                    f"{where}: pad_token{'_id' if where != TOKENIZER else ''}",
                    f"id {token}; the embedding has {patient.n_rows} rows",
                )


def pad_is_stop(patient: Patient) -> Iterator[Seen]:
    pad = patient.named.get("pad")
    if pad is None or pad == patient.named.get("eos"):
        return
    for where, ids in patient.stops.items():
        if patient.ids.get(pad) in ids:
            yield Seen(
                "The pad token is one of the tokens at which generation stops.",
                f"{TOKENIZER}: pad_token",
                f"pad_token {pad} ({patient.ids[pad]}) is in {where} {ids}",
            )
            return


def mend_pad(repair, patient: Patient) -> None:
    repair.set_token("pad", repair.choose_pad(patient))


# --- the end ----------------------------------------------------------------------------------


def eos_disagree(patient: Patient) -> Iterator[Seen]:
    eos = patient.ids.get(patient.named.get("eos"))
    if eos is None:
        return
    for where, ids in patient.stops.items():
        if eos not in ids:
            shown = ", ".join(map(patient.describe, ids))
            yield Seen(
                "Two files disagree about the token that ends an answer.",
                where,
                f"{shown}; the tokenizer's eos_token is {patient.describe(eos)}",
            )


def mend_eos(repair, patient: Patient) -> None:
    """Which file is right: the template shows how a turn ends; else the tokenizer is followed."""
    everyone = {token for ids in patient.stops.values() for token in ids}
    end = patient.turn_end if patient.ids.get(patient.turn_end) in everyone else None
    text = end or patient.named["eos"]
    repair.set_token("eos", text)
    others = [t for t in patient.stops.get(f"{GENERATION}: eos_token_id", []) if t in patient.texts]
    first = patient.ids[text]
    repair.edit(GENERATION)["eos_token_id"] = [first, *(t for t in others if t != first)]


def never_stops(patient: Patient) -> Iterator[Seen]:
    end = patient.turn_end
    if end is None:
        return
    everyone = {token for ids in patient.stops.values() for token in ids}
    if patient.ids.get(end) not in everyone:
        where = "tokenizer.ggml.eot_token_id"
        if patient.container == CHECKPOINT:
            where = f"{GENERATION}: eos_token_id"
        shown = ", ".join(map(patient.describe, sorted(everyone))) or "nowhere"
        yield Seen(
            "The chat template ends a turn with a token at which no program stops.",
            where,
            f"a turn ends with {end} ({patient.ids.get(end)}); generation stops at {shown}",
        )


def mend_never_stops(repair, patient: Patient) -> None:
    repair.set_token("eos", patient.turn_end)
    others = ids_in((patient.generation or {}).get("eos_token_id"))
    ids = [patient.ids[patient.turn_end], *others]
    repair.edit(GENERATION)["eos_token_id"] = list(dict.fromkeys(ids))


# --- all special tokens -----------------------------------------------------------------------


def special_outside(patient: Patient) -> Iterator[Seen]:
    for where, name, token in _stated_ids(patient):
        if _outside(patient, token):
            yield Seen(
                "A special token has an id that no row of the embedding has.",
                f"{where}: {name}" if patient.container == CHECKPOINT else name,
                f"id {token}; the embedding has {patient.n_rows} rows",
            )


def mend_special_outside(repair, patient: Patient) -> None:
    """The id of the tokenizer's own token of that kind, or none."""
    for where, name, token in _stated_ids(patient):
        if not _outside(patient, token):
            continue
        content = repair.edit(where)
        named = patient.ids.get(patient.named.get(name.removesuffix("_token_id")))
        kept = [t for t in ids_in(content.get(name)) if not _outside(patient, t)]
        kept = kept or ids_in(named)
        content[name] = None if not kept else kept if isinstance(content[name], list) else kept[0]


def _stated_ids(patient: Patient) -> Iterator[tuple[str, str, int]]:
    """(file, key, id) of every special token but pad, which has a check of its own."""
    if patient.container == GGUF:
        for key in SPECIAL_IDS:
            if key in patient.metadata:
                for token in ids_in(patient.metadata[key].data):
                    yield "", key, token
        return
    for where, content in ((SETTINGS, patient.config), (GENERATION, patient.generation or {})):
        for kind in SPECIAL_KEYS:
            if kind != "pad":
                for token in ids_in(content.get(f"{kind}_token_id")):
                    yield where, f"{kind}_token_id", token


def _outside(patient: Patient, token: int) -> bool:
    return token < 0 or (patient.n_rows is not None and token >= patient.n_rows)


def too_many_tokens(patient: Patient) -> Iterator[Seen]:
    if patient.n_rows is None:
        return
    beyond = sorted((token, text) for text, token in patient.ids.items() if token >= patient.n_rows)
    if beyond:
        token, text = beyond[0]
        yield Seen(
            "The tokenizer has tokens that the embedding has no row for.",
            "tokenizer.json: added_tokens",
            f"{len(beyond)} tokens beyond the {patient.n_rows} rows, the first {text} ({token})",
        )


def not_special(patient: Patient) -> Iterator[Seen]:
    named = {text for kind, text in patient.named.items() if kind != "unk"}
    control = {*named, *TURN_ENDS, *END_TEXTS, "<|im_start|>"}
    plain = [t for t in patient.added if t.content in control and not t.special]
    if plain:
        yield Seen(
            "Control tokens are marked as ordinary text.",
            "tokenizer.json: added_tokens",
            ", ".join(f"{t.content} ({t.id}) special false" for t in plain),
        )


def mend_not_special(repair, patient: Patient) -> None:
    plain = {t.content for t in patient.added if not t.special}
    control = {text for kind, text in patient.named.items() if kind != "unk"}
    wanted = plain & {*control, *TURN_ENDS, *END_TEXTS, "<|im_start|>"}
    entries = []
    if patient.tokenizer is not None:
        entries += repair.edit("tokenizer.json").get("added_tokens") or []
    if patient.tokenizer_config.get("added_tokens_decoder"):
        entries += repair.edit(TOKENIZER)["added_tokens_decoder"].values()
    for entry in entries:
        if entry.get("content") in wanted:
            entry["special"] = True


BOTH, FOLDER = (CHECKPOINT, GGUF), (CHECKPOINT,)

# Ends before pads: which token may pad depends on which one ends.
CHECKS = (
    Check(
        "eos-disagree", ERROR, FOLDER, "tokenizer, config and generation config end alike",
        eos_disagree,
        "Programs differ in the file they ask: transformers follows generation_config.json, others "
        "config.json or the tokenizer. In some of them answers run on to the length limit.",
        "fix writes the token that the chat template ends a turn with into all of them.",
        mend_eos,
    ),
    Check(
        "never-stops", ERROR, BOTH, "generation stops where the chat template ends a turn",
        never_stops,
        "The model writes that token when it is done, nobody takes notice, and it goes on: with "
        "the user's next question, or with the same answer, until the length limit.",
        "fix adds it to generation_config.json and names it eos_token. For a .gguf file: to-gguf "
        "--override tokenizer.ggml.eot_token_id=u32:ID.",
        mend_never_stops,
    ),
    Check(
        "pad-missing", WARNING, FOLDER, "a pad token is named", pad_missing,
        "Texts of different lengths are padded to make a batch. Without a pad token a trainer "
        "stops with an error, or takes the end token for it and teaches the model not to stop.",
        "fix names one that the model has and that ends nothing (--pad-token chooses).",
        mend_pad,
    ),
    Check(
        "pad-is-eos", WARNING, FOLDER, "the pad token is not the end token", pad_is_eos,
        "Trainers hide pad tokens from the loss. With the end token for padding the end is hidden "
        "too, so a model that is fine-tuned from this one learns never to stop.",
        "fix names another token that the model has (--pad-token chooses).",
        mend_pad,
    ),
    Check(
        "pad-outside", ERROR, FOLDER, "the pad token has a row in the embedding", pad_outside,
        "The first padded batch reads past the embedding: an index error, or a crash on a GPU.",
        "fix names a token that the model has (--pad-token chooses).",
        mend_pad,
    ),
    Check(
        "pad-is-stop", NOTE, FOLDER, "the pad token ends nothing", pad_is_stop,
        "Fine-tuning hides it from the loss, so a tuned model forgets to end documents with it; "
        "turns of a chat end with another token and are not touched.",
        "Only a note: Qwen publishes its models so. Unsloth uses <|vision_pad|> instead: "
        "fix --pad-token '<|vision_pad|>'.",
        mend_pad, opinion=True,
    ),
    Check(
        "special-outside", ERROR, BOTH, "special tokens have rows in the embedding",
        special_outside,
        "A program that uses it reads past the embedding; llama.cpp takes a token of its own "
        "instead, and may stop at every comma.",
        "fix takes the tokenizer's own token of that kind, or none. For a .gguf file: to-gguf "
        "--override KEY=u32:ID.",
        mend_special_outside,
    ),
    Check(
        "too-many-tokens", ERROR, FOLDER, "every token has a row in the embedding",
        too_many_tokens,
        "Text that holds one of them cannot be embedded: an index error in transformers, a refusal "
        "in llama.cpp. It happens when tokens are added and the model is not resized.",
        "Not mended: rows would have to be trained. Use the tokenizer the model was trained with, "
        "or model.resize_token_embeddings() and train.",
    ),
    Check(
        "not-special", WARNING, FOLDER, "control tokens are marked special", not_special,
        "They are printed in answers, for decoding skips special tokens only; and in llama.cpp "
        "they act wherever they stand in a user's text, who can so forge a turn of the chat.",
        "fix sets special true in tokenizer.json and tokenizer_config.json.",
        mend_not_special,
    ),
)  # fmt: skip
