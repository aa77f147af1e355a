"""The container against gguf-py, which we did not write, and against damaged files."""

import contextlib
import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.errors import BadInput, InputMissing, QwqQuantError
from quant.gguf_file import (
    GGML_TYPES,
    SCALAR_TYPES,
    GgufFile,
    TensorEntry,
    Value,
    encode_header,
    encode_metadata,
    metadata_nbytes_at_most,
    open_gguf,
    tensor_nbytes,
)

METADATA = {
    "general.architecture": Value("str", "qwen2"),
    "a.u8": Value("u8", 255),
    "a.i8": Value("i8", -128),
    "a.u16": Value("u16", 65535),
    "a.i16": Value("i16", -32768),
    "a.u32": Value("u32", 2**32 - 1),
    "a.i32": Value("i32", -(2**31)),
    "a.u64": Value("u64", 2**64 - 1),
    "a.i64": Value("i64", -(2**63)),
    "a.f32": Value("f32", 1e-5),
    "a.f64": Value("f64", 1e-300),
    "a.yes": Value("bool", True),
    "a.no": Value("bool", False),
    "a.empty": Value("str", ""),
    "a.text": Value("str", "<think>\n日本 \U0001f999"),
    "a.strings": Value("arr[str]", ["a", "", "ä"]),
    "a.ints": Value("arr[i32]", [-1, 2, 3]),
    "a.longs": Value("arr[i64]", [2**40, -(2**40)]),
    "a.floats": Value("arr[f32]", np.array([0.5, -1.5], np.float32)),
    "a.none": Value("arr[u8]", []),
}


def write_file(path, metadata=METADATA, tensors=None, data=None):
    tensors = [TensorEntry("w", (3, 4), "F32", 0)] if tensors is None else tensors
    data = np.arange(12, dtype=np.float32).tobytes() if data is None else data
    header = encode_header(encode_metadata(metadata), len(metadata), tensors, 32)
    path.write_bytes(header + data)
    return path


def same(a: Value, b: Value) -> bool:
    if a.type != b.type:
        return False
    if isinstance(a.data, np.ndarray) or isinstance(b.data, np.ndarray):
        return np.array_equal(np.asarray(a.data), np.asarray(b.data))
    return np.float32(a.data) == np.float32(b.data) if a.type == "f32" else a.data == b.data


def test_types_are_those_of_gguf_py():
    for name, (number, block_size, block_nbytes) in GGML_TYPES.items():
        theirs = gguf.GGMLQuantizationType[name]
        assert number == theirs.value
        if name != "Q8_1":  # gguf-py 0.19 counts its two float16 as float32
            assert (block_size, block_nbytes) == gguf.GGML_QUANT_SIZES[theirs]
    names = {"u8": "UINT8", "i8": "INT8", "u16": "UINT16", "i16": "INT16", "u32": "UINT32",
             "i32": "INT32", "f32": "FLOAT32", "bool": "BOOL", "str": "STRING", "u64": "UINT64",
             "i64": "INT64", "f64": "FLOAT64"}  # fmt: skip
    for ours, theirs in names.items():
        assert SCALAR_TYPES[ours] == gguf.GGUFValueType[theirs].value


def test_gguf_py_reads_every_type_we_write(tmp_path):
    reader = gguf.GGUFReader(write_file(tmp_path / "a.gguf"))
    for key, value in METADATA.items():
        contents = reader.get_field(key).contents()
        if value.type == "f32":
            assert np.float32(contents) == np.float32(value.data)
        elif value.element_type and value.element_type != "str":
            assert np.array_equal(contents, value.data)
        else:
            assert contents == value.data
    (tensor,) = reader.tensors
    assert tensor.name == "w"
    assert np.array_equal(tensor.data, np.arange(12, dtype=np.float32).reshape(3, 4))


def test_we_read_what_gguf_py_writes(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 1e6)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("x.weight", np.ones((2, 8), np.float32))
    writer.add_tensor("y.weight", np.ones((2, 2, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = GgufFile.open(tmp_path / "b.gguf")
    assert read.metadata["llama.block_count"] == Value("u32", 2)
    assert same(read.metadata["tokenizer.ggml.tokens"], Value("arr[str]", ["a", "b"]))
    assert read.tensors["x.weight"].shape == (2, 8)
    assert read.tensors["y.weight"].shape == (2, 2, 32)
    assert read.tensors["y.weight"].dtype == "F16"


def test_round_trip(tmp_path):
    read = GgufFile.open(write_file(tmp_path / "a.gguf"))
    assert list(read.metadata) == list(METADATA)
    for key, value in METADATA.items():
        assert same(read.metadata[key], value), key


def test_lists_of_texts_may_be_left_out(tmp_path):
    path = write_file(tmp_path / "a.gguf")
    whole, read = GgufFile.open(path), GgufFile.open(path, texts=False)
    assert (read.tensors, read.data_start) == (whole.tensors, whole.data_start)
    assert list(read.metadata) == list(METADATA)
    for key, value in METADATA.items():
        expected = Value("arr[str]", []) if value.type == "arr[str]" else value
        assert same(read.metadata[key], expected), key


scalars = st.one_of(
    st.integers(0, 2**32 - 1).map(lambda n: Value("u32", n)),
    st.integers(-(2**63), 2**63 - 1).map(lambda n: Value("i64", n)),
    st.floats(allow_nan=False).map(lambda x: Value("f64", x)),
    st.booleans().map(lambda b: Value("bool", b)),
    st.text().map(lambda s: Value("str", s)),
    st.lists(st.text(max_size=8), max_size=5).map(lambda s: Value("arr[str]", s)),
    st.lists(st.integers(-128, 127), max_size=5).map(lambda s: Value("arr[i8]", s)),
)


def encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=20).filter(encodable), scalars, max_size=6))
def test_any_metadata_survives(tmp_path_factory, metadata):
    metadata.pop("general.alignment", None)
    metadata = {k: v for k, v in metadata.items() if v.type != "str" or encodable(v.data)}
    metadata = {
        k: v
        for k, v in metadata.items()
        if v.type != "arr[str]" or all(encodable(text) for text in v.data)
    }
    path = write_file(tmp_path_factory.mktemp("m") / "m.gguf", metadata)
    read = GgufFile.open(path).metadata
    assert list(read) == list(metadata)
    assert all(same(read[key], value) for key, value in metadata.items())


# --- damaged files ----------------------------------------------------------------------------


def header(n_tensors=0, n_kv=0, version=3, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, n_tensors, n_kv)


def text(s: bytes):
    return struct.pack("<Q", len(s)) + s


DAMAGED = {
    "empty": (b"", "only 0 bytes"),
    "short": (b"GGUF", "only 4 bytes"),
    "magic": (header(magic=b"PK\3\4") + bytes(64), "no GGUF file"),
    "version": (header(version=9) + bytes(64), "version 9"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), "big-endian"),
    "kv count": (header(n_kv=2**60) + bytes(64), "metadata keys are claimed"),
    "tensor count": (header(n_tensors=2**60) + bytes(64), "tensors are claimed"),
    "string length": (header(n_kv=1) + struct.pack("<Q", 2**63) + bytes(64), "only"),
    "array length": (
        header(n_kv=1) + text(b"k") + struct.pack("<IIQ", 9, 4, 2**62) + bytes(64),
        "only",
    ),
    "strings": (
        header(n_kv=1) + text(b"k") + struct.pack("<IIQ", 9, 8, 2**62) + bytes(64),
        "more than the file can hold",
    ),
    "a long string": (
        header(n_kv=1) + text(b"k") + struct.pack("<IIQ", 9, 8, 3) + text(b"a")
        + struct.pack("<Q", 2**62) + bytes(64),
        "claims 3 strings, but only 1 are whole",
    ),
    "no third string": (
        header(n_kv=1) + text(b"k") + struct.pack("<IIQ", 9, 8, 3) + 2 * text(b"abcd"),
        "claims 3 strings, but only 2 are whole",
    ),
    "value type": (header(n_kv=1) + text(b"k") + struct.pack("<I", 77) + bytes(64), "type 77"),
    "nested array": (header(n_kv=1) + text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64), "9"),
    "twice": (header(n_kv=2) + 2 * (text(b"k") + struct.pack("<IB", 0, 1)) + bytes(64), "twice"),
    "alignment": (
        header(n_kv=1) + text(b"general.alignment") + struct.pack("<II", 4, 33) + bytes(64),
        "alignment",
    ),
    "dimensions": (header(1) + text(b"w") + struct.pack("<I", 9) + bytes(99), "9 dimensions"),
    "long name": (header(1) + text(b"w" * 64) + bytes(99), "longer than 63"),
    "tensor type": (
        header(1) + text(b"w") + struct.pack("<IQIQ", 1, 32, 4, 0) + bytes(99),
        "tensor type 4",
    ),
    "block": (header(1) + text(b"w") + struct.pack("<IQIQ", 1, 33, 8, 0) + bytes(99), "blocks"),
    "zero rows": (header(1) + text(b"w") + struct.pack("<IQIQ", 1, 0, 0, 0) + bytes(99), "empty"),
    "offset": (header(1) + text(b"w") + struct.pack("<IQIQ", 1, 8, 0, 32) + bytes(99), "instead"),
    "truncated": (
        header(1) + text(b"w") + struct.pack("<IQIQ", 1, 2**50, 0, 0) + bytes(99),
        "not whole",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(tmp_path, name):
    content, words = DAMAGED[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    for texts in (True, False):
        with pytest.raises(BadInput, match=words):
            GgufFile.open(path, texts)


def test_tensor_twice(tmp_path):
    entries = [TensorEntry("w", (8,), "F32", 0), TensorEntry("w", (8,), "F32", 32)]
    path = write_file(tmp_path / "x.gguf", {}, entries, bytes(64))
    with pytest.raises(BadInput, match="twice"):
        GgufFile.open(path)


def test_missing_file_and_fifo(tmp_path):
    import os

    with pytest.raises(InputMissing):
        GgufFile.open(tmp_path / "none.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(BadInput, match="no regular file"):  # and does not wait for a writer
        GgufFile.open(tmp_path / "pipe.gguf")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bytes_never_crash(tmp_path_factory, data):
    path = write_file(tmp_path_factory.mktemp("f") / "f.gguf")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 49))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    with contextlib.suppress(QwqQuantError):
        GgufFile.open(path)


def test_split_files_are_merged(tmp_path):
    def part(i, name, n=2, total=2):
        metadata = {"split.no": Value("u16", i), "split.count": Value("u16", n),
                    "split.tensors.count": Value("i32", total)}  # fmt: skip
        if i == 0:
            metadata["general.name"] = Value("str", "m")
        entries = [TensorEntry(name, (8,), "F32", 0)]
        write_file(tmp_path / f"m-{i + 1:05d}-of-{n:05d}.gguf", metadata, entries, bytes(32))

    part(0, "a")
    with pytest.raises(InputMissing, match="00002-of-00002"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")
    part(1, "a")
    with pytest.raises(BadInput, match="in two files"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")
    part(1, "b")
    whole = open_gguf(tmp_path / "m-00001-of-00002.gguf")
    assert set(whole.tensors) == {"a", "b"}
    assert list(whole.metadata) == ["general.name"]
    with pytest.raises(BadInput, match="first file"):
        open_gguf(tmp_path / "m-00002-of-00002.gguf")
    part(0, "a", total=3)
    with pytest.raises(BadInput, match="hold 2 tensors"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")


def test_a_split_count_that_is_no_number(tmp_path):
    path = write_file(tmp_path / "m.gguf", {"split.count": Value("arr[u16]", [2, 3])})
    with pytest.raises(BadInput, match="no whole number"):
        open_gguf(path)


def test_the_bound_of_the_header_is_one():
    assert len(encode_metadata(METADATA)) <= metadata_nbytes_at_most(METADATA)
    wide = {
        "k": Value("arr[str]", ["\U0001f999" * 9, ""]),
        "\U0001f999": Value("str", "\U0001f999"),
    }
    assert len(encode_metadata(wide)) <= metadata_nbytes_at_most(wide)


def test_tensor_nbytes():
    assert tensor_nbytes("Q4_K", (2, 512)) == 2 * 2 * 144
    with pytest.raises(ValueError, match="320"):
        tensor_nbytes("Q4_K", (2, 320))
