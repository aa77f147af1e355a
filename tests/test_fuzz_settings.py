"""Junk in a model's settings is refused or worked around, never a traceback.

A checkpoint keeps them in three small JSON files, a GGUF file in its metadata; both are what a
stranger published.
"""

import copy
import json
import shutil
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.errors import BadInput, QwqQuantError
from quant.gguf_file import TensorEntry, Value, encode_header, encode_metadata
from quant.metadata_keys import KEYS
from quant.overrides import INTEGER_RANGES
from quant.source import open_source
from quant.to_gguf import Job, Wishes, plan_gguf

TINY_QWQ = Path(__file__).parent.parent / "examples" / "tiny-qwq"
FILES = {
    name: json.loads((TINY_QWQ / name).read_text())
    for name in ("config.json", "generation_config.json", "tokenizer_config.json")
}
FILES["config.json"] |= {
    "use_sliding_window": True,
    "sliding_window": 64,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
}  # so that one change reaches what these lead to
ALSO_READ = {
    "config.json": (
        "auto_map", "head_dim", "num_key_value_heads", "original_max_position_embeddings",
        "partial_rotary_factor", "quantization_config", "rope_parameters",
    ),
    "generation_config.json": ("min_p",),
    "tokenizer_config.json": ("add_eos_token", "extra_special_tokens", "mask_token", "sep_token"),
}  # fmt: skip
"""Keys that are read where a file has them; the example's have not."""

WORDS = (
    "rope_type", "type", "rope_theta", "factor", "attention_factor", "beta_fast", "mscale",
    "mscale_all_dim", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    "content", "special", "id", "name", "template", "quant_method",
    "yarn", "linear", "llama3", "dynamic", "default", "fp8", "<|im_end|>", "Qwen2ForCausalLM",
)  # fmt: skip
"""Keys and texts that lead deeper into the code than any other text does."""

NUMBERS = (-1, 0, 1, 2, 64, 4096, 2**31, 2**63, 10**400, 0.5, 1e300, float("nan"), float("inf"))

texts = st.sampled_from(WORDS) | st.text(max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.integers() | st.floats() | texts,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(texts, inside, max_size=4),
    max_leaves=6,
)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The path to every value in a JSON document: ("added_tokens_decoder", "4091", "special")."""
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    return [inner for key, item in items for inner in ((*path, key), *places(item, (*path, key)))]


PLACES = [
    (name, path)
    for name, content in FILES.items()
    for path in (*places(content), *((key,) for key in ALSO_READ[name]))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """examples/tiny-qwq in a folder where files may be changed."""
    return Path(shutil.copytree(TINY_QWQ, tmp_path_factory.mktemp("fuzz") / "tiny-qwq"))


def write_with(folder: Path, changes: dict[tuple[str, tuple], object]) -> None:
    """Write the JSON files of `folder` anew, other values at the (file, path) of `changes`."""
    contents = copy.deepcopy(FILES)
    for (name, path), value in sorted(changes.items(), key=lambda item: -len(item[0][1])):
        inside = contents[name]
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = value
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))


def assert_planned_or_refused(model: Path, wishes: Wishes) -> None:
    """An error of ours, or a job whose header can be written; no control characters in either."""
    try:
        job = plan_gguf(open_source(str(model)), wishes)
    except QwqQuantError as error:
        said = str(error).split("\n")
    else:
        assert isinstance(job, Job)
        encode_metadata(job.metadata)
        said = job.notes
    assert all(line.isprintable() for line in said), said


KINDS = (None, -1, "x", [1], {"a": 1})
"""Values of the kinds that code mistakes for each other."""


@pytest.mark.parametrize("name", FILES)
def test_each_kind_of_json_value_under_each_key(folder, name):
    for key, value in product((*FILES[name], *ALSO_READ[name]), KINDS):
        write_with(folder, {(name, (key,)): value})
        assert_planned_or_refused(folder, Wishes("F16"))


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(PLACES), json_values, min_size=1, max_size=2))
def test_any_json_values_in_any_places(folder, junk):
    write_with(folder, junk)
    assert_planned_or_refused(folder, Wishes("F16"))


# --- GGUF metadata ----------------------------------------------------------------------------

SCALARS = {
    **{kind: st.integers(*limits) for kind, limits in INTEGER_RANGES.items()},
    "f32": st.floats(width=32),
    "f64": st.floats(),
    "bool": st.booleans(),
    "str": texts,
}
gguf_values = st.sampled_from(sorted(SCALARS)).flatmap(
    lambda kind: (
        SCALARS[kind].map(lambda data: Value(kind, data))
        | st.lists(SCALARS[kind], max_size=3).map(lambda data: Value(f"arr[{kind}]", data))
    )
)
GGUF_KEYS = [
    name.format(arch="qwen2", id=0, name="tool_use")
    for name, key in KEYS.items()
    if key.set_by != "container"  # how the file is laid out: tests/test_gguf_file.py's matter
]
SETTINGS = {
    "general.architecture": Value("str", "qwen2"),
    "qwen2.context_length": Value("u32", 256),
    "qwen2.attention.head_count": Value("u32", 4),
    "qwen2.rope.scaling.type": Value("str", "yarn"),
    "qwen2.rope.scaling.factor": Value("f32", 4.0),
    "qwen2.rope.scaling.original_context_length": Value("u32", 64),
    "qwen2.rope.scaling.attn_factor": Value("f32", 1.5),
    "general.sampling.sequence": Value("str", "top_k;temperature"),
    "general.sampling.top_p": Value("f32", 0.5),
}
"""Settings that the checks look at together."""


GGUF_KINDS = (
    Value("i64", -1),
    Value("f32", -1.0),
    Value("f32", float("nan")),
    Value("str", "x"),
    Value("arr[str]", []),
    Value("arr[i32]", [1, 2]),
)
"""Values that each reader of a key may meet: below 0, not finite, text, none, several."""


def plan_junk(folder: Path, junk: dict[str, Value]) -> None:
    """Write SETTINGS with other values to a GGUF file of one small tensor, and plan its copy."""
    metadata = SETTINGS | junk
    tensors = [TensorEntry("token_embd.weight", (2, 32), "F32", 0)]
    header = encode_header(encode_metadata(metadata), len(metadata), tensors, 32)
    path = folder / "junk.gguf"
    path.write_bytes(header + bytes(2 * 32 * 4))
    assert_planned_or_refused(path, Wishes())


def test_each_kind_of_gguf_value_under_each_key(folder):
    for key, value in product(GGUF_KEYS, GGUF_KINDS):
        plan_junk(folder, {key: value})


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(GGUF_KEYS), gguf_values, min_size=1, max_size=3))
def test_any_typed_values_under_any_keys(folder, junk):
    plan_junk(folder, junk)


def test_a_gguf_file_without_tensors_is_refused(tmp_path):
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(encode_header(encode_metadata(SETTINGS), len(SETTINGS), [], 32))
    with pytest.raises(BadInput, match="no tensors"):
        plan_gguf(open_source(str(path)), Wishes())
