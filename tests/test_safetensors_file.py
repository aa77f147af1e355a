"""Headers against the safetensors package; every kind of broken file is named for what it is."""

import io
import json
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quant.errors import BadInput, InputMissing, QwqQuantError
from quant.safetensors_file import DTYPE_BITS, read_header
from quant.strict_files import MAX_DEPTH, open_regular, parse_json

ROOT = Path(__file__).resolve().parents[1]


def entry(dtype="F32", shape=(2,), place=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(place)}


def pack(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def refusal(path: Path, content: bytes) -> BadInput:
    path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read_header(path)
    assert str(path) in caught.value.what  # the file is always named
    return caught.value


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.safetensors"


def test_what_safetensors_wrote_is_read_back(path):
    tensors = {
        name: torch.arange(30, dtype=torch.int32).to(dtype).reshape(5, 6)
        for name, dtype in {
            "f64": torch.float64, "f32": torch.float32, "f16": torch.float16,
            "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2,
            "i64": torch.int64, "u16": torch.uint16, "u8": torch.uint8, "c64": torch.complex64,
        }.items()
    }  # fmt: skip
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(3, 0), "é 字": torch.ones(1)}
    save_file(tensors, path, metadata={"format": "pt", "note": "ü"})
    infos, metadata = read_header(path)
    assert metadata == {"format": "pt", "note": "ü"}
    raw = path.read_bytes()
    with safe_open(path, "pt") as theirs:
        assert set(infos) == set(theirs.keys())
        for name, info in infos.items():
            piece = theirs.get_slice(name)
            assert (list(info.shape), info.dtype) == (piece.get_shape(), piece.get_dtype())
            stored = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert raw[info.offset : info.offset + info.nbytes] == stored
            assert (info.name, info.path, info.scale) == (name, path, None)


def test_every_dtype_of_the_format_is_listed_also_those_that_we_cannot_read(path):
    """Accepted by safetensors itself, so that the table of dtypes is the format's."""
    header, end = {}, 0
    for dtype, n_bits in DTYPE_BITS.items():
        header[dtype] = entry(dtype, (8,), (end, end + n_bits))
        end += n_bits
    path.write_bytes(pack(header, bytes(end)))
    assert all(name == info.dtype for name, info in read_header(path)[0].items())
    with safe_open(path, "np") as theirs:
        for name in header:
            assert theirs.get_slice(name).get_dtype() == name


def test_a_header_padded_with_spaces_and_a_file_without_tensors(path):
    path.write_bytes(pack(b"{}      "))
    assert read_header(path) == ({}, {})


def test_empty_tensors_lie_at_any_seam(path):
    places = {"a": (0, 8), "start": (0, 0), "b": (8, 16), "middle": (8, 8), "end": (16, 16)}
    header = {n: entry("U8", (place[1] - place[0],), place) for n, place in places.items()}
    path.write_bytes(pack(header, bytes(16)))
    with safe_open(path, "np") as theirs:
        assert set(read_header(path)[0]) == set(theirs.keys()) == set(places)


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", b"x" * 100)
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4932307584\n"
ONE = {"a": entry()}
BROKEN = {
    "empty": (b"", "is empty"),
    "seven bytes": (b"\1\2\3\4\5\6\7", "has 7 bytes, the smallest file has 10"),
    "git-lfs": (LFS, "git-LFS pointer"),
    "html": (b"<!DOCTYPE html><html><body>403</body>", "a web page"),
    "html in capitals": (b"\n  <HTML><HEAD>", "a web page"),
    "json error": (b'{"error": "Invalid username or password."}', "a JSON text"),
    "zip": (zip_bytes(), "a zip archive"),
    "pickle": (pickle.dumps({"a": np.zeros(3)}, protocol=2), "a Python pickle"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(100), "a GGUF file"),
    "zeros": (bytes(4096), "zeros where it should begin"),
    "noise": (b"\x10\0\0\0\0\0\0\0noise, no header", "does not begin with {"),
    "leading space": (pack(b" " + json.dumps(ONE).encode(), bytes(8)), "does not begin with {"),
    "huge header": (pack(ONE, bytes(8), length=2**62), "over the limit of 100.0 MB"),
    "header past the end": (pack(ONE, length=5000), "header alone needs 5008: the download"),
    "header length one short": (pack(ONE, bytes(8), length=len(json.dumps(ONE)) - 1), "line 1"),
    "header length one long": (pack(ONE, b"x" * 8, length=len(json.dumps(ONE)) + 1), "Extra data"),
    "cut short": (pack(ONE, bytes(7)), "its header needs"),
    "trailing bytes": (pack(ONE, bytes(11)), "3 bytes after its last tensor"),
    "hole": (
        pack({"a": entry(), "b": entry(place=(12, 20))}, bytes(20)),
        "4 bytes between a and b",
    ),
    "hole at the start": (pack({"a": entry(place=(4, 12))}, bytes(12)), "between the header and a"),
    "overlap": (pack({"a": entry(), "b": entry(place=(4, 12))}, bytes(12)), "b overlaps a"),
    "empty one inside": (
        pack({"a": entry(), "b": entry(shape=(0,), place=(4, 4))}, bytes(8)),
        "b overlaps a",
    ),
    "same place": (pack({"a": entry(), "b": entry()}, bytes(8)), "overlaps"),
    "shape and bytes": (
        pack({"a": entry(shape=(3,))}, bytes(8)),
        "needs 12 bytes, its place has 8",
    ),
    "half a byte": (pack({"a": entry("F4", (3,), (0, 1))}, bytes(1)), "needs 12 bits"),
    "overflow": (pack({"a": entry(shape=(2**62, 4))}, bytes(8)), "needs"),
    "negative shape": (pack({"a": entry(shape=(-2, -1))}, bytes(8)), "impossible shape"),
    "shape of true": (pack({"a": entry("U8", (True,), (0, 1))}, bytes(1)), "impossible shape"),
    "shape of floats": (pack({"a": entry(shape=(2.0,))}, bytes(8)), "impossible shape"),
    "shape null": (pack({"a": entry() | {"shape": None}}, bytes(8)), "impossible shape"),
    "65 dimensions": (pack({"a": entry(shape=[1] * 64 + [2])}, bytes(8)), "impossible shape"),
    "backward": (pack({"a": entry(place=(8, 0))}, bytes(8)), "impossible data_offsets"),
    "three offsets": (pack({"a": entry(place=(0, 4, 8))}, bytes(8)), "impossible data_offsets"),
    "no offsets": (pack({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "data_offsets None"),
    "unknown dtype": (pack({"a": entry("F33")}, bytes(8)), "unknown dtype F33"),
    "dtype a list": (pack({"a": entry() | {"dtype": ["F32"]}}, bytes(8)), "unknown dtype"),
    "entry a list": (pack({"a": [1]}, bytes(8)), "is not an object"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata a string": (pack({"__metadata__": "x"}), "__metadata__"),
    "duplicate tensor": (
        pack(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
        "'a' is there twice",
    ),
    "duplicate field": (pack(b'{"a":{"dtype":"F32","dtype":"F16"}}'), "'dtype' is there twice"),
    "not utf-8": (pack(b'{"\xff": 1}'), "Byte 2 of it is not UTF-8"),
    "half a character": (pack({"\ud800": entry()}, bytes(8)), "half of a surrogate pair"),
    "not json": (pack(b'{"a": }'), "line 1, column 7"),
    "deep": (pack(b'{"a":' + b"[" * 20_000 + b"]" * 20_000 + b"}"), "100 levels deep"),
    "a number of 5000 digits": (pack(b'{"a": ' + b"9" * 5000 + b"}"), "4300 digits"),
    "control characters": (pack({"\x1b[2J\n": entry("F33")}, bytes(8)), r"\x1b[2J\n has the"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_every_kind_of_broken_file_has_its_own_message(path, kind):
    content, message = BROKEN[kind]
    error = refusal(path, content)
    assert message in str(error)
    assert error.exit_code == 65
    assert "\x1b" not in str(error)
    assert "hf download" in error.next_step


def test_the_messages_differ(tmp_path):
    """Each kind is told apart from the others, not lumped together."""
    path = tmp_path / "x"
    texts = {kind: str(refusal(path, content)) for kind, (content, _) in BROKEN.items()}
    same = [
        ("html", "html in capitals"),
        ("noise", "leading space"),
        ("overlap", "empty one inside"),
        ("overlap", "same place"),
        ("metadata a string", "metadata of numbers"),
    ]
    for one, other in same:
        assert texts.pop(other) == texts[one]
    assert len(set(texts.values())) == len(texts)


def test_safetensors_refuses_them_too_save_the_few_that_we_add(path):
    """Our list is the format's: the package agrees on all but what it is known to let pass."""
    ours_alone = set()
    for kind, (content, _) in BROKEN.items():
        path.write_bytes(content)
        try:
            with safe_open(path, "np"):
                ours_alone.add(kind)
        except (SafetensorError, OSError):
            pass
    assert ours_alone == {"duplicate tensor", "leading space", "65 dimensions"}


def test_the_next_step_names_the_repository_of_a_file_in_the_hubs_cache(tmp_path):
    folder = tmp_path / "models--Qwen--QwQ-32B" / "snapshots" / "abc123"
    folder.mkdir(parents=True)
    error = refusal(folder / "model.safetensors", b"")
    assert "hf download Qwen/QwQ-32B model.safetensors --revision abc123" in error.next_step


def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path):
    fifo, listening = tmp_path / "fifo", tmp_path / "socket"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(listening))
        kinds = {tmp_path: "a folder", fifo: "a FIFO", listening: "a socket"}
        kinds[Path("/dev/null")] = "a device"
        for path, kind in kinds.items():
            with pytest.raises(BadInput, match=f"is {kind}, not a regular file"):
                read_header(path)


def test_a_fifo_that_takes_the_place_of_a_file_after_the_first_look(tmp_path, monkeypatch):
    """The open itself must not wait either: a link may change between stat and open."""
    fifo, regular = tmp_path / "fifo", tmp_path / "regular"
    os.mkfifo(fifo)
    regular.touch()
    real_stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path: real_stat(regular))
    with pytest.raises(BadInput, match="is a FIFO"), open_regular(fifo):
        pass


def test_links_to_nothing_loops_and_missing_files(tmp_path):
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputMissing, match="There is no file"):
        read_header(tmp_path / "none")
    with pytest.raises(InputMissing, match="is a link to a file that does not exist"):
        read_header(tmp_path / "dangling")
    with pytest.raises(BadInput, match="leads back to itself"):
        read_header(tmp_path / "loop")
    with pytest.raises(BadInput, match="File name too long"):
        read_header(tmp_path / ("x" * 300))


UNREADABLE = """
import os, sys
from pathlib import Path
from quant.errors import NotPermitted
from quant.safetensors_file import read_header
if os.geteuid() == 0:  # root may read everything
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
try:
    read_header(Path(sys.argv[1]))
except NotPermitted as error:
    print(error)
"""


def test_a_file_that_may_not_be_read(path):
    path.write_bytes(pack({}))
    path.chmod(0)
    for folder in list(path.parents)[:3]:
        folder.chmod(0o755)
    child = subprocess.run(
        [sys.executable, "-c", UNREADABLE, path], cwd=ROOT, capture_output=True, text=True
    )
    assert "may not be read by this user" in child.stdout, child.stderr


def test_json_errors_say_where(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(BadInput, match=r"Expecting.* at line 3, column 6\.") as caught:
        parse_json(b'{\n "a": 1,\n "b" 2}', path)
    assert caught.value.what == f"{path} is no valid JSON object."
    for raw, reason in {
        b"[1]": "It is a list",
        b"": "line 1, column 1",
        LFS: "git-LFS pointer",
        b"<html>": "a web page",
        b"\xef\xbb\xbf{}": "BOM",
        b'{"a": {"b": 1, "b": 2}}': "'b' is there twice",
        b'{"a": "\\ud800"}': "half of a surrogate pair",
        b'{"a": %s}' % (b"1" * 5000): "more than 4300 digits",
    }.items():
        with pytest.raises(BadInput) as caught:
            parse_json(raw, path)
        assert reason in str(caught.value), raw


def test_json_depth_is_limited_where_it_is_written(tmp_path):
    def nested(depth: int) -> bytes:
        return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    assert parse_json(nested(MAX_DEPTH - 1), tmp_path)
    for depth in (MAX_DEPTH + 1, 990, 100_000):
        with pytest.raises(BadInput, match="nested more than 100 levels"):
            parse_json(nested(depth), tmp_path)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "fuzzed.safetensors"


VALID = pack(
    {
        "__metadata__": {"format": "pt"},
        "model.embed_tokens.weight": entry("BF16", (4, 3), (0, 24)),
        "model.norm.weight": entry("F32", (3,), (24, 36)),
        "lm_head.weight": entry("F8_E4M3", (2, 2), (36, 40)),
    },
    bytes(range(40)),
)


@settings(max_examples=600, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(VALID) - 1), st.integers(1, 255)), min_size=1, max_size=3
    ),
    st.none() | st.integers(0, len(VALID) + 5),
)
def test_flipped_and_cut_bytes_never_give_anything_but_a_typed_error_or_the_truth(
    scratch, flips, cut
):
    content = bytearray(VALID)
    for place, mask in flips:
        content[place] ^= mask
    if cut is not None:
        content = content[:cut].ljust(cut, b"\0")
    scratch.write_bytes(content)
    try:
        infos, _ = read_header(scratch)
    except QwqQuantError:
        return
    with safe_open(scratch, "np") as theirs:  # what we take, the package takes, and alike
        assert set(infos) == set(theirs.keys())
        for name, info in infos.items():
            piece = theirs.get_slice(name)
            assert (list(info.shape), info.dtype) == (piece.get_shape(), piece.get_dtype())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]),
        json_values
        | st.fixed_dictionaries(
            {},
            optional={
                "dtype": st.sampled_from(["F32", "U8", "F4"]) | json_values,
                "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
                "data_offsets": st.lists(st.integers(-1, 16), max_size=3) | json_values,
            },
        ),
    ),
    st.integers(0, 16),
)
def test_any_json_for_a_header_gives_a_typed_error_or_the_truth(scratch, header, n_data):
    scratch.write_bytes(pack(header, bytes(n_data)))
    try:
        infos, _ = read_header(scratch)
    except QwqQuantError:
        return
    with safe_open(scratch, "np") as theirs:
        assert set(infos) == set(theirs.keys())
