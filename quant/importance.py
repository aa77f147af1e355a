"""Importance matrices: how much each input column of a weight matters; llama.cpp's two formats.

An error in column j of a weight w (n_rows, n_columns) moves the output by that error times x_j, the
column's input. So encoders weight errors by what a calibration run saw there:

    importance_j = sum over tokens of x_j^2 / n_tokens

Experts see different tokens and have a row of importances each: (n_matrices, n_columns). One row
for all of a layer's experts would be a mean over tokens that most of them never get.

    GGUF      general.type = "imatrix", imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size;
              F32 tensors NAME.in_sum2 (n_matrices, n_columns) sums of x^2,
                          NAME.counts (n_matrices, 1) tokens
    legacy    i32 n_entries | n_entries x (i32 length, name, i32 n_calls, i32 n, f32 values[n])
              [| i32 n_chunks [| i32 length, dataset]]
              values = mean of x^2 times n_calls; neither tokens nor n_matrices are recorded

Values are those that llama-quantize would use, to the last bit.
# ref: common/imatrix-loader.cpp, load_imatrix in tools/quantize/quantize.cpp, save_imatrix in
# tools/imatrix/imatrix.cpp of llama.cpp
"""

import os
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from quant.display import printable
from quant.durable import write_whole
from quant.errors import BadInput, BadRecipe
from quant.gguf_file import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_NAME_BYTES,
    GgufFile,
    Metadata,
    TensorEntry,
    Value,
    encode_header,
    encode_metadata,
    padded,
)
from quant.strict_files import impostor, open_regular
from quant.tensors import TensorInfo, TensorReader

MIN_TOKENS = 16
"""Fewer are refused. A mean of n squared Gaussians is off by sqrt(2 / n), here 35 %, and text is
worse than that; llama-imatrix, too, leaves out batches of fewer than 16."""

ENOUGH_TOKENS = 512
"""Fewer are mentioned: one chunk of llama-imatrix, means off by 6 % at best."""

MAX_IMPORTANCE = 1e15
"""More is refused. Encoders multiply sums of importances with each other in float32: above some
1e16 the search for a scale fails, at 1e38 ggml writes NaN or aborts. No activation is 3e7."""

SMALLEST_BLOCK = 16
"""Columns that share a scale in the format with the fewest (Q3_K, Q6_K)."""

OUTPUT = "output.weight"

_LAYER = re.compile(r"blk\.(\d+)\.")
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class ImportanceMatrix:
    """What a calibration run says about every weight it saw, by GGUF name."""

    path_name: str  # as the user gave it
    values: dict[str, np.ndarray]  # float32 (n_matrices, n_columns), mean of x^2
    n_tokens: dict[str, np.ndarray] = field(default_factory=dict)  # int64 (n_matrices,); GGUF only
    n_chunks: int = 0  # 0: not known
    chunk_size: int = 0  # tokens; 0: not known
    datasets: tuple[str, ...] = ()


def read_importance(path: Path) -> ImportanceMatrix:
    """The importance matrix in `path`, of either format.

    A legacy file does not say how many experts a weight has: its values are all in one row.
    Raises InputMissing, NotPermitted, or BadInput for whatever is damaged or cannot be; what is
    allocated is bounded by the file's size.
    """
    with open_regular(path) as file:
        is_gguf = file.read(len(MAGIC)) == MAGIC
    matrix = _read_gguf(path) if is_gguf else _read_legacy(path)
    for name, values in matrix.values.items():
        _check_values(path, name, values)
    return matrix


def _damaged(path: Path, why: str) -> BadInput:
    return BadInput(
        f"{printable(path)} is no usable importance matrix.",
        f"{why}.",
        "Download it again, or make one: qwq-quant imatrix MODEL -o FILE",
    )


def _check_name(path: Path, name: str) -> None:
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise _damaged(path, f"The name {printable(name)} in it is not UTF-8") from None
    if not 0 < length <= MAX_NAME_BYTES or "\0" in name:
        raise _damaged(path, f'"{printable(name)}" in it cannot be the name of a tensor')


def _check_values(path: Path, name: str, values: np.ndarray) -> None:
    """Raise BadInput unless every value can be a mean of squares."""
    with np.errstate(invalid="ignore"):
        faults = {
            "NaN": np.isnan(values),
            "negative": values < 0,
            "infinite": values == np.inf,
            f"more than {MAX_IMPORTANCE:g}": (values > MAX_IMPORTANCE) & (values < np.inf),
        }
    counts = {what: int(np.count_nonzero(wrong)) for what, wrong in faults.items()}
    if any(counts.values()):
        raise BadInput(
            f"{printable(path)}: {sum(counts.values())} of {values.size} values of "
            f"{printable(name)} are impossible.",
            "A mean square is finite and not negative, but here are: "
            + ", ".join(f"{n} {what}" for what, n in counts.items() if n)
            + ".",
            "Something overflowed in the calibration run, or the file is damaged. "
            "Make another: qwq-quant imatrix MODEL -o FILE",
        )


# --- GGUF -------------------------------------------------------------------------------------


def _read_gguf(path: Path) -> ImportanceMatrix:
    gguf = GgufFile.open(path)
    kind = gguf.metadata.get("general.type", Value("str", "model"))
    if kind != Value("str", "imatrix"):
        raise BadInput(
            f"{printable(path)} is a GGUF file, but no importance matrix.",
            f'Its general.type is "{printable(kind.data)}" instead of "imatrix".',
            "Make one: qwq-quant imatrix MODEL -o FILE",
        )
    n_chunks = _required(gguf, "imatrix.chunk_count", "u32")
    chunk_size = _required(gguf, "imatrix.chunk_size", "u32")
    datasets = _required(gguf, "imatrix.datasets", "arr[str]")
    values, n_tokens = {}, {}
    with TensorReader() as reader:
        for name in _weight_names(gguf):
            sums, counts = _sums_and_counts(gguf, name)
            n_tokens[name] = _read_counts(reader, counts)
            values[name] = _mean_square(
                reader.read_float32(sums, 0, sums.n_rows).reshape(counts.n_weights, -1),
                n_tokens[name],
            )
    if not values:
        raise _damaged(path, "It holds no weights")
    return ImportanceMatrix(
        str(path), values, n_tokens, n_chunks, chunk_size, tuple(map(_clean, datasets))
    )


def _required(gguf: GgufFile, key: str, type_name: str):
    """A metadata value that llama-quantize, too, demands."""
    value = gguf.metadata.get(key)
    if value is None or value.type != type_name:
        raise _damaged(gguf.path, f"Its {key} is {'missing' if value is None else value.type}")
    return value.data


def _clean(text: str) -> str:
    """`text` as UTF-8: a data set is a path on somebody's machine, and may be in any encoding."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _weight_names(gguf: GgufFile) -> list[str]:
    """Of every weight with sums or counts. Other tensors are ignored, as llama.cpp does."""
    names = {
        tensor.removesuffix(suffix)
        for tensor in gguf.tensors
        for suffix in (_SUMS, _COUNTS)
        if tensor.endswith(suffix)
    }
    for name in names:
        _check_name(gguf.path, name)
    return sorted(names)


def _sums_and_counts(gguf: GgufFile, name: str) -> tuple[TensorInfo, TensorInfo]:
    for suffix in (_SUMS, _COUNTS):
        info = gguf.tensors.get(name + suffix)
        if info is None:
            raise _damaged(gguf.path, f"{printable(name + suffix)} is missing")
        if info.dtype != "F32":
            raise _damaged(gguf.path, f"{printable(info.name)} is {info.dtype} instead of F32")
    sums, counts = gguf.tensors[name + _SUMS], gguf.tensors[name + _COUNTS]
    if counts.n_weights not in (1, sums.n_rows):
        why = f"{printable(name)} has {sums.n_rows} rows of sums, but {counts.n_weights} counts"
        raise _damaged(gguf.path, why)
    return sums, counts


def _read_counts(reader: TensorReader, info: TensorInfo) -> np.ndarray:
    """Tokens of each matrix, int64 (n_matrices,), rounded as llama.cpp's lround does."""
    stored = reader.read_float32(info, 0, info.n_rows).reshape(-1)
    if not np.all((stored >= 0) & (stored < 2.0**63)):
        raise _damaged(info.path, f"{printable(info.name)} holds what is no count of tokens")
    return np.floor(stored.astype(np.float64) + 0.5).astype(np.int64)


def _mean_square(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """sums (n_matrices, n_columns) / counts (n_matrices,), in place; 1 where nothing was seen.

    float32 throughout: llama-quantize rounds the count to float32 before it divides.
    """
    n = counts.astype(np.float32)[:, None]
    with np.errstate(all="ignore"):  # a NaN is for _check_values to find
        np.divide(sums, n, out=sums, where=n > 0)
    sums[counts == 0] = 1
    return sums


def write_importance(
    path: Path,
    sums: dict[str, np.ndarray],
    counts: dict[str, np.ndarray],
    chunk_size: int,
    n_chunks: int,
    datasets: Sequence[str],
) -> None:
    """Write what encode_importance gives. Raises CannotCreate or OutputFailed, too."""
    write_whole(path, encode_importance(path, sums, counts, chunk_size, n_chunks, datasets))


def encode_importance(
    path: Path,
    sums: dict[str, np.ndarray],
    counts: dict[str, np.ndarray],
    chunk_size: int,
    n_chunks: int,
    datasets: Sequence[str],
) -> bytes:
    """The file of sums of squared activations as llama-imatrix writes it, byte for byte.

    sums: weight name -> float32 (n_matrices, n_columns), 1 or n_experts matrices;
    counts: weight name -> the tokens in them (n_matrices,). chunk_size is in tokens.
    Raises BadInput, which names `path`, for sums that cannot be.
    """
    _check_measured(path, sums, counts)
    metadata = {
        "general.type": Value("str", "imatrix"),
        "imatrix.datasets": Value("arr[str]", list(datasets)),
        "imatrix.chunk_count": Value("u32", n_chunks),
        "imatrix.chunk_size": Value("u32", chunk_size),
    }
    entries, parts, offset = [], [b""], 0
    for name in sorted(sums):
        for suffix, array in ((_SUMS, sums[name]), (_COUNTS, counts[name][:, None])):
            # GGUF has no trailing dimensions of 1 (ggml_n_dims); ours are reversed.
            shape = array.shape if len(array) > 1 else array.shape[1:]
            entries.append(TensorEntry(name + suffix, shape, "F32", offset))
            data = array.astype("<f4").tobytes()
            parts.append(data.ljust(padded(len(data)), b"\0"))
            offset += len(parts[-1])
    parts[0] = encode_header(encode_metadata(metadata), len(metadata), entries, DEFAULT_ALIGNMENT)
    return b"".join(parts)


def _check_measured(path: Path, sums: dict[str, np.ndarray], counts: dict[str, np.ndarray]) -> None:
    if not sums or sums.keys() != counts.keys():
        raise ValueError("there must be sums, and counts of the same weights")
    for name, array in sums.items():
        if array.dtype != np.float32 or array.ndim != 2 or counts[name].shape != array.shape[:1]:
            raise ValueError(f"{name}: sums {array.dtype} {array.shape}, {counts[name].shape}")
        if (counts[name] < 0).any():
            raise ValueError(f"{name}: a count is negative")
        _check_name(path, name + _SUMS)
        _check_values(path, name, _mean_square(array.copy(), counts[name]))


# --- legacy -----------------------------------------------------------------------------------


class _LegacyFile:
    """Walks over a file of the old format; every length is checked against what is left."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.end = os.fstat(file.fileno()).st_size

    @property
    def left(self) -> int:
        return self.end - self.file.tell()

    def fail(self, why: str) -> BadInput:
        return _damaged(self.path, f"At byte {self.file.tell()}: {why}")

    def take(self, nbytes: int, what: str) -> bytes:
        data = self.file.read(nbytes) if nbytes <= self.left else b""
        if len(data) < nbytes:
            raise self.fail(f"{what} needs {nbytes} bytes, but only {self.left} are left")
        return data

    def number(self, what: str) -> int:
        """An i32 that counts something."""
        (n,) = struct.unpack("<i", self.take(4, what))
        if n < 0:
            raise self.fail(f"{what} is {n}")
        return n

    def entry(self) -> tuple[TensorInfo, int]:
        """Where the values of the next weight lie, and n_calls; the values are skipped."""
        length = self.number("the length of a name")
        if length > MAX_NAME_BYTES:
            raise self.fail(f"a name of {length} bytes; {MAX_NAME_BYTES} are allowed")
        name = self.take(length, "a name").decode("utf-8", "surrogateescape")
        _check_name(self.path, name)
        n_calls = self.number(f"the calls of {printable(name)}")
        n = self.number(f"the number of values of {printable(name)}")
        if not 0 < 4 * n <= self.left:
            raise self.fail(f"{printable(name)} claims {n} values, but {self.left} bytes are left")
        info = TensorInfo(name, (n,), "F32", self.path, self.file.tell(), 4 * n)
        self.file.seek(4 * n, os.SEEK_CUR)
        return info, n_calls

    def entries(self) -> dict[str, tuple[TensorInfo, int]]:
        n_entries = self.number("the number of weights")
        if not 0 < n_entries <= self.left // 17:  # 4 + 1 + 4 + 4 + 4 at least
            raise self.fail(f"{n_entries} weights are claimed, {self.left} bytes are left")
        found = {}
        for _ in range(n_entries):
            info, n_calls = self.entry()
            if info.name in found:
                raise self.fail(f"{printable(info.name)} is there twice")
            found[info.name] = info, n_calls
        return found

    def trailer(self) -> tuple[int, tuple[str, ...]]:
        """n_chunks and the data set; the oldest files have neither."""
        n_chunks = self.number("the number of chunks") if self.left else 0
        length = self.number("the length of the data set's name") if self.left else 0
        dataset = self.take(length, "the data set's name").split(b"\0")[0]
        if self.left:
            raise self.fail(f"{self.left} bytes follow where the file should end")
        return n_chunks, (dataset.decode("utf-8", "replace"),) if dataset else ()


def _read_legacy(path: Path) -> ImportanceMatrix:
    with open_regular(path) as file:
        start = file.read(64)
        # The format has no magic bytes. It starts with a number below 2^24, so with a zero byte
        # among four; what begins as text does not.
        if start and 0 not in start[:4]:
            why = f"It is {impostor(start) or 'neither a GGUF file nor one of the older format'}"
            raise _damaged(path, why)
        file.seek(0)
        legacy = _LegacyFile(path, file)
        entries = legacy.entries()
        n_chunks, datasets = legacy.trailer()
    values = {}
    with TensorReader() as reader:
        for name, (info, n_calls) in entries.items():
            values[name] = reader.read_float32(info, 0, 1)  # (1, n)
            if n_calls > 0:
                values[name] = _mean_square(values[name], np.array([n_calls]))
    return ImportanceMatrix(str(path), values, n_chunks=n_chunks, datasets=datasets)


# --- use --------------------------------------------------------------------------------------


def importance_metadata(matrix: ImportanceMatrix) -> Metadata:
    """The quantize.imatrix.* keys of a file made with `matrix`, of llama-quantize's types.

    Of the matrix's path only the file's name: the rest is about one machine, and may tell a user's.
    """
    metadata = {"quantize.imatrix.file": Value("str", Path(matrix.path_name).name)}
    if matrix.datasets:
        metadata["quantize.imatrix.dataset"] = Value("str", matrix.datasets[0])
    metadata["quantize.imatrix.entries_count"] = Value("u32", len(matrix.values))
    if matrix.n_chunks:
        metadata["quantize.imatrix.chunks_count"] = Value("u32", matrix.n_chunks)
    return metadata


def match_importance(
    matrix: ImportanceMatrix, shapes: dict[str, tuple[int, ...]], needed: set[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The importance of each tensor in `shapes` that has one, and notes for the user.

    shapes: the tensors to be quantized, (out, in) or (n_experts, out, in);
    needed: those of them whose formats are worth nothing without.
    Returns float32 (n_matrices, n_columns): (1, in) or (n_experts, in).
    Raises BadInput for the matrix of another model or of too few tokens (where they are known:
    a legacy file does not tell), BadRecipe if needed tensors have none.
    """
    where = printable(matrix.path_name)
    if not shapes:
        return {}, [f"{where} changes nothing: no tensor is quantized"]
    if not shapes.keys() & matrix.values.keys():
        raise BadInput(
            f"{where} is the importance matrix of another model.",
            f"It knows {_some(matrix.values)}; the model's tensors are {_some(shapes)}.",
            "Make one from this model: qwq-quant imatrix MODEL -o FILE",
        )
    found = {}
    for name, shape in shapes.items():
        if name in matrix.values:
            rows = _rows_for(matrix.values[name], shape)
            if rows is not None:
                found[name] = rows
            elif name != "token_embd.weight":  # llama-quantize, too, lets this one pass
                raise _other_shape(matrix, name, shape)
    _refuse_dead(matrix, found)
    missing = [name for name in shapes if name not in found]
    lacking = sorted(needed - found.keys())
    if lacking:
        raise BadRecipe(
            f"{where} lacks {len(lacking)} of the {len(needed)} tensors that need it.",
            f"{_some(lacking)}: their formats are so small that the result would be garbage.",
            "Matrices leave out output layer and embedding; give those larger formats "
            "(--output-type, --embedding-type)."
            if {*lacking} <= {OUTPUT, "token_embd.weight"}
            else "Take another matrix, or give them a larger format with --tensor-type.",
        )
    notes = [*_notes_on_layers(matrix, shapes), *_notes_on_tokens(matrix, found)]
    if missing:
        notes.append(
            f"{len(missing)} of {len(shapes)} tensors have no importance: {_some(missing)}"
        )
    dead = [name for name, rows in found.items() if _has_dead_block(rows)]
    if dead:
        notes.append(
            f"{len(dead)} of {len(shapes)} tensors have {SMALLEST_BLOCK} or more columns in a row "
            f"whose inputs were always zero; most formats will store zeros there: {_some(dead)}"
        )
    return found, notes


def _refuse_dead(matrix: ImportanceMatrix, found: dict[str, np.ndarray]) -> None:
    """Raise BadInput for a weight whose inputs were always zero: any format would do for it."""
    dead = [name for name, rows in found.items() if len(rows) == 1 and not rows.any()]
    if dead:
        raise BadInput(
            f"{printable(matrix.path_name)} says that the inputs of {len(dead)} weights were "
            "always zero.",
            f"{_some(dead)}: no text does that.",
            "Make another: qwq-quant imatrix MODEL -o FILE",
        )


def _notes_on_layers(matrix: ImportanceMatrix, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Whole layers that only the matrix or only the model has."""
    known, there = (
        {int(match[1]) for name in names if (match := _LAYER.match(name))}
        for names in (matrix.values, shapes)
    )
    notes = []
    if extra := sorted(known - there):
        notes.append(
            f"the importance matrix knows {len(extra)} layers, from {extra[0]} on, that are not "
            "quantized here: was it made from another model?"
        )
    if lacking := sorted(there - known):
        notes.append(
            f"the importance matrix lacks {len(lacking)} of {len(there)} layers, from "
            f"{lacking[0]} on: was it made from another model?"
        )
    return notes


def _some(names: Iterable[str], limit: int = 3) -> str:
    """The first names of many, for a message."""
    names = list(names)
    shown = ", ".join(map(printable, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _rows_for(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """`values` as (n_matrices, n_columns) of that shape; None if they are of another."""
    wanted = prod(shape[:-2]), shape[-1]
    if values.shape in (wanted, (1, prod(wanted))):
        return values.reshape(wanted)
    return None


def _other_shape(matrix: ImportanceMatrix, name: str, shape: tuple[int, ...]) -> BadInput:
    def length(n_matrices: int, n_columns: int) -> str:
        return f"{n_matrices} x {n_columns}" if n_matrices > 1 else f"{n_columns}"

    return BadInput(
        f"{printable(matrix.path_name)} is the importance matrix of another model.",
        f"It has {length(*matrix.values[name].shape)} values for {printable(name)}, whose inputs "
        f"are {length(prod(shape[:-2]), shape[-1])}.",
        "Make one from this model: qwq-quant imatrix MODEL -o FILE",
    )


def _notes_on_tokens(matrix: ImportanceMatrix, found: dict[str, np.ndarray]) -> list[str]:
    """What is to be said about the number of tokens. Raises BadInput if a weight saw too few."""
    counts = {name: matrix.n_tokens[name] for name in found if name in matrix.n_tokens}
    notes = []
    dense = {name: int(n[0]) for name, n in counts.items() if len(n) == 1}
    least = min(dense, key=dense.__getitem__, default=None)
    if least is not None and dense[least] < MIN_TOKENS:
        raise BadInput(
            f"{printable(matrix.path_name)} was made from too few tokens.",
            f"{printable(least)} saw {dense[least]}; {MIN_TOKENS} are the least, "
            f"{ENOUGH_TOKENS} the least that makes sense.",
            "Make one from a longer text: qwq-quant imatrix MODEL --calibration TEXT -o FILE",
        )
    if least is not None and dense[least] < ENOUGH_TOKENS:
        notes.append(
            f"the importance matrix is a rough estimate: {printable(least)} saw "
            f"{dense[least]} tokens, fewer than {ENOUGH_TOKENS}"
        )
    experts = [n for n in counts.values() if len(n) > 1]
    if experts:
        per_matrix = np.concatenate(experts)
        n_unseen = np.count_nonzero(per_matrix == 0)
        n_few = np.count_nonzero((per_matrix > 0) & (per_matrix < MIN_TOKENS))
        if n_unseen:
            notes.append(
                f"{n_unseen} of {per_matrix.size} expert matrices saw no token: "
                "all their columns count alike"
            )
        if n_few:
            notes.append(
                f"{n_few} of {per_matrix.size} expert matrices saw fewer than {MIN_TOKENS} tokens"
            )
    return notes


def _has_dead_block(rows: np.ndarray) -> bool:
    """Whether all columns of some block saw only zeros; a weighted error there is always 0."""
    n_blocks = rows.shape[1] // SMALLEST_BLOCK
    blocks = rows[:, : n_blocks * SMALLEST_BLOCK].reshape(len(rows), n_blocks, SMALLEST_BLOCK)
    return bool((~blocks.any(axis=2)).any())
