"""Overrides and rotary settings, read back and computed with by llama.cpp and transformers."""

import ctypes
import json
import math
import shutil
from functools import cache
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf import GGUFValueType
from safetensors.numpy import save_file
from safetensors.torch import load_file

from quant.errors import BadInput, BadRecipe, UsageError
from quant.gguf_file import SCALAR_TYPES, Value
from quant.metadata_checks import check_metadata
from quant.overrides import apply_overrides, parse_override, shorthand_overrides
from quant.rope import (
    llama3_rope_factors,
    rope_metadata,
    rope_overrides,
    without_scaling,
    yarn_magnitude,
)

TINY = Path(__file__).parents[1] / "examples/tiny-qwq"
N_VOCAB = 4096
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def base() -> dict[str, Value]:
    """tiny-qwq's metadata without a tokenizer, as a converter would write it."""
    return {
        "general.architecture": Value("str", "qwen2"),
        "qwen2.block_count": Value("u32", 6),
        "qwen2.context_length": Value("u32", 2048),
        "qwen2.embedding_length": Value("u32", 256),
        "qwen2.feed_forward_length": Value("u32", 768),
        "qwen2.attention.head_count": Value("u32", 4),
        "qwen2.attention.head_count_kv": Value("u32", 2),
        "qwen2.attention.layer_norm_rms_epsilon": Value("f32", 1e-5),
        "qwen2.rope.freq_base": Value("f32", 1e6),
        "qwen2.vocab_size": Value("u32", N_VOCAB),
        "tokenizer.ggml.model": Value("str", "no_vocab"),
    }


# --- the real engines -------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def silence():
    llama_cpp.llama_backend_init()
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    yield
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p(0))


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    tensors = load_file(TINY / "model.safetensors")
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def gguf_name(name: str) -> str:
    if name in WHOLE:
        return WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{PARTS[part]}.{kind}"


def write(path, metadata, weights=None):
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.kv_data[0].clear()
    for key, value in metadata.items():
        if value.type.startswith("arr["):
            item = GGUFValueType(SCALAR_TYPES[value.type[4:-1]])
            writer.add_key_value(key, value.data, GGUFValueType.ARRAY, sub_type=item)
        else:
            writer.add_key_value(key, value.data, GGUFValueType(SCALAR_TYPES[value.type]))
    for name, w in (weights or {}).items():
        writer.add_tensor(gguf_name(name), w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path, vocab_only=False):
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = vocab_only
    return llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)


def read_text(model, key: str) -> str | None:
    """llama.cpp's own text for a scalar; None if it has no such key."""
    buffer = ctypes.create_string_buffer(4096)
    n = llama_cpp.llama_model_meta_val_str(model, key.encode(), buffer, 4096)
    return None if n < 0 else buffer.value.decode()


def llama_cpp_logits(path, tokens) -> np.ndarray:
    """Logits of every position, (n_tokens, n_vocab); flash attention off, its cache is float16."""
    model = load(path)
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 512
    parameters.type_k = parameters.type_v = 0  # float32
    parameters.flash_attn_type = 0
    parameters.n_threads = parameters.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, parameters)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    shape = (len(tokens), N_VOCAB)
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory, weights):
    """A copy of tiny-qwq in float32, whose config.json the tests may change."""
    folder = tmp_path_factory.mktemp("hf")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(TINY / "generation_config.json", folder)
    return folder


@pytest.fixture(scope="module")
def transformers_logits(folder, tokens):
    """A function: transformers' float32 logits (n_tokens, n_vocab) under this config.json."""
    import torch
    from transformers import AutoModelForCausalLM

    @cache
    def logits(config: str) -> np.ndarray:
        (folder / "config.json").write_text(config)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].numpy()

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two OpenMP runtimes in one process wait for each other
    yield lambda config: logits(json.dumps(config))
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return [int(t) for t in np.random.default_rng(0).integers(0, 4000, 400)]


@pytest.fixture(scope="module")
def plain_logits(transformers_logits):
    return transformers_logits(tiny_config())


def tiny_config(**changes) -> dict:
    config = json.loads((TINY / "config.json").read_text()) | changes
    return {name: value for name, value in config.items() if value is not ...}


def difference(a, b) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


# --- every type, written and read back --------------------------------------------------------

SCALARS = {
    "u8": ("255", 255),
    "i8": ("-128", -128),
    "u16": ("65535", 65535),
    "i16": ("-32768", -32768),
    "u32": ("4294967295", 4294967295),
    "i32": ("-2147483648", -2147483648),
    "u64": ("18446744073709551615", 18446744073709551615),
    "i64": ("-9223372036854775808", -9223372036854775808),
    "f32": ("0.25", 0.25),
    "f64": ("-1.5e-300", -1.5e-300),
    "bool": ("true", True),
    "str": ("a=b:c; \u00fc \U0001f600", "a=b:c; \u00fc \U0001f600"),
}


@pytest.mark.parametrize("kind", SCALAR_TYPES)
def test_llama_cpp_reads_every_scalar_back(kind, tmp_path):
    text, data = SCALARS[kind]
    metadata = apply_overrides(base(), [f"x.{kind}={kind}:{text}"], "qwen2", force=True)
    assert metadata[f"x.{kind}"] == Value(kind, data)
    model = load(write(tmp_path / "m.gguf", metadata), vocab_only=True)
    got = read_text(model, f"x.{kind}")
    llama_cpp.llama_model_free(model)
    assert got == (text if not kind.startswith("f") else f"{data:f}")


def test_llama_cpp_reads_text_of_any_length(tmp_path):
    template = "{{ messages }}\n" * 20000
    overrides = [*shorthand_overrides("qwen2", name="", chat_template=template)]
    metadata = apply_overrides(base(), overrides, "qwen2")
    assert metadata["general.name"] == Value("str", "")
    model = load(write(tmp_path / "m.gguf", metadata), vocab_only=True)
    assert llama_cpp.llama_model_chat_template(model, None).decode() == template
    assert read_text(model, "general.name") == ""
    llama_cpp.llama_model_free(model)


class GgufReader:
    """llama.cpp's gguf.cpp: arrays are not among what llama_model_meta_val_str shows."""

    def __init__(self, path):
        lib = Path(llama_cpp.__file__).parent / "lib"
        self.lib = ctypes.CDLL(str(next(lib.glob("*ggml-base*"))))
        pointer = ctypes.c_void_p
        self.lib.gguf_init_from_file.restype = pointer

        class Parameters(ctypes.Structure):
            _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", pointer))

        self.lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, Parameters]
        for name, restype, argtypes in (
            ("find_key", ctypes.c_int64, [pointer, ctypes.c_char_p]),
            ("get_arr_type", ctypes.c_int, [pointer, ctypes.c_int64]),
            ("get_arr_n", ctypes.c_size_t, [pointer, ctypes.c_int64]),
            ("get_arr_data", pointer, [pointer, ctypes.c_int64]),
            ("get_arr_str", ctypes.c_char_p, [pointer, ctypes.c_int64, ctypes.c_size_t]),
            ("free", None, [pointer]),
        ):
            function = getattr(self.lib, f"gguf_{name}")
            function.restype, function.argtypes = restype, argtypes
        self.file = self.lib.gguf_init_from_file(str(path).encode(), Parameters(True, None))
        assert self.file

    def array(self, key: str) -> tuple[str, list]:
        n = self.lib.gguf_find_key(self.file, key.encode())
        kind = {v: k for k, v in SCALAR_TYPES.items()}[self.lib.gguf_get_arr_type(self.file, n)]
        count = self.lib.gguf_get_arr_n(self.file, n)
        if kind == "str":
            items = [self.lib.gguf_get_arr_str(self.file, n, i).decode() for i in range(count)]
            return kind, items
        dtype = {"bool": "?"}.get(kind, f"{kind[0]}{int(kind[1:]) // 8}" if kind != "bool" else "")
        address = self.lib.gguf_get_arr_data(self.file, n)
        nbytes = count * np.dtype(dtype).itemsize
        return kind, np.frombuffer(ctypes.string_at(address, nbytes), dtype).tolist()

    def close(self):
        self.lib.gguf_free(self.file)


@pytest.mark.parametrize("kind", SCALAR_TYPES)
def test_llama_cpp_reads_every_array_back(kind, tmp_path):
    _, item = SCALARS[kind]
    items = [item, {"str": "", "bool": False}.get(kind, 0 if kind[0] != "f" else 2.5), item]
    text = f"x.many=arr[{kind}]:{json.dumps(items)}"
    metadata = apply_overrides(base(), [text], "qwen2", force=True)
    assert metadata["x.many"] == Value(f"arr[{kind}]", items)
    reader = GgufReader(write(tmp_path / "m.gguf", metadata))
    assert reader.array("x.many") == (kind, items)
    reader.close()


def test_array_override_of_a_loader_key(tmp_path, weights):
    text = "qwen2.feed_forward_length=arr[i32]:[768,768,768,768,768,768]"
    with pytest.raises(BadRecipe, match="follows from the weights"):
        apply_overrides(base(), [text], "qwen2")
    metadata = apply_overrides(base(), [text], "qwen2", force=True)
    model = load(write(tmp_path / "m.gguf", metadata, weights))
    assert model
    llama_cpp.llama_model_free(model)


# --- text to value ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("qwen2.context_length=int:4096", "qwen2.context_length", Value("u32", 4096)),
        ("general.sampling.top_k=int:-1", "general.sampling.top_k", Value("i32", -1)),
        ("qwen2.rope.freq_base=float:1e6", "qwen2.rope.freq_base", Value("f32", 1e6)),
        ("qwen2.rope.freq_base=float:5", "qwen2.rope.freq_base", Value("f32", 5.0)),
        ("qwen2.attention.head_count=int:+8", "qwen2.attention.head_count", Value("u32", 8)),
        ("general.url=str:https://a/?b=c", "general.url", Value("str", "https://a/?b=c")),
        ("general.name=str:", "general.name", Value("str", "")),
        ("general.name=str:  two\nlines ", "general.name", Value("str", "  two\nlines ")),
        ("general.tags=arr[str]:[]", "general.tags", Value("arr[str]", [])),
        ("a.b=arr[f64]:[1, 2.5]", "a.b", Value("arr[f64]", [1.0, 2.5])),
        ("a.b=f32:3.4028235e38", "a.b", Value("f32", 3.4028235e38)),
        ("a.b=f32:-0", "a.b", Value("f32", 0.0)),
        ("a.b=f64:.5", "a.b", Value("f64", 0.5)),
        ("a.b=bool:false", "a.b", Value("bool", False)),
    ],
)
def test_parse(text, key, value):
    assert parse_override(text, "qwen2") == (key, value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "KEY=TYPE:VALUE"),
        ("=u32:1", "no key"),
        ("qwen2.context_length", "no value"),
        ("qwen2.context_length=4096", "Write --override qwen2.context_length=u32:4096"),
        ("qwen2.context_length=uint32:4096", "Write --override qwen2.context_length=u32:4096"),
        ("general.url=https://x.y", "Write --override general.url=str:https://x.y"),
        ("general.tags=arr[string]:[]", "Write --override general.tags=arr[str]:[]"),
        ("general.tags=arr:[]", "Write --override general.tags=arr[str]:[]"),
        ("a.b=arr[arr[u8]]:[[1]]", "no type"),
        ("a.b=U32:1", "no type"),
        ("a.b= u32:1", "no type"),
        ("a b=u32:1", "space or a control"),
        ("a.b =u32:1", "space or a control"),
        ("a\x1b[2J=u32:1", "a\\x1b[2J"),
        ("a\udcff=u32:1", "control character"),
        ("k" * 65536 + "=u32:1", "65535 bytes"),
    ],
)
def test_what_cannot_be_taken_apart(text, hint):
    with pytest.raises(UsageError) as error:
        parse_override(text, "qwen2")
    assert hint in str(error.value)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("u32:8589934592", "u32 goes from 0 to 4294967295"),
        ("u32:-1", "u32 goes from 0"),
        ("u8:256", "u8 goes from 0 to 255"),
        ("i8:-129", "i8 goes from -128 to 127"),
        ("u64:18446744073709551616", "does not fit"),
        ("u32:" + "9" * 5000, "no whole number"),
        ("u32:", "no whole number"),
        ("u32:1.0", "no whole number"),
        ("u32:1e3", "no whole number"),
        ("u32:0x10", "no whole number"),
        ("u32: 1", "no whole number"),
        ("u32:\u0661", "no whole number"),  # an Arabic digit
        ("f32:nan", "no number"),
        ("f32:inf", "no number"),
        ("f32:-Infinity", "no number"),
        ("f32:1,5", "no number"),
        ("f32:", "no number"),
        ("f32:1e39", "too large for f32"),
        ("f64:1e400", "not finite"),
        ("f32:1e-60", "too small for f32"),
        ("bool:True", "neither true nor false"),
        ("bool:1", "neither true nor false"),
        ("str:a\0b", "NUL"),
        ("str:\udcff", "no UTF-8"),
        ("arr[i32]:", "no JSON array"),
        ("arr[i32]:1", "no JSON array"),
        ('arr[i32]:{"a": 1}', "no JSON array"),
        ("arr[i32]:[1,]", "no JSON array"),
        ("arr[i32]:" + "[" * 100000, "no JSON array"),
        ("arr[i32]:[" + "9" * 5000 + "]", "no JSON array"),
        ("arr[f32]:[NaN]", "no JSON array"),
        ("arr[f32]:[1e39]", "too large"),
        ("arr[f64]:[1e999]", "not finite"),
        ("arr[f64]:[1" + "0" * 400 + "]", "too large"),
        ("arr[i32]:[1.0]", "no whole number"),
        ("arr[i32]:[true]", "no number"),
        ("arr[i32]:[[1]]", "no number"),
        ('arr[i32]:["1"]', "no number"),
        ("arr[bool]:[0]", "neither true nor false"),
        ("arr[str]:[1]", "no text"),
        ('arr[str]:["\\ud800"]', "no UTF-8"),
        ('arr[str]:["a\\u0000"]', "NUL"),
    ],
)
def test_values_their_type_cannot_hold(value, says):
    with pytest.raises(BadRecipe) as error:
        parse_override(f"a.b={value}", "qwen2")
    assert says in str(error.value)
    assert error.value.exit_code == 78
    with pytest.raises(BadRecipe):  # no force makes 2^33 fit
        apply_overrides(base(), [f"a.b={value}"], "qwen2", force=True)


# --- against the schema -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("qqwen2.context_length=u32:9", "Did you mean qwen2.context_length"),
        ("qwen2.rope.freqbase=f32:9", "--override qwen2.rope.freq_base=f32:9"),
        ("llama.context_length=u32:9", "--override qwen2.context_length=u32:9"),
        ("qwen2.contextlength=int:9", "--override qwen2.context_length=u32:9"),
        ("nothing.like.it=u32:9", "have no effect"),
        ("qwen2.context_length=i32:9", "must be u32, not i32"),
        ("qwen2.context_length=u64:9", "must be u32, not u64"),
        ("qwen2.context_length=float:9", "must be u32, not float"),
        ("qwen2.rope.freq_base=int:9", "must be f32, not int"),
        ("qwen2.rope.freq_base=f64:9", "must be f32, not f64"),
        ("qwen2.expert_used_count=u16:9", "must be u32 or arr[i32] or arr[u32], not u16"),
        ("tokenizer.ggml.add_bos_token=u8:1", "must be bool, not u8"),
        ("general.sampling.temp=f64:0.6", "must be f32, not f64"),
        ("qwen2.rope.scaling.type=str:dynamic", "must be one of none, linear, yarn, longrope"),
        ("qwen2.rope.scaling.factor=f32:0.5", "must be between 1"),
        ("qwen2.attention.layer_norm_rms_epsilon=f32:100000", "must be between 0 and 0.1"),
        ("tokenizer.ggml.pre=str:qwen3", "near: qwen"),
        ("general.sampling.top_p=f32:95", "must be between 0 and 1"),
        ("general.sampling.mirostat=i32:3", "must be one of 0, 1, 2"),
        ("qwen2.block_count=u32:5", "follows from the weights and is 6"),
        ("qwen2.attention.key_length=u32:5", "follows from the weights and is not set"),
        ("general.architecture=str:llama", "follows from the weights and is qwen2"),
        ("qwen2.context_length=u32:0", "must be between 1"),
    ],
)
def test_refused_unless_forced(text, says):
    with pytest.raises(BadRecipe) as error:
        apply_overrides(base(), [text], "qwen2")
    assert says in str(error.value)
    assert "--force-override" in str(error.value)
    if "=int:" in text or "=float:" in text:  # without a known width there is nothing to insist on
        return
    key, value = parse_override(text, "qwen2")
    assert apply_overrides(base(), [text], "qwen2", force=True) == {**base(), key: value}


@pytest.mark.parametrize(
    "text", ["split.no=u16:1", "split.count=u16:2", "split.tensors.count=i32:3",
             "general.alignment=u32:64"],
)  # fmt: skip
@pytest.mark.parametrize("force", [False, True])
def test_never_overridden(text, force):
    with pytest.raises(BadRecipe, match="cannot be overridden"):
        apply_overrides(base(), [text], "qwen2", force)


def test_the_value_it_has_already_is_no_change():
    same = {**base(), "general.alignment": Value("u32", 32)}
    texts = ["qwen2.block_count=u32:6", "general.alignment=u32:32", "qwen2.block_count=int:6"]
    assert apply_overrides(same, texts, "qwen2") == same


def test_the_input_is_left_alone_and_the_later_override_stays():
    metadata = base()
    texts = ["general.name=str:a", "qwen2.context_length=u32:8", "general.name=str:b"]
    changed = apply_overrides(metadata, texts, "qwen2")
    assert metadata == base()
    assert list(changed) == [*base(), "general.name"]  # order is kept
    assert changed["general.name"].data == "b"
    assert changed["qwen2.context_length"] == Value("u32", 8)


def test_a_key_the_file_has_keeps_its_type():
    metadata = {"general.architecture": Value("str", "gemma3"), "gemma3.odd": Value("u16", 1)}
    assert apply_overrides(metadata, ["gemma3.odd=int:2"], "gemma3")["gemma3.odd"].type == "u16"
    with pytest.raises(BadRecipe, match="must be u16"):
        apply_overrides(metadata, ["gemma3.odd=u32:2"], "gemma3")


@pytest.mark.parametrize("kind", [k for k in SCALAR_TYPES if k != "u32"])
def test_llama_cpp_refuses_what_was_forced(kind, tmp_path, weights):
    """The refusal above is no pedantry: the forced file does not load."""
    text = f"qwen2.context_length={kind}:{'true' if kind == 'bool' else 100}"
    metadata = apply_overrides(base(), [text], "qwen2", force=True)
    assert not load(write(tmp_path / "m.gguf", metadata, weights))


def test_shorthands():
    texts = shorthand_overrides("qwen2", name="a=b", rms_eps=1e-6, chat_template="{{ x }}")
    metadata = apply_overrides(base(), texts, "qwen2")
    assert metadata["general.name"] == Value("str", "a=b")
    assert metadata["qwen2.attention.layer_norm_rms_epsilon"] == Value("f32", 1e-6)
    assert metadata["tokenizer.chat_template"] == Value("str", "{{ x }}")
    assert shorthand_overrides("qwen2") == []
    for eps in (float("nan"), -1e-6, 1.0):
        with pytest.raises(BadRecipe):
            apply_overrides(base(), shorthand_overrides("qwen2", rms_eps=eps), "qwen2")


# --- overrides change what they should --------------------------------------------------------


def test_rms_eps_changes_logits_as_in_transformers(
    tmp_path, weights, tokens, transformers_logits, plain_logits
):
    metadata = apply_overrides(base(), shorthand_overrides("qwen2", rms_eps=1e-2), "qwen2")
    got = llama_cpp_logits(write(tmp_path / "m.gguf", metadata, weights), tokens)
    assert difference(got, transformers_logits(tiny_config(rms_norm_eps=1e-2))) < 1e-4
    assert difference(got, plain_logits) > 0.1
    unchanged = llama_cpp_logits(write(tmp_path / "m.gguf", base(), weights), tokens)
    assert difference(unchanged, plain_logits) < 1e-4


def test_theta_changes_logits_as_in_transformers(tmp_path, weights, tokens, transformers_logits):
    metadata = rope_overrides("qwen2", None, None, None, 12345.0, None, base())
    got = llama_cpp_logits(write(tmp_path / "m.gguf", metadata, weights), tokens)
    assert difference(got, transformers_logits(tiny_config(rope_theta=12345.0))) < 1e-4


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
        {"rope_scaling": {"type": "yarn", **{k: YARN[k] for k in YARN if k != "rope_type"}}},
        {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_theta": ...},
        {
            "rope_parameters": {**YARN, "rope_theta": 5e5, "attention_factor": 1.0},
            "rope_theta": ...,
        },
        {"rope_scaling": {**YARN, "attention_factor": 0.7}},
        {"rope_scaling": {**YARN, "attention_factor": 1.5}},
        {"rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0}},
        {"rope_scaling": {**YARN, "mscale": 0.707}},
        {"rope_scaling": {**YARN, "factor": 1.0}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
        {"rope_parameters": YARN, "rope_theta": ...},
        {"rope_theta": ...},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ],
    ids=lambda changes: json.dumps({k: v for k, v in changes.items() if v is not ...})[:80],
)
def test_config_json_means_the_same_to_both_engines(
    changes, tmp_path, weights, tokens, transformers_logits, plain_logits
):
    config = tiny_config(**changes)
    metadata, _ = rope_metadata(config, "qwen2")
    path = write(tmp_path / "m.gguf", {**base(), **metadata}, weights)
    theirs = transformers_logits(config)
    assert difference(llama_cpp_logits(path, tokens), theirs) < 1e-4
    if "dynamic" not in str(changes) and 'factor": 1.0' not in json.dumps(changes, default=str):
        assert difference(theirs, plain_logits) > 0.1


def test_yarn_by_option_is_yarn_by_config(tmp_path, weights, tokens, transformers_logits):
    metadata = rope_overrides("qwen2", "yarn", 4, 256, None, None, base())
    assert "qwen2.rope.scaling.attn_factor" not in metadata
    path = write(tmp_path / "m.gguf", metadata, weights)
    theirs = transformers_logits(tiny_config(rope_scaling=YARN))
    assert difference(llama_cpp_logits(path, tokens), theirs) < 1e-4


def test_attn_factor_is_applied_on_top_of_yarns_own(tmp_path, weights, tokens, transformers_logits):
    """The circulated attn_factor=1.1386 is 1.1386 twice; the converter's own key does nothing."""
    m = yarn_magnitude(4)
    assert m == pytest.approx(1.13863, abs=1e-5)
    yarn = rope_overrides("qwen2", "yarn", 4, 256, None, None, base())
    twice = apply_overrides(yarn, [f"qwen2.rope.scaling.attn_factor=f32:{m}"], "qwen2")
    got = llama_cpp_logits(write(tmp_path / "m.gguf", twice, weights), tokens)
    right = transformers_logits(tiny_config(rope_scaling=YARN))
    doubled = transformers_logits(tiny_config(rope_scaling={**YARN, "attention_factor": m * m}))
    assert difference(got, right) > 0.05
    assert difference(got, doubled) < 1e-4
    assert any("1.2965" in w and "twice" in w for w in check_metadata(twice, "qwen2", None))
    dead = apply_overrides(yarn, ["qwen2.rope.scaling.yarn_attn_factor=f32:0.5"], "qwen2")
    got = llama_cpp_logits(write(tmp_path / "m.gguf", dead, weights), tokens)
    assert difference(got, right) < 1e-4
    assert any("does not read" in w for w in check_metadata(dead, "qwen2", None))


@pytest.mark.parametrize(
    ("overrides", "stretched"),
    [
        (["factor=f32:4"], True),
        (["factor=f32:4", "type=str:longrope"], True),
        (["factor=f32:4", "type=str:none"], False),
    ],
)
def test_warnings_about_scaling_say_what_llama_cpp_does(
    overrides, stretched, tmp_path, weights, tokens, transformers_logits, plain_logits
):
    texts = [f"qwen2.rope.scaling.{text}" for text in overrides]
    metadata = apply_overrides(base(), texts, "qwen2")
    got = llama_cpp_logits(write(tmp_path / "m.gguf", metadata, weights), tokens)
    linear = transformers_logits(tiny_config(rope_scaling={"type": "linear", "factor": 4.0}))
    assert difference(got, linear if stretched else plain_logits) < 1e-4
    (warning,) = check_metadata(metadata, "qwen2", None)
    assert ("linear" in warning) == stretched


# --- the metadata as a whole ------------------------------------------------------------------

VOCABULARY = {
    "tokenizer.ggml.tokens": Value("arr[str]", ["a"] * 8),
    "tokenizer.ggml.token_type": Value("arr[i32]", [1] * 8),
    "tokenizer.ggml.eos_token_id": Value("u32", 7),
}


def test_a_sound_file_has_no_warnings():
    assert check_metadata(base() | VOCABULARY, "qwen2", 8) == []
    assert check_metadata(base(), "qwen2", None) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"qwen2.rope.scaling.type": Value("str", "ntk")}, "aborts"),
        ({"qwen2.rope.scaling.factor": Value("f32", 0.25)}, "shorter"),
        ({"qwen2.rope.scaling.factor": Value("f32", 0.0)}, "shorter"),
        ({"qwen2.attention.head_count_kv": Value("u32", 3)}, "cannot share 3"),
        (
            {"qwen2.attention.head_count_kv": Value("arr[i32]", [2, 2, 3, 2, 2, 2])},
            "cannot share 3",
        ),
        ({"qwen2.attention.head_count": Value("u32", 6)}, "no multiple of 6"),
        ({"qwen2.rope.dimension_count": Value("u32", 32)}, "key head 64"),
        ({"qwen2.attention.value_length": Value("u32", 32)}, "key head 64"),
        ({"qwen2.feed_forward_length": Value("arr[i32]", [768] * 5)}, "5 items for 6 layers"),
        ({"qwen2.expert_used_count": Value("u32", 2)}, "2 of 0 experts"),
        ({"qwen2.expert_count": Value("u32", 2)}, "0 of 2 experts"),
        ({"qwen2.expert_group_count": Value("u32", 2)}, "0 of 2 groups of 0 experts"),
        ({"tokenizer.ggml.eos_token_id": Value("u32", 8)}, "ends at 7"),
        ({"general.sampling.sequence": Value("str", "top_k,temp")}, "';' alone"),
    ],
)
def test_refused_as_a_whole(changes, says):
    metadata = base() | VOCABULARY | changes
    with pytest.raises(BadRecipe) as error:
        check_metadata(metadata, "qwen2", 8)
    assert says in str(error.value)
    assert error.value.what in check_metadata(metadata, "qwen2", 8, force=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.tokens": Value("arr[str]", ["a"] * 9)},
        {"tokenizer.ggml.token_type": Value("arr[i32]", [1] * 7)},
        {"tokenizer.ggml.scores": Value("arr[f32]", [0.0] * 9)},
    ],
)
def test_the_vocabularys_length_cannot_be_forced(changes, force):
    with pytest.raises(BadRecipe):
        check_metadata(base() | VOCABULARY | changes, "qwen2", 8, force)


def yarn_file(**scaling):
    return {f"qwen2.rope.scaling.{name}": value for name, value in scaling.items()}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (yarn_file(type=Value("str", "yarn")), "without qwen2.rope.scaling.factor nothing"),
        (
            yarn_file(type=Value("str", "yarn"), factor=Value("f32", 4.0)),
            "llama.cpp takes context_length (2048)",
        ),
        (
            yarn_file(
                type=Value("str", "yarn"),
                factor=Value("f32", 4.0),
                original_context_length=Value("u32", 256),
            ),
            "context_length is 2048, but YaRN stretches 256 tokens by 4 to 1024",
        ),
        (yarn_file(attn_factor=Value("f32", 0.9)), "multiplied by 0.9000 in effect"),
        (yarn_file(yarn_beta_fast=Value("f32", 16.0)), "does not read"),
        ({"qwen2.attention.sliding_window": Value("u32", 16)}, "does not read"),
        ({"qwen2.no_such_key": Value("u32", 16)}, "does not read"),
        ({"general.sampling.penalty_repeat": Value("f32", 1.1),
          "general.sampling.sequence": Value("str", "top_k;temp")}, "penalty_repeat 1.1"),
    ],
)  # fmt: skip
def test_warned_about(changes, says):
    warnings = check_metadata(base() | changes, "qwen2", None)
    assert len(warnings) == 1
    assert says in warnings[0]


def test_forced_nonsense_is_no_traceback():
    texts = [
        "qwen2.rope.scaling.factor=str:four",
        "qwen2.attention.head_count=bool:true",
        "qwen2.context_length=arr[str]:[]",
        "tokenizer.ggml.eos_token_id=str:last",
        "tokenizer.ggml.tokens=u32:1",
    ]
    metadata = apply_overrides(base(), texts, "qwen2", force=True)
    check_metadata(metadata, "qwen2", 8, force=True)


# --- rotary options ---------------------------------------------------------------------------


def test_yarn_for_qwq():
    qwq = base() | {"qwen2.context_length": Value("u32", 40960)}
    metadata = rope_overrides("qwen2", "yarn", 4.0, 32768, None, None, qwq)
    assert {k: v for k, v in metadata.items() if qwq.get(k) != v} == {
        "qwen2.context_length": Value("u32", 131072),
        "qwen2.rope.scaling.type": Value("str", "yarn"),
        "qwen2.rope.scaling.factor": Value("f32", 4.0),
        "qwen2.rope.scaling.original_context_length": Value("u32", 32768),
    }
    assert check_metadata(metadata, "qwen2", None) == []
    assert qwq["qwen2.context_length"].data == 40960


def test_context_length_given_or_larger_is_kept():
    given = rope_overrides("qwen2", "yarn", 4.0, 256, None, 777, base())
    assert given["qwen2.context_length"].data == 777
    larger = rope_overrides("qwen2", "yarn", 2.0, 256, None, None, base())
    assert larger["qwen2.context_length"].data == 2048
    assert "2048" in check_metadata(larger, "qwen2", None)[0]
    assert rope_overrides("qwen2", None, None, None, None, None, base()) == base()


def test_a_new_scaling_replaces_the_old():
    yarn = rope_overrides("qwen2", "yarn", 4.0, 256, None, None, base())
    yarn["qwen2.rope.scaling.attn_factor"] = Value("f32", 0.9)
    yarn["qwen2.rope.scale_linear"] = Value("f32", 2.0)
    linear = rope_overrides("qwen2", "linear", 2.0, None, 5e5, 4096, yarn)
    assert linear == base() | {
        "qwen2.context_length": Value("u32", 4096),
        "qwen2.rope.freq_base": Value("f32", 5e5),
        "qwen2.rope.scaling.type": Value("str", "linear"),
        "qwen2.rope.scaling.factor": Value("f32", 2.0),
    }
    assert rope_overrides("qwen2", "none", None, None, None, None, yarn) == base()


@pytest.mark.parametrize(
    "options",
    [
        ("yarn", None, 256, None, None),
        ("yarn", 4.0, None, None, None),
        ("yarn", float("nan"), 256, None, None),
        ("linear", None, None, None, None),
        ("linear", 2.0, 256, None, None),
        ("none", 2.0, None, None, None),
        ("ntk", 2.0, None, None, None),
        (None, 2.0, None, None, None),
        (None, None, 256, None, None),
    ],
)
def test_options_that_do_not_go_together(options):
    with pytest.raises(UsageError):
        rope_overrides("qwen2", *options, base())


@pytest.mark.parametrize(
    "options",
    [
        ("yarn", 0.5, 256, None, None),
        ("yarn", 4.0, 0, None, None),
        ("yarn", 4.0, 2**40, None, None),
        ("yarn", 1e6, 2**30, None, None),
        ("linear", -1.0, None, None, None),
        (None, None, None, 0.0, None),
        (None, None, None, float("nan"), None),
        (None, None, None, None, 0),
        (None, None, None, None, 2**33),
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(BadRecipe, match="between"):
        rope_overrides("qwen2", *options, base())


# --- config.json ------------------------------------------------------------------------------


def test_theta():
    assert rope_metadata(tiny_config(), "qwen2") == (
        {"qwen2.rope.freq_base": Value("f32", 1e6)},
        [],
    )
    metadata, (warning,) = rope_metadata(tiny_config(rope_theta=...), "qwen2")
    assert metadata == {"qwen2.rope.freq_base": Value("f32", 10000.0)}
    assert "10000 is taken" in warning
    assert "qwen2" in warning


@pytest.mark.parametrize(
    "name", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "llama", "mistral", "mixtral"]
)
def test_default_theta_is_transformers_own(name):
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(name).rope_parameters["rope_theta"]
    metadata, _ = rope_metadata({"model_type": name}, "llama")
    assert metadata["llama.rope.freq_base"].data == theirs


def test_yarn_of_config_json():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = tiny_config(rope_scaling=scaling, max_position_embeddings=131072)
    metadata, warnings = rope_metadata(config, "qwen2")
    assert warnings == []
    assert metadata == {
        "qwen2.rope.freq_base": Value("f32", 1e6),
        "qwen2.rope.scaling.type": Value("str", "yarn"),
        "qwen2.rope.scaling.factor": Value("f32", 4.0),
        "qwen2.rope.scaling.original_context_length": Value("u32", 32768),
    }
    raised, (warning,) = rope_metadata({**config, "max_position_embeddings": 40960}, "qwen2")
    assert raised["qwen2.context_length"] == Value("u32", 131072)
    assert "40960" in warning
    with_default = {**scaling, "attention_factor": 0.1 * math.log(4) + 1}
    assert rope_metadata({**config, "rope_scaling": with_default}, "qwen2")[0] == metadata


def test_yarn_warnings():
    usual = {"type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1, "truncate": True}
    metadata, warnings = rope_metadata(tiny_config(rope_scaling=usual), "qwen2")
    assert metadata["qwen2.rope.scaling.original_context_length"].data == 2048
    assert [w.split(" (")[0] for w in warnings] == [
        "YaRN has no original_max_position_embeddings; max_position_embeddings",
        "context_length is 8192, YaRN's 2048 x 4; config.json's max_position_embeddings is 2048.",
    ]


@pytest.mark.parametrize("odd", [{"beta_fast": 64}, {"beta_slow": 2}, {"truncate": False}])
def test_yarn_that_llama_cpp_would_compute_otherwise_is_refused(odd):
    config = tiny_config(rope_scaling={"type": "yarn", "factor": 4.0, **odd})
    with pytest.raises(BadInput, match="--rope-scaling yarn --rope-factor 4"):
        rope_metadata(config, "qwen2")
    by_hand, warnings = rope_metadata(without_scaling(config), "qwen2")
    assert "qwen2.rope.scaling.type" not in by_hand and not warnings


def test_original_length_at_the_top_level_wins():
    """As transformers has it, for Phi-3 and its kind."""
    config = tiny_config(rope_scaling=YARN, original_max_position_embeddings=512)
    metadata, _ = rope_metadata(config, "qwen2")
    assert metadata["qwen2.rope.scaling.original_context_length"].data == 512


def test_both_spellings_may_stand_side_by_side():
    """As releases for transformers 4 and 5 have them."""
    old, new = {"type": "yarn", **YARN}, {**YARN, "rope_theta": 1e6}
    both, _ = rope_metadata(tiny_config(rope_scaling=old, rope_parameters=new), "qwen2")
    assert both == rope_metadata(tiny_config(rope_scaling=old), "qwen2")[0]
    layers = {"full_attention": new, "sliding_attention": new}
    assert both == rope_metadata(tiny_config(rope_parameters=layers), "qwen2")[0]
    default = {"rope_type": "default", "rope_theta": 1e6}
    plain = rope_metadata(tiny_config(), "qwen2")
    assert rope_metadata(tiny_config(rope_parameters=default), "qwen2") == plain
    assert rope_metadata(tiny_config(rope_scaling={}), "qwen2") == plain
    assert rope_metadata(tiny_config(rope_scaling={"type": None}), "qwen2") == plain


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 2.0}},
            "factor is 2.0 in one",
        ),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "factor is missing"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta is 10000.0"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "at least 1"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "at least 1"),
        ({"rope_scaling": {**YARN, "factor": "4"}}, "factor is 4"),
        ({"rope_scaling": {**YARN, "factor": True}}, "factor is True"),
        ({"rope_scaling": {**YARN, "factor": float("inf")}}, "finite"),
        ({"rope_scaling": {**YARN, "factor": float("nan")}}, "finite"),
        ({"rope_scaling": {**YARN, "attention_factor": 0}}, "above 0"),
        ({"rope_scaling": {**YARN, "attention_factor": -1.0}}, "above 0"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "original_max"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 1.5}}, "original_max"),
        (
            {"rope_scaling": YARN, "max_position_embeddings": None},
            "max_position_embeddings is None",
        ),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "rope_type is longrope"),
        ({"rope_scaling": {"type": "su"}}, "rope_type is su"),
        ({"rope_scaling": {"type": "\x1b[2J"}}, "rope_type is \\x1b[2J"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "no such factors"),
        ({"rope_scaling": "yarn"}, "must be an object"),
        ({"rope_scaling": [4]}, "must be an object"),
        ({"rope_theta": "1e6"}, "rope_theta is 1e6"),
        ({"rope_theta": 0}, "above 0"),
        ({"rope_theta": [1e6]}, "A number is needed"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"a": YARN, "b": {"rope_type": "default"}}}, "layer to layer"),
    ],
    ids=str,
)
def test_bad_rotary_settings(changes, says):
    with pytest.raises(BadInput) as error:
        rope_metadata(tiny_config(**changes), "qwen2")
    assert says in str(error.value)
    assert "\x1b" not in str(error.value)


# --- Llama 3 ----------------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("theta", "head_dim", "changes"),
    [
        (500000.0, 128, {}),
        (500000.0, 64, {"factor": 32.0}),
        (10000.0, 80, {"factor": 2.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0}),
        (1e6, 16, {"original_max_position_embeddings": 256}),
    ],
)
@pytest.mark.parametrize("new", [False, True])
def test_llama3_factors_are_transformers_own(theta, head_dim, changes, new):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import _compute_llama3_parameters

    scaling = {**LLAMA3, **changes}
    config = {"model_type": "llama", "hidden_size": 4 * head_dim, "num_attention_heads": 4,
              "max_position_embeddings": 131072}  # fmt: skip
    if new:
        config["rope_parameters"] = {**scaling, "rope_theta": theta}
    else:
        config |= {"rope_scaling": scaling, "rope_theta": theta}
    factors = llama3_rope_factors(config)
    theirs, _ = _compute_llama3_parameters(LlamaConfig(**json.loads(json.dumps(config))))
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    assert factors.shape == (head_dim // 2,)
    assert factors.dtype == np.float32
    np.testing.assert_allclose(plain / factors, theirs.numpy(), rtol=3e-6)
    assert factors[0] == 1
    assert factors[-1] == scaling["factor"]
    metadata, warnings = rope_metadata(config, "llama")
    assert (metadata, warnings) == ({"llama.rope.freq_base": Value("f32", theta)}, [])


def test_no_llama3_factors_for_others():
    assert llama3_rope_factors(tiny_config()) is None
    assert llama3_rope_factors(tiny_config(rope_scaling=YARN)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {**LLAMA3, "factor": None}},
        {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
        {"rope_scaling": {**LLAMA3, "high_freq_factor": "4"}},
        {"rope_scaling": LLAMA3, "hidden_size": ...},
        {"rope_scaling": LLAMA3, "num_attention_heads": 0},
        {"rope_scaling": LLAMA3, "head_dim": 63},
        {"rope_scaling": LLAMA3, "head_dim": 10**15},
        {"rope_scaling": LLAMA3, "head_dim": "64"},
    ],
    ids=str,
)
def test_bad_llama3_settings(changes):
    with pytest.raises(BadInput):
        llama3_rope_factors(tiny_config(**changes))
