"""A repaired copy of a checkpoint: the same weights, mended small files, whole or not at all.

The source is never written to. Shards are linked (hard links: no space, no time) where the file
system allows it, else copied; small files are always copies, so that editing one later leaves the
source alone. Changes are gathered in memory first, so that a mend that cannot be made is told
before anything is written.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

from quant.checkpoint import Checkpoint
from quant.display import printable
from quant.doctor.checks import CHECKS, examine
from quant.doctor.finding import NOTE, Finding, Report
from quant.doctor.opening import open_folder
from quant.doctor.patient import GENERATION, SETTINGS, TOKENIZER, Patient, Talk
from quant.doctor.rope import is_number, stated_rope, write_yarn
from quant.doctor.template import strip_think
from quant.durable import PendingFolder, translated_errors, write_whole
from quant.errors import BadInput, BadRecipe, UsageError
from quant.estimates import Estimate, reading_seconds, writing_seconds
from quant.inspection.facts import is_count
from quant.manifest import NAME as MANIFEST
from quant.manifest import SourceFile, environment, write_for_folder
from quant.preflight import SMALL_NBYTES, Needs, measure_needs
from quant.recipe import Chosen, choose_recipe
from quant.source import Source, source_files

JINJA = "chat_template.jinja"

USUAL_PADS = ("<|vision_pad|>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>")
"""Tokens that exist for padding, in the vocabularies that people use."""

EXAMINING_NBYTES, EXAMINING_SECONDS = 240 << 20, 1.0
"""Python, numpy and a tokenizer of the usual size, whose files are looked through."""

LAST_PADS = ("<|endoftext|>", "<unk>", "[UNK]")
"""Better than none, where they are not what ends an answer."""


@dataclass(frozen=True)
class Wanted:
    """What to mend: ids of checks, or all that is not a matter of opinion; and three wishes."""

    apply: tuple[str, ...] = ()
    everything: bool = False
    pad_token: str | None = None
    template_think: str = "keep"
    yarn: float | None = None


@dataclass
class Repair:
    """Changes to the small files of a checkpoint, in memory."""

    patient: Patient
    pad_token: str | None = None
    files: dict[str, dict] = field(default_factory=dict)  # file -> its new content
    template: str | None = None
    notes: list[str] = field(default_factory=list)

    def edit(self, file_name: str) -> dict:
        """The content of a JSON file, to be changed in place; an empty one if there is none."""
        if file_name not in self.files:
            content = self.patient.checkpoint.read_json(file_name)
            self.files[file_name] = deepcopy(content) if content is not None else {}
        return self.files[file_name]

    def say(self, note: str) -> None:
        self.notes.append(note)

    def set_token(self, kind: str, text: str) -> None:
        """Name a special token in every file that names or numbers it."""
        token = self.patient.ids[text]
        self.edit(TOKENIZER)[f"{kind}_token"] = text
        if self.patient.checkpoint.read_json("special_tokens_map.json") is not None:
            self.edit("special_tokens_map.json")[f"{kind}_token"] = text
        self.edit(SETTINGS)[f"{kind}_token_id"] = token
        if kind != "eos" and self.patient.generation is not None:
            self.edit(GENERATION)[f"{kind}_token_id"] = token
        self.say(f"{kind}_token is {text} ({token})")

    def choose_pad(self, patient: Patient) -> str:
        """The user's pad token, else the first that the model has and that ends no answer."""
        if self.pad_token is not None:
            return self.pad_token
        by_recipe = patient.recipe.pad_tokens if patient.recipe else []
        n_rows = patient.n_rows or 0
        eos = self.files.get(TOKENIZER, {}).get("eos_token", patient.named.get("eos"))
        for text in (*by_recipe, *USUAL_PADS, *LAST_PADS):
            ends = text in (eos, patient.turn_end)
            if text in patient.ids and patient.ids[text] < n_rows and not ends:
                return text
        raise BadRecipe(
            "No token of this model is known to be fit for padding.",
            "The usual ones are not in its vocabulary, or end its answers.",
            "Name one that it never writes: qwq-quant fix --pad-token TOKEN.",
        )

    def take_template(self, text: str, works: Callable[[Talk], bool]) -> None:
        """Take a changed template if it does, rendered, what it was changed for."""
        talk = self.patient.talk_of(text)
        if not works(talk):
            problem = talk.prompt.problem or talk.history.problem or "it has no effect"
            raise BadRecipe(
                "The chat template could not be mended.",
                f"The usual change does not work in it: {printable(problem)}.",
                "Edit the template by hand.",
            )
        self.template = text

    def contents(self) -> dict[str, bytes]:
        """File name -> new bytes of every file that changes."""
        checkpoint, changed = self.patient.checkpoint, {}
        if self.template is not None:
            if checkpoint.read_text(JINJA) is not None:
                changed[JINJA] = self.template.encode()
            if JINJA not in changed or self.patient.tokenizer_config.get("chat_template"):
                self._store_template(self.edit(TOKENIZER))
        for name, content in self.files.items():
            if content != checkpoint.read_json(name):
                text = json.dumps(content, indent=2, ensure_ascii=False)
                changed[name] = f"{text}\n".encode()
        return changed

    def _store_template(self, content: dict) -> None:
        """In tokenizer_config.json, where every version of transformers looks for one."""
        stored = content.get("chat_template")
        if not isinstance(stored, list):
            content["chat_template"] = self.template
            return
        others = [entry for entry in stored if entry.get("name") != "default"]
        content["chat_template"] = [{"name": "default", "template": self.template}, *others]


@dataclass(frozen=True)
class Plan:
    """What will be written: decided, nothing done yet."""

    checkpoint: Checkpoint
    chosen: Chosen | None
    before: Report
    mended: tuple[str, ...]  # ids of the checks
    notes: tuple[str, ...]
    contents: dict[str, bytes]


def plan_fix(source: Source, recipe: str | None, wanted: Wanted) -> Plan:
    """Examine a checkpoint and decide every change.

    Raises UsageError, BadInput or BadRecipe for a mend that cannot be made; nothing is written.
    """
    if not isinstance(source, Checkpoint):
        raise BadInput(
            f"{printable(source.path)} is a GGUF file.",
            "fix writes checkpoints; a GGUF file's metadata is changed while it is copied.",
            "The doctor names the option of to-gguf for each finding: "
            "qwq-quant to-gguf FILE.gguf -o NEW.gguf ...",
        )
    chosen = choose_recipe(source, recipe)
    before = examine(source, chosen)
    patient = Patient(source, chosen)
    repair = Repair(patient, _checked_pad(patient, wanted.pad_token))
    mended = _mend(repair, patient, _chosen_ids(before, wanted), wanted)
    _grant(wanted, repair, patient, mended)
    plan = Plan(source, chosen, before, tuple(mended), tuple(repair.notes), repair.contents())
    again = wanted.everything and mended
    return _and_what_that_uncovers(plan, recipe, wanted) if again else plan


def _mend(repair: Repair, patient: Patient, ids: list[str], wanted: Wanted) -> list[str]:
    """The checks that were mended. What cannot be is an error where it was named, else a note."""
    mended = []
    for check_id in ids:
        try:
            CHECKS[check_id].mend(repair, patient)
            mended.append(check_id)
        except BadRecipe as error:
            if check_id in wanted.apply:
                raise
            repair.say(f"{check_id} is not mended: {error.what} {error.next_step}")
    return mended


def _and_what_that_uncovers(plan: Plan, recipe: str | None, wanted: Wanted) -> Plan:
    """With --all: one mend may uncover another defect, as a right eos shows a pad equal to it."""
    mended = mended_checkpoint(plan)
    wanted = Wanted(everything=True, pad_token=wanted.pad_token)
    further = set(_chosen_ids(examine(mended, plan.chosen), wanted)) - set(plan.mended)
    if not further:
        return plan
    more = plan_fix(mended, recipe, wanted)
    return replace(
        plan,
        mended=plan.mended + more.mended,
        notes=tuple(dict.fromkeys(plan.notes + more.notes)),
        contents={**plan.contents, **more.contents},
    )


def _checked_pad(patient: Patient, text: str | None) -> str | None:
    if text is None:
        return None
    token = patient.ids.get(text)
    if token is None or token >= (patient.n_rows or 0):
        raise UsageError(
            f"--pad-token {printable(text, 60)} is no token of this model.",
            "It has to be one whole token of the vocabulary, with a row in the embedding.",
            "See tokenizer.json's added_tokens.",
        )
    return text


def _chosen_ids(report: Report, wanted: Wanted) -> list[str]:
    """The checks to mend, each once, in the order of the table."""
    found = {finding.id: finding for finding in report.findings}
    for check_id in wanted.apply:
        _refuse_idle(check_id, found)
    ids = set(wanted.apply)
    if wanted.everything:
        ids |= {i for i, f in found.items() if f.check.mend and not f.check.opinion}
    return [check_id for check_id in CHECKS if check_id in ids]


def _refuse_idle(check_id: str, found: dict[str, Finding]) -> None:
    """Raise UsageError for an --apply that names no finding, or one that cannot be mended."""
    shown = printable(check_id, 60)
    fixable = [i for i, finding in found.items() if finding.check.mend]
    there = f"To be mended here: {', '.join(fixable)}." if fixable else "Nothing can be mended."
    if check_id not in CHECKS:
        raise UsageError(f"--apply {shown} is no check of the doctor.", "", there)
    if check_id not in found:
        raise UsageError(
            f"--apply {shown}: the doctor does not find that in this model.", "", there
        )
    if CHECKS[check_id].mend is None:
        raise UsageError(f"--apply {shown} cannot be mended.", CHECKS[check_id].remedy, there)


def _grant(wanted: Wanted, repair: Repair, patient: Patient, mended: list[str]) -> None:
    """The wishes that are no findings: a pad token, the template's <think>, YaRN."""
    if wanted.pad_token is not None and not any(i.startswith("pad-") for i in mended):
        repair.set_token("pad", wanted.pad_token)
    if wanted.template_think == "strip" and "template-opens-think" not in mended:
        if not patient.talk.opens_think:
            raise UsageError(
                "--template-think strip has nothing to do.",
                "The chat template does not open <think>.",
                "Leave it out.",
            )
        strip_think(repair, patient)
        repair.say("the chat template no longer opens <think>")
    if wanted.yarn is not None:
        _stretch(wanted.yarn, repair, patient)


def _stretch(factor: float, repair: Repair, patient: Patient) -> None:
    """YaRN by `factor` over the recipe's original context, or over config.json's own."""
    if not 1 < factor <= 1000:
        raise UsageError(
            f"--yarn {factor:g} is no factor.", "It is more than 1 and at most 1000, such as 4."
        )
    rope, yarn = stated_rope(patient.config), patient.recipe.yarn if patient.recipe else None
    longest = patient.config.get("max_position_embeddings")
    original = rope.get("original_max_position_embeddings", longest)
    if yarn is not None and is_count(longest):
        original = min(yarn.original_context, longest)
    if not is_number(rope.get("rope_theta")) or not is_count(original):
        raise BadRecipe(
            "YaRN needs rope_theta and max_position_embeddings.",
            "config.json does not state both, and a loader's default may be another one.",
            "Mend rope-incomplete first, or state them.",
        )
    write_yarn(repair.edit(SETTINGS), rope["rope_theta"], factor, original)
    repair.say(f"YaRN: {original} x {factor:g} = {round(original * factor)} tokens, for every text")


@dataclass(frozen=True)
class MendedCheckpoint(Checkpoint):
    """A checkpoint whose small files read as they would be mended; its weights are the source's.

    What to-gguf and dynamic-4bit take with --fix: no folder has to be written first.
    """

    contents: dict[str, bytes] = field(default_factory=dict)

    def read_bytes(self, file_name: str) -> bytes | None:
        changed = self.contents.get(file_name)
        return super().read_bytes(file_name) if changed is None else changed


def mended_checkpoint(plan: Plan) -> MendedCheckpoint:
    """The plan's checkpoint as it will be. Raises BadInput if a mended defect is still there."""
    source, changed = plan.checkpoint, plan.contents.get(SETTINGS)
    earlier = source.contents if isinstance(source, MendedCheckpoint) else {}
    mended = MendedCheckpoint(
        source.folder,
        source.name,
        source.revision,
        source.config if changed is None else json.loads(changed),
        source.tensors,
        {**earlier, **plan.contents},
    )
    _check(plan, examine(mended, plan.chosen))
    return mended


# --- writing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixed:
    """What was written, and what the doctor says of it."""

    folder: Path
    after: Report
    linked: int
    copied: int


def fix_needs(plan: Plan, folder: Path) -> tuple[Needs, Estimate]:
    """What writing it takes: the small files, and shards that cannot be linked.

    Raises UsageError for the source's own folder, CannotCreate for one in no folder.
    """
    _refuse_inside(plan.checkpoint, folder)
    shards, parent = source_files(plan.checkpoint), Path(os.path.abspath(folder)).parent
    kept = _small_files(plan.checkpoint, {path.name for path in shards})
    small = sum((plan.checkpoint.folder / name).stat().st_size for name in kept)
    small += sum(map(len, plan.contents.values()))
    needs = measure_needs(folder, disk=small + SMALL_NBYTES, memory=EXAMINING_NBYTES)
    device = os.stat(parent).st_dev
    copied = [path for path in shards if path.stat().st_dev != device]
    nbytes = sum(path.stat().st_size for path in copied)
    needs = replace(needs, disk=needs.disk + nbytes)
    seconds = EXAMINING_SECONDS + max(
        reading_seconds(copied, nbytes), writing_seconds(parent, small + nbytes)
    )
    return needs, Estimate(seconds)


def write_fix(
    plan: Plan, folder: Path, force: bool = False, command: tuple[str, ...] = ()
) -> Fixed:
    """Write the repaired checkpoint to `folder`, which must not be there unless `force`.

    Raises BadInput if a mended check still finds something, CannotCreate or OutputFailed if it
    cannot be written; nothing is left behind then.
    """
    _refuse_inside(plan.checkpoint, folder)
    pending = PendingFolder(folder, force)
    try:
        with translated_errors(folder):
            linked, files = _fill(plan, pending.temporary)
        written = open_folder(pending.temporary, str(folder))
        after = examine(written, plan.chosen)
        _check(plan, after)
        _write_manifest(plan, pending.temporary, files, after, command)
        pending.publish()
    finally:
        pending.discard()
    return Fixed(folder, after, linked, len(source_files(plan.checkpoint)) - linked)


def _refuse_inside(checkpoint: Checkpoint, folder: Path) -> None:
    source, target = checkpoint.folder.resolve(), folder.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise UsageError(
            f"{printable(folder)} is the model's own folder, inside it, or around it.",
            "The source is never written to.",
            "Choose another folder with -o.",
        )


def _fill(plan: Plan, folder: Path) -> tuple[int, list[dict]]:
    """Put all files of the model into `folder`: how many shards were linked, and every file."""
    linked, files = 0, []
    checkpoint, shards = plan.checkpoint, source_files(plan.checkpoint)
    for path in shards:
        name = path.relative_to(checkpoint.folder).as_posix()
        linked += _link_or_copy(path, folder / name)
        files.append({"name": name, "nbytes": path.stat().st_size})
    kept = _small_files(checkpoint, {path.name for path in shards})
    for name in sorted({*kept, *plan.contents}):
        content = plan.contents.get(name)
        content = checkpoint.read_bytes(name) if content is None else content
        (folder / name).parent.mkdir(exist_ok=True)
        write_whole(folder / name, content)
        digest = hashlib.sha256(content).hexdigest()
        files.append({"name": name, "nbytes": len(content), "sha256": digest})
    return linked, files


def _small_files(checkpoint: Checkpoint, shards: set[str]) -> list[str]:
    """Configs, tokenizers, templates, licences, cards: the visible files but other weights."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
    found = [
        path.name
        for path in sorted(checkpoint.folder.iterdir())
        if path.is_file() and path.name not in shards | {MANIFEST}
        if not path.name.startswith(".") and not path.name.endswith(weights)
    ]
    extra = sorted((checkpoint.folder / "additional_chat_templates").glob("*.jinja"))
    return found + [f"{path.parent.name}/{path.name}" for path in extra]


def _link_or_copy(source: Path, target: Path) -> bool:
    """Whether a hard link was made; across file systems the file is copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    real = source.resolve()
    try:
        os.link(real, target)
        return True
    except OSError:
        shutil.copyfile(real, target)
        return False


def _check(plan: Plan, after: Report) -> None:
    """Raise BadInput if a mended defect is still there: then the mend is at fault."""
    still = {finding.id for finding in after.findings} & set(plan.mended)
    if still:
        raise BadInput(
            f"The repaired model still has: {', '.join(sorted(still))}.",
            "The usual mend does not fit this model, so nothing was written.",
            "Leave it out, and report it.",
        )


def _write_manifest(
    plan: Plan, folder: Path, files: list[dict], after: Report, command: tuple[str, ...]
) -> None:
    """What was mended, from what, and every file in the folder."""
    entry = {
        "command": list(command),
        "source": {
            "model": plan.checkpoint.name,
            "revision": plan.checkpoint.revision,
            "files": [vars(SourceFile.of(path)) for path in source_files(plan.checkpoint)],
        },
        "recipe": plan.chosen.recipe.name if plan.chosen else None,
        "mended": list(plan.mended),
        "changes": list(plan.notes),
        "changed_files": sorted(plan.contents),
        "left": [f.id for f in after.findings if f.severity != NOTE],
        "files": files,
        **environment(),
    }
    write_for_folder(folder, entry)
