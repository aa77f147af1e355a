"""A model, opened, to everything inspect tells of it: sections of facts, tensor kinds, notes.

The order of the sections is that of printing and the same for both containers, so that `compare`
can walk two descriptions side by side. The section about the file itself is made here; the others
have their own modules. What cannot be read is a section's problem and never an error: a model with
a broken tokenizer still has an architecture.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from quant.architectures import (
    assemble,
    check_graph,
    find_architecture,
    hyperparameters,
    read_dimensions,
)
from quant.checkpoint import Checkpoint
from quant.display import human_bytes
from quant.errors import QwqQuantError
from quant.gguf_file import GgufFile, Metadata
from quant.inspection.architecture import (
    IN_CONFIG,
    IN_GGUF,
    architecture_section,
    read_sizes,
    rope_of_config,
    rope_of_gguf,
)
from quant.inspection.conversation import (
    TOKENS,
    checkpoint_generation,
    checkpoint_templates,
    gguf_generation,
    gguf_templates,
    tokenizer_section,
)
from quant.inspection.facts import (
    Fact,
    Section,
    as_object,
    is_count,
    plain,
    plain_fact,
    reason,
    show,
    text_at,
    texts_at,
)
from quant.inspection.tensor_kinds import (
    TensorKind,
    fold_tensors,
    has_no_head,
    vocabulary_rows,
    weights_section,
)
from quant.source import Source, source_files
from quant.vocabulary import read_vocabulary

CHECKPOINT, GGUF = "safetensors checkpoint", "GGUF"


@dataclass(frozen=True)
class Description:
    """Everything inspect tells of one model. notes: what a conversion would warn about."""

    model: str  # as the user named it
    container: str  # CHECKPOINT or GGUF
    sections: tuple[Section, ...]
    tensors: tuple[TensorKind, ...]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict:
        """One JSON object: sections of raw values, the tensor kinds, problems and notes."""
        return {
            "model": self.model,
            **{s.key: {fact.key: fact.value for fact in s.facts} for s in self.sections},
            "tensors": [kind.as_json() for kind in self.tensors],
            "problems": {s.key: s.problem for s in self.sections if s.problem},
            "notes": list(self.notes),
        }


def describe(source: Source) -> Description:
    """All facts of an opened model. What cannot be read becomes a section's problem, no error."""
    return _describe_gguf(source) if isinstance(source, GgufFile) else _describe_checkpoint(source)


def _describe_checkpoint(checkpoint: Checkpoint) -> Description:
    # A model that also sees or hears keeps the numbers of its text half in `text_config`.
    config = {**checkpoint.config, **as_object(checkpoint.config.get("text_config"))}
    kinds, sizes = fold_tensors(checkpoint.tensors.values()), read_sizes(config, IN_CONFIG)
    name, obstacle, notes = _conversion(checkpoint)
    n_rows = vocabulary_rows(checkpoint.tensors.values()) or config.get("vocab_size")
    tied = config.get("tie_word_embeddings")
    if not isinstance(tied, bool):
        tied = has_no_head(kinds)
    rope = rope_of_config(config, name)
    vocabulary, tokenizer_problem = {}, ""
    try:
        found = read_vocabulary(checkpoint, n_rows if is_count(n_rows) else 0)
        vocabulary, notes = found.metadata(), [*notes, *found.notes]
    except QwqQuantError as error:
        tokenizer_problem = reason(error)
        obstacle = obstacle or "not supported: see Tokenizer"
    sections = (
        _file_section(
            checkpoint,
            plain_fact("class", _class_name(config), own=True),
            *_revision(checkpoint),
            Fact("to_gguf", not obstacle, obstacle or "supported", "to-gguf", own=True),
        ),
        architecture_section(name or _class_name(config), sizes, rope, n_rows, tied),
        weights_section(kinds, sizes),
        tokenizer_section(vocabulary, tokenizer_problem),
        checkpoint_templates(checkpoint),
        checkpoint_generation(checkpoint, config, texts_at(vocabulary, TOKENS)),
    )
    return Description(checkpoint.name, CHECKPOINT, sections, kinds, tuple(notes))


def _describe_gguf(gguf: GgufFile) -> Description:
    metadata = gguf.metadata
    name = text_at(metadata, "general.architecture")
    stated = {
        key.removeprefix(f"{name}."): value.data
        for key, value in metadata.items()
        if name and key.startswith(f"{name}.")
    }
    kinds, sizes = fold_tensors(gguf.tensors.values()), read_sizes(stated, IN_GGUF)
    n_rows = vocabulary_rows(gguf.tensors.values()) or stated.get("vocab_size")
    rope, value_size = rope_of_gguf(gguf, stated), stated.get("attention.value_length")
    sections = (
        _file_section(gguf, *_gguf_facts(metadata)),
        architecture_section(name, sizes, rope, n_rows, has_no_head(kinds), value_size),
        weights_section(kinds, sizes),
        tokenizer_section(metadata),
        gguf_templates(metadata),
        gguf_generation(metadata),
    )
    return Description(str(gguf.path), GGUF, sections, kinds)


def _conversion(checkpoint: Checkpoint) -> tuple[str | None, str, list[str]]:
    """GGUF's name of the architecture, what stands in the way of to-gguf, and its warnings."""
    name, config = None, checkpoint.config
    try:
        architecture = find_architecture(config)
        name = architecture.gguf_name
        size = read_dimensions(architecture, config)
        warnings = check_graph(architecture, config)
        _, more = assemble(architecture, checkpoint, size)
        _, rope_warnings = hyperparameters(architecture, config, size)
    except QwqQuantError as error:
        return name, "not supported: see Notes", [f"to-gguf: {reason(error)}"]
    return name, "", [*warnings, *more, *rope_warnings]


# --- the file ---------------------------------------------------------------------------------


def _file_section(source: Source, *more: Fact) -> Section:
    container = GGUF if isinstance(source, GgufFile) else CHECKPOINT
    paths = source_files(source)
    if container == GGUF:
        n_files, nbytes = max(1, len(paths)), source.nbytes
    else:
        n_files, nbytes = len(paths), sum(path.stat().st_size for path in paths)
    size = Fact("nbytes", nbytes, human_bytes(nbytes), "size on disk")
    kind, count = plain_fact("format", container), plain_fact("files", n_files)
    return Section("File", (kind, count, size, *more))


def _class_name(config: Mapping) -> str | None:
    """The class that transformers builds, from "architectures"; else the model_type."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else config.get("model_type")
    return name if isinstance(name, str) else None


def _revision(checkpoint: Checkpoint) -> list[Fact]:
    """The commit on the hub; a local folder has none."""
    revision = checkpoint.revision
    return [plain_fact("revision", revision, own=True)] if revision else []


def _gguf_facts(metadata: Metadata) -> tuple[Fact, ...]:
    texts = {
        "name": "general.name",
        "license": "general.license",
        "made_by": "general.quantized_by",
        "importance_matrix": "quantize.imatrix.dataset",
    }
    facts = [
        plain_fact(key, text_at(metadata, place), own=True)
        for key, place in texts.items()
        if text_at(metadata, place) is not None
    ]
    file_type = metadata.get("general.file_type")
    if file_type is not None:
        name = _file_type_name(file_type.data)
        facts.append(Fact("file_type", plain(file_type.data), name, "file type", own=True))
    return tuple(facts)


def _file_type_name(number: object) -> str:
    """llama.cpp's name of the mixture: 15 -> "Q4_K_M"."""
    from gguf import LlamaFileType

    try:
        return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return show(plain(number))
