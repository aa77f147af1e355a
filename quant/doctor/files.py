"""The files of a model: small ones that cannot be read, shards, types, tied embeddings, weights."""

from collections.abc import Iterator

import numpy as np

from quant.display import printable
from quant.doctor.finding import CHECKPOINT, ERROR, GGUF, NOTE, WARNING, Check, Seen
from quant.doctor.opening import is_quantized
from quant.doctor.patient import GENERATION, SETTINGS, TOKENIZER, Patient
from quant.errors import QwqQuantError
from quant.finite import count_nonfinite
from quant.gguf_file import GGML_TYPES
from quant.inspection.facts import reason
from quant.inspection.tensor_kinds import kind_of
from quant.source import source_files
from quant.tensors import STORED_DTYPES, TensorInfo, TensorReader

FLOATS = ("F64", "F32", "F16", "BF16")
DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
SLAB = 1 << 24  # weights read at once


def unreadable(patient: Patient) -> Iterator[Seen]:
    for file_name in (GENERATION, TOKENIZER, "tokenizer.json", "special_tokens_map.json"):
        try:
            patient.checkpoint.read_json(file_name)
        except QwqQuantError as error:
            yield Seen("A file of the model cannot be read.", file_name, reason(error))


TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model",
)  # fmt: skip
"""Any of these is one; *.tiktoken too."""


def no_tokenizer(patient: Patient) -> Iterator[Seen]:
    folder = patient.checkpoint.folder
    if not any((folder / name).exists() for name in TOKENIZERS) and not any(
        folder.glob("*.tiktoken")
    ):
        yield Seen("There is no tokenizer.", "tokenizer.json", f"none of {', '.join(TOKENIZERS)}")


def left_over(patient: Patient) -> Iterator[Seen]:
    used = {path.name for path in source_files(patient.source)}
    found = sorted(path.name for path in patient.checkpoint.folder.glob("*.safetensors"))
    extra = [name for name in found if name not in used and not name.startswith("consolidated")]
    if extra:
        more = f" and {len(extra) - 5} more" if len(extra) > 5 else ""
        yield Seen(
            "Shards lie in the folder that the model does not use.",
            "*.safetensors",
            ", ".join(extra[:5]) + more,
        )


def dtype_stated(patient: Patient) -> Iterator[Seen]:
    stated = patient.config.get("dtype", patient.config.get("torch_dtype"))
    stored = _main_dtype(patient)
    if isinstance(stated, str) and stated in DTYPE_NAMES and stored != DTYPE_NAMES[stated]:
        if stored not in FLOATS:
            return
        key = "dtype" if "dtype" in patient.config else "torch_dtype"
        yield Seen(
            "The stated type is not that of the weights.",
            f"{SETTINGS}: {key}",
            f"{stated}, but most weights are stored as {stored}",
        )


def _main_dtype(patient: Patient) -> str:
    weights: dict[str, int] = {}
    for info in patient.source.tensors.values():
        weights[info.dtype] = weights.get(info.dtype, 0) + info.n_weights
    return max(weights, key=weights.__getitem__)


def mend_dtype(repair, patient: Patient) -> None:
    names = {stored: name for name, stored in DTYPE_NAMES.items()}
    config = repair.edit(SETTINGS)
    config["dtype" if "dtype" in config else "torch_dtype"] = names[_main_dtype(patient)]


def mixed(patient: Patient) -> Iterator[Seen]:
    """Matrices alone: norms and biases in float32 beside 16-bit weights are usual."""
    if is_quantized(patient.checkpoint):
        return  # scales lie beside the weights
    counts: dict[str, int] = {}
    for info in patient.source.tensors.values():
        if len(info.shape) > 1 and info.dtype in FLOATS:
            counts[info.dtype] = counts.get(info.dtype, 0) + 1
    if len(counts) > 1:
        yield Seen(
            "Matrices are stored in more than one type.",
            "*.safetensors",
            ", ".join(f"{n} tensors {dtype}" for dtype, n in sorted(counts.items())),
        )


# --- the output layer -------------------------------------------------------------------------


def _head_and_embedding(patient: Patient) -> tuple[TensorInfo | None, TensorInfo | None]:
    kinds = {kind_of(info.name): info for info in patient.source.tensors.values()}
    return kinds.get("output"), kinds.get("embedding")


def head_missing(patient: Patient) -> Iterator[Seen]:
    head, embedding = _head_and_embedding(patient)
    if head is None and embedding is not None and not _tied(patient):
        yield Seen(
            "The output layer is missing, and the embedding is not said to take its place.",
            f"{SETTINGS}: tie_word_embeddings",
            f"{patient.config.get('tie_word_embeddings')}; no lm_head.weight in the shards",
        )


def _tied(patient: Patient) -> bool:
    """transformers 4 takes true where nothing is stated; Qwen and Llama state false themselves."""
    return patient.config.get("tie_word_embeddings", False) is True


def mend_head(repair, patient: Patient) -> None:
    repair.edit(SETTINGS)["tie_word_embeddings"] = True


def head_ignored(patient: Patient) -> Iterator[Seen]:
    head, embedding = _head_and_embedding(patient)
    if not _tied(patient) or head is None or embedding is None:
        return
    if not _equal(head, embedding):
        yield Seen(
            "An output layer is stored that differs from the embedding it is tied to.",
            f"{SETTINGS}: tie_word_embeddings",
            f"true, but {head.name} and {embedding.name} hold other values",
        )


def _equal(a: TensorInfo, b: TensorInfo) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    with TensorReader() as reader:
        for start in range(0, a.nbytes, SLAB):
            n = min(SLAB, a.nbytes - start)
            if not np.array_equal(reader.read_bytes(a, start, n), reader.read_bytes(b, start, n)):
                return False
    return True


# --- weights ----------------------------------------------------------------------------------


def not_finite(patient: Patient) -> Iterator[Seen]:
    for info, n_bad, _ in _measured(patient):
        if n_bad:
            yield Seen(
                "A tensor holds NaN or infinite weights.",
                info.name,
                f"{n_bad} of {info.n_weights} values ({info.dtype})",
            )


def zero_rows(patient: Patient) -> Iterator[Seen]:
    """Matrices; the embedding and the output have rows of tokens that nobody uses."""
    for info, _, n_zero in _measured(patient):
        if n_zero and len(info.shape) > 1 and kind_of(info.name) not in ("embedding", "output"):
            yield Seen(
                "A matrix has rows of zeros alone.",
                info.name,
                f"{n_zero} of {info.n_rows} rows ({info.dtype})",
            )


def _measured(patient: Patient) -> list[tuple[TensorInfo, int, int]]:
    """(tensor, values that are not finite, rows of zeros), read once for both checks."""
    if not hasattr(patient, "measured"):
        with TensorReader() as reader:
            tensors = patient.source.tensors.values()
            patient.measured = [(i, *_measure(reader, i)) for i in tensors if _readable(i)]
    return patient.measured


def _readable(info: TensorInfo) -> bool:
    return info.dtype in FLOATS or info.dtype == "F8_E4M3" or info.dtype in GGML_TYPES


def _measure(reader: TensorReader, info: TensorInfo) -> tuple[int, int]:
    n_bad = n_zero = 0
    step = max(1, SLAB // max(1, info.n_columns))
    for start in range(0, info.n_rows, step):
        stop = min(info.n_rows, start + step)
        if info.dtype in STORED_DTYPES and info.dtype in (*FLOATS, "F8_E4M3"):
            stored = reader.read_stored(info, start, stop)
            n_bad += count_nonfinite(stored, info.dtype)
            n_zero += _rows_of_zeros(stored)
        else:
            w = _decoded(reader, info, start, stop)
            n_bad += int(w.size - np.count_nonzero(np.isfinite(w)))
            n_zero += int(np.count_nonzero(~w.any(axis=1)))
    return n_bad, n_zero


def _rows_of_zeros(stored: np.ndarray) -> int:
    """Rows whose bits are zero but for the sign: 0.0 and -0.0."""
    bits = stored.view(f"u{stored.itemsize}")
    shifted = bits << 1 if bits.itemsize > 1 else bits & 0x7F
    return int(np.count_nonzero(~shifted.any(axis=1)))


def _decoded(reader: TensorReader, info: TensorInfo, start: int, stop: int) -> np.ndarray:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    number, block_size, block_nbytes = GGML_TYPES[info.dtype]
    row_nbytes = info.n_columns // block_size * block_nbytes
    raw = reader.read_bytes(info, start * row_nbytes, (stop - start) * row_nbytes)
    with np.errstate(all="ignore"):
        return dequantize(raw.reshape(stop - start, row_nbytes), GGMLQuantizationType(number))


def token_ids(patient: Patient) -> Iterator[Seen]:
    from quant.doctor.llama import different_ids

    for difference in different_ids(patient.checkpoint):
        yield Seen(
            "llama.cpp cuts a text into other tokens than transformers.",
            "tokenizer.json",
            printable(difference, 300),
        )


FOLDER, BOTH = (CHECKPOINT,), (CHECKPOINT, GGUF)

CHECKS = (
    Check(
        "file-unreadable", ERROR, FOLDER, "small files are valid JSON", unreadable,
        "Programs that ask the file fail; those that do not run with other settings.",
        "Not mended: fetch the file again.",
    ),
    Check(
        "tokenizer-missing", ERROR, FOLDER, "there is a tokenizer", no_tokenizer,
        "No program can read a text with this model. It happens when a trainer saved the weights "
        "alone.",
        "Not mended: copy tokenizer.json and tokenizer_config.json from the model that it was made "
        "from.",
    ),
    Check(
        "shard-left-over", NOTE, FOLDER, "all shards belong to the model", left_over,
        "They take space, and a program that reads every shard it finds mixes two models.",
        "Only a note: fix copies the shards of the model alone.",
    ),
    Check(
        "dtype-stated", WARNING, FOLDER, "the stated type is the weights'", dtype_stated,
        "Programs cast the weights to the stated type: bfloat16 read as float16 overflows above "
        "65504, float32 read as 16 bits loses what was kept on purpose.",
        "fix states the type that most weights have.",
        mend_dtype,
    ),
    Check(
        "dtype-mixed", NOTE, FOLDER, "matrices are of one type", mixed,
        "Loaders cast all to one type; the larger ones were stored for nothing, or are rounded.",
        "Only a note: some makers keep routers or outputs in float32 on purpose.",
    ),
    Check(
        "head-missing", ERROR, FOLDER, "there is an output layer", head_missing,
        "transformers makes one of random numbers, with one line in its log: answers are noise.",
        "fix --apply head-missing says that the embedding takes its place, as it does in models "
        "that are published without one. If a shard was lost, fetch it instead.",
        mend_head, opinion=True,
    ),
    Check(
        "head-ignored", WARNING, FOLDER, "a stored output layer is used", head_ignored,
        "transformers reads the embedding instead, other programs the layer: two models in one.",
        "Not mended: nothing tells which is right. Most often a fine-tune untied them and "
        "tie_word_embeddings should be false.",
    ),
    Check(
        "weights-not-finite", ERROR, BOTH, "weights are finite", not_finite,
        "One NaN spreads through its layer to every token; quantizing spreads it to its block.",
        "Not mended: fetch or train the tensor again. to-gguf --nan-policy zero sets them to zero.",
        deep=True,
    ),
    Check(
        "weights-zero-rows", NOTE, BOTH, "matrices have no rows of zeros", zero_rows,
        "A neuron that always gives zero: pruned on purpose, or a part that was never written.",
        "Only a note.",
        deep=True,
    ),
    Check(
        "token-ids-differ", ERROR, FOLDER, "llama.cpp and transformers cut text alike", token_ids,
        "The GGUF file of this model would read other tokens than it was trained on.",
        "Not mended here: report it with the text; to-gguf --pre-tokenizer may name better rules.",
        deep=True,
    ),
)  # fmt: skip
