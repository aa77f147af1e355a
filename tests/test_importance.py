"""Importance matrices: the real ggml reads and writes the same bytes; hostile files are refused."""

import ctypes
import os
import struct
import tracemalloc
from pathlib import Path

import ggml_oracle
import gguf
import llama_cpp
import llama_oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_makers import make_model

from quant.errors import BadInput, BadRecipe, InputMissing, QwqQuantError
from quant.formats import FORMATS
from quant.gguf_file import GgufFile, TensorEntry, Value, encode_header, encode_metadata
from quant.importance import (
    ENOUGH_TOKENS,
    MAX_IMPORTANCE,
    MIN_TOKENS,
    ImportanceMatrix,
    importance_metadata,
    match_importance,
    read_importance,
    write_importance,
)
from quant.mixtures import MIXTURES
from quant.source import open_source
from quant.tensors import TensorReader
from quant.to_gguf import Wishes, plan_gguf
from quant.write_gguf import write_gguf

Q, DOWN = "blk.0.attn_q.weight", "blk.1.ffn_down_exps.weight"
N_CHUNKS, CHUNK_SIZE, DATASETS = 3, 512, ["wiki.txt", "文.txt"]


def measured(seed: int = 0) -> tuple[dict, dict]:
    """Sums and counts as a calibration run gives them: a dense weight and four experts."""
    draw = np.random.default_rng(seed)
    sums = {DOWN: draw.gamma(0.5, 3e4, (4, 96)), Q: draw.gamma(0.5, 3e4, (1, 64))}
    counts = {DOWN: np.array([700, 0, 5, 1 << 25 | 1]), Q: np.array([1537])}
    sums[DOWN][1] = 0
    return {name: a.astype(np.float32) for name, a in sums.items()}, counts


def written(path: Path, seed: int = 0) -> Path:
    write_importance(path, *measured(seed), CHUNK_SIZE, N_CHUNKS, DATASETS)
    return path


def legacy_bytes(entries, trailer=b"", n_entries=None) -> bytes:
    """entries: (name, n_calls, values); numbers can be told to lie with (n, values)."""
    parts = [struct.pack("<i", len(entries) if n_entries is None else n_entries)]
    for name, n_calls, values in entries:
        raw = name if isinstance(name, bytes) else name.encode()
        n, values = values if isinstance(values, tuple) else (len(values), values)
        parts += [struct.pack("<i", len(raw)), raw, struct.pack("<ii", n_calls, n)]
        parts.append(np.asarray(values, "<f4").tobytes())
    return b"".join(parts) + trailer


def legacy_trailer(n_chunks: int, dataset: bytes) -> bytes:
    return struct.pack("<ii", n_chunks, len(dataset)) + dataset


# --- the real ggml ----------------------------------------------------------------------------


class _InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)
    ]  # fmt: skip


class _GgufInitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p))]


def ggml(name: str, restype, *arguments):
    """Call a function of libggml-base; str, int, structures and pointers as they come."""
    function = getattr(ggml_oracle.libggml(), name)
    function.restype = restype
    function.argtypes = None
    return function(*[
        a.encode() if isinstance(a, str) else ctypes.c_size_t(a) if isinstance(a, int) else a
        for a in arguments
    ])  # fmt: skip


def llama_save(path: Path, sums, counts, chunk_size, n_chunks, datasets) -> None:
    """IMatrixCollector::save_imatrix of llama.cpp's tools/imatrix, call by call."""
    pointer = ctypes.c_void_p
    context = pointer(ggml("ggml_init", pointer, _InitParams(1 << 20, None, False)))
    out = pointer(ggml("gguf_init_empty", pointer))
    ggml("gguf_set_val_str", None, out, "general.type", "imatrix")
    texts = (ctypes.c_char_p * len(datasets))(*[d.encode() for d in datasets])
    ggml("gguf_set_arr_str", None, out, "imatrix.datasets", texts, len(datasets))
    ggml("gguf_set_val_u32", None, out, "imatrix.chunk_count", n_chunks)
    ggml("gguf_set_val_u32", None, out, "imatrix.chunk_size", chunk_size)
    for name in sorted(sums):
        n_mat, n_columns = sums[name].shape
        columns = {".in_sum2": (n_columns, sums[name]), ".counts": (1, counts[name])}
        for suffix, (ne0, values) in columns.items():
            tensor = pointer(ggml("ggml_new_tensor_2d", pointer, context, 0, ne0, n_mat))
            ggml("ggml_set_name", pointer, tensor, name + suffix)
            data = ggml("ggml_get_data", pointer, tensor)
            ctypes.memmove(data, values.astype(np.float32).tobytes(), 4 * values.size)
            ggml("gguf_add_tensor", None, out, tensor)
    assert ggml("gguf_write_to_file", ctypes.c_bool, out, str(path), ctypes.c_bool(False))
    ggml("gguf_free", None, out)
    ggml("ggml_free", None, context)


def llama_load(path: Path) -> tuple[dict, tuple]:
    """common_imatrix_load and llama-quantize's load_imatrix, for the GGUF format.

    Returns name -> importances, one after another, and (datasets, n_chunks, chunk_size).
    """
    pointer = ctypes.c_void_p
    context = pointer()
    file = pointer(ggml("gguf_init_from_file", pointer, str(path),
                        _GgufInitParams(False, ctypes.pointer(context))))  # fmt: skip
    assert file, "llama.cpp cannot open it"

    def key(name):
        found = ggml("gguf_find_key", ctypes.c_int64, file, name)
        assert found >= 0
        return ctypes.c_int64(found)

    datasets = key("imatrix.datasets")
    assert ggml("gguf_get_arr_type", ctypes.c_int, file, datasets) == 8  # GGUF_TYPE_STRING
    n_datasets = ggml("gguf_get_arr_n", ctypes.c_size_t, file, datasets)
    facts = (
        [ggml("gguf_get_arr_str", ctypes.c_char_p, file, datasets, i).decode()
         for i in range(n_datasets)],
        ggml("gguf_get_val_u32", ctypes.c_uint32, file, key("imatrix.chunk_count")),
        ggml("gguf_get_val_u32", ctypes.c_uint32, file, key("imatrix.chunk_size")),
    )  # fmt: skip
    arrays = {}
    # Of the file, not of the context: that has one tensor more, all data as a blob of int8.
    for i in range(ggml("gguf_get_n_tensors", ctypes.c_int64, file)):
        name = ggml("gguf_get_tensor_name", ctypes.c_char_p, file, i).decode()
        tensor = pointer(ggml("ggml_get_tensor", pointer, context, name))
        assert ggml("gguf_get_tensor_type", ctypes.c_int, file, i) == 0  # GGML_TYPE_F32
        nbytes = ggml("ggml_nbytes", ctypes.c_size_t, tensor)
        data = ggml("ggml_get_data", pointer, tensor)
        arrays[name] = np.frombuffer(ctypes.string_at(data, nbytes), np.float32)
    ggml("gguf_free", None, file)
    ggml("ggml_free", None, context)
    weights = {}
    for name in {n.removesuffix(".in_sum2") for n in arrays if n.endswith(".in_sum2")}:
        sums, counts = arrays[name + ".in_sum2"], arrays[name + ".counts"]
        weights[name] = restated(sums, [int(c + np.copysign(0.5, c)) for c in counts.tolist()])
    return weights, facts


def restated(sums: np.ndarray, counts: list[int]) -> np.ndarray:
    """llama-quantize's load_imatrix, a number at a time."""
    e, ne0 = np.empty(len(sums), np.float32), len(sums) // len(counts)
    for j, n in enumerate(counts):
        count = np.float32(n)
        for i in range(ne0):
            e[j * ne0 + i] = sums[j * ne0 + i] / count if count > 0 else np.float32(1)
    return e


def test_bytes_are_those_ggml_would_write(tmp_path):
    ours, theirs = written(tmp_path / "ours.gguf"), tmp_path / "theirs.gguf"
    llama_save(theirs, *measured(), CHUNK_SIZE, N_CHUNKS, DATASETS)
    assert ours.read_bytes() == theirs.read_bytes()


def test_no_data_sets_are_an_empty_list(tmp_path):
    write_importance(tmp_path / "ours.gguf", *measured(), 0, 0, [])
    llama_save(tmp_path / "theirs.gguf", *measured(), 0, 0, [])
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    assert read_importance(tmp_path / "ours.gguf").datasets == ()


def test_values_are_those_llama_quantize_computes(tmp_path):
    path = written(tmp_path / "i.gguf")
    theirs, facts = llama_load(path)
    ours = read_importance(path)
    assert facts == (list(ours.datasets), ours.n_chunks, ours.chunk_size)
    assert facts == (DATASETS, N_CHUNKS, CHUNK_SIZE)
    assert ours.values.keys() == theirs.keys() == {Q, DOWN}
    for name, values in ours.values.items():
        assert values.dtype == np.float32
        assert values.tobytes() == theirs[name].tobytes(), name
    assert ours.values[DOWN].shape == (4, 96) and ours.values[Q].shape == (1, 64)
    assert np.all(ours.values[DOWN][1] == 1)  # never routed to
    assert ours.n_tokens[DOWN].tolist() == [700, 0, 5, 1 << 25]  # as float32
    assert ours.n_tokens[Q].tolist() == [1537]


def test_gguf_py_reads_it(tmp_path):
    reader = gguf.GGUFReader(written(tmp_path / "i.gguf"))
    keys = ("general.type", "imatrix.chunk_count", "imatrix.chunk_size", "imatrix.datasets")
    assert [reader.fields[k].contents() for k in keys] == [
        "imatrix", N_CHUNKS, CHUNK_SIZE, DATASETS
    ]  # fmt: skip
    shapes = {t.name: (t.tensor_type.name, t.shape.tolist()) for t in reader.tensors}
    assert shapes == {
        f"{Q}.in_sum2": ("F32", [64]),
        f"{Q}.counts": ("F32", [1]),
        f"{DOWN}.in_sum2": ("F32", [96, 4]),
        f"{DOWN}.counts": ("F32", [1, 4]),
    }


def test_fractional_counts_round_as_lround(tmp_path):
    sums, counts = measured()
    counts = {DOWN: np.array([0.4, 0.5, 2.5, 1.4]), Q: np.array([16.5])}
    llama_save(tmp_path / "i.gguf", sums, counts, CHUNK_SIZE, N_CHUNKS, DATASETS)
    ours, (theirs, _) = read_importance(tmp_path / "i.gguf"), llama_load(tmp_path / "i.gguf")
    assert ours.n_tokens[DOWN].tolist() == [0, 1, 3, 1] and ours.n_tokens[Q].tolist() == [17]
    assert all(ours.values[name].tobytes() == theirs[name].tobytes() for name in theirs)


def test_one_count_for_all_matrices(tmp_path):
    """Of a 3-D weight that is no expert's, llama-imatrix writes one count and one long row."""
    name, sums = "blk.0.attn_k_b.weight", np.arange(1, 129, dtype=np.float32)[None]
    write_importance(tmp_path / "i.gguf", {name: sums}, {name: np.array([600])}, 512, 1, [])
    found, _ = match_importance(read_importance(tmp_path / "i.gguf"), {name: (4, 8, 32)}, set())
    assert np.array_equal(found[name], (sums / np.float32(600)).reshape(4, 32))


# --- the legacy format ------------------------------------------------------------------------


def test_legacy_values(tmp_path):
    draw = np.random.default_rng(1)
    entries = [(Q, 7, draw.gamma(0.5, 9.0, 64)), (DOWN, 0, draw.gamma(0.5, 9.0, 4 * 96))]
    path = tmp_path / "i.dat"
    path.write_bytes(legacy_bytes(entries, legacy_trailer(7, b"wiki.txt")))
    matrix = read_importance(path)
    assert matrix.n_chunks == 7 and matrix.datasets == ("wiki.txt",) and matrix.n_tokens == {}
    for name, n_calls, values in entries:
        expected = [
            np.float32(v) / np.float32(n_calls) if n_calls else np.float32(v) for v in values
        ]
        assert matrix.values[name].tobytes() == np.array(expected, np.float32).tobytes()
        assert matrix.values[name].shape == (1, len(values))
    found, notes = match_importance(matrix, {Q: (8, 64), DOWN: (4, 8, 96)}, {Q, DOWN})
    assert found[DOWN].shape == (4, 96) and notes == []
    assert np.array_equal(found[DOWN][2], matrix.values[DOWN][0, 192:288])


def test_legacy_round_trip_by_the_writer_s_formula(tmp_path):
    """save_imatrix_legacy stores (sum / count) * n_calls; what comes back is the mean."""
    sums, counts = measured()
    n_calls = -(-int(counts[Q][0]) // CHUNK_SIZE)
    stored = (sums[Q][0] / np.float32(counts[Q][0])) * np.float32(n_calls)
    (tmp_path / "i.dat").write_bytes(legacy_bytes([(Q, n_calls, stored)]))
    values = read_importance(tmp_path / "i.dat").values[Q][0]
    np.testing.assert_allclose(values, sums[Q][0] / counts[Q][0], rtol=3e-7)


@pytest.mark.parametrize(
    ("trailer", "n_chunks", "datasets"),
    [
        (b"", 0, ()),
        (struct.pack("<i", 5), 5, ()),
        (legacy_trailer(5, b""), 5, ()),
        (legacy_trailer(5, b"a.txt\0hidden"), 5, ("a.txt",)),
        (legacy_trailer(5, b"\xff.txt"), 5, ("\ufffd.txt",)),
    ],
)
def test_legacy_trailers(trailer, n_chunks, datasets, tmp_path):
    (tmp_path / "i.dat").write_bytes(legacy_bytes([(Q, 1, [1.0])], trailer))
    matrix = read_importance(tmp_path / "i.dat")
    assert (matrix.n_chunks, matrix.datasets) == (n_chunks, datasets)


@pytest.mark.parametrize("n_entries", [91, 123])  # "[" and "{"
def test_legacy_numbers_that_look_like_text(n_entries, tmp_path):
    entries = [(f"blk.{i}.attn_q.weight", 1, [1.0]) for i in range(n_entries)]
    (tmp_path / "i.dat").write_bytes(legacy_bytes(entries))
    assert len(read_importance(tmp_path / "i.dat").values) == n_entries


# --- bad files --------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")

BAD_LEGACY = {
    "empty": (b"", "0 are left"),
    "no weights": (struct.pack("<i", 0) + b"\1" * 60, "0 weights are claimed"),
    "negative weights": (struct.pack("<i", -1 << 24), "is -16777216"),
    "too many weights": (legacy_bytes([(Q, 1, [1.0])], n_entries=9_999_999), "9999999 weights"),
    "one weight too many": (legacy_bytes([(Q, 1, [1.0] * 9)], n_entries=2), "needs 4 bytes"),
    "long name": (legacy_bytes([("x" * 64, 1, [1.0])]), "name of 64 bytes"),
    "negative name": (struct.pack("<ii", 1, -5) + b"x" * 30, "length of a name is -5"),
    "name cut off": (struct.pack("<ii", 1, 60) + b"x" * 30, "60 bytes, but only 30"),
    "no name": (legacy_bytes([("", 1, [1.0] * 9)]), "name of a tensor"),
    "name not UTF-8": (legacy_bytes([(b"blk.\xff.weight", 1, [1.0])]), r"blk\.\\udcff.*not UTF-8"),
    "NUL in a name": (legacy_bytes([(b"blk.\0.weight", 1, [1.0])]), r"blk\.\\x00"),
    "control characters": (legacy_bytes([(b"\x1b[2J", -1, [1.0])]), r"\\x1b\[2J is -1"),
    "name twice": (legacy_bytes([(Q, 1, [1.0]), (Q, 1, [2.0])]), f"{Q} is there twice"),
    "negative calls": (legacy_bytes([(Q, -7, [1.0])]), f"{Q} is -7"),
    "no values": (legacy_bytes([(Q, 1, (0, [1.0]))]), "claims 0 values"),
    "negative values": (legacy_bytes([(Q, 1, (-2, [1.0]))]), f"values of {Q} is -2"),
    "too many values": (legacy_bytes([(Q, 1, (2**31 - 1, [1.0]))]), "claims 2147483647 values"),
    "truncated": (legacy_bytes([(Q, 1, [1.0] * 64)])[:-1], "claims 64 values, but 255 bytes"),
    "half a number": (legacy_bytes([(Q, 1, [1.0])], b"\5\0"), "chunks needs 4 bytes, but only 2"),
    "negative chunks": (legacy_bytes([(Q, 1, [1.0])], legacy_trailer(-5, b"")), "chunks is -5"),
    "data set cut": (legacy_bytes([(Q, 1, [1.0])], legacy_trailer(5, b"ab")[:-1]), "2 bytes"),
    "data set huge": (legacy_bytes([(Q, 1, [1.0])], struct.pack("<ii", 5, 1 << 30)), "1073741824"),
    "more at the end": (
        legacy_bytes([(Q, 1, [1.0])], legacy_trailer(5, b"ab") + b"x"),
        "1 bytes f",
    ),
    "NaN": (legacy_bytes([(Q, 3, [1.0, NAN, NAN])]), f"2 of 3 values of {Q}.*\n.*2 NaN"),
    "negative": (legacy_bytes([(Q, 3, [1.0, -1.0, 2.0])]), f"1 of 3 values of {Q}.*\n.*1 negative"),
    "infinite": (legacy_bytes([(Q, 3, [1.0, INF])]), f"1 of 2 values of {Q}.*\n.*1 infinite"),
    "too large": (legacy_bytes([(Q, 3, [1.0, 4e15])]), f"1 of 2 values of {Q}.*\n.*1 more than 1e"),
    "overflowing": (legacy_bytes([(Q, 1, [1.0, 1e20])]), f"1 of 2 values of {Q}.*\n.*1 more than"),
    "JSON": (b'{"model": 1}', "JSON"),
    "a web page": (b"<!DOCTYPE html><html>", "web page"),
    "git-LFS": (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS"),
    "text": (b"blk.0.attn_q.weight 1.0 2.0", "neither a GGUF file nor"),
    "pickle": (b"\x80\x02}q\x00.", "pickle"),
}


@pytest.mark.parametrize("case", BAD_LEGACY)
def test_bad_legacy_files(case, tmp_path):
    raw, message = BAD_LEGACY[case]
    (tmp_path / "i.dat").write_bytes(raw)
    check_refusal(tmp_path / "i.dat", message)


def check_refusal(path: Path, message: str) -> None:
    """Reading fails with BadInput in three parts, without allocating what the file claims."""
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match=path.name) as caught:
            read_importance(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.match(message)
    error = caught.value
    assert error.what and error.why and error.next_step and error.exit_code == 65
    assert all(c.isprintable() for c in f"{error.what}{error.why}{error.next_step}")
    assert peak < 1 << 20


METADATA = {
    "general.type": Value("str", "imatrix"),
    "imatrix.datasets": Value("arr[str]", ["wiki.txt"]),
    "imatrix.chunk_count": Value("u32", 3),
    "imatrix.chunk_size": Value("u32", 512),
}
SUMS, COUNTS = f"{Q}.in_sum2", f"{Q}.counts"
TENSORS = {SUMS: np.ones((4, 8), np.float32), COUNTS: np.full((4, 1), 600, np.float32)}


def gguf_bytes(metadata=None, tensors=None, drop=()) -> bytes:
    metadata = {k: v for k, v in {**METADATA, **(metadata or {})}.items() if k not in drop}
    tensors = {k: v for k, v in {**TENSORS, **(tensors or {})}.items() if k not in drop}
    entries, data = [], b""
    for name, array in tensors.items():
        kind = {"float32": "F32", "float16": "F16"}[str(array.dtype)]
        entries.append(TensorEntry(name, array.shape, kind, len(data)))
        data += array.tobytes().ljust(-(-array.nbytes // 32) * 32, b"\0")
    return encode_header(encode_metadata(metadata), len(metadata), entries, 32) + data


def counts_of(*counts: float) -> dict:
    return {COUNTS: np.array(counts, np.float32)[:, None]}


BAD_GGUF = {
    "a model": ({"metadata": {"general.type": Value("str", "model")}}, 'type is "model"'),
    "no type": ({"drop": ["general.type"]}, 'type is "model"'),
    "type of another type": ({"metadata": {"general.type": Value("arr[u8]", [1, 2])}}, "1 2"),
    "hostile type": ({"metadata": {"general.type": Value("str", "\x1b[2J")}}, r"\\x1b\[2J"),
    "no datasets": ({"drop": ["imatrix.datasets"]}, "imatrix.datasets is missing"),
    "no chunk count": ({"drop": ["imatrix.chunk_count"]}, "imatrix.chunk_count is missing"),
    "chunk size a string": ({"metadata": {"imatrix.chunk_size": Value("str", "x")}}, "size is str"),
    "chunk count negative": ({"metadata": {"imatrix.chunk_count": Value("i32", -1)}}, "is i32"),
    "datasets a string": ({"metadata": {"imatrix.datasets": Value("str", "x")}}, "datasets is str"),
    "no tensors": ({"drop": [SUMS, COUNTS]}, "holds no weights"),
    "no sums": ({"drop": [SUMS]}, f"{SUMS} is missing"),
    "no counts": ({"drop": [COUNTS]}, f"{COUNTS} is missing"),
    "sums without a name": ({"tensors": {".in_sum2": TENSORS[SUMS]}}, "name of a tensor"),
    "name not UTF-8": ({"tensors": {"\udcff.counts": TENSORS[COUNTS]}}, "not UTF-8"),
    "sums of float16": ({"tensors": {SUMS: np.ones((4, 8), np.float16)}}, "F16 instead of F32"),
    "counts of float16": ({"tensors": {COUNTS: np.ones((4, 1), np.float16)}}, "F16 instead"),
    "too few counts": ({"tensors": counts_of(600, 600)}, "4 rows of sums, but 2 counts"),
    "too many counts": ({"tensors": counts_of(*[600] * 5)}, "4 rows of sums, but 5 counts"),
    "negative count": ({"tensors": counts_of(600, 600, -1, 600)}, f"{COUNTS} holds"),
    "NaN count": ({"tensors": counts_of(600, NAN, 600, 600)}, f"{COUNTS} holds"),
    "infinite count": ({"tensors": counts_of(INF, 600, 600, 600)}, f"{COUNTS} holds"),
    "huge count": ({"tensors": counts_of(1e20, 600, 600, 600)}, f"{COUNTS} holds"),
    "NaN sum": ({"tensors": {SUMS: np.full((4, 8), NAN, np.float32)}}, f"32 of 32 values of {Q}"),
    "negative sum": ({"tensors": {SUMS: -TENSORS[SUMS]}}, "32 negative"),
    "signalling NaN": (
        {"tensors": {SUMS: np.full((4, 8), 0x7FA00000, np.uint32).view(np.float32)}}, "32 NaN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_GGUF)
def test_bad_gguf_files(case, tmp_path):
    changes, message = BAD_GGUF[case]
    (tmp_path / "i.dat").write_bytes(gguf_bytes())
    assert read_importance(tmp_path / "i.dat").values[Q].shape == (4, 8)
    (tmp_path / "i.dat").write_bytes(gguf_bytes(**changes))
    check_refusal(tmp_path / "i.dat", message)


def test_a_truncated_gguf_file_and_a_huge_claim(tmp_path):
    (tmp_path / "i.dat").write_bytes(gguf_bytes()[:-64])
    check_refusal(tmp_path / "i.dat", "ends at byte")
    entry = TensorEntry(SUMS, (1 << 40, 1 << 20), "F32", 0)
    header = encode_header(encode_metadata(METADATA), len(METADATA), [entry], 32)
    (tmp_path / "i.dat").write_bytes(header)
    check_refusal(tmp_path / "i.dat", "ends at byte")


def test_sums_of_an_expert_without_tokens_are_not_looked_at(tmp_path):
    sums = TENSORS[SUMS].copy()
    sums[2] = NAN
    tensors = {SUMS: sums, **counts_of(600, 600, 0, 600)}
    (tmp_path / "i.dat").write_bytes(gguf_bytes(tensors=tensors))
    assert np.all(read_importance(tmp_path / "i.dat").values[Q][2] == 1)


def test_other_tensors_are_ignored(tmp_path):
    """Newer llama-imatrix versions may store more, such as sums that are not squared."""
    extra = {f"{Q}.in_sum": -TENSORS[SUMS]}
    (tmp_path / "i.dat").write_bytes(gguf_bytes(tensors=extra))
    assert read_importance(tmp_path / "i.dat").values.keys() == {Q}


def test_a_data_set_s_name_may_be_in_any_encoding(tmp_path):
    names = {"imatrix.datasets": Value("arr[str]", [b"wiki-\xe9.txt", "b"])}
    (tmp_path / "i.dat").write_bytes(gguf_bytes(metadata=names))
    assert read_importance(tmp_path / "i.dat").datasets == ("wiki-\ufffd.txt", "b")


def test_a_whole_model_is_no_importance_matrix(bf16_file):
    with pytest.raises(BadInput, match="no importance matrix"):
        read_importance(bf16_file)


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputMissing):
        read_importance(tmp_path / "none")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(BadInput, match="not a regular file"):
            read_importance(path)


@settings(max_examples=150, deadline=None)
@given(st.booleans(), st.data())
def test_no_byte_flip_breaks_it(tmp_path_factory, legacy, data):
    entries = [(Q, 3, [1.0, 2.0, 0.5]), (DOWN, 2, [1.0, 4.0])]
    raw = bytearray(
        legacy_bytes(entries, legacy_trailer(3, b"wiki.txt")) if legacy else gguf_bytes()
    )
    flips = st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255))
    for at, value in data.draw(st.lists(flips, min_size=1, max_size=3)):
        raw[at] = value
    path = tmp_path_factory.getbasetemp() / "flipped.dat"
    path.write_bytes(
        raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    )
    try:
        matrix = read_importance(path)
    except QwqQuantError as error:
        assert error.exit_code == 65
        return
    for values in matrix.values.values():
        assert values.dtype == np.float32 and values.ndim == 2
        assert np.all((values >= 0) & (values <= np.float32(MAX_IMPORTANCE)))


# --- writing what cannot be -------------------------------------------------------------------


def test_what_was_measured_is_checked_before_it_is_written(tmp_path):
    path = tmp_path / "i.gguf"
    sums, counts = measured()
    sums[Q][0, 3] = NAN
    with pytest.raises(BadInput, match=f"1 of 64 values of {Q}"):
        write_importance(path, sums, counts, 512, 1, [])
    with pytest.raises(BadInput, match="name of a tensor"):
        long = "x" * 56  # 64 bytes with .in_sum2
        write_importance(path, {long: sums[DOWN]}, {long: counts[DOWN]}, 512, 1, [])
    sums, counts = measured()
    with pytest.raises(ValueError):
        write_importance(path, {}, {}, 512, 1, [])
    with pytest.raises(ValueError):
        write_importance(path, sums, {Q: counts[Q]}, 512, 1, [])
    with pytest.raises(ValueError):
        write_importance(path, sums, {**counts, DOWN: counts[Q]}, 512, 1, [])
    with pytest.raises(ValueError):
        write_importance(path, sums, {**counts, Q: -counts[Q]}, 512, 1, [])
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_is_replaced_whole(tmp_path):
    path = written(tmp_path / "i.gguf", seed=1)
    before = path.read_bytes()
    written(path)
    assert path.read_bytes() != before and list(tmp_path.iterdir()) == [path]
    sums, counts = measured()
    original = {name: a.copy() for name, a in sums.items()}
    write_importance(path, sums, counts, 512, 1, [])
    assert all(np.array_equal(sums[name], original[name]) for name in sums)


# --- matching ---------------------------------------------------------------------------------


def matrix_of(values: dict, n_tokens: dict | None = None, **more) -> ImportanceMatrix:
    return ImportanceMatrix(
        "there/i.gguf",
        {name: np.asarray(v, np.float32) for name, v in values.items()},
        {name: np.array(n) for name, n in (n_tokens or {}).items()},
        **more,
    )


ONES, FOUR = np.ones((1, 64)), np.ones((4, 64))


def test_what_has_no_importance_is_noted():
    matrix = matrix_of({Q: 2 * ONES, "blk.0.ffn_gate_inp.weight": ONES}, {Q: [600]})
    shapes = {"output.weight": (100, 64), Q: (64, 64), "token_embd.weight": (100, 64)}
    found, notes = match_importance(matrix, shapes, {Q})
    assert found.keys() == {Q} and np.all(found[Q] == 2) and found[Q].shape == (1, 64)
    assert found[Q].dtype == np.float32
    assert notes == ["2 of 3 tensors have no importance: output.weight, token_embd.weight"]


def test_the_matrix_of_another_model():
    with pytest.raises(BadInput, match="another model") as caught:
        match_importance(matrix_of({"blk.0.attn_qkv.weight": ONES}), {Q: (64, 64)}, {Q})
    assert "blk.0.attn_qkv.weight" in caught.value.why and Q in caught.value.why
    for shape, theirs in (((64, 32), "64 values for .* are 32"), ((4, 8, 64), "64 .* 4 x 64")):
        with pytest.raises(BadInput, match="another model") as caught:
            match_importance(matrix_of({Q: ONES}), {Q: shape}, set())
        assert caught.match(f"{Q}") and caught.match(theirs)
    for shape in ((8, 64), (2, 8, 128), (8, 256)):  # the same length is not enough
        with pytest.raises(BadInput, match="4 x 64 values"):
            match_importance(matrix_of({Q: FOUR}), {Q: shape}, set())


def test_only_the_embedding_may_be_of_another_length():
    matrix = matrix_of({Q: ONES, "token_embd.weight": ONES})
    found, notes = match_importance(matrix, {Q: (64, 64), "token_embd.weight": (99, 32)}, set())
    assert found.keys() == {Q} and "token_embd.weight" in notes[0]


def test_what_needs_one_and_has_none():
    shapes = {Q: (64, 64), "blk.0.attn_k.weight": (64, 64), "blk.0.attn_v.weight": (64, 64)}
    with pytest.raises(BadRecipe, match=r"(?s)lacks 1 of the 2 .*blk\.0\.attn_v"):
        match_importance(matrix_of({Q: ONES}), shapes, {Q, "blk.0.attn_v.weight"})


def test_too_few_tokens():
    shapes = {Q: (64, 64)}
    for n in (0, MIN_TOKENS - 1):
        with pytest.raises(BadInput, match=f"(?s)too few tokens.*{Q} saw {n};"):
            match_importance(matrix_of({Q: ONES}, {Q: [n]}), shapes, set())
    for n in (MIN_TOKENS, ENOUGH_TOKENS - 1):
        _, (note,) = match_importance(matrix_of({Q: ONES}, {Q: [n]}), shapes, set())
        assert f"{Q} saw {n} tokens" in note
    assert match_importance(matrix_of({Q: ONES}, {Q: [ENOUGH_TOKENS]}), shapes, set())[1] == []
    # A weight of the file that this model does not have, or does not quantize, is no matter.
    other = matrix_of({Q: ONES, "x": ONES}, {Q: [600], "x": [1]})
    assert match_importance(other, shapes, set())[1] == []


def test_experts_without_tokens():
    matrix = matrix_of({DOWN: FOUR, Q: ONES}, {DOWN: [0, 3, 600, 0], Q: [600]})
    _, notes = match_importance(matrix, {DOWN: (4, 8, 64), Q: (64, 64)}, set())
    assert notes == [
        "2 of 4 expert matrices saw no token: all their columns count alike",
        "1 of 4 expert matrices saw fewer than 16 tokens",
    ]


def test_columns_that_were_always_zero():
    alive = ONES.copy()
    alive[0, 8:24] = 0  # half of each of two blocks
    dead = FOUR.copy()
    dead[3, 16:32] = 0
    _, notes = match_importance(matrix_of({Q: alive}), {Q: (64, 64)}, set())
    assert notes == []
    shapes = {DOWN: (4, 8, 64), Q: (64, 64)}
    _, (note,) = match_importance(matrix_of({DOWN: dead, Q: alive}), shapes, set())
    assert note.startswith("1 of 2 tensors have 16 or more") and DOWN in note


def test_many_names_are_cut():
    shapes = {f"blk.0.x{i}.weight": (64, 64) for i in range(1, 9)} | {Q: (64, 64)}
    _, (note,) = match_importance(matrix_of({Q: ONES}), shapes, set())
    assert note.endswith("blk.0.x3.weight and 5 more")


def test_layers_that_only_one_of_them_has():
    shapes = {f"blk.{i}.attn_q.weight": (64, 64) for i in range(6)}
    longer = matrix_of({f"blk.{i}.attn_q.weight": ONES for i in range(12)})
    _, (note,) = match_importance(longer, shapes, set())
    assert "knows 6 layers, from 6 on, that are not" in note and "another model?" in note
    shorter = matrix_of({f"blk.{i}.attn_q.weight": ONES for i in range(4)})
    _, (note, _) = match_importance(shorter, shapes, set())
    assert "lacks 2 of 6 layers, from 4 on" in note


def test_inputs_that_were_never_anything_else_than_zero():
    with pytest.raises(BadInput, match=f"(?s)inputs of 1 weights were always zero.*{Q}"):
        match_importance(matrix_of({Q: 0 * ONES}), {Q: (64, 64)}, set())


def test_a_matrix_where_nothing_is_quantized_is_no_mistake():
    found, notes = match_importance(matrix_of({Q: ONES}), {}, set())
    assert found == {} and notes == ["there/i.gguf changes nothing: no tensor is quantized"]


def test_a_matrix_says_nothing_of_the_output_layer():
    shapes = {Q: (64, 64), "output.weight": (64, 64)}
    with pytest.raises(BadRecipe, match="--output-type"):
        match_importance(matrix_of({Q: ONES}), shapes, {"output.weight"})


# --- use --------------------------------------------------------------------------------------


def test_metadata_has_llama_quantize_s_keys_and_types():
    matrix = matrix_of({Q: ONES, DOWN: FOUR}, n_chunks=7, datasets=("wiki.txt", "more.txt"))
    assert importance_metadata(matrix) == {
        "quantize.imatrix.file": Value("str", "i.gguf"),
        "quantize.imatrix.dataset": Value("str", "wiki.txt"),
        "quantize.imatrix.entries_count": Value("u32", 2),
        "quantize.imatrix.chunks_count": Value("u32", 7),
    }
    assert importance_metadata(matrix_of({Q: ONES})).keys() == {
        "quantize.imatrix.file", "quantize.imatrix.entries_count"
    }  # fmt: skip


@pytest.fixture(scope="module")
def bf16_file(tiny_qwq, tmp_path_factory) -> Path:
    return write_bf16(tiny_qwq, tmp_path_factory.mktemp("bf16") / "model.gguf")


def write_bf16(model: Path, output: Path) -> Path:
    write_gguf(plan_gguf(open_source(str(model)), Wishes("BF16")), output)
    return output


def llama_quantize(source: Path, output: Path, mixture: str, importance: dict) -> None:
    """The real llama_model_quantize, with importances as llama-quantize hands them over."""
    arrays = {name: np.ascontiguousarray(a, np.float32) for name, a in importance.items()}
    data = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()
    for place, (name, array) in zip(data, arrays.items(), strict=False):
        place.name, place.size = name.encode(), array.size
        place.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.imatrix = MIXTURES[mixture].file_type, 2, data
    llama_oracle.listen()
    result = llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), params)
    assert result == 0, "".join(llama_oracle.LOG[-4:])


def calibrated(bf16: Path, path: Path) -> dict:
    """An importance matrix for all layers of a model in `path`; returns the weights' shapes."""
    draw = np.random.default_rng(2)
    shapes = {
        name: info.shape
        for name, info in GgufFile.open(bf16).tensors.items()
        if len(info.shape) > 1 and not name.endswith("ffn_gate_inp.weight")
    }
    sums, counts = {}, {}
    for name, shape in shapes.items():
        if name.startswith("blk."):
            n_matrices = shape[0] if len(shape) == 3 else 1
            scale = 10 ** draw.uniform(-2, 3)
            sums[name] = draw.gamma(0.4, scale, (n_matrices, shape[-1])).astype(np.float32)
            counts[name] = draw.integers(ENOUGH_TOKENS, 9999, n_matrices)
    write_importance(path, sums, counts, 512, 19, ["random"])
    return shapes


@pytest.mark.parametrize("name", ["tiny-qwq", "qwen3moe"])
def test_real_files_quantized_with_what_we_wrote(name, bf16_file, tmp_path):
    """llama_model_quantize with the file's values = our encoders with match_importance's rows."""
    bf16 = bf16_file
    if name != "tiny-qwq":
        size = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2}
        make_model(name, tmp_path / "model", **size)
        bf16 = write_bf16(tmp_path / "model", tmp_path / "bf16.gguf")
    shapes = calibrated(bf16, tmp_path / "i.gguf")
    theirs, _ = llama_load(tmp_path / "i.gguf")
    llama_quantize(bf16, tmp_path / "theirs.gguf", "Q4_K_M", theirs)
    ours, notes = match_importance(read_importance(tmp_path / "i.gguf"), shapes, set())
    assert notes == [
        f"2 of {len(shapes)} tensors have no importance: token_embd.weight, output.weight"
    ]
    weights, n_weighted = GgufFile.open(bf16).tensors, 0
    with TensorReader() as reader:
        for tensor in gguf.GGUFReader(tmp_path / "theirs.gguf").tensors:
            info, kind = weights[tensor.name], tensor.tensor_type.name
            w = reader.read_float32(info, 0, info.n_rows)
            if tensor.name in ours and kind != "F32":
                rows = ours[tensor.name]
                matrices = w.reshape(len(rows), -1, w.shape[1])
                pieces = zip(matrices, rows, strict=True)
                encoded = [FORMATS[kind].encode(m, importance)[""] for m, importance in pieces]
                n_weighted += 1
            else:
                encoded = [FORMATS[kind].encode(w)[""]]
            stored = np.ascontiguousarray(tensor.data).view(np.uint8)
            assert stored.tobytes() == np.concatenate(encoded).tobytes(), tensor.name
    assert n_weighted == len(ours) == len(shapes) - 2
