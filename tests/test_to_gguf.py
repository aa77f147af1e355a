"""to-gguf end to end: real model folders in, the real llama.cpp and transformers as judges."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ggml_oracle
import gguf
import llama_oracle
import numpy as np
import pytest
from click.testing import CliRunner
from model_makers import MODELS, make_model, torch_logits
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from xxhash import xxh3_128_hexdigest

from quant.cli import cli
from quant.formats import FORMATS
from quant.gguf_file import GgufFile, open_gguf
from quant.mixtures import MIXTURES
from quant.source import open_source
from quant.to_gguf import Wishes, plan_gguf
from quant.write_gguf import write_gguf

TOKENS = [17, 900, 4, 4092, 256, 256, 31, 2048, 77, 4095, 1, 3000, 640, 12, 9, 2222]

LOGIT_ERROR = {
    "F32": 1e-4, "F16": 2e-3, "BF16": 1.5e-2, "Q8_0": 4e-2,
    "Q5_0": 0.2, "Q5_1": 0.2, "Q4_0": 0.4, "Q4_1": 0.4,
}  # fmt: skip
"""Largest relative RMS error of the logits of a random 3-layer model, by type."""


def write(model: Path, output: Path, type_name="F32", **wishes) -> Path:
    job = plan_gguf(open_source(str(model)), Wishes(type_name, **wishes))
    write_gguf(job, output)
    return output


def run(*args) -> "CliRunner":
    return CliRunner().invoke(cli, [str(a) for a in args])


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.parametrize("name", MODELS)
def test_float32_logits_equal_transformers(name, made_models, tmp_path):
    folder, model = made_models(name)
    found = llama_oracle.logits(write(folder, tmp_path / "m.gguf"), TOKENS)
    expected = torch_logits(model, TOKENS)
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()
    assert relative_error(found, expected) < LOGIT_ERROR["F32"]


@pytest.mark.parametrize("type_name", [t for t in LOGIT_ERROR if t != "F32"])
@pytest.mark.parametrize("name", MODELS)
def test_every_type_of_every_architecture_loads(name, type_name, made_models, tmp_path):
    folder, model = made_models(name)
    path = write(folder, tmp_path / "m.gguf", type_name)
    error = relative_error(llama_oracle.logits(path, TOKENS), torch_logits(model, TOKENS))
    assert error < LOGIT_ERROR[type_name]


@pytest.mark.parametrize("type_name", LOGIT_ERROR)
def test_tiny_qwq_loads_and_thinks_alike(type_name, tiny_qwq, tmp_path):
    import torch
    import transformers

    path = write(tiny_qwq, tmp_path / "m.gguf", type_name)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_qwq, dtype=torch.float32)
    found, expected = llama_oracle.logits(path, TOKENS), torch_logits(model.eval(), TOKENS)
    if type_name in ("F32", "BF16"):  # bf16 weights are exact in both
        assert (
            np.abs(found - expected).max()
            <= (1e-3 if type_name == "F32" else 2e-2) * np.abs(expected).max()
        )
    assert relative_error(found, expected) < LOGIT_ERROR[type_name]


@pytest.mark.parametrize("type_name", LOGIT_ERROR)
def test_every_byte_is_what_ggml_writes(type_name, tiny_qwq, tmp_path):
    read = GgufFile.open(write(tiny_qwq, tmp_path / "m.gguf", type_name))
    reader = gguf.GGUFReader(read.path)
    stored = {t.name: t for t in reader.tensors}
    job = plan_gguf(open_source(str(tiny_qwq)), Wishes(type_name))
    with safe_open(tiny_qwq / "model.safetensors", "pt") as source:
        for assignment in job.plan.assignments:
            w = source.get_tensor(assignment.source.source_name).float().numpy()
            tensor = stored[assignment.name]
            expected = ggml_oracle.quantize(tensor.tensor_type.value, np.atleast_2d(w))
            assert np.array_equal(tensor.data.view(np.uint8).ravel(), expected.ravel())
            assert tensor.tensor_type.name == assignment.format.name


def test_shards_give_the_same_bytes(tmp_path, tiny_qwq):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_qwq)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="3MB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    for file in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        shutil.copy(tiny_qwq / file, tmp_path / "sharded")
    one = write(tiny_qwq, tmp_path / "one.gguf", "Q8_0", name="m")
    many = write(tmp_path / "sharded", tmp_path / "many.gguf", "Q8_0", name="m")
    assert one.read_bytes() == many.read_bytes()


def test_fused_experts_give_the_same_bytes(made_models, tmp_path):
    """transformers 5 keeps experts fused in memory; some releases store them so."""
    folder, _ = made_models("qwen3moe")
    fused = tmp_path / "fused"
    shutil.copytree(folder, fused)
    tensors = load_file(fused / "model.safetensors")
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp.experts"
        part = {
            p: np.stack([tensors.pop(f"{prefix}.{x}.{p}.weight") for x in range(4)])
            for p in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{prefix}.gate_up_proj"] = np.concatenate([part["gate_proj"], part["up_proj"]], 1)
        tensors[f"{prefix}.down_proj"] = part["down_proj"]
    save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
    a = write(folder, tmp_path / "a.gguf", "Q8_0", name="m")
    b = write(fused, tmp_path / "b.gguf", "Q8_0", name="m")
    assert a.read_bytes() == b.read_bytes()


def test_fp8_checkpoint(made_models, tmp_path):
    """e4m3 weights with 128x128 block scales, as DeepSeek and Qwen3-FP8 ship them."""
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    folder, _ = made_models("qwen3")
    fp8, plain = tmp_path / "fp8", tmp_path / "plain"
    shutil.copytree(folder, fp8)
    shutil.copytree(folder, plain)
    tensors, decoded = load_torch(folder / "model.safetensors"), {}
    for name in list(tensors):
        w = tensors[name]
        if "proj" not in name:
            decoded[name] = w
            continue
        rows, columns = (-(-n // 128) for n in w.shape)
        scale = torch.rand(rows, columns) * 1e-3 + 1e-3
        wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: w.shape[0], : w.shape[1]]
        tensors[name] = (w / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
        decoded[name] = tensors[name].float() * wide
    save_torch(tensors, fp8 / "model.safetensors", metadata={"format": "pt"})
    save_torch(decoded, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (fp8 / "config.json").write_text(json.dumps(config))
    a = write(fp8, tmp_path / "a.gguf", "F32", name="m")
    b = write(plain, tmp_path / "b.gguf", "F32", name="m")
    assert a.read_bytes() == b.read_bytes()


# --- .gguf as input ---------------------------------------------------------------------------


def test_gguf_copy_split_and_merge(tiny_qwq, tmp_path):
    whole = write(tiny_qwq, tmp_path / "m.gguf", "Q4_0")
    result = run("to-gguf", whole, "-o", tmp_path / "parts.gguf", "--split-max-size", "1MB")
    assert result.exit_code == 0, result.output
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert len(parts) > 3
    assert np.array_equal(
        llama_oracle.logits(parts[0], TOKENS[:4]), llama_oracle.logits(whole, TOKENS[:4])
    )
    result = run("to-gguf", parts[0], "-o", tmp_path / "merged.gguf")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "merged.gguf").read_bytes() == whole.read_bytes()


def test_gguf_with_changed_metadata_keeps_its_weights(tiny_qwq, tmp_path):
    whole = write(tiny_qwq, tmp_path / "m.gguf", "Q5_1")
    args = ("--override", "qwen2.context_length=u32:4096", "--name", "renamed")
    result = run("to-gguf", whole, "-o", tmp_path / "n.gguf", *args)
    assert result.exit_code == 0, result.output
    old, new = open_gguf(whole), open_gguf(tmp_path / "n.gguf")
    assert new.metadata["qwen2.context_length"].data == 4096
    assert new.metadata["general.name"].data == "renamed"
    assert old.path.read_bytes()[old.data_start :] == new.path.read_bytes()[new.data_start :]


def test_16_bit_gguf_is_encoded_like_its_checkpoint(tiny_qwq, tmp_path):
    middle = write(tiny_qwq, tmp_path / "bf16.gguf", "BF16")
    direct = write(tiny_qwq, tmp_path / "direct.gguf", "Q8_0")
    result = run("to-gguf", middle, "-o", tmp_path / "two.gguf", "--type", "q8_0")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "two.gguf").read_bytes() == direct.read_bytes()
    again = run("to-gguf", direct, "-o", tmp_path / "three.gguf", "--type", "Q4_0")
    assert again.exit_code == 65 and "quantized already" in again.output


def test_a_split_keeps_its_alignment_and_its_size(tiny_qwq, tmp_path):
    whole = write(tiny_qwq, tmp_path / "m.gguf", "Q4_0")
    aligned = tmp_path / "a.gguf"
    reader = open_gguf(whole)
    writer = gguf.GGUFWriter(aligned, "qwen2")
    writer.add_custom_alignment(128)
    for tensor in gguf.GGUFReader(whole).tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for source, limit in ((aligned, 900_000), (whole, 900_000)):
        output = tmp_path / f"{source.stem}-parts.gguf"
        result = run("to-gguf", source, "-o", output, "--split-max-size", limit)
        assert result.exit_code == 0, result.output
        parts = sorted(tmp_path.glob(f"{source.stem}-parts-*.gguf"))
        assert len(parts) > 3 and max(p.stat().st_size for p in parts) <= limit
        again = open_gguf(parts[0])
        assert list(again.tensors) == list(reader.tensors)
        result = run("to-gguf", parts[0], "-o", parts[0], "--force", "--split-max-size", limit)
        assert result.exit_code == 2 and "source itself" in result.output


def test_options_that_a_copy_would_ignore_are_refused(tiny_qwq, tmp_path):
    whole = write(tiny_qwq, tmp_path / "m.gguf", "Q4_0")
    for option in (["--pure"], ["--imatrix", "x"], ["--tensor-type", "ffn=Q8_0"]):
        result = run("to-gguf", whole, "-o", tmp_path / "n.gguf", *option)
        assert result.exit_code == 2 and option[0] in result.output
    result = run("to-gguf", whole, "-o", tmp_path / "n.gguf", "--pre-tokenizer", "qwn2")
    assert result.exit_code == 2 and "qwen2" in result.output
    result = run("to-gguf", whole, "-o", tmp_path / "n.gguf", "--pre-tokenizer", "llama-bpe")
    assert result.exit_code == 0, result.output
    assert open_gguf(tmp_path / "n.gguf").metadata["tokenizer.ggml.pre"].data == "llama-bpe"


def test_a_gguf_with_nan_can_still_be_split(spoiled, tmp_path):
    whole = tmp_path / "m.gguf"
    args = ("--type", "F32", "--nan-policy", "keep-16bit")
    kept = run("to-gguf", spoiled(np.nan), "-o", whole, *args)
    assert kept.exit_code == 0 and "3 NaN or infinite weights were kept" in kept.output
    result = run("to-gguf", whole, "-o", tmp_path / "p.gguf", "--split-max-size", "3MB")
    assert result.exit_code == 0 and "were kept" in result.output
    result = run("to-gguf", tmp_path / "p-00001-of-00002.gguf", "-o", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == whole.read_bytes()


def test_fp8_blocks_of_another_size(made_models, tmp_path):
    """The config says how large blocks are; the number of scales alone does not."""
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    folder, _ = made_models("qwen3")
    shutil.copytree(folder, tmp_path / "fp8")
    tensors = load_torch(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"  # 192 x 128
    scale = torch.tensor([[1e-3, 2e-3], [3e-3, 4e-3]])
    wide = scale.repeat_interleave(100, 0).repeat_interleave(100, 1)[:192, :128]
    stored = (tensors[name] / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    expected = (stored.float() * wide).numpy()
    save_torch(
        tensors | {name: stored, f"{name}_scale_inv": scale},
        tmp_path / "fp8" / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    for block, code in (([100, 100], 0), ([96, 96], 0), ([64, 64], 65), ([100], 65)):
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": block}
        (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
        output = tmp_path / "m.gguf"
        result = run("to-gguf", tmp_path / "fp8", "-o", output, "--type", "F32", "--force")
        assert result.exit_code == code, result.output
        if block == [100, 100]:
            found = {t.name: t.data for t in gguf.GGUFReader(output).tensors}
            assert np.array_equal(found["blk.0.ffn_up.weight"], expected)


# --- weights that do not fit ------------------------------------------------------------------


@pytest.fixture
def spoiled(made_models, tmp_path):
    """A function that copies the qwen2 model with one weight replaced."""
    folder, _ = made_models("qwen2")

    def make(value, name="model.layers.1.mlp.up_proj.weight", count=3):
        copy = tmp_path / "spoiled"
        shutil.copytree(folder, copy)
        tensors = load_file(copy / "model.safetensors")
        tensors[name].ravel()[1000 : 1000 + count] = value
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return make


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_weights_are_refused_by_name_and_count(value, spoiled, tmp_path):
    result = run("to-gguf", spoiled(value), "-o", tmp_path / "m.gguf", "--type", "Q8_0")
    assert result.exit_code == 65
    assert "model.layers.1.mlp.up_proj.weight has 3 NaN or infinite weights" in result.output
    assert "row 7, column 104" in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["spoiled"]


def test_nan_policies(spoiled, tmp_path):
    folder = spoiled(np.nan)
    for policy in ("keep-16bit", "zero"):
        args = ("--type", "Q8_0", "--nan-policy", policy)
        result = run("to-gguf", folder, "-o", tmp_path / f"{policy}.gguf", *args)
        assert result.exit_code == 0, result.output
        assert (
            "model.layers.1.mlp.up_proj.weight" in result.output or "blk.1.ffn_up" in result.output
        )
    kept = {t.name: t for t in gguf.GGUFReader(tmp_path / "keep-16bit.gguf").tensors}
    assert kept["blk.1.ffn_up.weight"].tensor_type.name == "BF16"
    assert kept["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"
    zeroed = {t.name: t for t in gguf.GGUFReader(tmp_path / "zero.gguf").tensors}[
        "blk.1.ffn_up.weight"
    ]
    w = gguf.dequantize(zeroed.data, zeroed.tensor_type).ravel()
    assert np.isfinite(w).all() and not w[1000:1003].any() and w[:1000].any()


def test_float16_overflow_stays_bf16_with_a_note(spoiled, tmp_path):
    folder = spoiled(70000.0)
    result = run("to-gguf", folder, "-o", tmp_path / "m.gguf", "--type", "F16")
    assert result.exit_code == 0 and "blk.1.ffn_up.weight" in result.output
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert tensors["blk.1.ffn_up.weight"].tensor_type.name == "BF16"
    assert tensors["blk.1.ffn_gate.weight"].tensor_type.name == "F16"
    with llama_oracle.loaded(tmp_path / "m.gguf"):
        pass


def test_beyond_bfloat16_stays_float32(spoiled, tmp_path):
    result = run("to-gguf", spoiled(3.4e38), "-o", tmp_path / "m.gguf", "--type", "BF16")
    assert result.exit_code == 0 and "written as F32" in result.output
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert tensors["blk.1.ffn_up.weight"].data.ravel()[1000] == np.float32(3.4e38)
    with llama_oracle.loaded(tmp_path / "m.gguf"):
        pass


# --- overrides read back by llama.cpp ---------------------------------------------------------


def test_an_override_of_each_kind_is_read_back(tiny_qwq, tmp_path):
    chosen = {
        "qwen2.context_length": ("u32", "65536", "65536"),
        "qwen2.attention.layer_norm_rms_epsilon": ("f32", "1e-6", "0.000001"),
        "general.name": ("str", "a name", "a name"),
        "tokenizer.ggml.add_bos_token": ("bool", "true", "true"),
        "general.sampling.top_k": ("i32", "7", "7"),
    }
    for kind, value in [("u8", "200"), ("i8", "-100"), ("u16", "60000"), ("i16", "-30000"),
                        ("u64", str(2**40)), ("i64", str(-(2**40))), ("f64", "0.25")]:  # fmt: skip
        shown = "0.250000" if kind == "f64" else value
        chosen[f"custom.{kind}"] = (kind, value, shown)
    overrides = tuple(f"{key}={kind}:{value}" for key, (kind, value, _) in chosen.items())
    path = write(
        tiny_qwq,
        tmp_path / "m.gguf",
        "Q8_0",
        overrides=(*overrides, 'general.tags=arr[str]:["a","b"]'),
        force_override=True,
    )
    found = llama_oracle.metadata(path)
    assert {key: found[key] for key in chosen} == {
        key: shown for key, (_, _, shown) in chosen.items()
    }
    assert open_gguf(path).metadata["general.tags"].data == ["a", "b"]


def test_epsilon_override_changes_the_logits_as_in_transformers(made_models, tmp_path):
    folder, _ = made_models("qwen2")
    loose = make_model("qwen2", tmp_path / "loose", rms_norm_eps=0.05)
    path = write(folder, tmp_path / "m.gguf", "F32", rms_eps=0.05)
    found, expected = llama_oracle.logits(path, TOKENS), torch_logits(loose, TOKENS)
    assert relative_error(found, expected) < 1e-4
    plain = llama_oracle.logits(write(folder, tmp_path / "p.gguf", "F32"), TOKENS)
    assert relative_error(plain, expected) > 1e-3


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}


@pytest.mark.parametrize("name", ["qwen2", "llama2"])
def test_yarn_from_config_and_from_options(name, tmp_path):
    scaled = make_model(name, tmp_path / "scaled", rope_parameters=YARN)
    plain = make_model(
        name, tmp_path / "plain", rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )
    expected = torch_logits(scaled, TOKENS)
    from_config = write(tmp_path / "scaled", tmp_path / "a.gguf", "F32")
    from_options = write(
        tmp_path / "plain", tmp_path / "b.gguf", "F32",
        rope_scaling="yarn", rope_factor=4.0, rope_original_context=512,
    )  # fmt: skip
    for path in (from_config, from_options):
        assert relative_error(llama_oracle.logits(path, TOKENS), expected) < 1e-3
        assert not any("attn_factor" in key for key in open_gguf(path).metadata)
    without = llama_oracle.logits(write(tmp_path / "plain", tmp_path / "c.gguf", "F32"), TOKENS)
    assert relative_error(without, expected) > 1e-2
    arch = open_gguf(from_options).metadata["general.architecture"].data
    assert open_gguf(from_options).metadata[f"{arch}.context_length"].data == 2048
    assert relative_error(torch_logits(plain, TOKENS), without) < 1e-3


def test_linear_rope_and_theta(tmp_path):
    linear = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
    model = make_model("qwen2", tmp_path / "m", rope_parameters=linear)
    path = write(tmp_path / "m", tmp_path / "a.gguf", "F32")
    assert relative_error(llama_oracle.logits(path, TOKENS), torch_logits(model, TOKENS)) < 1e-3
    make_model("qwen2", tmp_path / "n", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    options = {"rope_theta": 5e5, "rope_scaling": "linear", "rope_factor": 2.0}
    path = write(tmp_path / "n", tmp_path / "b.gguf", "F32", **options)
    assert relative_error(llama_oracle.logits(path, TOKENS), torch_logits(model, TOKENS)) < 1e-3


def test_chat_template_override(tiny_qwq, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }} <eot>")
    path = write(tiny_qwq, tmp_path / "m.gguf", "Q8_0", chat_template=tmp_path / "t.jinja")
    assert llama_oracle.chat_template(path) == "{{ messages[0].content }} <eot>"
    original = llama_oracle.chat_template(write(tiny_qwq, tmp_path / "n.gguf", "Q8_0"))
    assert original.endswith("<think>\\n' }}{%- endif %}")


# --- the output appears whole or not at all; killed and ended runs are in test_resume.py ------


def child(*args, limit=None):
    """The command in a process of its own; `limit` is the largest file it may write."""

    def restrict():
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-c", "from quant.cli import main; main()", *map(str, args)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=restrict
    )


def test_a_full_disk_leaves_the_old_file(tiny_qwq, tmp_path):
    path = write(tiny_qwq, tmp_path / "m.gguf", "Q4_0")
    before = path.read_bytes(), sorted(os.listdir(tmp_path))
    process = child("to-gguf", tiny_qwq, "-o", path, "--type", "F32", "--force", limit=1 << 20)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 74 and "larger than" in error and "Traceback" not in error
    assert (path.read_bytes(), sorted(os.listdir(tmp_path))) == before


def test_a_second_run_on_the_same_output_is_refused(tiny_qwq, tmp_path):
    from quant.durable import PendingFile

    first = PendingFile(tmp_path / "m.gguf")
    result = run("to-gguf", tiny_qwq, "-o", tmp_path / "m.gguf")
    first.discard()
    assert result.exit_code == 73 and "Another run is writing" in result.output
    assert run("to-gguf", tiny_qwq, "-o", tmp_path / "m.gguf").exit_code == 0


def test_wrong_bytes_on_the_disk_are_noticed(tiny_qwq, tmp_path, monkeypatch):
    """A disk that stores one byte wrong: simulated at the only place bytes are handed to it."""
    from quant import durable

    honest = durable.PendingFile.write_at

    def lying(self, offset, data):
        honest(self, offset, data)
        if offset > 1 << 20:
            os.pwrite(self.descriptor, b"\xa5", offset)

    monkeypatch.setattr(durable.PendingFile, "write_at", lying)
    result = run("to-gguf", tiny_qwq, "-o", tmp_path / "m.gguf", "--type", "BF16")
    assert result.exit_code == 74 and "differ from what was written" in result.output
    assert not os.listdir(tmp_path)


def test_a_source_that_changes_is_refused(tiny_qwq, tmp_path):
    shutil.copytree(tiny_qwq, tmp_path / "model")
    job = plan_gguf(open_source(str(tmp_path / "model")), Wishes("BF16"))
    seen = []

    def touch_once(n):
        if not seen:
            os.utime(tmp_path / "model" / "model.safetensors", ns=(1, 1))
            seen.append(n)

    from quant.errors import BadInput

    with pytest.raises(BadInput, match="changed while"):
        write_gguf(job, tmp_path / "m.gguf", progress=touch_once)
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_manifest(tiny_qwq, tmp_path):
    import hashlib

    for type_name in ("Q8_0", "Q4_0"):
        assert run("to-gguf", tiny_qwq, "-o", tmp_path, "--type", type_name).exit_code == 0
    manifest = json.loads((tmp_path / "qwq-quant.json").read_text())
    assert set(manifest["outputs"]) == {"tiny-qwq-Q8_0.gguf", "tiny-qwq-Q4_0.gguf"}
    for name, entry in manifest["outputs"].items():
        content = (tmp_path / name).read_bytes()
        (file,) = entry["files"]
        assert file["nbytes"] == len(content)
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
        for tensor in GgufFile.open(tmp_path / name).tensors.values():
            data = content[tensor.offset : tensor.offset + tensor.nbytes]
            assert entry["tensors"][tensor.name]["xxh3_128"] == xxh3_128_hexdigest(data)
        assert entry["source"]["files"][0]["name"] == "model.safetensors"


def test_bytes_do_not_depend_on_the_number_of_threads(tiny_qwq, tmp_path, monkeypatch):
    from quant import convert

    a = write(tiny_qwq, tmp_path / "a.gguf", "Q4_1")
    monkeypatch.setattr(convert, "worker_count", lambda: 7)
    monkeypatch.setattr(convert, "WEIGHTS_AT_ONCE", 5000)
    b = write(tiny_qwq, tmp_path / "b.gguf", "Q4_1")
    assert a.read_bytes() == b.read_bytes()


def test_the_types_of_the_command_line_are_the_library_s():
    from quant.cli import to_gguf
    from quant.convert import NAN_POLICIES

    assert list(to_gguf.TYPES) == list(MIXTURES)
    assert set(to_gguf.FORMATS) == set(FORMATS)
    assert to_gguf.NAN_POLICIES == NAN_POLICIES
    assert all(m.default in FORMATS for m in MIXTURES.values())
