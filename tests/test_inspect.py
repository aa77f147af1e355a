"""inspect: facts of checkpoints and GGUF files, what differs between two, and how it is printed."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import llama_cpp
import llama_oracle
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from model_makers import MODELS
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from quant.cli import cli
from quant.errors import BadInput, QwqQuantError
from quant.inspection.compare import compare
from quant.inspection.conversation import opens_think
from quant.inspection.describe import describe
from quant.inspection.tensor_kinds import kind_of
from quant.source import open_source
from quant.to_gguf import Wishes, plan_gguf
from quant.write_gguf import write_gguf


def inspect(*args) -> str:
    """What `qwq-quant inspect` prints; exit code 0."""
    result = CliRunner().invoke(cli, ["inspect", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def inspect_json(*args) -> dict:
    """The same with --format json; strictly JSON, one document."""

    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(inspect(*args, "--format", "json"), parse_constant=no_constant)


def facts_of(path) -> dict:
    return describe(open_source(str(path))).as_json()


def differences(a, b) -> dict[tuple[str, str], list]:
    found = compare(describe(open_source(str(a))), describe(open_source(str(b)))).as_json()
    return {(d["section"], d["fact"]): d["values"] for d in found["differences"]}


def assert_fits_a_terminal(output: str) -> None:
    for line in output.splitlines():
        assert len(line) <= 80 and line.isprintable() and line == line.rstrip(), repr(line)


def to_gguf(model, path: Path, type_name: str, **wishes) -> Path:
    write_gguf(plan_gguf(open_source(str(model)), Wishes(type_name, **wishes)), path)
    return path


@pytest.fixture(scope="module")
def tiny_q8_0(tiny_qwq, tmp_path_factory):
    return to_gguf(tiny_qwq, tmp_path_factory.mktemp("q8_0") / "tiny-Q8_0.gguf", "Q8_0")


@pytest.fixture
def tiny_copy(tiny_qwq, tmp_path):
    """examples/tiny-qwq in a folder where files may be changed."""
    return Path(shutil.copytree(tiny_qwq, tmp_path / "copy"))


# --- a checkpoint -----------------------------------------------------------------------------


def test_tiny_qwq(tiny_qwq):
    found = facts_of(tiny_qwq)
    assert found["file"] == {
        "format": "safetensors checkpoint",
        "files": 1,
        "nbytes": 13652328,
        "class": "Qwen2ForCausalLM",
        "to_gguf": True,
    }
    assert found["architecture"] == {
        "architecture": "qwen2",
        "layers": 6,
        "hidden_size": 256,
        "heads": 4,
        "kv_heads": 2,
        "head_size": 64,
        "feed_forward_size": 768,
        "context": 2048,
        "sliding_window": None,
        "norm_eps": 1e-05,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "vocabulary": 4096,
        "tied_embeddings": False,
        "kv_cache_nbytes_per_token": 2 * 6 * 2 * 64 * 2,
        "kv_cache_nbytes": 2 * 6 * 2 * 64 * 2 * 2048,
    }
    end, pad = {"id": 4093, "text": "<|im_end|>"}, {"id": 4091, "text": "<|endoftext|>"}
    tokenizer = found["tokenizer"]
    assert (tokenizer["model"], tokenizer["pre_tokenizer"]) == ("gpt2", "qwen2")
    assert (tokenizer["tokens"], tokenizer["unused_tokens"]) == (4096, 0)
    assert (tokenizer["eos"], tokenizer["eot"], tokenizer["pad"]) == (end, end, pad)
    assert tokenizer["add_bos"] is False
    assert found["generation"] == {
        "temp": 0.6, "top_k": 40, "top_p": 0.95, "min_p": 0.0, "penalty_repeat": 1.0,
        "stop_tokens": [4093, 4091],
    }  # fmt: skip
    config = json.loads((tiny_qwq / "tokenizer_config.json").read_text())
    template = found["chat_template"]["default"]
    assert template["length"] == len(config["chat_template"]) and template["opens_think"]
    assert found["problems"] == {} and all("(NFC)" in note for note in found["notes"])


def test_sizes_are_those_of_the_safetensors_library(tiny_qwq):
    found = facts_of(tiny_qwq)
    with safe_open(tiny_qwq / "model.safetensors", "np") as file:
        sizes = {name: np.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert found["weights"] == {
        "parameters": sum(sizes.values()),
        "nbytes": 2 * sum(sizes.values()),
        "bits_per_weight": 16.0,
        "types": {"BF16": 1.0},
    }
    kinds = {kind["kind"]: kind for kind in found["tensors"]}
    assert sum(kind["n_tensors"] for kind in kinds.values()) == len(sizes)
    for part in "qkv":
        names = [name for name in sizes if name.endswith(f"self_attn.{part}_proj.weight")]
        kind = kinds[f"attention {part}"]
        assert (kind["n_tensors"], kind["n_weights"]) == (6, sum(sizes[name] for name in names))
    assert kinds["mlp down"]["shapes"] == [[256, 768]]
    assert kinds["biases"]["shapes"] == [[256], [128]]
    order = list(kinds)
    assert (order[0], order[-1]) == ("embedding", "output")


QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1000000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
    "sliding_window": 32768,
}  # fmt: skip
RELEASES = {
    "Qwen1.5-7B": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 151936,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    },
    "Qwen2-7B": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
    },
    "QwQ-32B": {
        "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
        "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    },
}  # fmt: skip
"""The numbers of the published config.json files."""


def save_release(folder: Path, name: str) -> Path:
    """A release's config and the header of its weights; the weights are a hole in the file."""
    config = {**QWEN, **RELEASES[name]}
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        inside = {
            "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (hidden, hidden), "self_attn.q_proj.bias": (hidden,),
            "self_attn.k_proj.weight": (kv, hidden), "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, hidden), "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (hidden, hidden), "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden), "mlp.down_proj.weight": (hidden, inner),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{key}": shape for key, shape in inside.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps(config))
    with open(folder / name / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    return folder / name


@pytest.mark.parametrize(
    ("name", "parameters", "kv_cache"),
    [
        ("Qwen1.5-7B", 7721324544, 2 * 32 * 32 * 128 * 2),
        ("Qwen2-7B", 7615616512, 2 * 28 * 4 * 128 * 2),
        ("QwQ-32B", 32763876352, 262144),
    ],
)
def test_published_sizes(tmp_path, name, parameters, kv_cache):
    found = facts_of(save_release(tmp_path, name))
    assert found["weights"]["parameters"] == parameters
    assert found["weights"]["nbytes"] == 2 * parameters
    assert found["architecture"]["kv_cache_nbytes_per_token"] == kv_cache


def test_fp8_counts_its_scales(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    name = "model.layers.0.mlp.up_proj.weight"
    w, scale = torch.zeros(256, 128).to(torch.float8_e4m3fn), torch.ones(2, 1)
    save_torch({name: w, f"{name}_scale_inv": scale}, tmp_path / "model.safetensors")
    (kind,) = facts_of(tmp_path)["tensors"]
    assert kind["types"] == {"F8_E4M3": 256 * 128} and kind["n_tensors"] == 1
    assert kind["nbytes"] == 256 * 128 + 4 * 2


def test_yarn_in_config_json(tiny_copy):
    config = json.loads((tiny_copy / "config.json").read_text())
    config["rope_scaling"] = {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048,
    }  # fmt: skip
    (tiny_copy / "config.json").write_text(json.dumps(config))
    scaling = facts_of(tiny_copy)["architecture"]["rope_scaling"]
    assert scaling == {"type": "yarn", "factor": 4.0, "original_context_length": 2048}
    assert "yarn, factor 4 over 2,048" in inspect(tiny_copy)


# --- what cannot be read is said, not raised --------------------------------------------------


def test_an_unsupported_architecture(tmp_path):
    config = {
        "architectures": ["Gemma9ForCausalLM"],
        "text_config": {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2},
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    q, patch = np.zeros((8, 8), np.float16), np.zeros((3, 2, 2, 2), np.float32)
    save_file(
        {
            "model.language_model.layers.0.self_attn.q_proj.weight": q,
            "model.language_model.layers.1.self_attn.q_proj.weight": q,
            "model.language_model.layers.1.pre_feedforward_layernorm.weight": q[0],
            "model.vision_tower.blocks.0.conv.weight": patch,
            "model.vision_tower.blocks.1.conv.weight": patch,
            "model.scale": np.zeros((), np.float32),
        },
        tmp_path / "model.safetensors",
    )
    found = facts_of(tmp_path)
    assert found["file"]["class"] == found["architecture"]["architecture"] == "Gemma9ForCausalLM"
    assert found["file"]["to_gguf"] is False
    assert any("Gemma9ForCausalLM" in note for note in found["notes"])
    assert found["architecture"]["head_size"] == 4
    assert found["architecture"]["rope_scaling"] == {"type": "longrope"}
    assert "kv_cache_nbytes" not in found["architecture"]  # it may keep something else
    kinds = {kind["kind"]: kind for kind in found["tensors"]}
    assert kinds["attention q"]["n_tensors"] == 2 and kinds["norms"]["n_tensors"] == 1
    assert kinds["model.vision_tower.blocks.*.conv"]["shapes"] == [[3, 2, 2, 2]]
    assert found["weights"]["parameters"] == 2 * 64 + 8 + 2 * 24 + 1
    output = inspect(tmp_path)
    assert "not supported" in output and "3 x 2 x 2 x 2" in output and "scalar" in output
    assert_fits_a_terminal(output)


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"model": ')


def bad_sampling(folder):
    (folder / "generation_config.json").write_text('{"temperature": "hot", "eos_token_id": 4093}')


def bad_template(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": 5}))


@pytest.mark.parametrize(
    ("damage", "section", "words"),
    [
        (no_tokenizer, "tokenizer", "no tokenizer"),
        (broken_tokenizer, "tokenizer", "tokenizer.json"),
        (bad_sampling, "generation", "temperature"),
        (bad_template, "chat_template", "chat_template"),
    ],
)
def test_a_section_says_what_is_wrong_with_it(tiny_copy, damage, section, words):
    damage(tiny_copy)
    found = inspect_json(tiny_copy)
    assert words in found["problems"][section]
    assert found["architecture"]["layers"] == 6
    output = inspect(tiny_copy)
    assert words in output
    assert_fits_a_terminal(output)


def test_a_missing_tensor_is_noted(tiny_copy):
    config = json.loads((tiny_copy / "config.json").read_text())
    (tiny_copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    found = facts_of(tiny_copy)
    assert found["file"]["to_gguf"] is False
    assert "model.layers.6" in found["notes"][0]


JUNK = [None, True, -1, 0, 3.5, 1e300, 10**30, "x\x1b[31m", [], [1], {}, {"a": 1}]
FUZZED = {
    "config.json": [
        "architectures", "num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim",
        "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
        "vocab_size", "max_position_embeddings", "tie_word_embeddings", "eos_token_id",
    ],
    "generation_config.json": ["eos_token_id", "do_sample", "temperature", "top_k"],
}  # fmt: skip


@pytest.mark.parametrize("file_name", FUZZED)
def test_junk_in_a_config_is_shown_or_refused(tiny_copy, file_name):
    """Every value JSON can hold, in every place: no other exception, valid JSON, safe text."""
    no_tokenizer(tiny_copy)  # which makes it fast
    honest = json.loads((tiny_copy / file_name).read_text())
    for key in FUZZED[file_name]:
        for value in JUNK:
            (tiny_copy / file_name).write_text(json.dumps({**honest, key: value}))
            try:
                open_source(str(tiny_copy))
            except QwqQuantError:
                continue
            inspect_json(tiny_copy)
            assert_fits_a_terminal(inspect(tiny_copy))


# --- a GGUF file ------------------------------------------------------------------------------


def make_gguf(path: Path, arch: str = "qwen3moe", add=lambda writer: None, name="g") -> Path:
    """A small GGUF file by the gguf library: two layers, two types, YaRN, two chat templates."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv([2, 2])
    writer.add_key_length(32)
    writer.add_value_length(16)
    writer.add_feed_forward_length([96, 128])
    writer.add_expert_count(4)
    writer.add_expert_used_count(1)
    writer.add_context_length(4096)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(5e6)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(2.0)
    writer.add_rope_scaling_orig_ctx_len(2048)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(["a", "b", "ab", "<|im_end|>", "[PAD4]"])
    writer.add_token_types([1, 1, 1, 3, 5])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    writer.add_bos_token_id(99)
    writer.add_chat_template(
        [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    )
    writer.add_sampling_temp(0.6)
    add(writer)
    w = np.linspace(-1, 1, 5 * 64, dtype=np.float32).reshape(5, 64)
    writer.add_tensor("token_embd.weight", w)
    for layer in range(2):
        q8 = gguf.quants.quantize(np.ones((128, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(
            f"blk.{layer}.attn_q.weight", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0
        )
        writer.add_tensor(f"blk.{layer}.ffn_up_exps.weight", np.zeros((4, 32, 64), np.float16))
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file(tmp_path):
    found = facts_of(make_gguf(tmp_path / "a.gguf"))
    assert found["file"]["file_type"] == 15 and found["file"]["name"] == "g"
    assert found["architecture"] == {
        "architecture": "qwen3moe",
        "layers": 2,
        "hidden_size": 64,
        "heads": 4,
        "kv_heads": 2,  # for all layers the same
        "head_size": 32,
        "feed_forward_size": [96, 128],
        "experts": 4,
        "experts_used": 1,
        "expert_size": None,
        "shared_expert_size": None,
        "context": 4096,
        "sliding_window": None,
        "norm_eps": 1e-06,  # the file holds it in float32
        "rope_theta": 5e6,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_context_length": 2048},
        "vocabulary": 5,
        "tied_embeddings": True,
        "kv_cache_nbytes_per_token": 2 * 2 * (32 + 16) * 2,
        "kv_cache_nbytes": 2 * 2 * (32 + 16) * 2 * 4096,
    }
    n_q, n_experts, rest = 2 * 128 * 64, 2 * 4 * 32 * 64, 5 * 64 + 2 * 64
    kinds = {kind["kind"]: kind for kind in found["tensors"]}
    assert kinds["experts up"]["shapes"] == [[32, 64]]
    assert kinds["attention q"]["types"] == {"Q8_0": n_q}
    assert kinds["experts up"]["types"] == {"F16": n_experts}
    shares = found["weights"]["types"]
    assert shares["F32"] == pytest.approx(rest / (n_q + n_experts + rest), abs=1e-6)
    assert found["weights"]["active_parameters"] == n_q + n_experts // 4 + rest
    assert found["weights"]["nbytes"] == n_q // 32 * 34 + 2 * n_experts + 4 * rest
    tokenizer = found["tokenizer"]
    assert (tokenizer["tokens"], tokenizer["unused_tokens"], tokenizer["merges"]) == (5, 1, 1)
    assert tokenizer["eos"] == {"id": 3, "text": "<|im_end|>"}
    assert tokenizer["bos"] == {"id": 99, "text": None}
    assert list(found["chat_template"]) == ["default", "tool_use"]
    assert found["generation"] == {"temp": 0.6}
    output = inspect(tmp_path / "a.gguf")
    for words in ("Q4_K_M", "96 to 128, by layer", "(no such token)", "Q8_0 49.", "2 (2 heads"):
        assert words in output
    assert_fits_a_terminal(output)


def test_an_unknown_architecture_in_a_gguf(tmp_path):
    found = facts_of(make_gguf(tmp_path / "a.gguf", arch="nobody"))
    assert found["architecture"]["architecture"] == "nobody"
    assert found["architecture"]["layers"] == 2
    assert "kv_cache_nbytes" not in found["architecture"]


def test_metadata_of_wrong_types(tmp_path):
    """Readers would refuse these values; inspect shows them."""

    def add(writer):
        writer.add_float32("qwen3moe.rope.scaling.attn_factor", float("nan"))
        writer.add_string("qwen3moe.expert_feed_forward_length", "x")
        writer.add_array("qwen3moe.attention.sliding_window", [1, 2])
        writer.add_string("tokenizer.ggml.padding_token_id", "none")
        writer.add_array("general.sampling.top_p", [0.5, 0.25])
        writer.add_float32("general.sampling.min_p", float("inf"))
        writer.add_string("tokenizer.chat_template.", "nameless")

    path = make_gguf(tmp_path / "a.gguf", add=add)
    found = inspect_json(path)
    assert found["architecture"]["rope_scaling"]["attn_factor"] == "nan"
    assert found["architecture"]["expert_size"] == "x"
    assert found["generation"]["min_p"] == "inf"
    assert found["tokenizer"]["pad"] == {"id": "none", "text": None}
    assert_fits_a_terminal(inspect(path))


def test_a_gguf_without_tokenizer_or_tensors(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = inspect_json(tmp_path / "empty.gguf")
    assert "tokenizer" in found["problems"] and found["weights"]["parameters"] == 0
    assert_fits_a_terminal(inspect(tmp_path / "empty.gguf"))


def test_llama_cpp_agrees(tiny_q8_0):
    found = facts_of(tiny_q8_0)
    architecture, weights = found["architecture"], found["weights"]
    with llama_oracle.loaded(tiny_q8_0) as model:
        assert weights["parameters"] == llama_cpp.llama_model_n_params(model)
        assert weights["nbytes"] == llama_cpp.llama_model_size(model)
        assert architecture["layers"] == llama_cpp.llama_model_n_layer(model)
        assert architecture["hidden_size"] == llama_cpp.llama_model_n_embd(model)
        assert architecture["heads"] == llama_cpp.llama_model_n_head(model)
        assert architecture["kv_heads"] == llama_cpp.llama_model_n_head_kv(model)
        assert architecture["context"] == llama_cpp.llama_model_n_ctx_train(model)
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        for kind in ("bos", "eos", "eot", "pad"):
            read = getattr(llama_cpp, f"llama_vocab_{kind}")
            assert found["tokenizer"][kind]["id"] == read(vocabulary)
        assert found["tokenizer"]["add_bos"] == llama_cpp.llama_vocab_get_add_bos(vocabulary)


# --- hostile texts ----------------------------------------------------------------------------

HOSTILE = "\x1b[2J<script>alert(1)</script>\r\n\u202egnp.exe [red]"


def test_hostile_names_are_escaped(tmp_path):
    def add(writer):
        writer.add_string(f"tokenizer.chat_template.{HOSTILE}", HOSTILE)
        writer.add_string("general.license", HOSTILE)
        writer.add_string(f"general.sampling.{HOSTILE}", HOSTILE)
        writer.add_tensor(HOSTILE, np.zeros(32, np.float32))

    path = make_gguf(tmp_path / "a.gguf", arch=HOSTILE, add=add, name=HOSTILE)
    other = make_gguf(tmp_path / "b.gguf")
    for output in (inspect(path), inspect(path, other)):
        assert_fits_a_terminal(output)
        assert r"\x1b[2J<script>" in output and r"\r\n" in output
    found = inspect_json(path)
    assert found["file"]["name"] == HOSTILE and HOSTILE in found["chat_template"]
    assert "\x1b" not in inspect(path, "--format", "json")


def test_texts_that_are_no_utf8(tmp_path):
    path = make_gguf(tmp_path / "a.gguf", name="caf?")
    path.write_bytes(path.read_bytes().replace(b"caf?", b"caf\xe9").replace(b"plain", b"pl\xe9in"))
    assert r"caf\udce9" in inspect(path)
    assert inspect_json(path)["file"]["name"] == "caf\udce9"


def test_thousands_of_odd_names_make_a_short_table(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    zero = np.zeros(1, np.float32)
    save_file({f"x{i}": zero for i in range(3000)}, tmp_path / "model.safetensors")
    output = inspect(tmp_path)
    assert "more kinds" in output and len(output.splitlines()) < 120
    assert len(inspect_json(tmp_path)["tensors"]) == 3000


# --- two models -------------------------------------------------------------------------------


def test_a_model_does_not_differ_from_itself(tiny_qwq, tiny_q8_0):
    for model in (tiny_qwq, tiny_q8_0):
        assert inspect_json(model, model)["identical"] is True
        assert inspect(model, model).startswith("No fact differs.")


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_is_described_as_its_own_gguf_is(made_models, tmp_path, name):
    """The same facts by two ways: config.json and safetensors; metadata and GGUF tensors."""
    folder, _ = made_models(name)
    path = to_gguf(folder, tmp_path / "own.gguf", "F32")
    assert differences(folder, path).keys() == {("file", "format"), ("file", "nbytes")}
    found = compare(describe(open_source(str(folder))), describe(open_source(str(path))))
    assert found.tensors == ()


def test_a_quantized_gguf_differs_in_types_and_bytes_alone(tiny_qwq, tiny_q8_0):
    found = differences(tiny_qwq, tiny_q8_0)
    assert {section for section, _ in found} == {"file", "weights"}
    assert found["weights", "bits_per_weight"][0] == 16.0
    output = inspect(tiny_qwq, tiny_q8_0)
    assert "BF16 100 %" in output and "1.1 MB, Q8_0" in output and "No other fact" in output
    assert_fits_a_terminal(output)


def test_qwen1_5_against_qwen2(tmp_path):
    """What one wants to see: grouped heads, longer context, wider feed-forward, fewer layers."""
    a, b = (save_release(tmp_path, name) for name in ("Qwen1.5-7B", "Qwen2-7B"))
    found = differences(a, b)
    assert {key[1]: values for key, values in found.items() if key[0] == "architecture"} == {
        "layers": [32, 28],
        "hidden_size": [4096, 3584],
        "heads": [32, 28],
        "kv_heads": [32, 4],
        "feed_forward_size": [11008, 18944],
        "context": [32768, 131072],
        "vocabulary": [151936, 152064],
        "kv_cache_nbytes_per_token": [524288, 57344],
        "kv_cache_nbytes": [524288 * 32768, 57344 * 131072],
    }  # fmt: skip
    output = inspect(a, b)
    for words in ("32 (one each)", "4 (7 heads share one)", "7.72 B", "512 x 3584", "Qwen1.5-7B"):
        assert words in output
    assert_fits_a_terminal(output)


def test_one_side_without_tokenizer(tiny_qwq, tiny_copy):
    no_tokenizer(tiny_copy)
    found = differences(tiny_qwq, tiny_copy)
    assert set(found) == {("file", "to_gguf"), ("tokenizer", "problem")}
    assert found["tokenizer", "problem"][0] is None
    assert_fits_a_terminal(inspect(tiny_qwq, tiny_copy))


def test_overrides_show(tiny_qwq, tmp_path, tiny_q8_0):
    wishes = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_context": 2048}
    path = to_gguf(tiny_qwq, tmp_path / "long.gguf", "Q8_0", sampling="none", **wishes)
    found = differences(tiny_q8_0, path)
    assert found["architecture", "rope_scaling"][1]["type"] == "yarn"
    assert found["architecture", "context"] == [2048, 8192]
    assert found["generation", "temp"] == [0.6, None]


# --- small parts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "opens"),
    [
        (
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}",
            True,
        ),
        ("{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}", True),
        (
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
            "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
            False,
        ),
        ("<think>{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}", False),
        ("{{ '<think>' }}", False),
    ],
    ids=["QwQ", "DeepSeek-R1", "Qwen3", "history", "no generation prompt"],
)
def test_opens_think(template, opens):
    assert opens_think(template) is opens


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.17.self_attn.o_proj.weight", "attention o"),
        ("blk.17.attn_output.weight", "attention o"),
        ("output_norm.weight", "norms"),
        ("lm_head.weight", "output"),
        ("model.layers.3.mlp.experts.127.up_proj.weight", "experts up"),
        ("model.layers.3.mlp.experts.gate_up_proj", "experts gate + up"),
        ("language_model.model.layers.0.mlp.down_proj.weight", "mlp down"),
        ("vision.layers.0.mlp.down_proj.weight", "vision.layers.*.mlp.down_proj"),
        ("blk.0.attn_k.bias", "biases"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "buffers"),
        ("rope_freqs.weight", "rope factors"),
    ],
)
def test_kind_of(name, kind):
    assert kind_of(name) == kind


# --- the command ------------------------------------------------------------------------------


def child(*args):
    code = "from quant.cli import main; main()"
    command = [sys.executable, "-c", code, "inspect", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_broken_container_is_an_error(tiny_q8_0, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_q8_0.read_bytes()[:100000])
    with pytest.raises(BadInput):
        open_source(str(broken))
    done = child(tmp_path / "broken.gguf")
    assert done.returncode == 65 and done.stdout == ""
    assert "broken.gguf" in done.stderr and "Traceback" not in done.stderr


def test_json_is_one_document_on_stdout(tiny_qwq, tiny_q8_0):
    one = inspect_json(tiny_qwq)
    two = inspect_json(tiny_qwq, tiny_q8_0)
    assert two["models"][0] == one and two["identical"] is False
    assert [d["fact"] for d in two["differences"]] == [
        "format", "nbytes", "nbytes", "bits_per_weight", "types",
    ]  # fmt: skip


def test_it_needs_no_torch(tiny_qwq):
    code = f"import sys; sys.argv = ['q', 'inspect', {str(tiny_qwq)!r}]\n"
    code += "from quant.cli import main\nimport io, contextlib\n"
    code += (
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main()"
    )
    code += "\nprint(*sorted({m.partition('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "transformers", "numba", "huggingface_hub"}
