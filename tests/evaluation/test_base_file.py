"""llama.cpp's base file: bit for bit, hostile files refused, figures those of the real tool."""

import csv
import ctypes
import ctypes.util
import hashlib
import math
import struct
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from evaluation_helpers import to_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.errors import BadInput, InputMissing
from quant.evaluation.base_file import (
    BaseFile,
    base_file_nbytes,
    compare_rows,
    decode_rows,
    encode_header,
    encode_rows,
    row_length,
)
from quant.evaluation.chunks import Chunks, cut_chunks
from quant.evaluation.divergence import Accumulator, compare_logits, log_softmax, statistics
from quant.evaluation.runners import open_runner
from quant.texts import Record, Texts, read_texts

F32 = np.float32


@lru_cache(maxsize=1)
def libm() -> ctypes.CDLL:
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    library.expf.restype, library.expf.argtypes = ctypes.c_float, [ctypes.c_float]
    return library


def restated_row(logits: np.ndarray) -> np.ndarray:
    """log_softmax(n_vocab, logits, log_prob, tok) of perplexity.cpp, a float at a time."""
    highest, lowest = F32(max(logits)), F32(min(logits))
    lowest = max(lowest, F32(highest - F32(16)))
    total = 0.0
    for x in logits:
        total += libm().expf(F32(x - highest))
    log_sum = F32(math.log(total))
    least = F32(F32(lowest - highest) - log_sum)
    scale = F32(F32(highest - lowest) / F32(65535))
    row = np.zeros(2 * ((len(logits) + 1) // 2) + 4, np.uint16)
    row[:4] = np.array([scale, least], F32).view(np.uint16)
    if scale:
        inverse = F32(F32(1) / scale)
        for i, x in enumerate(logits):
            if x > lowest:
                shifted = F32(F32(inverse * F32(x - lowest)) + F32(12582912))
                row[4 + i] = (int(shifted.view(np.int32)) & 0x007FFFFF) - 0x00400000
    return row


@given(st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 4.0, 30.0]), st.sampled_from([63, 64]))
@settings(max_examples=40, deadline=None)
def test_rows_are_those_llama_cpp_writes(seed, scale, n_vocab):
    logits = np.random.default_rng(seed).normal(0, scale, (3, n_vocab)).astype(F32)
    rows = encode_rows(logits)
    assert rows.shape == (3, row_length(n_vocab)) == (3, 4 + 64)
    for row, each in zip(rows, logits, strict=True):
        assert np.array_equal(row, restated_row(each))


def test_equal_logits_have_no_scale():
    logits = np.full((1, 8), 3, F32)
    rows = encode_rows(logits)
    assert np.array_equal(rows[0], restated_row(logits[0])) and not rows[0, :2].any()
    assert np.allclose(decode_rows(rows, 8), -math.log(8))


def test_what_is_stored_is_near_what_was_meant():
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 4, (50, 999)).astype(F32)
    decoded, meant = decode_rows(encode_rows(logits), 999), log_softmax(logits)
    kept = logits > logits.max(axis=1, keepdims=True) - 16
    assert np.abs(decoded - meant)[kept].max() <= 0.5 * 16 / 65535 + 1e-5
    targets = draw.integers(0, 999, 50)
    other = (logits + draw.normal(0, 0.2, logits.shape)).astype(F32)
    stored = statistics(compare_rows(encode_rows(logits), other, targets))
    exact = statistics(compare_logits(logits, other, targets))
    assert stored.kld.value == pytest.approx(exact.kld.value, rel=1e-3)
    assert stored.ppl == exact.ppl


def test_logits_that_are_not_finite_are_not_written():
    with pytest.raises(BadInput, match="not finite"):
        encode_rows(np.array([[1, np.nan]], F32))


# --- the file ---------------------------------------------------------------------------------


def written(path: Path, n_vocab: int = 31, n_chunks: int = 3, n_ctx: int = 9) -> Chunks:
    draw = np.random.default_rng(1)
    tokens = draw.integers(0, n_vocab, (n_chunks, n_ctx)).astype(np.int32)
    chunks = Chunks(tokens, ("",) * n_chunks, None)
    logits = draw.normal(0, 2, (n_chunks, chunks.n_scored, n_vocab)).astype(F32)
    rows = b"".join(encode_rows(each).tobytes() for each in logits)
    path.write_bytes(encode_header(chunks, n_vocab) + rows)
    return chunks


def test_a_file_comes_back(tmp_path):
    chunks = written(tmp_path / "base.kld")
    base = BaseFile.open(tmp_path / "base.kld")
    assert base.n_vocab == 31 and np.array_equal(base.tokens, chunks.tokens)
    assert (tmp_path / "base.kld").stat().st_size == base_file_nbytes(chunks, 31)
    assert base.chunks(bos=5).inputs[:, 0].tolist() == [5, 5, 5]
    draw = np.random.default_rng(1)
    draw.integers(0, 31, (3, 9))
    logits = draw.normal(0, 2, (3, 4, 31)).astype(F32)
    assert np.array_equal(base.rows(2), encode_rows(logits[2]))


def test_a_missing_file(tmp_path):
    with pytest.raises(InputMissing):
        BaseFile.open(tmp_path / "none.kld")


@pytest.mark.parametrize(
    ("where", "what"),
    [
        (0, b"_logitz_"), (8, struct.pack("<i", -256)), (8, struct.pack("<i", 2)),
        (8, struct.pack("<i", 2**31 - 1)), (12, struct.pack("<i", 0)), (12, struct.pack("<i", -31)),
        (12, struct.pack("<i", 29)), (16, struct.pack("<i", 2**30)), (16, struct.pack("<i", 0)),
        (20, struct.pack("<i", 31)), (20, struct.pack("<i", -1)),
    ],
)  # fmt: skip
def test_a_damaged_header_is_refused(tmp_path, where, what):
    path = tmp_path / "base.kld"
    written(path)
    raw = bytearray(path.read_bytes())
    raw[where : where + len(what)] = what
    path.write_bytes(raw)
    with pytest.raises(BadInput):
        BaseFile.open(path)


@pytest.mark.parametrize("n", [0, 7, 19, 60, -1])
def test_a_truncated_file_is_refused(tmp_path, n):
    path = tmp_path / "base.kld"
    written(path)
    path.write_bytes(path.read_bytes()[:n])
    with pytest.raises(BadInput):
        BaseFile.open(path)


@pytest.mark.parametrize(
    "numbers", [(np.nan, -5), (-1e-4, -5), (np.inf, -5), (1e-4, np.nan), (1e-4, 5), (1, -5)]
)
def test_rows_that_are_no_log_probabilities_are_refused(numbers):
    rows = encode_rows(np.random.default_rng(0).normal(0, 1, (2, 8)).astype(F32))
    rows[1, :4] = np.array(numbers, F32).view(np.uint16)
    with pytest.raises(BadInput, match="damaged"), np.errstate(all="ignore"):
        decode_rows(rows, 8)


# --- the real tool ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, tuple[str, str]]]:
    """type -> figure -> (value, error) as llama-perplexity printed them."""
    found = {}
    with open(ROOT / "benchmarks" / "llama_perplexity.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["type"], {})[row["figure"]] = row["value"], row["error"]
    return found


@pytest.fixture(scope="module")
def reference(tiny_qwq, texts, tmp_path_factory) -> tuple[Path, Path, Chunks]:
    """Our base file of the F32 model over the recorded text: (folder, base file, windows)."""
    folder = tmp_path_factory.mktemp("reference")
    records = read_texts(texts / "heldout.jsonl").records
    text = "\n\n".join(r.text for r in records if r.category != "reasoning")
    with open_runner(to_gguf(tiny_qwq, "F32", folder / "F32.gguf")) as runner:
        chunks = cut_chunks(runner, Texts("t.txt", "", (Record(text),)), 256).part(0, 24)
        parts = [encode_header(chunks, runner.n_vocab)]
        for logits in runner.logits(chunks.inputs, chunks.first):
            parts.append(encode_rows(logits).tobytes())
    (folder / "base.kld").write_bytes(b"".join(parts))
    return folder, folder / "base.kld", chunks


def test_the_windows_are_those_of_the_tool(reference, recorded):
    _, path, chunks = reference
    header = path.read_bytes()[: 20 + 4 * chunks.tokens.size]
    digest = recorded["F32"]["sha256 of the base file up to its rows"][0]
    assert hashlib.sha256(header).hexdigest() == digest
    assert path.stat().st_size == int(recorded["F32"]["bytes of the base file"][0])


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K_M", "Q2_K"])
def test_figures_are_those_of_the_tool(reference, recorded, tiny_qwq, type_name):
    """Every figure to its last printed digit or three digits, whichever is less."""
    folder, path, chunks = reference
    base, accumulator = BaseFile.open(path), Accumulator()
    with open_runner(to_gguf(tiny_qwq, type_name, folder / f"{type_name}.gguf")) as runner:
        for i, logits in enumerate(runner.logits(chunks.inputs, chunks.first)):
            accumulator.add(compare_rows(base.rows(i), logits, chunks.targets[i]))
    found = {name: (x, e) for name, x, e in accumulator.statistics().rows()}
    assert found.keys() == recorded[type_name].keys()
    for name, pair in recorded[type_name].items():
        for ours, theirs in zip(found[name], pair, strict=True):
            if theirs:
                last_digit = 10.0 ** -len(theirs.partition(".")[2])
                assert ours == pytest.approx(float(theirs), rel=1e-3, abs=last_digit), name
