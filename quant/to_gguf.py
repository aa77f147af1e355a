"""From a MODEL and the user's wishes to a GGUF file: plan it, then carry the plan out.

`plan_gguf` decides everything from headers alone and returns it as data; `write_gguf` does it.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from quant import manifest
from quant.architectures import (
    assemble,
    check_graph,
    find_architecture,
    hyperparameters,
    read_dimensions,
)
from quant.assembly import Assembly, Piece
from quant.checkpoint import Checkpoint
from quant.convert import Change, Progress, convert
from quant.display import printable
from quant.errors import BadInput, BadRecipe, CannotCreate, InputMissing, UsageError
from quant.formats.format import Format
from quant.gguf_file import GGML_TYPES, GgufFile, Metadata, TensorEntry, Value, split_paths
from quant.importance import importance_metadata, match_importance, read_importance
from quant.metadata import QUANTIZATION_VERSION, general_metadata
from quant.metadata_checks import check_metadata
from quant.mixtures import (
    MIXTURES,
    Choices,
    Mixture,
    Model,
    assign_formats,
    needs_importance,
)
from quant.overrides import apply_overrides, shorthand_overrides
from quant.plan import Assignment, Plan
from quant.preflight import Needs
from quant.rope import rope_overrides
from quant.sampling import read_profile, sampling_from_generation_config
from quant.sinks.gguf import GgufSink, WrittenFile, split_metadata
from quant.source import Source, source_files
from quant.tensors import WEIGHT_DTYPES, TensorReader
from quant.vocabulary import read_vocabulary

DEFAULT_TYPE = "Q8_0"


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
    pre_tokenizer: str | None = None
    max_file_nbytes: int | None = None
    choices: Choices = field(default_factory=Choices)
    imatrix: Path | None = None


@dataclass(frozen=True)
class Job:
    """Everything that will be written, decided: the plan, the metadata, and what to tell."""

    source: Source
    plan: Plan
    metadata: Metadata
    type_name: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What was written."""

    files: tuple[WrittenFile, ...]
    changes: tuple[Change, ...] = field(default=())

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)


def plan_gguf(source: Source, wishes: Wishes) -> Job:
    """Decide every tensor's format and every metadata key. Reads headers and JSON, no weights.

    Raises BadInput, BadRecipe or UsageError; nothing has been written then.
    """
    job = (
        _plan_gguf_copy(source, wishes)
        if isinstance(source, GgufFile)
        else _plan_checkpoint(source, wishes)
    )
    return _with_wishes(job, wishes)


def _plan_checkpoint(checkpoint: Checkpoint, wishes: Wishes) -> Job:
    mixture = MIXTURES[wishes.type_name or DEFAULT_TYPE]
    config = checkpoint.config
    architecture = find_architecture(config)
    size = read_dimensions(architecture, config)
    notes = check_graph(architecture, config)
    tensors, warnings = assemble(architecture, checkpoint, size)
    numbers, rope_warnings = hyperparameters(architecture, config, size)
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
    plan = Plan(tuple(assignments), wishes.max_file_nbytes)
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
    needed = {a.name for a in assignments if needs_importance(a, mixture)}
    if matrix is None:
        if needed:
            raise BadRecipe(
                f"{mixture.name} needs an importance matrix for {len(needed)} tensors, such as "
                f"{printable(min(needed))}.",
                "Without knowing which weights matter, so few bits leave nothing of the model.",
                "Give one with --imatrix FILE (llama.cpp's llama-imatrix makes them), or choose a "
                "larger type.",
            )
        return assignments, {}, []
    shapes = {a.name: a.source.shape for a in assignments if a.format.block_size > 1}
    values, notes = match_importance(matrix, shapes, needed)
    assignments = [replace(a, importance=values.get(a.name)) for a in assignments]
    return assignments, importance_metadata(matrix), notes


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
    if wishes.type_name is None:
        copies = [Assignment(t, _stored_format(t), "copied as it is") for t in tensors]
        type_name, notes = _main_type(tensors), []
    else:
        mixture = MIXTURES[wishes.type_name]
        _refuse_requantizing(gguf, mixture.name)
        copies, more, notes = _assign(tensors, mixture, metadata, wishes)
        metadata, type_name = {**metadata, **more}, mixture.name
        metadata["general.file_type"] = Value("u32", mixture.file_type)
        metadata["general.quantization_version"] = Value("u32", QUANTIZATION_VERSION)
    plan = Plan(tuple(copies), wishes.max_file_nbytes, alignment=gguf.alignment)
    return Job(gguf, plan, metadata, type_name, tuple(notes))


def _stored_format(tensor: Assembly) -> Format:
    """The tensor's own type. Copied bytes are never encoded, so types we cannot encode will do."""
    return Format(tensor.dtype, *GGML_TYPES[tensor.dtype], encode=None, decode=None)


def _main_type(tensors: list[Assembly]) -> str:
    """The type most weights are stored in."""
    weights: dict[str, int] = {}
    for tensor in tensors:
        weights[tensor.dtype] = weights.get(tensor.dtype, 0) + tensor.n_weights
    return max(weights, key=weights.__getitem__)


def _refuse_requantizing(gguf: GgufFile, type_name: str) -> None:
    quantized = [i for i in gguf.tensors.values() if i.dtype not in WEIGHT_DTYPES]
    if quantized:
        raise BadInput(
            f"{printable(gguf.path)} is quantized already: {printable(quantized[0].name)} is "
            f"{quantized[0].dtype}.",
            f"Encoding it again as {type_name} would add one loss to another.",
            "Start from the 16-bit model, or leave --type out to copy the tensors as they are.",
        )


def _with_wishes(job: Job, wishes: Wishes) -> Job:
    """The job with settings, shorthands and overrides applied, and the metadata checked."""
    metadata = dict(job.metadata)
    named = metadata.get("general.architecture")
    architecture = named.data if named is not None and named.type == "str" else ""
    if wishes.sampling is not None:
        metadata = {k: v for k, v in metadata.items() if not k.startswith("general.sampling.")}
        if wishes.sampling != "none":
            metadata |= read_profile(wishes.sampling)
    metadata = rope_overrides(
        architecture,
        scaling=wishes.rope_scaling,
        factor=wishes.rope_factor,
        original_context=wishes.rope_original_context,
        theta=wishes.rope_theta,
        context_length=wishes.context_length,
        current=metadata,
    )
    tensors = {a.name: a.source for a in job.plan.assignments}
    if wishes.rope_scaling is not None and "rope_freqs.weight" in tensors:
        raise UsageError(
            "--rope-scaling cannot be set for a model with Llama 3's own rope factors.",
            "llama.cpp would apply both, one on top of the other.",
        )
    template = wishes.chat_template and _read_template(wishes.chat_template)
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
    return replace(job, metadata=metadata, notes=(*job.notes, *warnings))


def _read_template(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise InputMissing(f"There is no file {printable(path)} (--chat-template).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{printable(path)} (--chat-template) cannot be read: {error}.") from None


# --- writing ----------------------------------------------------------------------------------


def output_path(job: Job, output: Path) -> Path:
    """The file to write: `output` itself, or a file named after model and type in that folder."""
    if not output.is_dir():
        return output
    name = job.metadata.get("general.name", Value("str", "model")).data
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in str(name)).strip("-.")
    return output / f"{safe or 'model'}-{job.type_name}.gguf"


def check_output(job: Job, output: Path, force: bool) -> list[Path]:
    """The files that will be written. Raises CannotCreate if one must not be."""
    paths = split_paths(output, len(job.plan.files))
    sources = source_files(job.source)
    for path in paths:
        if path.is_dir():
            raise CannotCreate(f"{printable(path)} is a folder.")
        if path.is_symlink():
            raise CannotCreate(
                f"{printable(path)} is a symbolic link.",
                "Writing through it could reach a file that others share.",
                "Remove it or choose another name with -o.",
            )
        if any(path.exists() and path.samefile(source) for source in sources):
            raise UsageError(
                f"{printable(path)} is the source itself; choose another name with -o."
            )
        if path.exists() and not force:
            raise CannotCreate(f"{printable(path)} exists already.", "", "Replace it with --force.")
    return paths


def write_gguf(
    job: Job,
    output: Path,
    *,
    force: bool = False,
    nan_policy: str = "refuse",
    progress: Progress = lambda n_weights: None,
    verifying: Callable[[], None] = lambda: None,
) -> Result:
    """Carry out the job. The output appears whole and verified, or not at all.

    Raises OutputFailed, CannotCreate, or BadInput if the weights hold NaN or the source changed.
    """
    paths = check_output(job, output, force)
    before = [manifest.SourceFile.of(path) for path in source_files(job.source)]
    n_files, n_tensors = len(paths), len(job.plan.assignments)
    sinks: list[GgufSink] = []
    changes: list[Change] = []
    try:
        with TensorReader() as reader:
            for index, (path, assignments) in enumerate(zip(paths, job.plan.files, strict=True)):
                metadata = split_metadata(job.metadata, index, n_files, n_tensors)
                entries = [
                    TensorEntry(a.name, a.source.shape, a.format.name, 0) for a in assignments
                ]
                sinks.append(GgufSink(path, metadata, entries, job.plan.alignment))
                changes += convert(
                    assignments, sinks[-1], reader, nan_policy=nan_policy, progress=progress
                )
        verifying()
        files = tuple(sink.finish() for sink in sinks)
        _check_unchanged(job.source, before)
        for sink in sinks:
            sink.publish()
    finally:
        for sink in sinks:
            sink.discard()
    result = Result(files, tuple(changes))
    _record(job, paths[0], result, before)
    return result


def _check_unchanged(source: Source, before: list[manifest.SourceFile]) -> None:
    after = [manifest.SourceFile.of(path) for path in source_files(source)]
    changed = [old.name for old, new in zip(before, after, strict=True) if old != new]
    if changed:
        raise BadInput(
            f"{printable(', '.join(changed))} changed while it was being read.",
            "The output would mix two versions of the model, so it was not kept.",
            "Run the command again when the download or the training has ended.",
        )


def _record(job: Job, path: Path, result: Result, sources: list[manifest.SourceFile]) -> None:
    """Write the output's entry in the manifest."""
    entry = {
        "command": sys.argv[1:],
        "source": {
            "model": str(getattr(job.source, "name", None) or job.source.path),
            "revision": getattr(job.source, "revision", None),
            "files": [asdict(file) for file in sources],
        },
        **result_summary(job, result),
        "tensors": {
            t.entry.name: {"type": t.entry.type, "xxh3_128": t.xxh3_128}
            for file in result.files
            for t in file.tensors
        },
        **manifest.environment(),
    }
    manifest.add_entry(path.parent, path.name, entry)


def result_summary(job: Job, result: Result) -> dict:
    """What was written, for the manifest and `--format json`."""
    return {
        "type": job.type_name,
        "bits_per_weight": round(job.plan.bits_per_weight, 4),
        "files": [
            {"name": file.path.name, "nbytes": file.nbytes, "sha256": file.sha256}
            for file in result.files
        ],
        "changes": [asdict(change) for change in result.changes],
        "notes": list(job.notes),
    }


def describe_json(job: Job, needs: Needs) -> str:
    """The job as JSON, for `--dry-run --format json`."""
    plan = job.plan
    return json.dumps(
        {
            "type": job.type_name,
            "nbytes": plan.nbytes,
            "n_weights": plan.n_weights,
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "files": len(plan.files),
            "needs": {**asdict(needs), "fits": needs.fits},
            "tensors": [
                {
                    "name": a.name,
                    "source": a.source.source_name,
                    "shape": list(a.source.shape),
                    "source_type": a.source.dtype,
                    "type": a.format.name,
                    "nbytes": a.nbytes,
                    "rule": a.rule,
                }
                for a in plan.assignments
            ],
            "notes": list(job.notes),
        },
        indent=1,
    )
