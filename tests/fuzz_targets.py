"""Readers of files that strangers wrote, each with valid files and ways to damage them.

`targets(folder)` gives every target: hypothesis draws an input, `execute` hands it to the reader
under a limit of time and memory. The reader may accept it or raise one of our errors; anything
else, a hang, or an allocation out of proportion is a fault. tests/test_fuzz.py runs a few
examples of each, scripts/check_reliability.py --fuzz-minutes a campaign.
"""

import copy
import json
import re
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import hostile_runs
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from quant.checkpoint import Checkpoint
from quant.errors import QwqQuantError
from quant.gguf_file import TensorEntry, Value, encode_header, encode_metadata, open_gguf
from quant.importance import read_importance
from quant.inspection.describe import describe
from quant.journal import interrupted_job
from quant.lora import open_adapter
from quant.metadata_checks import check_metadata
from quant.metadata_keys import KEYS
from quant.overrides import INTEGER_RANGES, apply_overrides
from quant.recipe import read_profile, read_recipe, recipe_names, recipe_text
from quant.sensitivity import read_sensitivity
from quant.source import open_source
from quant.to_gguf import Wishes, plan_gguf
from quant.verify import find_outputs
from quant.vocabulary import read_vocabulary

SECONDS = 10.0
"""Far above the slowest honest answer, which takes a tenth of one."""

MEMORY_NBYTES = 300 << 20
"""That one execution may take on top of what the process has; the files have some kilobytes."""


@dataclass(frozen=True)
class Target:
    """One reader. `run` writes the drawn input to a file and reads it, as a command would."""

    name: str
    valid: object
    """An input that nobody damaged: it is accepted."""
    inputs: SearchStrategy
    run: Callable[[object], object]


class Fault(Exception):
    """What must never happen: another exception than ours, a hang, or too much memory."""


def execute(target: Target, drawn: object) -> str:
    """ "accepted", or the error and where in the program it was raised. Raises Fault."""
    try:
        with limits():
            target.run(drawn)
    except QwqQuantError as error:
        return f"{type(error).__name__} {_place(error)}"
    except MemoryError as error:
        raise Fault(f"{target.name}: more than {MEMORY_NBYTES >> 20} MiB") from error
    except Exception as error:
        raise Fault(f"{target.name}: {error!r}") from error
    return "accepted"


def _place(error: BaseException) -> str:
    """The last line of the program that an error passed through: it tells refusals apart."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if "/quant/" in code.co_filename:
            place = f"{Path(code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


@contextmanager
def limits() -> Iterator[None]:
    """Raise Fault after SECONDS, and MemoryError where more than MEMORY_NBYTES are taken."""

    def end(number, frame):
        raise Fault(f"no answer after {SECONDS} seconds")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    n_pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed = n_pages * resource.getpagesize() + MEMORY_NBYTES
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- damaged bytes ----------------------------------------------------------------------------

LENGTHS = (0, 1, 2, 7, 8, 255, 256, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
           2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip


@st.composite
def damaged(draw, seeds: list[bytes], words: list[bytes] = ()) -> bytes:
    """One of the seeds, changed in up to four places: bits, numbers, cuts, copies, words."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        change = draw(st.sampled_from(CHANGES))
        at = draw(st.integers(0, len(content)))
        change(draw, content, at, seeds, words)
    return bytes(content)


def _flip(draw, content, at, seeds, words):
    if at < len(content):
        content[at] ^= draw(st.integers(1, 255))


def _lie(draw, content, at, seeds, words):
    """A number of 1, 2, 4 or 8 bytes that is a length somewhere."""
    code = draw(st.sampled_from("BHIQ"))
    size = struct.calcsize(code)
    number = draw(st.sampled_from(LENGTHS) | st.integers(0, 2**64 - 1))
    content[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, "little")


def _cut(draw, content, at, seeds, words):
    del content[at:]


def _remove(draw, content, at, seeds, words):
    del content[at : at + draw(st.integers(1, 64))]


def _repeat(draw, content, at, seeds, words):
    content[at:at] = content[at : at + draw(st.integers(1, 256))] * draw(st.integers(1, 3))


def _splice(draw, content, at, seeds, words):
    """A piece of another file."""
    other = draw(st.sampled_from(seeds))
    start = draw(st.integers(0, len(other)))
    content[at : at + draw(st.sampled_from([0, 16]))] = other[start : start + 64]


def _insert(draw, content, at, seeds, words):
    content[at:at] = draw(st.sampled_from(list(words)) if words else st.binary(max_size=16))


CHANGES = (_flip, _lie, _cut, _remove, _repeat, _splice, _insert)


# --- damaged JSON -----------------------------------------------------------------------------

RAW = "\ue000"
"""Begins and ends a string that is written as it stands, without quotes."""

JUNK = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, 1e300, "", "x", "\x1b[2J", "\ud800",
    "../x", "a" * 5000, [], [1], ["x"], [[]], {}, {"x": 7}, {"type": "x"},
    *(f"{RAW}{text}{RAW}" for text in (
        "NaN", "-Infinity", "1e999", "9" * 5000, "[" * 90 + "]" * 90, "[" * 2000 + "]" * 2000,
        '{"a":' * 2000 + "1" + "}" * 2000, "", "tru", "'x'", '{"a": 1, "a": 2}', "\x00",
    )),
)  # fmt: skip


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The path to every value in a document."""
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    return [inner for key, item in items for inner in ((*path, key), *places(item, (*path, key)))]


@st.composite
def damaged_json(draw, documents: list[dict], keys: tuple[str, ...] = ()) -> bytes:
    """One of the documents with up to three values replaced, moved, removed, added or doubled."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(0, 3))):
        found = places(document) or [("x",)]
        path = draw(st.sampled_from(found))
        value = draw(st.sampled_from(JUNK) | st.integers() | st.floats() | st.text(max_size=5))
        if draw(st.booleans()) and len(found) > 1:
            value = _at(document, draw(st.sampled_from(found)))
        _change(draw, document, path, copy.deepcopy(value), keys)
    text = json.dumps(document)
    text = re.sub('"\\\\ue000(.*?)\\\\ue000"', lambda m: json.loads(f'"{m[1]}"'), text)
    raw = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 4)) == 0:
        raw = draw(damaged([raw], [b'"', b"{", b"}", b"[", b",", b"\\u", b"\xff", b"\xef\xbb\xbf"]))
    return raw


def _at(document: object, path: tuple) -> object:
    for key in path:
        document = document[key]
    return document


def _change(draw, document, path: tuple, value: object, keys: tuple[str, ...]) -> None:
    inside, key = _at(document, path[:-1]), path[-1]
    action = draw(st.sampled_from(["replace", "remove", "add", "double"]))
    if action == "remove" and key in (inside if isinstance(inside, dict) else range(len(inside))):
        del inside[key]
    elif action == "add" and isinstance(inside, dict):
        names = st.text(max_size=5)
        inside[draw(st.sampled_from(keys) | names if keys else names)] = value
    elif action == "double" and isinstance(inside, dict) and key in inside:
        inside[key] = f"{RAW}1, {json.dumps(key)}: 2{RAW}"
    else:
        inside[key] = value


# --- the targets ------------------------------------------------------------------------------


def targets(folder: Path) -> dict[str, Target]:
    """By name. `folder` is filled with valid files of every kind."""
    prepared = hostile_runs.prepare(folder / "valid")
    makers = (
        safetensors_header, sharded_checkpoint, model_settings, gguf_header, tokenizer_json,
        tokenizer_model, recipes, profiles, overrides, importance, sensitivities, adapter,
        journal, manifest,
    )  # fmt: skip
    made = [make(prepared, _fresh(folder / make.__name__)) for make in makers]
    return {target.name: target for target in made}


def _fresh(folder: Path) -> Path:
    folder.mkdir()
    return folder


def safetensors_header(prepared: Path, work: Path) -> Target:
    """A whole checkpoint whose one shard is damaged: its header first of all."""
    shutil.copytree(prepared / "model", work, dirs_exist_ok=True)
    path = work / "model.safetensors"
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + n]), raw[8 + n :]
    small = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [4, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [24, 28]},
        "b_scale_inv": {"dtype": "F32", "shape": [1, 1], "data_offsets": [28, 32]},
    }
    few = struct.pack("<Q", len(json.dumps(small))) + json.dumps(small).encode() + bytes(32)
    keys = ("dtype", "shape", "data_offsets", "__metadata__", "a_scale_inv", "c")

    def packed(raw: bytes, behind: bytes, lie: int) -> bytes:
        return ((len(raw) + lie) % 2**64).to_bytes(8, "little") + raw + behind

    lies = st.sampled_from((0, 0, 0, 0, 1, -1, 10**8, -(10**4)))
    structured = st.one_of(
        st.builds(packed, damaged_json([small], keys), st.just(bytes(32)), lies),
        st.builds(packed, damaged_json([header], keys), st.just(data), lies),
    )

    def run(content: bytes) -> None:
        path.write_bytes(content)
        describe(Checkpoint.open(work))

    return Target("safetensors header", few, structured | damaged([few]), run)


def sharded_checkpoint(prepared: Path, work: Path) -> Target:
    """The index of two shards."""
    from hostile_inputs import in_two_shards

    place = hostile_runs.Place(work)
    shutil.copytree(prepared / "model", work / "model")
    index = in_two_shards(place)
    document = json.loads(index.read_text())
    shards = sorted(set(document["weight_map"].values()))
    keys = ("weight_map", "metadata", "model.norm.weight", *shards)

    def run(content: bytes) -> None:
        index.write_bytes(content)
        Checkpoint.open(place.source)

    valid = json.dumps(document).encode()
    return Target("index", valid, damaged_json([document], keys), run)


def model_settings(prepared: Path, work: Path) -> Target:
    """config.json, generation_config.json, tokenizer_config.json: whatever a plan looks at."""
    shutil.copytree(prepared / "model", work, dirs_exist_ok=True)
    small_tokenizer(work)
    names = ("config.json", "generation_config.json", "tokenizer_config.json")
    valid = {name: json.loads((work / name).read_text()) for name in names}
    valid["config.json"] |= {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    keys = ("quantization_config", "auto_map", "head_dim", "rope_parameters", "rope_theta",
            "min_p", "added_tokens_decoder", "chat_template", "factor", "rope_type")  # fmt: skip
    inputs = st.one_of(
        *(st.tuples(st.just(name), damaged_json([valid[name]], keys)) for name in names)
    )

    def run(drawn: tuple[str, bytes]) -> None:
        for name in names:
            (work / name).write_text(json.dumps(valid[name]))
        (work / drawn[0]).write_bytes(drawn[1])
        source = open_source(str(work))
        describe(source)
        encode_metadata(plan_gguf(source, Wishes("F16")).metadata)

    return Target("model settings", ("none.json", b""), inputs, run)


GGUF_METADATA = {
    "general.architecture": Value("str", "qwen2"),
    "general.alignment": Value("u32", 32),
    "general.name": Value("str", "tiny"),
    "general.sampling.sequence": Value("str", "top_k;temperature"),
    "qwen2.context_length": Value("u32", 256),
    "qwen2.block_count": Value("u32", 1),
    "qwen2.attention.head_count": Value("u32", 2),
    "qwen2.rope.scaling.type": Value("str", "yarn"),
    "tokenizer.ggml.model": Value("str", "gpt2"),
    "tokenizer.ggml.tokens": Value("arr[str]", ["a", "b"]),
    "tokenizer.ggml.token_type": Value("arr[i32]", [1, 3]),
    "tokenizer.chat_template": Value("str", "{{ messages }}"),
    "a.f64": Value("arr[f64]", [0.5]),
    "a.bool": Value("bool", True),
}


def gguf_header(prepared: Path, work: Path) -> Target:
    """A GGUF file of two small tensors, and the beginning of a split one."""
    entries = [
        TensorEntry("token_embd.weight", (2, 32), "F16", 0),
        TensorEntry("blk.0.ffn_up.weight", (4, 32), "Q8_0", 128),
    ]

    def whole(metadata: dict) -> bytes:
        return encode_header(encode_metadata(metadata), len(metadata), entries, 32) + bytes(288)

    split = {"split.no": Value("u16", 0), "split.count": Value("u16", 2)}
    seeds = [whole(GGUF_METADATA), whole(GGUF_METADATA | split), whole({})]
    words = [b"GGUF", *(key.encode() for key in GGUF_METADATA), *(
        struct.pack("<I", kind) for kind in range(14)
    )]  # fmt: skip
    path = work / "m.gguf"

    def run(content: bytes) -> None:
        path.write_bytes(content)
        source = open_gguf(path)
        describe(source)
        encode_metadata(plan_gguf(source, Wishes()).metadata)

    return Target("GGUF header", seeds[0], damaged(seeds, words), run)


def small_tokenizer(folder: Path) -> dict:
    """Keep three hundred pieces of a tokenizer.json. Returns it."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    model = content["model"]
    model["vocab"] = {text: i for text, i in model["vocab"].items() if i < 300}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)  # which has the ids of the whole vocabulary
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
    known = model["vocab"].keys()
    model["merges"] = [p for p in pairs if {*p, "".join(p)} <= known]
    content["added_tokens"] = [
        token | {"id": 300 + i} for i, token in enumerate(content["added_tokens"])
    ]
    path.write_text(json.dumps(content))
    return content


def _vocabulary_of(work: Path) -> None:
    read_vocabulary(Checkpoint(work, "fuzzed", None, {}, {}), 3100)


def tokenizer_json(prepared: Path, work: Path) -> Target:
    shutil.copytree(prepared / "model", work, dirs_exist_ok=True)
    (work / "generation_config.json").unlink()
    document = small_tokenizer(work)
    few = copy.deepcopy(document)
    few["model"]["vocab"] = dict(list(few["model"]["vocab"].items())[:5])
    few["model"]["merges"] = [["a", "b"]]
    keys = ("model", "vocab", "merges", "added_tokens", "pre_tokenizer", "normalizer", "type",
            "pretokenizers", "pattern", "Regex", "content", "special", "id")  # fmt: skip

    def run(content: bytes) -> None:
        (work / "tokenizer.json").write_bytes(content)
        _vocabulary_of(work)

    valid = json.dumps(document).encode()
    return Target("tokenizer.json", valid, damaged_json([document, few, few], keys), run)


def tokenizer_model(prepared: Path, work: Path) -> Target:
    """SentencePiece's protobuf, alone in its folder."""
    from tokenizer_makers import sentencepiece_model

    whole = sentencepiece_model()
    seeds = [whole, whole[:2000], whole[-2000:]]

    def run(content: bytes) -> None:
        (work / "tokenizer.model").write_bytes(content)
        _vocabulary_of(work)

    return Target("tokenizer.model", whole, damaged(seeds), run)


def _lines(texts: list[str]) -> SearchStrategy:
    """TOML whose lines are those of several files, changed, doubled, left out or in disorder."""
    junk = ('x = 1', '[profiles.x]', '[[profiles]]', 'temp = nan', 'temp = "hot"', 'temp = -inf',
            "top_k = 99999999999999999999", 'sequence = "top_k,temp"', 'name = ["x"]', '"" = 1',
            "a.b.c.d = {}", "a = " + "[" * 300 + "]" * 300, 's = "\\u0000\\u001b[2J"',
            "d = 1979-05-27T07:32:00Z", "matches = '(a+)+$'", "[expected]", "[yarn]")  # fmt: skip

    @st.composite
    def drawn(draw) -> bytes:
        lines = [
            line for line in draw(st.sampled_from(texts)).splitlines() if not line.startswith("#")
        ]
        for _ in range(draw(st.integers(0, 4))):
            at = draw(st.integers(0, len(lines)))
            new = draw(st.sampled_from(junk) | st.sampled_from(lines or junk))
            lines[at : at + draw(st.integers(0, 1))] = [new]
        raw = "\n".join(lines).encode()
        return draw(damaged([raw])) if draw(st.integers(0, 3)) == 0 else raw

    return drawn()


def recipes(prepared: Path, work: Path) -> Target:
    def run(content: bytes) -> None:
        (work / "r.toml").write_bytes(content)
        read_recipe(str(work / "r.toml"))

    texts = [recipe_text(name) for name in recipe_names()]
    return Target("recipe", texts[0].encode(), _lines(texts), run)


def profiles(prepared: Path, work: Path) -> Target:
    """A file for --sampling."""
    valid = ['temp = 0.6\ntop_k = 40\nsequence = "top_k;temperature"\n', "min_p = 0.05\n"]

    def run(content: bytes) -> None:
        (work / "p.toml").write_bytes(content)
        read_profile(str(work / "p.toml"))

    return Target("sampling profile", valid[0].encode(), _lines(valid), run)


def overrides(prepared: Path, work: Path) -> Target:
    """--override KEY=TYPE:VALUE, one or two, forced or not."""
    known = [key.format(arch="qwen2", id=0, name="tool_use") for key in KEYS]
    kinds = [*INTEGER_RANGES, "f32", "f64", "bool", "str", "arr[str]", "arr[i32]", "arr[f32]"]
    kinds += ["arr[arr[u8]]", "arr[", "u128", ""]
    values = st.one_of(
        st.sampled_from(["0", "-1", "1", "true", "nan", "inf", "1e999", "[]", '["a"]', "[1, 2]",
                         "[" * 2000, '{"a": 1}', "9" * 5000, "0x10", "1_0", "\u0661", "yarn",
                         "top_k,temp", "\x1b[2J", "\udcff", '[null]', '["\\ud800"]']),
        st.integers().map(str), st.floats().map(str), st.text(max_size=8),
    )  # fmt: skip
    text = st.builds(
        "{}={}:{}".format,
        st.sampled_from(known) | st.text(max_size=8),
        st.sampled_from(kinds) | st.text(max_size=5),
        values,
    )
    inputs = st.tuples(st.lists(text | st.text(max_size=20), min_size=1, max_size=2), st.booleans())
    metadata = open_gguf(prepared / "out" / "m.gguf").metadata

    def run(drawn: tuple[list[str], bool]) -> None:
        changed = apply_overrides(metadata, drawn[0], "qwen2", drawn[1])
        check_metadata(changed, "qwen2", 4096, drawn[1])
        encode_metadata(changed)

    valid = (["qwen2.context_length=u32:4096", "general.name=str:x"], False)
    return Target("overrides", valid, inputs, run)


def importance(prepared: Path, work: Path) -> Target:
    """llama.cpp's importance matrix, in both its formats."""
    name = b"blk.0.attn_q.weight"
    numbers = struct.pack("<8f", *range(8))
    legacy = struct.pack("<i", 1) + struct.pack("<i", len(name)) + name
    legacy += struct.pack("<ii", 3, 8) + numbers + struct.pack("<ii", 3, 5) + b"a.txt"
    seeds = [(prepared / "out" / "imatrix.gguf").read_bytes(), legacy]

    def run(content: bytes) -> None:
        (work / "i.dat").write_bytes(content)
        read_importance(work / "i.dat")

    return Target("importance matrix", seeds[1], damaged(seeds), run)


def sensitivities(prepared: Path, work: Path) -> Target:
    document = json.loads((prepared / "out" / "sensitivity.json").read_text())

    def run(content: bytes) -> None:
        (work / "s.json").write_bytes(content)
        read_sensitivity(work / "s.json")

    valid = json.dumps(document).encode()
    return Target("sensitivities", valid, damaged_json([document], tuple(document)), run)


def adapter(prepared: Path, work: Path) -> Target:
    """A LoRA adapter's adapter_config.json and the header of its weights."""
    from hostile_inputs import dump
    from numpy import ones, uint16

    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
              "task_type": "CAUSAL_LM", "bias": "none", "use_rslora": False}  # fmt: skip
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    weights = dump({
        f"{prefix}A.weight": ("BF16", ones((2, 32), uint16)),
        f"{prefix}B.weight": ("BF16", ones((32, 2), uint16)),
    })  # fmt: skip
    keys = ("alpha_pattern", "rank_pattern", "modules_to_save", "layers_to_transform", "use_dora",
            "init_lora_weights", "fan_in_fan_out", "exclude_modules")  # fmt: skip
    inputs = st.tuples(
        st.just(json.dumps(config).encode()) | damaged_json([config], keys),
        st.just(weights) | damaged([weights]),
    )
    model = str(prepared / "model")

    def run(drawn: tuple[bytes, bytes]) -> None:
        (work / "adapter_config.json").write_bytes(drawn[0])
        (work / "adapter_model.safetensors").write_bytes(drawn[1])
        open_adapter(str(work))
        open_source(model, lora=str(work))

    return Target("LoRA adapter", (json.dumps(config).encode(), weights), inputs, run)


def journal(prepared: Path, work: Path) -> Target:
    """What an interrupted run left: damaged, it tells less, never something else."""
    lines = [
        {"qwq_quant": "0.1.0", "job": {"a": 1}},
        {"tensor": {"name": "w", "nbytes": 3}, "changes": []},
    ]
    valid = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    inputs = damaged([valid]) | damaged_json(lines).map(lambda raw: raw + b"\n" + valid)

    def run(content: bytes) -> None:
        (work / ".m.gguf.journal").write_bytes(content)
        interrupted_job(work / "m.gguf")

    return Target("journal", valid, inputs, run)


def manifest(prepared: Path, work: Path) -> Target:
    """qwq-quant.json, as `verify` finds outputs by it."""
    document = json.loads((prepared / "out" / "qwq-quant.json").read_text())
    shutil.copy(prepared / "out" / "m.gguf", work)

    def run(content: bytes) -> None:
        (work / "qwq-quant.json").write_bytes(content)
        find_outputs(work)
        find_outputs(work / "m.gguf")

    keys = ("outputs", "files", "tensors", "sha256", ".", "../x")
    return Target("manifest", json.dumps(document).encode(), damaged_json([document], keys), run)
