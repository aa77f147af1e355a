"""--lora: adapters of the real PEFT, merged as they are read; merge_and_unload is the oracle."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_makers import (
    CONFIG,
    WEIGHTS,
    adds_in_order,
    bits,
    edit_config,
    edit_tensors,
    make_adapter,
    merged_by_peft,
    save_merged,
)
from safetensors.torch import load_file

from quant import lora_config
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.weights import CheckpointWeights
from quant.checkpoint import Checkpoint
from quant.cli import cli
from quant.errors import BadInput, InputMissing, QwqQuantError, UsageError
from quant.lora import merge_adapter, merge_notes, open_adapter
from quant.lora_config import parse_lora_config
from quant.manifest import SourceFile
from quant.model_folder import Source
from quant.source import check_unchanged, open_source, source_files
from quant.tensors import TensorReader, to_float32

ALL = "all-linear"
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj."


def run(*args):
    return CliRunner().invoke(cli, [str(a) for a in args])


exactly = pytest.mark.skipif(not adds_in_order(), reason="PEFT's sums have another order here")


def stored_bits(reader: TensorReader, info, start: int, stop: int) -> np.ndarray:
    rows = reader.read_stored(info, start, stop)
    return rows.view(f"i{rows.itemsize}")


@pytest.fixture(scope="module")
def bases(tiny_qwq, made_models, tmp_path_factory):
    """Name -> folder: the trained bf16 model, and tiny ones of other types and makes."""
    made = {"tiny-qwq": tiny_qwq}

    def get(name: str) -> Path:
        if name not in made and name.endswith(" f16"):
            from transformers import AutoModelForCausalLM

            made[name] = tmp_path_factory.mktemp("f16")
            model = AutoModelForCausalLM.from_pretrained(get(name.removesuffix(" f16")))
            model.half().save_pretrained(made[name])
        return made[name] if name in made else made_models(name)[0]

    return get


@pytest.fixture(scope="module")
def plain(tiny_qwq, tmp_path_factory):
    """An adapter of tiny-qwq's linear layers."""
    return make_adapter(tmp_path_factory.mktemp("plain"), tiny_qwq, target_modules=ALL)


@pytest.fixture
def broken(plain, tmp_path):
    """A copy of it, to be broken."""
    return shutil.copytree(plain, tmp_path / "adapter")


CASES = {
    "all linears": ("tiny-qwq", {"target_modules": ALL}),
    "adapter in bf16": ("tiny-qwq", {"target_modules": ALL, "stored": torch.bfloat16}),
    "r 64, rank-stabilized": (
        "tiny-qwq",
        {"target_modules": ["o_proj", "up_proj"], "r": 64, "lora_alpha": 7, "use_rslora": True},
    ),
    "ranks and alphas of their own": (
        "tiny-qwq",
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {
                r"layers\.[0-2]\.mlp\.up_proj": 3,
                "^model.layers.4.self_attn.k_proj": 5,
            },
            "alpha_pattern": {"up_proj": 3, r".*\.1\.self_attn\.q_proj": 64},
        },
    ),
    "by a pattern": ("tiny-qwq", {"target_modules": r".*layers\.[135]\..*(gate|up)_proj"}),
    "some layers": (
        "tiny-qwq",
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 3], "layers_pattern": "layers"},
    ),
    "all but some": ("tiny-qwq", {"target_modules": ALL, "exclude_modules": r".*\.2\.mlp\..*"}),
    "embedding and output": (
        "tiny-qwq",
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "r": 16},
    ),
    "whole tensors": (
        "tiny-qwq",
        {"target_modules": ALL, "modules_to_save": ["lm_head", "norm"], "stored": torch.float32},
    ),
    "biases": ("tiny-qwq", {"target_modules": ["q_proj"], "bias": "all"}),
    "a model in f16": ("qwen3 f16", {"target_modules": ALL}),
    "a model in f32": ("qwen3", {"target_modules": ALL}),
    "tied, but not touched": ("qwen2-tied", {"target_modules": ALL}),
}


@exactly
@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_merge_and_unload(case, bases, tmp_path):
    base, wishes = bases(CASES[case][0]), CASES[case][1]
    adapter = make_adapter(tmp_path, base, **wishes)
    ours, plain = open_source(str(base), lora=str(adapter)), Checkpoint.open(base)
    theirs = merged_by_peft(base, adapter).state_dict()
    rng, n_changed = np.random.default_rng(0), 0
    with TensorReader() as reader:
        for name, info in ours.tensors.items():
            want = bits(theirs[name])
            np.testing.assert_array_equal(stored_bits(reader, info, 0, info.n_rows), want, name)
            start, stop = sorted(rng.integers(0, info.n_rows + 1, 2))
            if start < stop:
                rows = stored_bits(reader, info, start, stop)
                np.testing.assert_array_equal(rows, want[start:stop], name)
            before = stored_bits(reader, plain.tensors[name], 0, info.n_rows)
            changed = not np.array_equal(before, want)
            assert changed == (info.change is not None) or info.change.whole, name
            n_changed += changed
    assert n_changed >= 2


@exactly
def test_an_adapter_for_each_expert_of_the_checkpoint(made_models, tmp_path):
    """As PEFT wrote them under transformers 4; PEFT 0.21 fuses them, with the same result."""
    base, _ = made_models("qwen3moe")
    adapter = make_adapter(tmp_path / "a", base, target_modules=["q_proj"])
    names = ["gate_proj", "up_proj", "down_proj"]
    edit_config(adapter, target_modules=names, target_parameters=None)
    experts = [t for t in Checkpoint.open(base).tensors.values() if ".experts." in t.name]

    def change(tensors):
        tensors.clear()
        for info in experts:
            module = f"base_model.model.{info.name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = 0.1 * torch.randn(8, info.shape[1])
            tensors[f"{module}.lora_B.weight"] = 0.1 * torch.randn(info.shape[0], 8)

    edit_tensors(adapter, change)
    ours = open_source(str(base), lora=str(adapter)).tensors
    theirs = Checkpoint.open(save_merged(base, adapter, tmp_path / "merged")).tensors
    assert sum(info.change is not None for info in ours.values()) == len(experts) == 36
    with TensorReader() as reader:
        for name, info in ours.items():
            mine, want = (reader.read_float32(i, 0, i.n_rows) for i in (info, theirs[name]))
            np.testing.assert_array_equal(mine, want, name)


@pytest.mark.parametrize("stored", (torch.float32, torch.bfloat16), ids=str)
def test_weights_are_near_to_the_formula_anywhere(stored, tiny_qwq, tmp_path):
    adapter = make_adapter(
        tmp_path, tiny_qwq, target_modules=["k_proj", "embed_tokens"], stored=stored
    )
    parts = {name: t.double().numpy() for name, t in load_file(adapter / WEIGHTS).items()}
    base = {
        name: t.double().numpy() for name, t in load_file(tiny_qwq / "model.safetensors").items()
    }
    module = "base_model.model.model.layers.2.self_attn.k_proj.lora_"
    deltas = {
        "model.layers.2.self_attn.k_proj.weight": parts[f"{module}B.weight"]
        @ parts[f"{module}A.weight"],
        "model.embed_tokens.weight": (
            parts["base_model.model.model.embed_tokens.lora_embedding_B"]
            @ parts["base_model.model.model.embed_tokens.lora_embedding_A"]
        ).T,
    }
    checkpoint = open_source(str(tiny_qwq), lora=str(adapter))
    with TensorReader() as reader:
        for name, delta in deltas.items():
            merged = reader.read_float32(checkpoint.tensors[name], 7, 99)
            want = base[name][7:99] + 2 * delta[7:99]
            assert np.abs(merged - base[name][7:99]).max() > 1e-4
            np.testing.assert_allclose(
                merged, want, rtol=2**-8, atol=2**-8 * np.abs(delta).max() * 2
            )


# --- everyone who reads sees merged weights -----------------------------------------------------


@exactly
def test_the_streamed_engine_runs_the_merged_model(tiny_qwq, tmp_path):
    wishes = {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]}
    adapter = make_adapter(tmp_path, tiny_qwq, **wishes)
    checkpoint = open_source(str(tiny_qwq), lora=str(adapter))
    model = merged_by_peft(tiny_qwq, adapter).float()
    theirs = {name: t.detach() for name, t in model.state_dict().items()}
    weights = CheckpointWeights(checkpoint)
    for name, w in theirs.items():
        assert torch.equal(weights.read(name).float(), w), name
    streamed = StreamedModel(checkpoint, dtype=torch.float32)
    tokens = np.arange(5, 4000, 133)[None]
    with torch.no_grad():
        want = model.model(torch.tensor(tokens), output_hidden_states=True).hidden_states
    hidden = streamed.embed(tokens)
    assert torch.equal(hidden.tensor[0], want[0][0])
    for layer in streamed.layers(tokens.shape[1]):
        layer.run(hidden, hidden)
    last = streamed.norm(hidden.tensor[0])
    torch.testing.assert_close(last, want[-1][0], rtol=2e-4, atol=2e-4)
    for start, rows in streamed.head_blocks():
        assert torch.equal(rows, theirs["lm_head.weight"][start : start + len(rows)])


def test_a_source_of_16_bit_folders_reads_merged_weights(tiny_qwq, plain):
    info = open_source(str(tiny_qwq), lora=str(plain)).tensors
    info = info["model.layers.0.mlp.up_proj.weight"]
    with TensorReader() as reader:
        rows = Source(info, reader, "bfloat16").read_16bit(3, 9)
        assert np.array_equal(to_float32(rows, "BF16"), reader.read_float32(info, 3, 9))
        assert not np.array_equal(rows.view(np.uint8), reader.read_bytes(info, 3 * 512, 6 * 512))


COMMANDS = {
    "to-gguf": ("--type", "BF16"),
    "dynamic-4bit": ("--budget", "0", "--no-check"),
    "gptq": ("--group-size", "64", "--tokens", "1024", "--seq-len", "128", "--no-check"),
}


@exactly
@pytest.mark.parametrize("command", COMMANDS)
def test_output_is_that_of_the_merged_folder(command, tiny_qwq, plain, tmp_path):
    merged = save_merged(tiny_qwq, plain, tmp_path / "merged")
    written = {}
    for name, model in {"ours": (tiny_qwq, "--lora", plain), "theirs": (merged,)}.items():
        output = tmp_path / name if command != "to-gguf" else tmp_path / f"{name}.gguf"
        done = run(command, *model, "-o", output, *COMMANDS[command])
        assert done.exit_code == 0, done.output
        written[name] = done
    entries = [
        json.loads(path.read_text())["outputs"] for path in tmp_path.glob("**/qwq-quant.json")
    ]
    ours, theirs = sorted(
        (entry for outputs in entries for entry in outputs.values()),
        key=lambda entry: entry["source"]["model"] == str(merged),
    )
    assert ours["tensors"] == theirs["tensors"]  # hashes of their bytes
    assert len(ours["tensors"]) > 70
    said = " ".join(written["ours"].stderr.split())
    assert f"merged LoRA {plain}: r 8, 42 matrices; it was trained on {tiny_qwq}" in said
    assert "LoRA" not in written["theirs"].stderr
    files = {file["name"]: file for file in ours["source"]["files"]}
    assert set(files) == {"model.safetensors", CONFIG, WEIGHTS}
    assert len(files[WEIGHTS]["sha256"]) == 64 and "sha256" not in files["model.safetensors"]


@exactly
@pytest.mark.parametrize("command", ("imatrix", "measure"))
def test_measurements_are_those_of_the_merged_folder(command, tiny_qwq, plain, tmp_path):
    merged = save_merged(tiny_qwq, plain, tmp_path / "merged")
    quick = ("--tokens", "512", "--seq-len", "128")
    quick += ("--metric", "activation") if command == "measure" else ()
    for name, model in {"ours": (tiny_qwq, "--lora", plain), "theirs": (merged,)}.items():
        done = run(command, *model, "-o", tmp_path / name, *quick)
        assert done.exit_code == 0, done.output
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    if command == "measure":
        ours, theirs = json.loads(ours)["groups"], json.loads(theirs)["groups"]
    assert ours == theirs


def test_a_plan_says_what_will_be_merged(tiny_qwq, plain, tmp_path):
    options = ("--dry-run", "--format", "json", "--fix", "all")
    done = run("to-gguf", tiny_qwq, "-o", tmp_path / "m.gguf", "--lora", plain, *options)
    notes = json.loads(done.stdout)["notes"]
    assert notes[0].startswith("merged LoRA") and any("mend" in note for note in notes[1:])
    assert not list(tmp_path.glob("*.gguf"))


def test_notes_name_ranks_and_replaced_tensors(tiny_qwq, tmp_path):
    wishes = {
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head"],
        "rank_pattern": {"0.*": 2},
    }
    adapter = make_adapter(tmp_path, tiny_qwq, **wishes)
    (note,) = merge_notes(open_source(str(tiny_qwq), lora=str(adapter)).tensors)
    assert ": r 2 to 8, 6 matrices, 1 tensors replaced; it was trained on" in note
    assert not list(merge_notes(open_source(str(tiny_qwq)).tensors))


@pytest.mark.parametrize("name", (CONFIG, WEIGHTS))
def test_an_adapter_that_changes_meanwhile_is_noticed(name, tiny_qwq, broken):
    source = open_source(str(tiny_qwq), lora=str(broken))
    before = [SourceFile.of(path) for path in source_files(source)]
    check_unchanged(source, before)
    path = broken / name
    content, status = bytearray(path.read_bytes()), path.stat()
    content[-10] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # size and time are the same
    with pytest.raises(BadInput, match=name):
        check_unchanged(source, before)


# --- refusals ----------------------------------------------------------------------------------


def refusal(base, adapter) -> str:
    with pytest.raises(BadInput) as error:
        open_source(str(base), lora=str(adapter))
    assert error.value.why and error.value.next_step
    return str(error.value)


SETTINGS = {
    "another kind": ({"peft_type": "IA3"}, "names IA3; only LORA can be merged"),
    "no kind": ({"peft_type": None}, "names no kind of adapter"),
    "DoRA": ({"use_dora": True}, "use_dora is set: DoRA"),
    "aLoRA": ({"alora_invocation_tokens": [3]}, "activated LoRA"),
    "tokens": ({"trainable_token_indices": [3, 4]}, "trained single tokens"),
    "parameters": ({"target_parameters": ["mlp.experts.down_proj"]}, "fused experts"),
    "biases of its own": ({"lora_bias": True}, "biases of its own"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4"),
    "a later PEFT's": ({"use_\x1bfoo": {"x": 1}}, r"use_\x1bfoo is set: a setting whose effect"),
    "r": ({"r": 0}, "r is 0"),
    "r true": ({"r": True}, "r is True"),
    "alpha": ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    "ranks": ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern is 2.5"),
    "pattern": ({"rank_pattern": {"q_proj(": 8}}, "It is no regular expression"),
    "slow pattern": (
        {"target_modules": r"(.?){31}(.?){31}(.?){31}\2\3[A-Z]"},
        "it was still being compared",
    ),
    "targets": ({"target_modules": [["q_proj"]]}, "target_modules is [['q_proj']]"),
    "other targets": ({"target_modules": ["q_proj"]}, "does not aim at model.layers."),
    "another rank": ({"r": 16}, "the rank 16, but A is 8 x "),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_refused(case, tiny_qwq, broken, monkeypatch):
    monkeypatch.setattr(lora_config, "PATTERN_SECONDS", 0.1)
    changes, message = SETTINGS[case]
    edit_config(broken, **changes)
    assert message in refusal(tiny_qwq, broken)


def lose_b(tensors):
    del tensors[f"{PREFIX}lora_B.weight"]


def put_nan(tensors):
    tensors[f"{PREFIX}lora_A.weight"][3, 5] = float("nan")


def blow_up(tensors):
    tensors[f"{PREFIX}lora_A.weight"] *= 1e30
    tensors[f"{PREFIX}lora_B.weight"] *= 1e30


def add(name, *shape, dtype=torch.float32):
    return lambda tensors: tensors.update({name: torch.ones(shape, dtype=dtype)})


TENSORS = {
    "A without B": (lose_b, "model.layers.0.self_attn.q_proj has an A, but not the other factor"),
    "NaN": (put_nan, f"holds 1 NaN or infinite weights in {PREFIX}lora_A.weight"),
    "magnitudes": (add(f"{PREFIX}lora_magnitude_vector", 256), "is no part of a plain LoRA"),
    "no prefix": (add("model.norm.weight", 256), "model.norm.weight is no part of a plain LoRA"),
    "a strange tensor": (
        add("base_model.model.model.layers.0.mlp.gate.weight", 4, 256),
        "an adapter for another model",
    ),
    "whole and LoRA": (add(f"{PREFIX}weight", 256, 256), "is not named as PEFT names it"),
    "integers": (add(f"{PREFIX}lora_A.weight", 8, 256, dtype=torch.int8), "is stored as I8"),
    "nothing": (lambda tensors: tensors.clear(), "holds no factors A and B"),
    "vocabulary": (
        add("base_model.model.lm_head.weight", 4100, 256),
        "has 4100 tokens, but the model has 4096",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused(case, tiny_qwq, broken):
    change, message = TENSORS[case]
    edit_tensors(broken, change)
    assert message in refusal(tiny_qwq, broken)


def test_an_adapter_for_another_model(made_models, tiny_qwq, plain, tmp_path):
    """Of more layers, of other sizes, of fewer layers."""
    message = refusal(made_models("qwen3")[0], plain)
    assert "is an adapter for another model than" in message
    assert "The model has no model.layers.3.mlp.down_proj.weight, model.layers.3" in message
    assert f"Give the model that it was trained on: {tiny_qwq}." in message
    wishes = {"target_modules": ["q_proj"], "layers_to_transform": [0, 1]}
    message = refusal(made_models("qwen3")[0], make_adapter(tmp_path / "a", tiny_qwq, **wishes))
    assert "is 256 x 128 in the model, and 256 x 256 where it was trained" in message
    adapter = make_adapter(tmp_path / "b", tiny_qwq, target_modules=["q_proj", "v_proj"])

    def lose_layers(tensors):
        for name in [n for n in tensors if ".layers.4." in n or ".layers.5." in n]:
            del tensors[name]

    edit_tensors(adapter, lose_layers)
    message = refusal(tiny_qwq, adapter)
    assert "It has nothing for model.layers.4.self_attn.q_proj" in message
    assert "and 1 more" in message


def test_a_tied_embedding_is_not_changed(made_models, tmp_path):
    base, _ = made_models("qwen2-tied")
    adapter = make_adapter(tmp_path, base, target_modules=["embed_tokens", "q_proj"])
    message = refusal(base, adapter)
    assert "embedding and output are one matrix" in message and "Untie them first" in message
    wishes = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    assert "changes lm_head.weight" in refusal(base, make_adapter(tmp_path, base, **wishes))


def test_weights_beyond_the_range_are_refused_when_they_are_read(tiny_qwq, broken, tmp_path):
    edit_tensors(broken, blow_up)
    done = run("to-gguf", tiny_qwq, "-o", tmp_path / "m.gguf", "--lora", broken)
    assert done.exit_code == 65
    said = " ".join(done.stderr.split())
    assert "model.layers.0.self_attn.q_proj.weight has weights beyond the range of BF16" in said
    assert not list(tmp_path.glob("*.gguf"))


def test_folders_that_are_no_adapters(tiny_qwq, broken, tmp_path):
    with pytest.raises(InputMissing, match="so it is no adapter of PEFT's"):
        open_adapter(str(tiny_qwq))
    with pytest.raises(BadInput, match="is a file, but an adapter is a folder"):
        open_adapter(str(broken / WEIGHTS))
    (broken / WEIGHTS).rename(broken / "adapter_model.bin")
    with pytest.raises(BadInput, match="is a Python pickle"):
        open_adapter(str(broken))
    (broken / "adapter_model.bin").unlink()
    with pytest.raises(InputMissing, match=f"holds no {WEIGHTS}"):
        open_adapter(str(broken))
    (broken / WEIGHTS).symlink_to(tiny_qwq / "model.safetensors")
    with pytest.raises(BadInput, match="link out of the model's folder"):
        open_adapter(str(broken))
    (broken / CONFIG).write_text(" " * 1_000_001)
    with pytest.raises(BadInput, match="has over 1000000 bytes"):
        open_adapter(str(broken))
    with pytest.raises(InputMissing, match="There is no file or folder"):
        open_adapter(str(tmp_path / "nowhere"))


def test_an_adapter_on_the_hub_is_named_by_its_commit(tiny_qwq, plain, tmp_path):
    """The layout of huggingface_hub's cache: nothing is fetched."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--adapter"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(plain, repository / "snapshots" / commit)
    source = open_source(str(tiny_qwq), lora="org/adapter", cache_dir=tmp_path, offline=True)
    (note,) = merge_notes(source.tensors)
    assert note.startswith("merged LoRA org/adapter@0123456789ab: r 8")


def test_a_gguf_takes_no_adapter(tiny_qwq, plain, tmp_path):
    model = tmp_path / "m.gguf"
    assert run("to-gguf", tiny_qwq, "-o", model, "--type", "BF16").exit_code == 0
    done = run("to-gguf", model, "-o", tmp_path / "n.gguf", "--lora", plain)
    assert done.exit_code == UsageError.exit_code
    assert "--lora cannot be merged into" in " ".join(done.stderr.split())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 70000) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(name=st.sampled_from(["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
       "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
       "modules_to_save", "init_lora_weights", "base_model_name_or_path", "peft_type", "x"]),
       value=VALUES)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_any_setting_is_taken_or_refused(name, value):
    content = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], name: value}
    module = "model.layers.3.self_attn.q_proj"
    try:
        config = parse_lora_config(json.dumps(content).encode(), Path(CONFIG))
        config.is_target(module)
        assert config.rank(module) > 0 and np.isfinite(config.scaling(module))
    except QwqQuantError as error:
        assert error.what and error.next_step


def test_settings_read_as_peft_reads_them(tiny_qwq, tmp_path):
    """rank, scaling and targets against PEFT's own functions, on all of a model's modules."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    cases = (
        {"target_modules": ["q_proj", "model.layers.1.mlp.up_proj"], "layers_to_transform": 1},
        {"target_modules": ["proj", "mlp.up_proj"], "exclude_modules": ["layers.2.mlp.up_proj"]},
        {"target_modules": r"model\.layers\.\d\.(mlp|self_attn)\.(up|q)_proj|lm_head"},
        {"target_modules": ["up_proj", "lm_head"], "modules_to_save": ["layers.3", "lm_head"]},
        {
            "target_modules": ["v_proj"],
            "layers_to_transform": [0, 5],
            "layers_pattern": ["h", "layers"],
        },
        {"target_modules": ["v_proj"], "rank_pattern": {"0.*v_proj": 3, "v_proj": 4, "x": 5}},
        {"target_modules": ["v_proj"], "alpha_pattern": {"^v_proj": 3, "[23].self_attn.v_proj": 4}},
    )
    names = [n.removesuffix(".weight") for n in Checkpoint.open(tiny_qwq).tensors]
    for case in cases:
        theirs = LoraConfig(r=8, lora_alpha=16, **case)
        theirs.save_pretrained(tmp_path)
        ours = parse_lora_config((tmp_path / CONFIG).read_bytes(), tmp_path / CONFIG)
        for name in names:
            assert ours.is_target(name) == bool(check_target_module_exists(theirs, name)), (
                case,
                name,
            )
            r = theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern, name), 8)
            alpha = theirs.alpha_pattern.get(get_pattern_key(theirs.alpha_pattern, name), 16)
            assert (ours.rank(name), ours.scaling(name)) == (r, alpha / r), (case, name)


def test_an_adapter_may_be_merged_by_hand(tiny_qwq, plain):
    checkpoint = Checkpoint.open(tiny_qwq)
    merged = merge_adapter(checkpoint, open_adapter(str(plain)))
    assert type(merged) is Checkpoint and all(t.change is None for t in checkpoint.tensors.values())
    assert merged.folder == checkpoint.folder and merged.config == checkpoint.config
