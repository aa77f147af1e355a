"""Broken, hostile and unlucky inputs: one table of what they are and what the program must answer.

`ROWS` are the kinds of trouble that the program was designed against; `CASES` the inputs of each,
made and run by tests/hostile_runs.py; `ELSEWHERE` names the tests that show what needs more than
an input and a command; `NOT_SHOWN` what cannot be shown on a machine like this, and why.
"""

import json
import os
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import psutil
from hostile_runs import CALIBRATING, COMMANDS, FOLDERS, ROOT, Case, Place

ROWS = {
    1: "no such path, empty folder",
    2: "config.json missing or no JSON object",
    3: "config.json huge, deep, or with a key twice",
    4: "unknown architecture, code in the repository",
    5: "already quantized",
    6: "a shard is missing",
    7: "a shard is cut short",
    8: "something else under a shard's name",
    9: "a header that lies",
    10: "a tensor twice",
    11: "index and shards disagree",
    12: "an index that leads elsewhere",
    13: "links, FIFOs, devices, sockets",
    14: "NaN and infinite weights",
    15: "weights beyond float16",
    16: "rows of zeros, constants, negative zeros",
    17: "shapes that are not the config's",
    18: "rows that no block divides",
    19: "dtypes that are not read",
    20: "output layer tied, missing, or both",
    21: "vocabulary and embedding",
    22: "tensor names: unknown, long, control characters",
    23: "chat templates: broken, hostile, endless",
    24: "overrides of wrong type or key",
    25: "sampling sequences that would be emptied",
    26: "rotary settings that contradict",
    27: "disk full before the start",
    28: "disk full or failing in the middle",
    29: "too little memory",
    30: "signals, kills, power cuts",
    31: "two runs on one output",
    32: "the source changes while it is read",
    33: "the output exists",
    34: "outputs that must not be written",
    35: "resuming another job",
    36: "a damaged journal",
    37: "the hub refuses, fails, lies",
    38: "file size limits",
    39: "no such device, no such library",
    40: "calibration texts that are none",
    41: "closed streams, other locales, odd paths",
    42: "a worker process dies",
}

ELSEWHERE = {
    12: {"test_checkpoint.py::test_hostile_shard_names_are_refused_before_anything_is_opened"},
    13: {
        "test_safetensors_file.py::test_a_fifo_that_takes_the_place_of_a_file_after_the_first_look",
        "test_checkpoint.py::test_the_hub_cache_allows_links_into_its_own_blobs_only",
    },
    23: {
        "test_doctor.py::test_an_escape_does_not_run",
        "test_doctor.py::test_a_runaway_ends_soon_and_takes_no_memory",
    },
    28: {"test_resume_faults.py::test_nothing_is_lost"},
    29: {"test_cli.py::test_a_plan_that_does_not_fit"},
    30: {
        "test_resume.py::test_a_signal_stops_safely_and_the_printed_command_goes_on",
        "test_resume.py::test_killed_it_goes_on",
        "test_dynamic_4bit_cli.py::test_an_interrupted_run_that_keeps_nothing_leaves_nothing",
    },
    31: {"test_hostile.py::test_a_second_run_on_an_output_is_refused_and_the_first_ends_well"},
    32: {"test_hostile.py::test_a_source_that_changes_midway_is_not_published"},
    33: {"evaluation/test_evaluate.py::test_something_else_of_that_name_is_never_replaced"},
    35: {
        "test_resume.py::test_another_job_starts_over_and_says_why",
        "test_resume.py::test_whatever_decides_the_bytes_is_looked_at",
    },
    36: {"test_resume_journal.py::test_any_changed_byte_ends_what_counts"},
    37: {
        "test_hub.py::test_what_the_hub_refuses",
        "test_hub.py::test_the_token_of_the_environment_is_not_printed_either",
        "test_hub.py::test_a_hub_in_a_hurry_is_given_time",
        "test_hub.py::test_an_interrupted_download_is_no_model_and_the_next_run_completes_it",
        "test_hub.py::test_weights_that_arrive_damaged_are_not_kept",
        "test_hub.py::test_a_branch_that_moves_meanwhile_gives_one_version",
        "test_hub.py::test_offline_with_the_cache_and_without",
    },
    42: {"evaluation/test_evaluate.py::test_a_process_that_fails"},
}

NOT_SHOWN = {
    29: "A GPU out of memory: needs a GPU.",
    38: "File systems without locks (NFS) or with files of 4 GB at most (FAT), and a clock that "
    "jumps: need a mount and a clock of their own. RLIMIT_FSIZE gives the same errno as FAT.",
}

CHECKPOINT = tuple(name for name in COMMANDS if name not in ("fix", "evaluate"))
"""Commands that open a checkpoint to quantize or to run it."""

QUANTIZED = ("dynamic-4bit", "gptq")

ALL = tuple(name for name in COMMANDS if name != "evaluate")

Maker = Callable[[Place], object]


# --- makers -----------------------------------------------------------------------------------


def config(**changes) -> Maker:
    """config.json with other values; ... takes a key out."""

    def make(p: Place) -> None:
        edit_json(p.source / "config.json", changes)

    return make


def edit_json(path: Path, changes: dict) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def written(name: str, content: bytes | str) -> Maker:
    """A file of the model with another content."""

    def make(p: Place) -> None:
        (p.source / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def removed(name: str) -> Maker:
    return lambda p: (p.source / name).unlink()


def several(*makers: Maker) -> Maker:
    return lambda p: [make(p) for make in makers]


def asked(*options: str) -> Maker:
    """A whole model; what is wrong is on the command line."""
    return lambda p: p.options.extend(options)


def model_at(path: str) -> Maker:
    def make(p: Place) -> None:
        p.model = path.format(folder=p.folder)

    return make


def output_at(path: str) -> Maker:
    def make(p: Place) -> None:
        p.output = path.format(folder=p.folder)

    return make


def read_shard(path: Path) -> tuple[dict, bytes]:
    """The header of a .safetensors file, and what is behind it."""
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def pack(header: dict | bytes, data: bytes, n: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if n is None else n) + raw + data


def header(change: Callable[[dict], object], more: bytes = b"", claim: int = 0) -> Maker:
    """The shard's header changed, its length overstated by `claim`, `more` behind its data."""

    def make(p: Place) -> None:
        entries, data = read_shard(p.shard)
        change(entries)
        raw = json.dumps(entries).encode()
        p.shard.write_bytes(pack(raw, data + more, len(raw) + claim))

    return make


def tensors(change: Callable[[dict], object]) -> Maker:
    """The shard written anew, its {name: (dtype, array of bytes or numbers)} changed."""

    def make(p: Place) -> None:
        held = load(p.shard)
        change(held)
        p.shard.write_bytes(dump(held))

    return make


def load(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """BF16 as its bits in uint16."""
    entries, data = read_shard(path)
    entries.pop("__metadata__", None)
    return {
        name: (
            e["dtype"],
            np.frombuffer(data, np.uint16, (e["data_offsets"][1] - e["data_offsets"][0]) // 2,
                          e["data_offsets"][0]).reshape(e["shape"]).copy(),
        )
        for name, e in entries.items()
    }  # fmt: skip


def dump(held: dict[str, tuple[str, np.ndarray]]) -> bytes:
    entries, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, w) in held.items():
        raw = w.tobytes()
        entries[name] = {
            "dtype": dtype, "shape": list(w.shape), "data_offsets": [len(data), len(data + raw)]
        }  # fmt: skip
        data += raw
    return pack(entries, data)


def bits(value: float) -> int:
    """A number in bfloat16."""
    return int(np.float32(value).view(np.uint32) >> 16)


UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


def value(name: str, *values: float) -> Maker:
    """Some values of a tensor's row 3, from column 5 on."""

    def change(held: dict) -> None:
        held[name][1][3, 5 : 5 + len(values)] = [bits(v) for v in values]

    return tensors(change)


def in_two_shards(p: Place) -> Path:
    """The weights in two shards. Returns the index."""
    held = load(p.shard)
    p.shard.unlink()
    names = list(held)
    weight_map = {}
    for i, part in enumerate((names[:7], names[7:]), 1):
        shard = f"model-0000{i}-of-00002.safetensors"
        (p.source / shard).write_bytes(dump({name: held[name] for name in part}))
        weight_map |= dict.fromkeys(part, shard)
    index = p.source / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def index(change: Callable[[dict], object]) -> Maker:
    """Two shards, and the index's weight_map changed."""

    def make(p: Place) -> None:
        path = in_two_shards(p)
        content = json.loads(path.read_text())
        change(content["weight_map"])
        path.write_text(json.dumps(content))

    return make


def shard_named(name: str) -> Maker:
    return index(lambda weight_map: weight_map.update({UP: name}))


def instead(make: Callable[[Path], object], name: str = "model.safetensors") -> Maker:
    """Something else that is no file, under a file's name."""

    def put(p: Place) -> None:
        (p.source / name).unlink()
        make(p.source / name)

    return put


def instead_of_the_manifest(make: Callable[[Path], object]) -> Maker:
    """In place of the manifest of the command's earlier output."""

    def put(p: Place) -> None:
        folder = p.out / COMMANDS[p.command][0] if p.command in FOLDERS else p.out
        (folder / "qwq-quant.json").unlink()
        make(folder / "qwq-quant.json")

    return put


def listening(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has 107 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def link_out(path: Path) -> None:
    """A link to a sound file that is somebody else's."""
    theirs = path.parents[1] / "theirs"
    theirs.write_bytes(b"{}")
    path.symlink_to(theirs)


def zipped() -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", b"x" * 100)
    return buffer.getvalue()


def twice(p: Place) -> None:
    """A name in a header two times, each with a place of its own."""
    entries, data = read_shard(p.shard)
    raw = json.dumps(entries)
    again = json.dumps({"lm_head.weight": entries["lm_head.weight"]})
    p.shard.write_bytes(pack(f"{raw[:-1]}, {again[1:]}".encode(), data))


def in_both_shards(p: Place) -> None:
    in_two_shards(p)
    first, second = sorted(p.source.glob("model-*.safetensors"))
    second.write_bytes(dump({**load(second), UP: load(first).get(UP) or load(second)[UP]}))
    first.write_bytes(dump({**load(first), UP: load(second)[UP]}))


def deep(n: int) -> str:
    return '{"a": ' + "[" * n + "]" * n + "}"


def gguf_model(type_name: str) -> Maker:
    """A GGUF file for a model: made from the tiny one, or the earlier output itself."""

    def make(p: Place) -> None:
        p.model = str(p.out / "m.gguf")
        if p.command == "to-gguf":
            p.options += ["--type", type_name]
            p.output = str(p.folder / "again.gguf")

    return make


def quantized_folder(name: str) -> Maker:
    """The earlier output of another command for a model."""

    def make(p: Place) -> None:
        p.model = str(p.out / name)

    return make


def tokenizer(change: Callable[[dict], object]) -> Maker:
    def make(p: Place) -> None:
        path = p.source / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return make


def template(text: str) -> Maker:
    return written("chat_template.jinja", text)


def calibration(content: bytes, name: str = "text.txt") -> Maker:
    def make(p: Place) -> None:
        path = p.folder / name
        path.write_bytes(content)
        p.options += ["--calibration", str(path)]

    return make


def odd_rows(p: Place) -> None:
    """All widths are multiples of 32 and none of 256; and one of 40, which 32 does not divide."""
    edit_json(p.source / "config.json", {"intermediate_size": 40})

    def cut(held: dict) -> None:
        for name, (dtype, w) in list(held.items()):
            part = name.split(".")[-2]
            if part in ("gate_proj", "up_proj"):
                held[name] = dtype, w[:40].copy()
            if part == "down_proj":
                held[name] = dtype, w[:, :40].copy()

    tensors(cut)(p)


def cache_snapshot(p: Place) -> Path:
    folder = p.folder / "models--acme--tiny" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    return folder


def into_the_cache(p: Place) -> None:
    p.output = str(cache_snapshot(p) / COMMANDS[p.command][0])


def onto_itself(p: Place) -> None:
    p.model = p.output = str(p.out / "m.gguf")
    p.usual = False  # a type would be refused first: it is quantized


def through_a_link(p: Place) -> None:
    path = p.out / COMMANDS[p.command][0]
    path.rename(p.folder / "target")
    path.symlink_to(p.folder / "target")


def something_of_theirs(p: Place) -> None:
    path = p.folder / "theirs"
    if p.command in FOLDERS:
        path.mkdir()
        path = path / "thesis.txt"
    path.write_text("do not lose me")
    p.output = str(p.folder / "theirs")


def noise_for_a_journal(p: Place) -> None:
    (p.out / "m.gguf").rename(p.out / "undisturbed")
    (p.out / ".m.gguf.journal").write_bytes(os.urandom(300))
    (p.out / ".m.gguf.partial").write_bytes(os.urandom(3000))


def without_library(name: str) -> Callable[[Place], object]:
    """A module of that name that cannot be imported goes first, also in child processes."""

    @contextmanager
    def under(p: Place):
        shim = p.folder.parent / f"no-{name}"
        shim.mkdir(exist_ok=True)
        (shim / f"{name}.py").write_text("raise ImportError('No module of that name')")
        with mock.patch.dict(os.environ, {"PYTHONPATH": str(shim)}):
            yield

    return under


def full_disk(p: Place):
    real = os.statvfs

    def statvfs(path):
        return SimpleNamespace(f_bavail=1, f_frsize=real(path).f_frsize)

    return mock.patch.object(os, "statvfs", statvfs)


def little_memory(p: Place):
    return mock.patch.object(
        psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20, total=1 << 30)
    )


def odd_path(p: Place) -> None:
    p.model = os.fsdecode(os.fsencode(p.folder) + b"/m\xff\xfe")
    os.rename(p.source, p.model)


def not_permitted(p: Place) -> None:
    p.output = str(p.folder / "locked" / COMMANDS[p.command][0])
    (p.folder / "locked").mkdir(mode=0o555)


# --- looking at what was written --------------------------------------------------------------


def zeros_stay_zeros(p: Place) -> list[str]:
    """Every weight decodes to a finite number, and those that were 0 to 0."""
    from gguf import GGUFReader, dequantize

    wrong = []
    for tensor in GGUFReader(p.out / "m.gguf").tensors:
        w = dequantize(tensor.data, tensor.tensor_type)
        if not np.isfinite(w).all():
            wrong.append(f"{tensor.name} is not finite")
        if "ffn_up" in tensor.name and w.any():
            wrong.append(f"{tensor.name} is not zero")
        if "attn_q.w" in tensor.name and np.unique(np.round(w, 2)).tolist() != [0.5]:
            wrong.append(f"{tensor.name} is not constant")
    return wrong


def stored_as(name: str, expected: str) -> Callable[[Place], list[str]]:
    def check(p: Place) -> list[str]:
        from quant.gguf_file import GgufFile

        dtype = GgufFile.open(p.out / "m.gguf").tensors[name].dtype
        return [] if dtype == expected else [f"{name} is {dtype}, not {expected}"]

    return check


def says_policy(p: Place) -> list[str]:
    entry = json.loads((p.out / "qwq-quant.json").read_text())["outputs"]["m.gguf"]
    told = "zero" in str(entry["changes"])
    return [] if told else ["the manifest does not tell what was set to zero"]


def byte_identical(p: Place) -> list[str]:
    """As a run gives that found no journal."""
    same = (p.out / "undisturbed").read_bytes() == (p.out / "m.gguf").read_bytes()
    return [] if same else ["the output is not that of an undisturbed run"]


# --- the table --------------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4932307584\n"
ONE = ("to-gguf",)

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}

CASES = [
    Case(1, "no such path", model_at("{folder}/none"), 66, ("org/name",), ALL),
    Case(1, "no such path, to compare with", lambda p: asked(str(p.source))(p) or
         model_at("{folder}/none")(p), 66, ("org/name",), ("evaluate",)),
    Case(1, "no such path, like a hub name with a dot", model_at("./acme/tiny"), 66, ("org/name",)),
    Case(1, "an empty folder", lambda p: (p.folder / "new").mkdir() or model_at("{folder}/new")(p),
         66, ("holds no config.json",), ALL),
    Case(1, "a file that is no model", model_at("{folder}/model/tokenizer.json"),
         65, ("neither a folder nor a .gguf",), ALL),
    Case(2, "no config.json", removed("config.json"), 66, ("holds no config.json",), ALL),
    Case(2, "invalid JSON", written("config.json", '{\n "a": 1,\n "b" 2}'), 65,
         ("config.json", "line 3, column 6"), ALL),
    Case(2, "a JSON array", written("config.json", "[1]"), 65, ("config.json", "is a list"), ALL),
    Case(2, "not UTF-8", written("config.json", b'{"a": "\xff"}'), 65, ("is not UTF-8",)),
    Case(3, "11 MB", written("config.json", b'{"a": "' + b"x" * 11_000_000 + b'"}'), 65,
         ("larger than 10.0 MB",), ALL),
    Case(3, "200 levels deep", written("config.json", deep(200)), 65, ("100 levels",), ALL),
    Case(3, "100,000 levels deep", written("config.json", deep(100_000)), 65, ("100 levels",), ALL),
    Case(3, "a key twice", written("config.json", '{"hidden_size": 1, "hidden_size": 2}'), 65,
         ("'hidden_size' is there twice",), ALL),
    Case(3, "a number of 5000 digits", written("config.json", '{"a": ' + "9" * 5000 + "}"), 65,
         ("4300 digits",)),
    Case(4, "unknown architecture", config(architectures=["RwkvForCausalLM"]), 65,
         ("RwkvForCausalLM", "Qwen2"), CHECKPOINT),
    Case(4, "no architecture", config(architectures=...), 65, ("architecture",), CHECKPOINT),
    Case(4, "an architecture of control characters", config(architectures=["\x1b[2JX\n"]), 65,
         ("\\x1b[2JX",), CHECKPOINT),
    Case(4, "code of its own", several(
        config(architectures=["MineForCausalLM"], auto_map={"AutoModel": "modeling_mine.Mine"}),
        written("modeling_mine.py", "open('was-run', 'w')")),
        65, ("modeling_mine.py",), CHECKPOINT),
    Case(5, "by its config", config(quantization_config={"quant_method": "awq"}), 65,
         ("already quantized", "awq"), CHECKPOINT),
    Case(5, "packed integers", tensors(
        lambda held: held.update({Q.replace("weight", "qweight"): held.pop(Q)})),
        65, ("already quantized", "packed integers"), CHECKPOINT),
    Case(5, "a 4-bit folder", quantized_folder("nf4"), 65, ("already quantized",), CHECKPOINT,
         needs=("nf4",)),
    Case(5, "a GPTQ folder", quantized_folder("int4"), 65, ("already quantized",), CHECKPOINT,
         needs=("int4",)),
    Case(5, "a GGUF file", gguf_model("Q4_0"), 65, ("quantized",), ONE),
    Case(5, "a GGUF file, to be run", gguf_model(""), 2, ("is a GGUF file", "checkpoint"),
         CALIBRATING),
    Case(6, "one of two shards", lambda p: in_two_shards(p) and
         (p.source / "model-00002-of-00002.safetensors").unlink(), 66,
         ("1 of 2 shards are missing", "8 tensors", "hf download"), ALL),
    Case(6, "the only one", removed("model.safetensors"), 66, ("holds no weights",), ALL),
    Case(6, "the index", lambda p: in_two_shards(p).unlink(), 66, ("neither", "index",), ALL),
    Case(7, "its last byte", lambda p: os.truncate(p.shard, p.shard.stat().st_size - 1), 65,
         ("is cut short", "bytes, its header needs", "hf download"), ALL),
    Case(7, "in the header", lambda p: os.truncate(p.shard, 100), 65, ("is cut short",), ALL),
    Case(7, "to nothing", lambda p: os.truncate(p.shard, 0), 65, ("is empty",), ALL),
    Case(7, "its beginning, zeros", written("model.safetensors", bytes(5000)), 65, ("zeros",)),
    Case(8, "a git-LFS pointer", written("model.safetensors", LFS), 65, ("git-LFS pointer",), ALL),
    Case(8, "a web page", written("model.safetensors", "<!DOCTYPE html><html>403"), 65,
         ("web page",)),
    Case(8, "a pickle", written("model.safetensors", pickle.dumps([1], protocol=2)), 65,
         ("pickle",)),
    Case(8, "a zip archive", written("model.safetensors", zipped()), 65, ("zip archive",)),
    Case(8, "a GGUF file", written("model.safetensors", b"GGUF\3\0\0\0" + bytes(99)), 65,
         ("a GGUF file",)),
    Case(8, "pickles alone", several(removed("model.safetensors"),
         written("pytorch_model.bin", pickle.dumps([1]))), 65, ("pickles",), ALL),
    Case(8, "no tokenizer but a pointer to it", written("tokenizer.json", LFS), 65,
         ("git-LFS pointer",), ONE),
    Case(8, "a pointer to the tokenizer, to calibrate", written("tokenizer.json", LFS), 65,
         ("tokenizer", "cannot be loaded"), CALIBRATING),
    Case(9, "a length beyond reason", header(lambda e: None, claim=1 << 62), 65,
         ("claims", "over the limit"), ALL),
    Case(9, "a length beyond the file", header(lambda e: None, claim=90_000_000), 65,
         ("cut short",)),
    Case(9, "a length one too long", header(lambda e: None, claim=1), 65, ("no valid JSON",)),
    Case(9, "an overlap", header(lambda e: e[UP].update(data_offsets=e[DOWN]["data_offsets"])), 65,
         ("overlaps",), ALL),
    Case(9, "a hole", header(lambda e: e.pop(UP)), 65, ("hole",), ALL),
    Case(9, "bytes at the end", header(lambda e: None, more=bytes(9)), 65,
         ("9 bytes after its last tensor",), ALL),
    Case(9, "a shape of 2^62 rows", header(lambda e: e[UP].update(shape=[1 << 62, 4])), 65,
         ("needs",)),
    Case(9, "a negative shape", header(lambda e: e[UP].update(shape=[-64, -32])), 65,
         ("impossible shape",)),
    Case(9, "offsets backward", header(lambda e: e[UP].update(data_offsets=[9, 0])), 65,
         ("impossible data_offsets",)),
    Case(10, "within a header", twice, 65, ("'lm_head.weight' is there twice",), ALL),
    Case(10, "in two shards", in_both_shards, 65, ("in more than one shard",), ALL),
    Case(11, "a tensor too many in the index", index(lambda m: m.update(extra=m[UP])), 65,
         ("1 in the index but in no shard: extra",), ALL),
    Case(11, "a tensor too few in the index", index(lambda m: m.pop(UP)), 65,
         ("1 in a shard but not in the index", UP), ALL),
    Case(11, "a tensor in the wrong shard",
         index(lambda m: m.update({UP: sorted(set(m.values()))[m[UP].startswith("model-00001")]})),
         65, ("in another shard",), ALL),
    Case(11, "no weight_map", lambda p: in_two_shards(p).write_text('{"weight_map": [1]}'), 65,
         ("no weight_map",), ALL),
    Case(11, "an empty one", lambda p: in_two_shards(p).write_text('{"weight_map": {}}'), 65,
         ("names no tensors",), ALL),
    *(
        Case(12, f"a shard {name!r}", shard_named(name), 65, (says,), ALL)
        for name, says in {
            "../x.safetensors": "lead out",
            "/etc/passwd": "lead out",
            "C:x.safetensors": "lead out",
            "\\\\srv\\x.safetensors": "lead out",
            "a/../../x.safetensors": "lead out",
            "model.bin": "Only .safetensors",
            "a\x1b[2J.safetensors": "cannot be printed",
        }.items()
    ),
    Case(12, "200 MB", lambda p: os.truncate(in_two_shards(p), 200_000_000), 65,
         ("larger than 100.0 MB",), ALL),
    Case(13, "a link out of the folder", instead(link_out), 65, ("link out of the model",), ALL),
    Case(13, "config.json a link out", instead(link_out, "config.json"), 65,
         ("link out of the model",), ALL),
    Case(13, "a link to itself", instead(lambda path: path.symlink_to(path.name)), 65,
         ("back to itself",), ALL),
    Case(13, "a link to nothing", instead(lambda path: path.symlink_to("none")), 66,
         ("link to a file that does not exist",), ALL),
    Case(13, "a FIFO", instead(os.mkfifo), 65, ("is a FIFO",), ALL),
    Case(13, "config.json a FIFO", instead(os.mkfifo, "config.json"), 65, ("is a FIFO",), ALL),
    Case(13, "tokenizer.json a FIFO", instead(os.mkfifo, "tokenizer.json"), 65, ("is a FIFO",)),
    Case(13, "a socket", instead(listening), 65, ("is a socket",), ALL),
    Case(13, "a folder", instead(os.mkdir), 65, ("is a folder",), ALL),
    Case(13, "a device", instead(lambda path: path.symlink_to("/dev/zero")), 65, ("link out",)),
    Case(13, "a FIFO as the model", lambda p: os.mkfifo(p.folder / "m.gguf") or
         model_at("{folder}/m.gguf")(p), 65, ("no regular file",), ONE),
    Case(13, "a FIFO as the text", lambda p: os.mkfifo(p.folder / "t.txt") or
         asked("--calibration", str(p.folder / "t.txt"))(p), 65, ("FIFO",), CALIBRATING[3:]),
    Case(13, "a FIFO as the output", lambda p: os.mkfifo(p.folder / "f") or
         output_at("{folder}/f")(p), 73, ("is never replaced",), ALL),
    Case(13, "a FIFO as the manifest", instead_of_the_manifest(os.mkfifo), 73, ("qwq-quant",),
         ("to-gguf", *QUANTIZED, "fix")),
    Case(36, "a manifest 2,000 levels deep", instead_of_the_manifest(
        lambda path: path.write_text(deep(2000))), 73, ("qwq-quant",),
        ("to-gguf", *QUANTIZED, "fix")),
    Case(36, "an empty manifest", instead_of_the_manifest(Path.touch), 73, ("qwq-quant",),
         ("to-gguf", *QUANTIZED, "fix")),
    Case(14, "NaN", value(UP, np.nan, np.nan), 65, (f"{UP} has 2 NaN", "row 3, column 5"), ONE),
    Case(14, "NaN, to calibrate", value(UP, np.nan, np.nan), 65, (f"{UP} has 2 NaN",),
         CALIBRATING),
    Case(14, "infinite", value(UP, np.inf, -np.inf, 1, -np.inf), 65, ("has 3",),
         ("to-gguf", *CALIBRATING)),
    Case(14, "NaN, set to zero", several(value(UP, np.nan), asked("--nan-policy", "zero")), 0,
         ("1 NaN",), ONE, check=says_policy),
    Case(14, "NaN, kept", several(value(UP, np.nan), asked("--nan-policy", "keep-16bit")), 0,
         ("NaN",), ONE, check=stored_as("blk.0.ffn_up.weight", "BF16")),
    Case(15, "1e30", value(UP, 1e30), 0, ("float16",), ONE,
         check=stored_as("blk.0.ffn_up.weight", "BF16")),
    Case(15, "1e30 in 4 bits", several(value(UP, 1e30), config(dtype="float16")), 65,
         ("float16", "mlp.up_proj"), ("dynamic-4bit", "gptq")),
    Case(15, "subnormal", value(UP, 1e-40, -1e-40), 0, (), ("to-gguf", "dynamic-4bit", "gptq")),
    *(
        Case(16, f"in {name}", several(
            tensors(lambda held: held.update({
                UP: ("BF16", np.full((64, 32), bits(-0.0), np.uint16)),
                Q: ("BF16", np.full((32, 32), bits(0.5), np.uint16))})),
            asked("--type", name)), 0, (), ONE, check=zeros_stay_zeros)
        for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")
    ),
    Case(16, "in 4 bits", tensors(lambda held: held.update({
        UP: ("BF16", np.zeros((64, 32), np.uint16))})), 0, (), ("dynamic-4bit", "gptq")),
    Case(17, "hidden_size", config(hidden_size=64), 65, ("64",), CHECKPOINT),
    Case(17, "vocab_size", config(vocab_size=5000), 65, ("5000",), CHECKPOINT),
    Case(17, "heads", config(num_attention_heads=3), 65, ("3",), CHECKPOINT),
    Case(17, "layers", config(num_hidden_layers=2), 65, ("layers.1",), CHECKPOINT),
    Case(17, "a million layers", config(num_hidden_layers=1_000_000), 65, ("layers",), CHECKPOINT),
    Case(17, "hidden_size of text", config(hidden_size="big"), 65, ("hidden_size",), CHECKPOINT),
    Case(17, "no layers", config(num_hidden_layers=-1), 65, ("num_hidden_layers",), CHECKPOINT),
    Case(18, "40 columns", several(odd_rows, asked("--type", "Q4_0")), 0, (), ONE,
         check=stored_as("blk.0.ffn_down.weight", "F16")),
    Case(18, "32 columns and blocks of 256", asked("--type", "Q4_K_M"), 0, (), ONE,
         check=stored_as("blk.0.ffn_up.weight", "Q5_0")),
    Case(18, "groups of 48", asked("--group-size", "48"), 65, ("48",), ("gptq",)),
    *(
        Case(19, dtype, header(lambda e, d=dtype: e[UP].update(dtype=d)), 65, (words,), CHECKPOINT)
        for dtype, words in {
            "U16": "U16", "I16": "I16", "F8_E4M3": "bytes", "C64": "bytes", "I4": "unknown dtype",
        }.items()
    ),
    Case(19, "FP8 without a scale", tensors(lambda held: held.update({
        UP: ("F8_E4M3", held[UP][1].astype(np.uint8))})), 65, ("without a scale",), CHECKPOINT),
    Case(20, "missing", tensors(lambda held: held.pop("lm_head.weight")), 65,
         ("lm_head.weight", "tie_word_embeddings"), ONE),
    Case(20, "missing, to be run", tensors(lambda held: held.pop("lm_head.weight")), 65,
         ("lm_head.weight",), CHECKPOINT[1:]),
    Case(20, "tied and stored", config(tie_word_embeddings=True), 0,
         ("lm_head.weight is stored although",), ONE),
    Case(20, "the embedding is missing", tensors(lambda h: h.pop("model.embed_tokens.weight")), 65,
         ("embed_tokens",), CHECKPOINT),
    Case(21, "a token too many", tokenizer(lambda t: t["model"]["vocab"].update(zzzz=5000)), 65,
         ("4096 rows",), ONE),
    Case(21, "a special id beyond", config(eos_token_id=9999), 0, ("9999",), ONE),
    Case(21, "an id twice", tokenizer(lambda t: t["model"]["vocab"].update(zzzz=7)), 65,
         ("share the id 7",), ONE),
    Case(21, "no merges", tokenizer(lambda t: t["model"].update(merges=[])), 65, ("no merges",),
         ONE),
    Case(21, "not UTF-8", written("tokenizer.json", b'{"model": "\xff"}'), 65, ("not UTF-8",), ONE),
    Case(21, "no tokenizer", removed("tokenizer.json"), 66, ("neither tokenizer.json",), ONE),
    *(
        Case(21, f"{name}, to calibrate", make, code, words, CALIBRATING[3:])
        for name, make, code, words in (
            ("not UTF-8", written("tokenizer.json", b'{"model": "\xff"}'), 65, ("tokenizer",)),
            ("no tokenizer", removed("tokenizer.json"), 66, ("tokenizer",)),
            ("no vocabulary", tokenizer(lambda t: t.update(model=None)), 65, ("tokenizer",)),
        )
    ),
    Case(22, "unknown", tensors(lambda h: h.update({"model.extra": h[UP]})), 65,
         ("have no place", "model.extra"), CHECKPOINT),
    Case(22, "5,000 letters", tensors(lambda h: h.update({"x" * 5000: h[UP]})), 65,
         ("have no place",), CHECKPOINT),
    Case(22, "control characters", tensors(lambda h: h.update({"a\0\n\x1b[2J": h[UP]})), 65,
         ("\\x1b[2J",), CHECKPOINT),
    Case(23, "broken", template("{% if %}"), 0, (), ONE),
    Case(23, "endless", template("{% for i in range(10**9) %}{% endfor %}" * 9), 0, (), ONE),
    Case(23, "an escape", template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), 0, (), ONE),
    Case(23, "broken, to be examined", template("{% if %}"), 1, ("template",), ("doctor",)),
    Case(23, "an escape, to be examined", template("{{ ''.__class__.__mro__ }}"), 1,
         ("template",), ("doctor",)),
    Case(23, "not UTF-8", written("chat_template.jinja", b"\xff"), 65,
         ("no UTF-8 text",), ONE),
    *(
        Case(24, text[:80], asked("--override", text), code, (words,), ONE)
        for text, code, words in (
            ("qwen2.context_length=str:4096", 78, "u32"),
            ("qwen2.context_length=u32:8589934592", 78, "u32"),
            ("qwen2.context_length=u32:-1", 78, "u32"),
            ("qwen2.context_length=u32:4k", 78, "4k"),
            ("qqwen2.context_length=u32:1", 78, "Did you mean"),
            ("qwen2.attention.layer_norm_rms_epsilon=f32:nan", 78, "nan"),
            ("qwen2.attention.layer_norm_rms_epsilon=f32:1e999", 78, "1e999"),
            ("qwen2.rope.freq_base=f32:inf", 78, "inf"),
            ("general.tags=arr[str]:[1]", 78, "general.tags"),
            ("general.tags=arr[str]:" + "[" * 3000, 78, "general.tags"),
            ("general.name=str:", 0, ""),
            ("general.architecture=str:llama", 78, "general.architecture"),
            ("general.alignment=u32:0", 78, "general.alignment"),
            ("tokenizer.ggml.tokens=arr[str]:[]", 78, "tokenizer.ggml.tokens"),
            ("x" * 70_000 + "=u32:1", 2, "65535 bytes"),
            ("no equals sign", 2, "KEY=TYPE:VALUE"),
            ("a=u99:1", 2, "u99"),
            ("\x1b[2J=u32:1", 2, "\\x1b[2J"),
        )
    ),
    *(
        Case(25, repr(text), asked("--override", f"general.sampling.sequence=str:{text}"), 78,
             (words,), ONE)
        for text, words in {
            "top_k,temperature": "';'",
            "top_k;temprature": "Did you mean temperature",
            "": "empty",
            "top_k;;temperature": "empty name",
        }.items()
    ),
    Case(25, "no temperature", asked("--override", "general.sampling.sequence=str:top_k"), 0,
         ("no temperature",), ONE),
    Case(25, "a penalty that nothing applies", asked(
        "--override", "general.sampling.sequence=str:top_k;temperature",
        "--override", "general.sampling.penalty_repeat=f32:1.1"), 0, ("penalty_repeat 1.1",), ONE),
    Case(25, "no such profile", asked("--sampling", "best"), 78, ("best",), ONE),
    Case(25, "a profile that is a pickle", lambda p: (p.folder / "p.toml").write_bytes(
        pickle.dumps([1])) and asked("--sampling", str(p.folder / "p.toml"))(p), 78, ("p.toml",),
        ONE),
    Case(25, "top_p of generation_config.json", lambda p: edit_json(
        p.source / "generation_config.json", {"top_p": 7}), 65, ("top_p",), ONE),
    *(
        Case(26, name, config(**changes), code, (words,), ONE)
        for name, changes, code, words in (
            ("yarn without original", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, 0, ""),
            ("factor below 1", {"rope_scaling": {**YARN, "factor": 0.5}}, 65, "factor"),
            ("factor of text", {"rope_scaling": {**YARN, "factor": "4"}}, 65, "factor"),
            ("factor NaN", {"rope_scaling": {**YARN, "factor": float("nan")}}, 65, "factor"),
            ("an unknown type", {"rope_scaling": {"type": "ntk", "factor": 2}}, 65, "ntk"),
            ("two that differ", {"rope_scaling": YARN, "rope_theta": 1e4,
                                 "rope_parameters": {**YARN, "factor": 2.0, "rope_theta": 1e4}},
             65, "rope"),
            ("theta 0", {"rope_theta": 0, "rope_parameters": ...}, 65, "theta"),
            ("a list", {"rope_scaling": [1]}, 65, "rope_scaling"),
        )
    ),
    Case(27, "a full disk", lambda p: None, 74, ("needs", "free", "too little"), ONE,
         under=full_disk),
    Case(27, "a full disk, for a folder", lambda p: None, 74, ("needs", "free"),
         ("dynamic-4bit", "gptq"), under=full_disk),
    Case(27, "a full disk, planned", asked("--dry-run"), 74, ("DOES NOT FIT",), ONE,
         under=full_disk),
    Case(28, "a limit of 300 kB", lambda p: None, 74, ("--split-max-size",), ONE,
         shell="ulimit -f 300; trap '' XFSZ; {command} --type BF16 --resume never"),
    Case(28, "a limit of 100 kB for a folder", asked("--budget", "0"), 74, ("larger than",),
         ("dynamic-4bit",), shell="ulimit -f 100; trap '' XFSZ; {command}"),
    Case(29, "1 MB free", lambda p: None, 69, ("memory",), ONE, under=little_memory),
    Case(29, "1 MB free, planned", asked("--dry-run"), 69, ("DOES NOT FIT",), ONE,
         under=little_memory),
    Case(33, "without --force", lambda p: None, 73, ("exists", "--force"), ALL, force=False),
    Case(33, "something else of its name", something_of_theirs, 73, ("exists and",), ALL),
    Case(34, "the source itself", onto_itself, 2, ("is the source itself",), ONE),
    Case(34, "the source's folder", output_at("{folder}/model"), 73, ("did not write",), QUANTIZED),
    Case(34, "the source's folder, to mend", output_at("{folder}/model"), 2, ("own folder",),
         ("fix",)),
    Case(34, "around the source", output_at("{folder}"), 73, ("did not write",), QUANTIZED),
    Case(34, "around the source, to mend", output_at("{folder}"), 2, ("own folder",), ("fix",)),
    Case(34, "a file of the source", output_at("{folder}/model/config.json"), 73,
         ("exists and is no",), ("to-gguf", "measure", "imatrix", "kv-calibrate")),
    Case(34, "a file of the source, as a folder", output_at("{folder}/model/config.json"), 73,
         ("inside a model's folder",), QUANTIZED),
    Case(34, "the source's shard", output_at("{folder}/model/model.safetensors"), 2,
         ("is the source itself",), ("to-gguf", "measure", "imatrix", "kv-calibrate")),
    Case(34, "within the source", output_at("{folder}/model/new"), 73,
         ("inside a model's folder",), QUANTIZED),
    Case(34, "within the source, to mend", output_at("{folder}/model/new"), 2, ("own folder",),
         ("fix",)),
    Case(34, "within the hub's cache", into_the_cache, 73, ("cache",), ALL),
    Case(34, "through a link", through_a_link, 73, ("link",), ("to-gguf", "measure", "imatrix")),
    Case(34, "through a link, for a folder", through_a_link, 73, ("is no folder",), FOLDERS[:3]),
    Case(34, "no such folder", output_at("{folder}/none/x"), 73, ("mkdir -p",), ALL),
    Case(34, "in a file", output_at("{folder}/out/m.gguf/x"), 73, ("not a folder",), ALL),
    Case(34, "a name of 255 letters", output_at("{folder}/" + "x" * 255), 73, ("too long",), ALL),
    Case(34, "the manifest's name", output_at("{folder}/out/qwq-quant.json"), 73, ("manifest",),
         ("to-gguf", "measure", "imatrix")),
    Case(34, "not permitted", not_permitted, 73, ("cannot be written",), ONE, shell=
         "[ $(id -u) != 0 ] || exec setpriv --bounding-set=-dac_override {command}; {command}"),
    Case(35, "nothing to resume", asked("--resume", "required"), 66, ("resume",), ONE),
    Case(36, "noise for a journal", noise_for_a_journal, 0, (), ONE, check=byte_identical),
    Case(38, "a limit on the file's size", lambda p: None, 74, ("--split-max-size",), ONE,
         shell="ulimit -f 300; trap '' XFSZ; {command} --type F32 --resume never"),
    Case(31, "a lock that a dead run left", lambda p: (p.out / ".m.gguf.partial").touch(), 0, (),
         ONE),
    Case(39, "no such device", asked("--device", "abacus"), 69, ("abacus", "--device cpu"),
         CALIBRATING),
    Case(39, "no llama-cpp-python", gguf_model(""), 69, ("pip install", "llama"), ("chat",),
         under=without_library("llama_cpp"), shell="{command} </dev/null"),
    Case(40, "empty", calibration(b""), 65, ("holds no text",), CALIBRATING[1:]),
    Case(40, "blank", calibration(b" \n\n "), 65, ("holds no text",), CALIBRATING[1:]),
    Case(40, "too short", calibration(b"Too few words."), 65, ("text.txt",), CALIBRATING[1:]),
    Case(40, "binary", calibration(b"\xff\xfe\x00a" * 999), 65, ("no UTF-8 text",),
         CALIBRATING[1:]),
    Case(40, "zero bytes", calibration(b"a\0b" * 999), 65, ("zero bytes",), CALIBRATING[1:]),
    Case(40, "broken JSON lines", calibration(b'{"text": "a"}\n{"text": }\n', "t.jsonl"), 65,
         ("Line 2",), CALIBRATING[1:]),
    Case(40, "JSON lines without text", calibration(b'{"content": "a"}\n', "t.jsonl"), 65,
         ("Line 1", "no text"), CALIBRATING[1:]),
    Case(40, "no such file", asked("--calibration", "none.txt"), 66, ("none.txt",),
         CALIBRATING[1:]),
    Case(40, "a folder", asked("--calibration", str(ROOT)), 65, ("is a folder",), CALIBRATING[1:]),
    Case(40, "2 GB", lambda p: calibration(b"")(p) or os.truncate(p.options[-1], 2 << 30), 65,
         ("larger than 1 GB",), CALIBRATING[3:]),
    Case(40, "one word alone", calibration(b"the " * 20_000), 0, (), ("imatrix", "kv-calibrate")),
    Case(41, "stdout closed", lambda p: None, 0, (), ONE, shell="{command} >&-"),
    Case(41, "read by head", asked("--dry-run"), 0, (), ONE,
         shell="set -o pipefail; {command} | head -1"),
    Case(41, "LANG=C and a path of other bytes", odd_path, 0, (), ONE,
         shell="LANG=C LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {command}"),
    Case(41, "a path of other bytes for a folder", odd_path, 0, (), ("dynamic-4bit",)),
    Case(41, "stdout full", asked("--dry-run"), 74, ("no space",), ONE,
         shell="{command} >/dev/full"),
]  # fmt: skip
"""Row by row. Codes and words are the contract with the user: what it is, what to do next."""
