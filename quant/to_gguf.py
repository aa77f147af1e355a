"""From a MODEL and the user's wishes to a planned GGUF file.

Everything is decided here and returned as data; write_gguf.py carries it out. Headers suffice for
that, except where a target size is to be met: then weights are encoded to measure their errors.
"""

from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from quant.architectures import (
    assemble,
    check_graph,
    find_architecture,
    hyperparameters,
    read_dimensions,
)
from quant.assembly import Assembly, Piece
from quant.checkpoint import Checkpoint
from quant.display import human_bytes, printable
from quant.errors import BadInput, BadRecipe, InputMissing, UsageError
from quant.formats import FORMATS
from quant.formats.format import Format
from quant.formats.refined import refined
from quant.gguf_file import (
    GGML_TYPES,
    GgufFile,
    Metadata,
    TensorEntry,
    Value,
    encode_header,
    encode_metadata,
    metadata_nbytes_at_most,
)
from quant.importance import importance_metadata, match_importance, read_importance
from quant.measured_errors import MeasuredErrors
from quant.metadata import QUANTIZATION_VERSION, general_metadata
from quant.metadata_checks import check_metadata
from quant.mixtures import (
    MIXTURES,
    NEEDS_IMPORTANCE,
    Choices,
    Mixture,
    Model,
    assign_formats,
    left_open,
    mostly,
    needs_importance,
)
from quant.overrides import apply_overrides, shorthand_overrides
from quant.plan import PART_NBYTES, Assignment, Plan
from quant.rope import rope_overrides, without_scaling
from quant.sampling import PREFIX, sampling_from_generation_config
from quant.source import Source
from quant.target_size import LADDER, Progress, Target, choose_formats
from quant.tensors import WEIGHT_DTYPES
from quant.vocabulary import read_vocabulary
from quant.vocabulary.pre_tokenizers import check_name

if TYPE_CHECKING:
    from quant.recipe import Chosen  # pydantic takes its time, and a library call need not know it

DEFAULT_TYPE = "Q8_0"

UNDECIDED = MIXTURES["BF16"]
"""Stands for the formats that a target size will choose, until it has."""


@dataclass(frozen=True)
class Wishes:
    """What the user asked for, beyond the model and the output. None means: as the model says."""

    type_name: str | None = None
    name: str | None = None
    overrides: tuple[str, ...] = ()
    force_override: bool = False
    rope_scaling: str | None = None
    rope_factor: float | None = None
    rope_original_context: int | None = None
    rope_theta: float | None = None
    rms_eps: float | None = None
    context_length: int | None = None
    chat_template: Path | None = None
    sampling: str | None = None  # a profile, a TOML file, or "none"
    recipe: "Chosen | None" = None  # its first profile is stored if `sampling` names none
    pre_tokenizer: str | None = None
    max_file_nbytes: int | None = None
    choices: Choices = field(default_factory=Choices)
    imatrix: Path | None = None
    target: Target | None = None  # instead of a type
    refine: bool = False  # slower encoders, lower errors, the same formats


@dataclass(frozen=True)
class Job:
    """Everything that will be written, decided: the plan, the metadata, and what to tell."""

    source: Source
    plan: Plan
    metadata: Metadata
    type_name: str
    notes: tuple[str, ...] = ()


def plan_gguf(
    source: Source,
    wishes: Wishes,
    measuring: Progress = lambda done, total: None,
    kept: MeasuredErrors | None = None,
) -> Job:
    """Decide every tensor's format and every metadata key.

    Reads headers and JSON, and no weights unless a target size is wished for: that reads and
    encodes a sample of every tensor, calls `measuring` after each, and keeps what it finds in
    `kept` for another run.
    Raises BadInput, BadRecipe or UsageError; nothing has been written then.
    """
    _refuse_contradictions(wishes)
    job = (
        _plan_gguf_copy(source, wishes)
        if isinstance(source, GgufFile)
        else _plan_checkpoint(source, wishes)
    )
    job = _with_wishes(job, wishes)
    if wishes.target is not None:
        job = _meet_target(job, wishes, measuring, kept)
    return replace(job, notes=(*job.notes, *_too_large(job.plan)))


def _refuse_contradictions(wishes: Wishes) -> None:
    """Raise UsageError for wishes that cannot both come true."""
    if wishes.target is None:
        return
    given = {"--type": wishes.type_name, "--pure": wishes.choices.pure}
    for option, value in given.items():
        if value:
            raise UsageError(
                f"{option} and a target size exclude each other.",
                "A target size chooses the format of every tensor.",
                "Leave one out. Single tensors can be given a format with --tensor-type.",
            )


def _meet_target(job: Job, wishes: Wishes, measuring: Progress, kept: MeasuredErrors | None) -> Job:
    """The job with formats that make it as large as the target, and its type named accordingly."""
    tensors = [a.source for a in job.plan.assignments]
    architecture = job.metadata["general.architecture"].data
    used = job.metadata.get(f"{architecture}.expert_used_count")
    plan, notes = choose_formats(
        job.plan,
        left_open(tensors, wishes.choices),
        wishes.target,
        header_nbytes=_header_nbytes(job, wishes.target),
        n_experts_used=used.data if used is not None and used.type == "u32" and used.data else 1,
        encoder=_refined if wishes.refine else lambda format: format,
        progress=measuring,
        kept=kept,
    )
    metadata = dict(job.metadata)
    if not any(text.startswith("general.file_type=") for text in wishes.overrides):
        metadata["general.file_type"] = Value("u32", mostly(plan.assignments).file_type)
    return replace(
        job,
        plan=plan,
        metadata=metadata,
        type_name=f"{plan.bits_per_weight:.2f}bpw",
        notes=(*job.notes, *notes),
    )


def _header_nbytes(job: Job, target: Target) -> int:
    """Bytes of the file before its tensors, exactly: formats are numbers of a fixed size.

    At most, if it is to be split: two parts that follow each other hold more than one part may.
    """
    plan = job.plan
    entries = [TensorEntry(a.name, a.source.shape, "F32", 0) for a in plan.assignments]
    encoded = encode_metadata(job.metadata)
    nbytes = len(encode_header(encoded, len(job.metadata), entries, plan.alignment))
    if plan.max_file_nbytes is None or target.file_nbytes is None:
        return nbytes
    n_parts = min(len(entries), 1 + 2 * ceil(target.file_nbytes / plan.max_file_nbytes))
    return nbytes + n_parts * PART_NBYTES


def _plan_checkpoint(checkpoint: Checkpoint, wishes: Wishes) -> Job:
    mixture = MIXTURES[wishes.type_name or DEFAULT_TYPE] if wishes.target is None else UNDECIDED
    config = checkpoint.config
    architecture = find_architecture(config)
    size = read_dimensions(architecture, config)
    notes = check_graph(architecture, config)
    tensors, warnings = assemble(architecture, checkpoint, size)
    rope_config = config if wishes.rope_scaling is None else without_scaling(config)
    numbers, rope_warnings = hyperparameters(architecture, rope_config, size)
    vocabulary = read_vocabulary(checkpoint, size.n_vocab, wishes.pre_tokenizer)
    n_weights = sum(t.n_weights for t in tensors if t.constant is None)
    generation_config = checkpoint.read_json("generation_config.json") or {}
    metadata = {
        **general_metadata(
            checkpoint, architecture.gguf_name, mixture, model_name(checkpoint), n_weights
        ),
        **sampling_from_generation_config(generation_config),
        **numbers,
        **vocabulary.metadata(),
    }
    notes = (*notes, *warnings, *rope_warnings, *vocabulary.notes)
    assignments, more, more_notes = _assign(tensors, mixture, metadata, wishes)
    plan = Plan(tuple(assignments))
    return Job(checkpoint, plan, {**metadata, **more}, mixture.name, (*notes, *more_notes))


def _assign(
    tensors: list[Assembly], mixture: Mixture, metadata: Metadata, wishes: Wishes
) -> tuple[list[Assignment], Metadata, list[str]]:
    """Formats for all tensors, with their importance; metadata and notes about the latter.

    Raises BadRecipe if a format needs an importance matrix and there is none.
    """
    matrix = None if wishes.imatrix is None else read_importance(wishes.imatrix)
    choices = replace(wishes.choices, has_importance=matrix is not None)
    assignments = assign_formats(tensors, mixture, Model.from_metadata(metadata), choices)
    notes = []
    if wishes.refine:
        assignments, notes = _with_refined_encoders(assignments, wishes)
    needed = {a.name: a.format.name for a in assignments if needs_importance(a, mixture)}
    if matrix is None:
        if needed:
            formats = " and ".join(sorted(set(needed.values())))
            raise BadRecipe(
                f"{formats} needs an importance matrix, and {len(needed)} of {len(assignments)} "
                f"tensors get it, such as {printable(min(needed))}.",
                "Without knowing which weights matter, so few bits leave nothing of the model.",
                "Give one with --imatrix FILE (qwq-quant imatrix MODEL -o FILE makes them), or "
                "choose a larger type.",
            )
        return assignments, {}, notes
    undecided = set() if wishes.target is None else left_open(tensors, choices)
    shapes = {
        a.name: a.source.shape
        for a in assignments
        if a.format.block_size > 1 or a.name in undecided
    }
    values, of_matrix = match_importance(matrix, shapes, set(needed))
    assignments = [replace(a, importance=values.get(a.name)) for a in assignments]
    return assignments, importance_metadata(matrix), [*notes, *of_matrix]


def _with_refined_encoders(
    assignments: list[Assignment], wishes: Wishes
) -> tuple[list[Assignment], list[str]]:
    """The assignments, and what there is to say of them.

    Raises UsageError if no format has a refined encoder, and none is still to be chosen.
    """
    if wishes.target is None and all(refined(a.format) is None for a in assignments):
        names = sorted({a.format.name for a in assignments})
        raise UsageError(
            "--refine would change nothing.",
            f"There is no longer search for {' and '.join(names)}.",
            "Leave it out.",
        )
    notes = ["--refine: the same formats with less error, but not the bytes of llama.cpp's tools"]
    plain = {a.format.name for a in assignments if a.format.block_size > 1}
    plain -= {a.format.name for a in assignments if refined(a.format) is not None}
    if plain and wishes.target is None:
        notes.append(f"--refine has no longer search for {' and '.join(sorted(plain))}")
    return [replace(a, format=_refined(a.format)) for a in assignments], notes


def target_encoders(wishes: Wishes) -> list[tuple[Format, bool]]:
    """(format, has importance) of what a target size tries where rows fill blocks of 256."""
    weighted = wishes.imatrix is not None
    names = [name for name in LADDER[256] if weighted or name not in NEEDS_IMPORTANCE]
    formats = [_refined(FORMATS[name]) if wishes.refine else FORMATS[name] for name in names]
    return [(format, weighted) for format in formats]


def _refined(format: Format) -> Format:
    """The format with the encoder that makes the smallest errors."""
    return refined(format) or format


def model_name(checkpoint: Checkpoint) -> str:
    """What to call the model: the repository's name, or the folder's."""
    if checkpoint.revision is not None:
        return checkpoint.name.rpartition("/")[2]
    return checkpoint.folder.resolve().name


def _plan_gguf_copy(gguf: GgufFile, wishes: Wishes) -> Job:
    """The tensors of a GGUF file as they are, or encoded anew if they are 16 bits or more."""
    if not gguf.tensors:
        raise BadInput(f"{printable(gguf.path)} holds no tensors.", "There is nothing to convert.")
    metadata = dict(gguf.metadata)
    tensors = [
        Assembly(info.name, info.shape, (Piece.whole(info),)) for info in gguf.tensors.values()
    ]
    if wishes.type_name is None and wishes.target is None:
        _refuse_idle_choices(wishes)
        copies = [
            Assignment(t, _stored_format(t), "copied as it is", is_copy=True) for t in tensors
        ]
        type_name, notes = _main_type(tensors), []
    else:
        mixture = UNDECIDED if wishes.type_name is None else MIXTURES[wishes.type_name]
        _refuse_requantizing(gguf)
        copies, more, notes = _assign(tensors, mixture, metadata, wishes)
        metadata, type_name = {**metadata, **more}, mixture.name
        metadata["general.file_type"] = Value("u32", mixture.file_type)
        metadata["general.quantization_version"] = Value("u32", QUANTIZATION_VERSION)
    plan = Plan(tuple(copies), alignment=gguf.alignment)
    return Job(gguf, plan, metadata, type_name, tuple(notes))


def _refuse_idle_choices(wishes: Wishes) -> None:
    """Raise UsageError for options that could change nothing where tensors are only copied."""
    choices = wishes.choices
    idle = {
        "--imatrix": wishes.imatrix,
        "--output-type": choices.output_type,
        "--embedding-type": choices.embedding_type,
        "--tensor-type": choices.tensor_types,
        "--pure": choices.pure,
        "--refine": wishes.refine,
    }
    given = [option for option, value in idle.items() if value]
    if given:
        raise UsageError(
            f"{', '.join(given)} would change nothing.",
            "Without a type, the tensors of a GGUF file are copied as they are.",
            "Add --type or a target size, or leave the option out.",
        )


def _stored_format(tensor: Assembly) -> Format:
    """The tensor's own type. Copied bytes are never encoded, so types we cannot encode will do."""
    return Format(tensor.dtype, *GGML_TYPES[tensor.dtype], encode=None, decode=None)


def _main_type(tensors: list[Assembly]) -> str:
    """The type most weights are stored in."""
    weights: dict[str, int] = {}
    for tensor in tensors:
        weights[tensor.dtype] = weights.get(tensor.dtype, 0) + tensor.n_weights
    return max(weights, key=weights.__getitem__)


def _refuse_requantizing(gguf: GgufFile) -> None:
    quantized = [i for i in gguf.tensors.values() if i.dtype not in WEIGHT_DTYPES]
    if quantized:
        raise BadInput(
            f"{printable(gguf.path)} is quantized already: {printable(quantized[0].name)} is "
            f"{quantized[0].dtype}.",
            "Encoding it again would add one loss to another.",
            "Start from the 16-bit model, or leave the type out to copy the tensors as they are.",
        )


def _with_wishes(job: Job, wishes: Wishes) -> Job:
    """The job with settings, shorthands and overrides applied, and the metadata checked."""
    metadata = dict(job.metadata)
    named = metadata.get("general.architecture")
    architecture = named.data if named is not None and named.type == "str" else ""
    metadata, notes = _with_sampling(metadata, wishes)
    metadata = rope_overrides(
        architecture,
        scaling=wishes.rope_scaling,
        factor=wishes.rope_factor,
        original_context=wishes.rope_original_context,
        theta=wishes.rope_theta,
        context_length=wishes.context_length,
        current=metadata,
        force=wishes.force_override,
    )
    tensors = {a.name: a.source for a in job.plan.assignments}
    if wishes.rope_scaling is not None and "rope_freqs.weight" in tensors:
        raise UsageError(
            "--rope-scaling cannot be set for a model with Llama 3's own rope factors.",
            "llama.cpp would apply both, one on top of the other.",
        )
    template = wishes.chat_template and _read_template(wishes.chat_template)
    if wishes.pre_tokenizer is not None and isinstance(job.source, GgufFile):
        metadata["tokenizer.ggml.pre"] = Value("str", check_name(wishes.pre_tokenizer))
    overrides = shorthand_overrides(architecture, wishes.name, wishes.rms_eps, template)
    overrides += wishes.overrides
    metadata = apply_overrides(metadata, overrides, architecture, wishes.force_override)
    embedding = tensors.get("token_embd.weight")
    warnings = check_metadata(
        metadata,
        architecture,
        embedding and embedding.shape[0],
        # A GGUF file that llama.cpp would refuse may still be split or mended here.
        force=wishes.force_override or isinstance(job.source, GgufFile),
    )
    plan = replace(
        job.plan,
        max_file_nbytes=wishes.max_file_nbytes,
        header_nbytes=metadata_nbytes_at_most(metadata),
    )
    return replace(job, plan=plan, metadata=metadata, notes=(*notes, *job.notes, *warnings))


def _with_sampling(metadata: Metadata, wishes: Wishes) -> tuple[Metadata, list[str]]:
    """The profile that was wished for; without one, the recipe's first.

    A recipe that was chosen by the model's name only adds what the model itself does not say.
    """
    if wishes.sampling is None and wishes.recipe is None:
        return metadata, []
    others = {k: v for k, v in metadata.items() if not k.startswith(PREFIX)}
    if wishes.sampling == "none":
        return others, []
    recipe = None if wishes.recipe is None else wishes.recipe.recipe
    if recipe is None or wishes.sampling not in (None, *recipe.profiles):
        from quant.recipe import read_profile  # pydantic takes its time; most runs need none

        return others | read_profile(wishes.sampling), []
    name, profile = recipe.profile(wishes.sampling)
    settings, notes = profile.metadata(), []
    if wishes.sampling is None:
        says = "are those of"
        if not wishes.recipe.named:
            own = {k: v for k, v in metadata.items() if k.startswith(PREFIX)}
            settings |= own
            says = "are the model's own, the rest from" if own else says
        notes.append(
            f"Sampling settings {says} recipe {recipe.name} ({printable(wishes.recipe.why)}), "
            f"profile {printable(name)}; --sampling chooses others, or none."
        )
    if left_out := profile.not_in_gguf():
        missing = ", ".join(f"{key} = {value}" for key, value in left_out.items())
        notes.append(f"GGUF has no key for {missing}: programs have to be told.")
    return others | settings, notes


def _too_large(plan: Plan) -> list[str]:
    """A note about files that --split-max-size cannot keep small."""
    limit = plan.max_file_nbytes
    large = [a for a in plan.assignments if limit is not None and a.nbytes > limit]
    if not large:
        return []
    names = ", ".join(printable(a.name) for a in large[:3]) + (", ..." if len(large) > 3 else "")
    return [f"{len(large)} tensors are larger than {human_bytes(limit)} by themselves: {names}."]


def _read_template(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise InputMissing(f"There is no file {printable(path)} (--chat-template).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{printable(path)} (--chat-template) cannot be read: {error}.") from None
