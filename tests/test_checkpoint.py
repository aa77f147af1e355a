"""Checkpoint.open on good folders, against safetensors and transformers, and on every bad one."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quant.checkpoint import Checkpoint
from quant.errors import BadInput, InputMissing, QwqQuantError
from quant.tensors import TensorReader

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
SHARDS = {
    "model-00001-of-00002.safetensors": ["model.embed_tokens.weight", "model.norm.weight"],
    "model-00002-of-00002.safetensors": ["lm_head.weight"],
}
FIRST, SECOND = SHARDS


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(6, 4).bfloat16(),
        "model.norm.weight": torch.randn(4),
        "lm_head.weight": torch.randn(6, 4).half(),
    }


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )


def weight_map() -> dict[str, str]:
    return {name: shard for shard, names in SHARDS.items() for name in names}


@pytest.fixture
def single(tmp_path) -> Path:
    """A folder with one model.safetensors."""
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def sharded(tmp_path) -> Path:
    """The same tensors in two shards with an index."""
    folder = tmp_path / "sharded"
    write_sharded(folder)
    return folder


def write_sharded(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for shard, names in SHARDS.items():
        save_file({name: weights()[name] for name in names}, folder / shard)
    write_index(folder, weight_map())


def holds_all(checkpoint: Checkpoint) -> None:
    """Every tensor of `weights` is read back from its file, value for value."""
    assert set(checkpoint.tensors) == set(weights())
    with TensorReader() as reader:
        for name, w in weights().items():
            ours = reader.read_float32(checkpoint.tensors[name], 0, w.numel() // 4)
            assert (ours == w.float().reshape(-1, 4).numpy()).all()


def refused(folder: Path, kind: type = BadInput) -> QwqQuantError:
    with pytest.raises(kind) as caught:
        Checkpoint.open(folder)
    assert type(caught.value) is kind
    assert "\x1b" not in str(caught.value)
    return caught.value


# What works


def test_a_single_file_and_shards_hold_the_same(single, sharded):
    for folder in (single, sharded):
        checkpoint = Checkpoint.open(folder)
        holds_all(checkpoint)
        assert (checkpoint.folder, checkpoint.name) == (folder, str(folder))
        assert (checkpoint.config, checkpoint.revision) == (CONFIG, None)
    named = Checkpoint.open(single, "org/name", "abc")
    assert (named.name, named.revision) == ("org/name", "abc")


def test_the_trained_example_reads_as_safetensors_reads_it():
    checkpoint = Checkpoint.open(ROOT / "examples" / "tiny-qwq")
    theirs = load_file(ROOT / "examples" / "tiny-qwq" / "model.safetensors")
    assert set(checkpoint.tensors) == set(theirs)
    with TensorReader() as reader:
        for name, info in checkpoint.tensors.items():
            ours = reader.read_float32(info, 0, info.n_rows)
            assert (ours.reshape(info.shape) == theirs[name].float().numpy()).all()


def test_a_single_file_goes_before_an_index_as_in_transformers(single):
    """Both are there and differ: we read the file that transformers loads."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(single)
    state = load_file(single / "model.safetensors")
    save_file({name: w + 1 for name, w in state.items()}, single / "m-00001-of-00001.safetensors")
    write_index(single, dict.fromkeys(state, "m-00001-of-00001.safetensors"))
    loaded = Qwen2ForCausalLM.from_pretrained(single).model.norm.weight
    with TensorReader() as reader:
        info = Checkpoint.open(single).tensors["model.norm.weight"]
        assert (reader.read_float32(info, 0, 1)[0] == loaded.detach().numpy()).all()


def test_shards_in_a_folder_within_and_files_that_the_index_does_not_name(sharded):
    (sharded / "parts").mkdir()
    (sharded / FIRST).rename(sharded / "parts" / FIRST)
    spellings = iter([f"./parts//{FIRST}", f"parts/{FIRST}"])  # one file, two spellings
    names = {name: s if s == SECOND else next(spellings) for name, s in weight_map().items()}
    write_index(sharded, names)
    (sharded / "extra.safetensors").write_bytes(b"not looked at")
    holds_all(Checkpoint.open(sharded))


def hub_cache(root: Path, shards: Callable[[Path], None] = write_sharded) -> Path:
    """The layout of huggingface_hub: files of a snapshot are links to ../../blobs/<hash>."""
    repository = root / "models--acme--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    shards(snapshot)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repository / "blobs" / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_the_hub_caches_links_are_followed_also_through_a_link_to_the_snapshot(tmp_path):
    snapshot = hub_cache(tmp_path / "cache")
    holds_all(Checkpoint.open(snapshot))
    (tmp_path / "my-model").symlink_to(snapshot)
    holds_all(Checkpoint.open(tmp_path / "my-model"))
    (tmp_path / "disk").symlink_to(tmp_path / "cache")
    holds_all(Checkpoint.open(tmp_path / "disk" / "models--acme--tiny" / "snapshots" / ("0" * 40)))


def test_a_folder_that_is_itself_a_link_and_links_within_it(sharded, tmp_path):
    (sharded / FIRST).rename(sharded / "there.safetensors")
    (sharded / FIRST).symlink_to("there.safetensors")
    (tmp_path / "link").symlink_to(sharded)
    holds_all(Checkpoint.open(tmp_path / "link"))


def test_700_tensors_in_8_shards_come_in_the_indexs_order(tmp_path):
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(704)]
    shards = [f"model-{i:05}-of-00008.safetensors" for i in range(8)]
    for i, shard in enumerate(shards):
        save_file({name: torch.ones(2, 2) for name in names[i::8]}, tmp_path / shard)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_index(tmp_path, {name: shards[i % 8] for i, name in enumerate(names)})
    began = time.perf_counter()
    checkpoint = Checkpoint.open(tmp_path)
    print(f"{1000 * (time.perf_counter() - began):.1f} ms")
    assert list(checkpoint.tensors) == names


def test_importing_it_is_light():
    code = "import sys, quant.checkpoint, quant.hub; print(*sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = {name.split(".")[0] for name in child.stdout.split()}
    assert "numpy" in loaded
    assert not loaded & {"torch", "transformers", "huggingface_hub", "safetensors", "httpx2"}


# The folder and its config


def test_no_folder_an_empty_one_and_one_that_is_a_file(tmp_path, single):
    assert "no folder" in refused(tmp_path / "none", InputMissing).what
    (tmp_path / "empty").mkdir()
    assert "It is empty." in refused(tmp_path / "empty", InputMissing).why
    assert "is not a folder" in refused(single / "config.json").what
    (single / "config.json").unlink()
    error = refused(single, InputMissing)
    assert "holds no config.json" in error.what
    assert "model.safetensors" in error.why


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,}', "line 1, column 9"),
        (b"[1, 2]", "It is a list"),
        (b"", "line 1, column 1"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'{"a": 1, "\\u001b[2J": 2, "\\u001b[2J": 3}', r"\x1b[2J' is there twice"),
        (b'{"a":' * 100_000, "nested more than 100"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested more than 100"),
        (b" " * 10_000_001, "larger than 10.0 MB"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
    ],
)
def test_a_config_that_is_none(single, content, message):
    (single / "config.json").write_bytes(content)
    error = refused(single)
    assert message in str(error)
    assert str(single / "config.json") in error.what


@pytest.mark.parametrize(
    ("file_name", "message"),
    [
        ("pytorch_model.bin", "Python pickles"),
        ("pytorch_model-00001-of-00002.bin", "Python pickles"),
        ("consolidated.00.safetensors", "their maker's own names"),
        ("model-Q4_K_M.gguf", "GGUF"),
        ("adapter_model.safetensors", "LoRA"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_weights_in_another_format_are_named(single, file_name, message, with_config):
    (single / "model.safetensors").rename(single / file_name)
    if not with_config:
        (single / "config.json").unlink()
    error = refused(single)
    assert message in error.why
    assert file_name in error.why
    assert error.next_step


def test_no_weights_and_shards_without_their_index(single, sharded):
    (single / "model.safetensors").unlink()
    error = refused(single, InputMissing)
    assert "holds no weights" in error.what
    (sharded / "model.safetensors.index.json").unlink()
    error = refused(sharded, InputMissing)
    assert "neither model.safetensors nor model.safetensors.index.json" in error.what


# Quantized already


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "fp8 e5m2"),
        ({"quantization_config": {"quant_method": ["\x1b"]}}, r"\x1b"),
        ({"quantization_config": {"x": 1}}, "unnamed"),
    ],
)
def test_a_model_that_is_quantized_already(single, config, method):
    (single / "config.json").write_text(json.dumps(CONFIG | config))
    error = refused(single)
    assert f"{method}" in error.what
    assert "already quantized" in error.what
    assert "16-bit model" in error.next_step


def test_a_quantization_config_that_is_null_or_no_object(single):
    (single / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": None}))
    holds_all(Checkpoint.open(single))
    (single / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": [1]}))
    assert "is no object" in refused(single).what


def test_packed_weights_that_the_config_keeps_quiet_about(single):
    save_file(
        {"model.layers.0.mlp.up_proj.qweight": torch.zeros(2, 2, dtype=torch.int32)},
        single / "model.safetensors",
    )
    assert "packed integers" in refused(single).what


# The index and its shards


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "m/../../outside.safetensors",
        "m/..",
        "..",
        "/etc/passwd",
        "/etc/x.safetensors",
        "//server/share/x.safetensors",
        "C:x.safetensors",
        "c:/x.safetensors",
        "\\\\server\\share\\x.safetensors",
        "\\x.safetensors",
        "..\\outside.safetensors",
        "m\\x.safetensors",
        "pytorch_model.bin",
        "x.safetensors.bin",
        "x.SAFETENSORS",
        "",
        ".",
        "m/",
        "x\0.safetensors",
        "x\n.safetensors",
        "\x1b[2J.safetensors",
        "\u202e.safetensors",
    ],
)
def test_hostile_shard_names_are_refused_before_anything_is_opened(sharded, shard, monkeypatch):
    (sharded.parent / "outside.safetensors").write_bytes((sharded / FIRST).read_bytes())
    write_index(sharded, weight_map() | {"lm_head.weight": shard})
    opened = []
    real_open = os.open
    monkeypatch.setattr(
        os,
        "open",
        lambda path, *rest, **kw: opened.append(str(path)) or real_open(path, *rest, **kw),
    )
    assert "names the shard" in refused(sharded).what
    assert [Path(path).suffix for path in opened] == [".json", ".json"]  # config and index


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "no valid JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {"a": null}}', "has no weight_map"),
        ('{"weight_map": {}}', "names no tensors"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "'a' is there twice"),
        ("{" * 100_000, "no valid JSON object"),
    ],
)
def test_an_index_that_is_none(sharded, index, message):
    path = sharded / "model.safetensors.index.json"
    path.write_text(index)
    error = refused(sharded)
    assert message in str(error)
    assert str(path) in error.what


def test_an_index_of_200_mb_is_not_read(sharded):
    with open(sharded / "model.safetensors.index.json", "r+b") as file:
        file.truncate(200_000_000)
    assert "larger than 100.0 MB" in refused(sharded).what


def test_missing_shards_are_listed_with_what_they_hold(sharded):
    (sharded / FIRST).unlink()
    error = refused(sharded, InputMissing)
    assert error.what == f"1 of 2 shards are missing from {sharded}."
    assert error.why == f"{FIRST} (2 tensors)"
    assert f"hf download ORG/NAME {FIRST}" in error.next_step


def test_a_truncated_shard(sharded):
    content = (sharded / FIRST).read_bytes()
    (sharded / FIRST).write_bytes(content[:-1])
    error = refused(sharded)
    assert error.what == f"{sharded / FIRST} is cut short."
    assert f"It has {len(content) - 1} bytes, its header needs {len(content)}" in error.why


def test_the_index_and_the_shards_are_compared_both_ways(sharded):
    many = {f"model.layers.{i}.x": torch.zeros(1) for i in range(12)}
    save_file({"lm_head.weight": weights()["lm_head.weight"], **many}, sharded / SECOND)
    changed = weight_map() | {"gone.weight": FIRST, "model.norm.weight": SECOND}
    write_index(sharded, changed)
    error = refused(sharded)
    assert "1 in the index but in no shard: gone.weight." in error.why
    assert "12 in a shard but not in the index: model.layers.0.x," in error.why
    assert error.why.count("model.layers.") == 10
    assert "and 2 more" in error.why
    moved = f"1 in another shard than the index says: model.norm.weight (in {FIRST}, not {SECOND})"
    assert moved in error.why


def test_one_tensor_in_two_shards(sharded):
    both = {name: weights()[name] for name in ("lm_head.weight", "model.norm.weight")}
    save_file(both, sharded / SECOND)
    error = refused(sharded)
    assert f"1 in more than one shard: model.norm.weight (in {FIRST}, {SECOND})" in error.why


# Links and things that are no files


def test_a_link_out_of_the_folder_is_not_followed(sharded, single, tmp_path):
    outside = tmp_path / "outside"
    (sharded / FIRST).rename(outside)
    (sharded / FIRST).symlink_to(outside)
    error = refused(sharded)
    assert "is a link out of the model's folder" in error.what
    assert str(outside) in error.why
    for name in ("config.json", "model.safetensors"):
        (single / name).rename(tmp_path / f"outside-{name}")
        (single / name).symlink_to(tmp_path / f"outside-{name}")
        assert "is a link out" in refused(single).what
        (single / name).unlink()
        (tmp_path / f"outside-{name}").rename(single / name)
    holds_all(Checkpoint.open(single))


def test_a_folder_within_that_is_a_link_out(sharded, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (sharded / FIRST).rename(tmp_path / "elsewhere" / FIRST)
    (sharded / "parts").symlink_to(tmp_path / "elsewhere")
    write_index(sharded, {n: s if s == SECOND else f"parts/{s}" for n, s in weight_map().items()})
    assert "is a link out" in refused(sharded).what


@pytest.mark.parametrize("target", ["../../../models--other--x/blobs/1", "../../refs/main"])
def test_the_hub_cache_allows_links_into_its_own_blobs_only(tmp_path, target):
    snapshot = hub_cache(tmp_path)
    outside = snapshot / target
    outside.parent.mkdir(parents=True, exist_ok=True)
    outside.write_bytes((snapshot / FIRST).read_bytes())
    (snapshot / FIRST).unlink()
    (snapshot / FIRST).symlink_to(target)
    assert "is a link out" in refused(snapshot).what


def test_a_folder_that_only_looks_like_the_hubs_cache(tmp_path):
    """`snapshots` without models--, or a blobs folder that is itself a link out."""
    snapshot = hub_cache(tmp_path)
    (tmp_path / "models--acme--tiny").rename(tmp_path / "tiny")
    assert "is a link out" in refused(tmp_path / "tiny" / "snapshots" / snapshot.name).what
    (tmp_path / "tiny").rename(tmp_path / "models--acme--tiny")
    (snapshot / "../../blobs").resolve().rename(tmp_path / "secrets")
    (tmp_path / "models--acme--tiny" / "blobs").symlink_to(tmp_path / "secrets")
    assert "is a link out" in refused(snapshot).what


def test_a_blob_that_was_deleted_from_the_cache(tmp_path):
    snapshot = hub_cache(tmp_path)
    (snapshot / FIRST).resolve().unlink()
    error = refused(snapshot, InputMissing)
    assert "is a link to a file that does not exist" in error.what
    assert f"hf download acme/tiny {FIRST} --revision {'0' * 40}" in error.next_step


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", FIRST])
def test_fifos_folders_loops_and_devices_in_place_of_files(sharded, name):
    (sharded / name).unlink()
    os.mkfifo(sharded / name)
    assert "is a FIFO" in refused(sharded).what
    (sharded / name).unlink()
    (sharded / name).mkdir()
    assert "is a folder" in refused(sharded).what
    (sharded / name).rmdir()
    (sharded / name).symlink_to(name)
    assert "leads back to itself" in refused(sharded).what
    (sharded / name).unlink()
    (sharded / name).symlink_to("/dev/zero")
    assert "is a link out" in refused(sharded).what


# FP8


def fp8_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    layer = "model.layers.0.self_attn."
    return {
        f"{layer}q_proj.weight": (torch.randn(256, 300) * 50).to(torch.float8_e4m3fn),
        f"{layer}q_proj.weight_scale_inv": torch.rand(2, 3),
        f"{layer}q_proj.activation_scale": torch.rand(()),
        f"{layer}k_proj.weight": (torch.randn(8, 16) * 50).to(torch.float8_e4m3fn),
        f"{layer}k_proj.weight_scale_inv": torch.rand(()).bfloat16(),
        f"{layer}k_proj.input_scale": torch.rand(1),
        "model.norm.weight": torch.rand(16).bfloat16(),
    }


def write_fp8(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": fp8}))


def test_fp8_weights_carry_their_scales(single):
    tensors = fp8_weights()
    write_fp8(single, tensors)
    checkpoint = Checkpoint.open(single)
    q, k = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qk")
    assert set(checkpoint.tensors) == {q, k, "model.norm.weight"}
    each = tensors[f"{q}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)[:, :300]
    with TensorReader() as reader:
        ours = reader.read_float32(checkpoint.tensors[q], 0, 256)
        assert (ours == (tensors[q].float() * each).numpy()).all()
        ours = reader.read_float32(checkpoint.tensors[k], 0, 8)
        assert (ours == (tensors[k].float() * tensors[f"{k}_scale_inv"].float()).numpy()).all()
    assert checkpoint.tensors["model.norm.weight"].scale is None


def test_an_fp8_model_that_transformers_wrote_is_what_transformers_makes_of_it(tmp_path):
    from transformers import FineGrainedFP8Config, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=64, hidden_size=256, intermediate_size=384, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    tensors = {}
    for name, w in Qwen3ForCausalLM(config).state_dict().items():
        if name.endswith("_proj.weight"):
            tensors[name] = (w * 1000).to(torch.float8_e4m3fn)
            down, across = (n // 128 for n in w.shape)
            tensors[f"{name}_scale_inv"] = torch.rand(down, across) / 1000
        else:
            tensors[name] = w.contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config.quantization_config = FineGrainedFP8Config().to_dict()
    config.save_pretrained(tmp_path)
    theirs = Qwen3ForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(dequantize=True),
    ).state_dict()
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.tensors) == set(theirs)
    with TensorReader() as reader:
        for name, info in checkpoint.tensors.items():
            ours = reader.read_float32(info, 0, info.n_rows).reshape(info.shape)
            np.testing.assert_allclose(ours, theirs[name].numpy(), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (None, "in FP8 without a scale"),
        (torch.rand(3, 3), "do not cover 256"),
        (torch.rand(2, 3, 1), "only a matrix"),
        (torch.rand(2, 3).double(), "stored as F64 [2, 3], but only F32, BF16, F16"),
        (torch.ones(2, 3, dtype=torch.uint8), "stored as U8 [2, 3], but only F32, BF16, F16"),
        (torch.rand(2, 3).to(torch.float8_e4m3fn), "stored as F8_E4M3 [2, 3], but only"),
    ],
)
def test_fp8_scales_that_cannot_be_applied(single, scale, message):
    tensors = fp8_weights()
    q = "model.layers.0.self_attn.q_proj.weight"
    del tensors[f"{q}_scale_inv"]
    if scale is not None:
        tensors[f"{q}_scale_inv"] = scale
    write_fp8(single, tensors)
    error = refused(single)
    assert message in str(error)
    assert q in str(error)


def test_a_scale_beside_a_weight_that_is_not_fp8_or_beside_none(single):
    tensors = fp8_weights()
    tensors["model.norm.weight_scale_inv"] = torch.rand(1)
    write_fp8(single, tensors)
    assert "should be FP8, is stored as BF16" in refused(single).why
    del tensors["model.norm.weight_scale_inv"]
    tensors["nothing_scale_inv"] = torch.rand(1)
    write_fp8(single, tensors)
    assert "should be FP8, is missing" in refused(single).why


def test_an_activation_scale_of_no_fp8_weight_stays_for_the_planner_to_refuse(single):
    write_fp8(single, fp8_weights() | {"model.norm.input_scale": torch.rand(1)})
    assert "model.norm.input_scale" in Checkpoint.open(single).tensors


def test_dtypes_that_cannot_be_read_are_listed_not_refused(single):
    save_file({"w": torch.zeros(2, 2).to(torch.float8_e5m2)}, single / "model.safetensors")
    assert Checkpoint.open(single).tensors["w"].dtype == "F8_E5M2"


# The other files


def test_other_files_are_read_or_none_or_refused(single, tmp_path):
    checkpoint = Checkpoint.open(single)
    (single / "tokenizer_config.json").write_text('{"a": "字"}')
    (single / "chat_template.jinja").write_bytes("{{ 'é\r\n' }}".encode())
    (single / "tokenizer.model").write_bytes(b"\n\xff")
    assert checkpoint.read_json("tokenizer_config.json") == {"a": "字"}
    assert checkpoint.read_text("chat_template.jinja") == "{{ 'é\r\n' }}"
    assert checkpoint.read_bytes("tokenizer.model") == b"\n\xff"
    assert checkpoint.read_json("none.json") is checkpoint.read_text("none") is None
    assert checkpoint.read_bytes("config.json/none") is None
    with pytest.raises(BadInput, match="Byte 1 of it is not"):
        checkpoint.read_text("tokenizer.model")
    (single / "bad.json").write_text('{\n"a": 1 "b"}')
    with pytest.raises(BadInput, match=r"bad\.json is no valid JSON object.\n.* line 2, column 8"):
        checkpoint.read_json("bad.json")
    (tmp_path / "secret.json").write_text("{}")
    (single / "link.json").symlink_to("../secret.json")
    for name in ("link.json", "../secret.json", str(tmp_path / "secret.json")):
        with pytest.raises(BadInput, match="out of the model's folder"):
            checkpoint.read_json(name)
    with open(single / "huge.json", "wb") as file:
        file.truncate(200_000_001)
    with pytest.raises(BadInput, match=r"larger than 200\.0 MB"):
        checkpoint.read_json("huge.json")


# Anything at all


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "sharded"
    write_sharded(folder)
    return folder


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", FIRST])
def test_flipped_and_cut_bytes_give_a_typed_error_or_a_true_checkpoint(fuzzed, name):
    path = fuzzed / name
    whole = path.read_bytes()

    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 255)), max_size=3),
        st.none() | st.integers(0, len(whole)),
    )
    def check(flips, cut):
        content = bytearray(whole)
        for place, mask in flips:
            content[place] ^= mask
        path.write_bytes(content[:cut])
        try:
            checkpoint = Checkpoint.open(fuzzed)
        except QwqQuantError:
            return
        assert isinstance(checkpoint.config, dict)
        theirs = load_file(fuzzed / FIRST) | load_file(fuzzed / SECOND)
        assert {n: list(i.shape) for n, i in checkpoint.tensors.items()} == {
            n: list(w.shape) for n, w in theirs.items()
        }

    try:
        check()
    finally:
        path.write_bytes(whole)
