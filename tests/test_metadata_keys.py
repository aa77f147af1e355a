"""The key table against llama.cpp itself: a type it accepts loads, any other is refused."""

import ctypes
import re

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf import GGUFValueType

from quant.gguf_file import SCALAR_TYPES, Value
from quant.metadata_keys import (
    ARCHITECTURES,
    KEYS,
    PRE_TOKENIZERS,
    SAMPLING,
    SCALING_TYPES,
    TOKENIZER_MODELS,
    expected,
    is_read,
    nearest,
    objection,
)

SAMPLES = {"f32": 0.5, "f64": 0.5, "bool": True, "str": "text"}  # any integer type: 1
TOKENS = ["a", "b", "c", "d", "e", "f", "g", "h"]
N = 32  # hidden and inner size of the toy model

TOY = {
    "general.architecture": ("str", "qwen2"),
    "qwen2.block_count": ("u32", 1),
    "qwen2.context_length": ("u32", 64),
    "qwen2.embedding_length": ("u32", N),
    "qwen2.feed_forward_length": ("u32", N),
    "qwen2.attention.head_count": ("u32", 2),
    "qwen2.attention.head_count_kv": ("u32", 2),
    "qwen2.attention.key_length": ("u32", N // 2),
    "qwen2.attention.value_length": ("u32", N // 2),
    "qwen2.rope.dimension_count": ("u32", N // 2),
    "qwen2.attention.layer_norm_rms_epsilon": ("f32", 1e-6),
    "qwen2.rope.scaling.type": ("str", "none"),
    "tokenizer.ggml.model": ("str", "gpt2"),
    "tokenizer.ggml.pre": ("str", "qwen2"),
    "tokenizer.ggml.tokens": ("arr[str]", TOKENS),
    "tokenizer.ggml.token_type": ("arr[i32]", [1] * 8),
    "tokenizer.ggml.scores": ("arr[f32]", [0.0] * 8),
    "tokenizer.ggml.merges": ("arr[str]", ["a b"]),
}
"""Every key a toy Qwen2 with eight tokens needs, and what it must be for it to load."""

ACCEPTED = {
    "general.alignment": 32,
    "qwen2.nextn_predict_layers": 0,
    "qwen2.expert_count": 0,
    "qwen2.expert_used_count": 0,
    "qwen2.expert_group_count": 0,
    "tokenizer.ggml.scores": [0] * 8,
}
"""Values for keys where any number will not do."""

REFUSAL = re.compile(rb"wrong (array element )?type|invalid gguf type|must be of type|is not a str")

NEVER_REFUSED = {
    "classifier.output_labels": "a value that is no array is passed over (get_arr)",
    "tensor_extra.prec_a4": "read only beside tensor_extra.name",
    "tensor_extra.name": "a value that is no array is passed over (get_arr)",
    "precompiled_charsmap": "read for the tokenizer model t5 only",
    "source.huggingface.repository": "in LLM_KV_NAMES, read by nobody",
    "cls_token_id": "in LLM_KV_NAMES, read by nobody",
}


def sample(kind: str):
    if kind.startswith("arr["):
        return [sample(kind[4:-1])]
    return SAMPLES.get(kind, 1)


def write_toy(path, extra: dict, tensors: bool = True):
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.kv_data[0].clear()  # TOY has general.architecture
    for key, (kind, data) in {**TOY, **extra}.items():
        if kind.startswith("arr["):
            item = GGUFValueType(SCALAR_TYPES[kind[4:-1]])
            writer.add_key_value(key, data, GGUFValueType.ARRAY, sub_type=item)
        else:
            writer.add_key_value(key, data, GGUFValueType(SCALAR_TYPES[kind]))
    shapes = {"token_embd.weight": (8, N), "output_norm.weight": (N,)}
    for name in ("attn_norm", "ffn_norm"):
        shapes[f"blk.0.{name}.weight"] = (N,)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}.weight"] = (N, N)
    for name, shape in shapes.items() if tensors else ():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def loads():
    """A function: does llama.cpp load this file? The whole of it, or the vocabulary only.

    What llama.cpp logged while it tried is in the function's `log`.
    """
    llama_cpp.llama_backend_init()
    keep = llama_cpp.llama_log_callback(lambda _, text, __: load.log.append(text))
    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))

    def load(path, vocab_only=False) -> bool:
        load.log = []
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = vocab_only
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if model:
            llama_cpp.llama_model_free(model)
        return bool(model)

    yield load
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p(0))


READ_BY_LOADER = [
    template.format(arch="qwen2", id=0, name="tool_use")
    for template, key in KEYS.items()
    if (
        ("{arch}" in template and "qwen2" in key.readers)
        or template.startswith("tokenizer.ggml.")
        or template
        in ("general.architecture", "general.name", "general.alignment", "general.file_type")
        or template == "split.count"
    )
    and not any(template.endswith(name) for name in NEVER_REFUSED)
    and not template.endswith("vocab_size")  # read for the tokenizer model no_vocab only
]


def test_loader_keys_are_most_of_the_table():
    assert len(READ_BY_LOADER) > 50


@pytest.mark.parametrize("key", READ_BY_LOADER)
def test_llama_cpp_accepts_exactly_the_types_of_the_table(key, tmp_path, loads):
    known = expected(key, "qwen2")
    for kind in known.types:
        data = ACCEPTED.get(key, TOY[key][1] if key in TOY else sample(kind))
        if kind.startswith("arr[") and not isinstance(data, list):
            data = [data]  # one number a layer
        assert loads(write_toy(tmp_path / "toy.gguf", {key: (kind, data)})), f"{kind} refused"
    for kind in (*SCALAR_TYPES, *(f"arr[{k}]" for k in SCALAR_TYPES)):
        if kind in known.types or (kind == "arr[bool]" and "arr[i32]" in known.types):
            continue  # a number a layer may be true or false to llama.cpp; nobody writes that
        path = write_toy(tmp_path / "toy.gguf", {key: (kind, sample(kind))})
        assert not loads(path), f"{kind} accepted"
        assert REFUSAL.search(b"".join(loads.log)), kind


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_readers_are_the_architectures_whose_loader_asks(arch, tmp_path, loads):
    """A type nobody accepts is refused exactly where the key is read."""
    toy = {key.replace("qwen2.", f"{arch}."): value for key, value in TOY.items()}
    toy["general.architecture"] = ("str", arch)
    if arch != "qwen2" and arch != "qwen3":
        toy |= {f"{arch}.expert_count": ("u32", 2), f"{arch}.expert_used_count": ("u32", 1)}
    for template in (t for t in KEYS if t.startswith("{arch}.")):
        key = template.format(arch=arch)
        if key.endswith(("vocab_size", "classifier.output_labels")):
            continue  # see above
        loads(write_toy(tmp_path / "m.gguf", toy | {key: ("u16", 1)}, tensors=False))
        assert bool(REFUSAL.search(b"".join(loads.log))) == is_read(key, arch), key


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_is_known_to_llama_cpp(name, tmp_path, loads):
    path = write_toy(tmp_path / "v.gguf", {"tokenizer.ggml.pre": ("str", name)}, tensors=False)
    assert loads(path, vocab_only=True)


def test_another_pre_tokenizer_is_refused(tmp_path, loads):
    path = write_toy(tmp_path / "v.gguf", {"tokenizer.ggml.pre": ("str", "qwen3")}, tensors=False)
    assert not loads(path, vocab_only=True)
    problem = objection(Value("str", "qwen3"), KEYS["tokenizer.ggml.pre"])
    assert "near: qwen" in problem


@pytest.mark.parametrize("name", [*TOKENIZER_MODELS, "bpe"])
def test_tokenizer_models_are_known_to_llama_cpp(name, tmp_path, loads):
    """The toy's tokens do not suit all of them, but only an unknown name is called unknown."""
    extra = {"tokenizer.ggml.model": ("str", name)}
    loads(write_toy(tmp_path / "v.gguf", extra, tensors=False), vocab_only=True)
    unknown = any(b"unknown tokenizer" in text for text in loads.log)
    assert unknown == (name == "bpe")


def test_scaling_types_load(tmp_path, loads):
    for name in SCALING_TYPES:
        assert loads(write_toy(tmp_path / "m.gguf", {"qwen2.rope.scaling.type": ("str", name)}))


def test_sampling_keys_are_llama_cpps_twelve():
    theirs = {llama_cpp.llama_model_meta_key_str(i).decode() for i in range(12)}
    assert theirs == {f"general.sampling.{name}" for name in SAMPLING}
    assert theirs <= KEYS.keys()


def test_types_are_those_gguf_py_writes(tmp_path):
    """gguf-py's own methods, for keys llama.cpp takes in any type or does not read."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    numbers = {"count", "top_k", "last_n", "mirostat", "length", "type", "version"}
    for name in dir(writer):
        if not name.startswith("add_sampling_"):
            continue
        number = 1 if any(n in name for n in numbers) else 0.5
        getattr(writer, name)("top_k" if name.endswith("sequence") else number)
    for add in (writer.add_author, writer.add_size_label, writer.add_license_link):
        add("text")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, "text")
    writer.add_dataset_url(3, "text")
    writer.add_tags(["a"])
    writer.add_quantization_version(2)
    writer.add_chat_template([{"name": "tool_use", "template": "x"}])
    names = {number: name for name, number in SCALAR_TYPES.items()} | {9: "arr[str]"}
    written = writer.kv_data[0]
    assert len([k for k in written if k.startswith("general.sampling.")]) == 12
    for key, value in written.items():
        kind = names[int(value.type)]
        assert expected(key, "qwen2").types[0] == kind, key


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_templates_expand(arch):
    assert expected(f"{arch}.context_length", arch).types == ("u32",)
    assert expected(f"{arch}.context_length", "gemma3") is None
    assert expected("gemma3.context_length", "gemma3").types == ("u32",)
    assert expected("general.base_model.12.name", arch).types == ("str",)
    assert expected("general.base_model.x.name", arch) is None
    assert expected("tokenizer.chat_template.rag", arch).types == ("str",)
    assert expected("tokenizer.chat_template.", arch) is None
    assert expected("{arch}.context_length", arch) is None


def test_readers():
    assert is_read("qwen2.rope.freq_base", "qwen2")
    assert not is_read("qwen2.rope.scaling.yarn_beta_fast", "qwen2")
    assert not is_read("llama.expert_feed_forward_length", "llama")
    assert is_read("qwen3moe.expert_feed_forward_length", "qwen3moe")
    assert is_read("gemma3.rope.scaling.yarn_beta_fast", "gemma3")  # who knows


@pytest.mark.parametrize(
    ("key", "arch", "right"),
    [
        ("qqwen2.context_length", "qwen2", "qwen2.context_length"),
        ("qwen2.rope.freqbase", "qwen2", "qwen2.rope.freq_base"),
        ("llama.context_length", "qwen2", "qwen2.context_length"),
        ("qwen2.context_length", "qwen3moe", "qwen3moe.context_length"),
        ("context_length", "llama", "llama.context_length"),
        ("llama.rope.freqbase", "qwen2", "qwen2.rope.freq_base"),
        ("qwen2.attention.layer_norm_eps", "qwen2", "qwen2.attention.layer_norm_rms_epsilon"),
        ("general.sampling.temperature", "qwen2", "general.sampling.temp"),
        ("sampling.top_k", "qwen2", "general.sampling.top_k"),
        ("tokenizer.ggml.pad_token_id", "qwen2", "tokenizer.ggml.padding_token_id"),
        ("tokenizer.ggml.separator_token_id", "qwen2", "tokenizer.ggml.seperator_token_id"),
        ("name", "qwen2", "general.name"),
        ("completely.different", "qwen2", None),
        ("x" * 65535, "qwen2", None),
    ],
)
def test_nearest(key, arch, right):
    assert nearest(key, arch) == right


def test_objections():
    top_p = KEYS["general.sampling.top_p"]
    assert objection(Value("f32", 0.95), top_p) == ""
    assert objection(Value("f32", 1.5), top_p) == "must be between 0 and 1"
    assert objection(Value("f32", float("nan")), top_p)
    scaling = KEYS["{arch}.rope.scaling.type"]
    assert objection(Value("str", "dynamic"), scaling) == (
        "must be one of none, linear, yarn, longrope"
    )
