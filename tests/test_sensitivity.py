"""The file of sensitivities: whole, or a plain word why not; and the model it belongs to."""

import copy
import csv
import json
import math
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_makers import make_model
from safetensors.numpy import load_file, save_file

from quant.checkpoint import Checkpoint
from quant.errors import BadInput, InputMissing, QwqQuantError
from quant.groups import find_groups
from quant.sensitivity import (
    MAX_NBYTES,
    METRICS,
    MeasuredModule,
    Sensitivity,
    check_model,
    fingerprint,
    read_sensitivity,
    sample_weights,
    write_sensitivity,
)


def measured(checkpoint, metrics=("weight", "activation", "kld")) -> Sensitivity:
    """Made-up numbers for a real model."""
    draw = random.Random(0)
    groups = {group.name: group for group in find_groups(checkpoint.tensors.values())}
    modules = {
        name: MeasuredModule(
            checkpoint.tensors[name + ".weight"].shape,
            {"weight": draw.random(), "activation": draw.random()},
        )
        for group in groups.values()
        for name in group.modules
    }
    return Sensitivity(
        {
            "name": checkpoint.name,
            "revision": checkpoint.revision,
            "architecture": checkpoint.config["architectures"][0],
            "fingerprint": fingerprint(checkpoint),
            "sample": sample_weights(checkpoint),
        },
        {"name": "wiki.txt", "sha256": "ab" * 32, "n_tokens": 4096, "seq_len": 512, "seed": 0},
        {"quant_type": "nf4", "blocksize": 64, "double_quant": True, "search_scales": False},
        {"numpy": np.__version__},
        modules,
        groups,
        {metric: {name: draw.random() for name in groups} for metric in metrics},
    )


@pytest.fixture(scope="module")
def tiny(tiny_qwq):
    checkpoint = Checkpoint.open(tiny_qwq)
    return checkpoint, measured(checkpoint)


def write(path, content):
    path.write_text(json.dumps(content))
    return path


# --- there and back ---------------------------------------------------------------------------


def test_what_is_written_is_read(tiny, tmp_path):
    _, sensitivity = tiny
    path = tmp_path / "sensitivity.json"
    write_sensitivity(path, sensitivity)
    again = read_sensitivity(path)
    assert again == sensitivity
    assert again.to_json() == sensitivity.to_json() == json.loads(path.read_text())
    assert list(again.metrics) == ["weight", "activation", "kld"]
    assert again.values("kld") == sensitivity.metrics["kld"]
    assert list(again.values("kld")) == list(again.groups)
    first = path.read_bytes()
    write_sensitivity(path, again)
    assert path.read_bytes() == first


def test_the_file_is_what_the_interface_says(tiny):
    content = tiny[1].to_json()
    assert list(content) == [
        "qwq_quant", "format", "model", "calibration", "quantization", "versions", "modules",
        "groups",
    ]  # fmt: skip
    group = content["groups"]["model.layers.2.self_attn.qkv_proj"]
    assert list(group) == ["kind", "layer", "modules", "weight", "activation", "kld"]
    assert (group["kind"], group["layer"]) == ("qkv", 2)
    assert group["modules"] == [f"model.layers.2.self_attn.{x}_proj" for x in "qkv"]
    module = content["modules"]["model.layers.2.mlp.down_proj"]
    assert list(module) == ["shape", "weight", "activation"]


def test_a_metric_that_was_not_measured(tiny):
    with pytest.raises(BadInput, match="There are: weight, activation, kld"):
        tiny[1].values("block")


def test_no_text_was_needed(tiny, tmp_path):
    checkpoint, _ = tiny
    content = measured(checkpoint, ["weight"]).to_json()
    content["calibration"] = {}
    for module in content["modules"].values():
        del module["activation"]
    sensitivity = read_sensitivity(write(tmp_path / "s.json", content))
    assert not sensitivity.calibration
    assert list(sensitivity.metrics) == ["weight"]


def test_whole_numbers_are_numbers(tiny, tmp_path):
    content = tiny[1].to_json()
    name = next(iter(content["groups"]))
    content["groups"][name]["weight"] = 0
    value = read_sensitivity(write(tmp_path / "s.json", content)).values("weight")[name]
    assert value == 0.0
    assert type(value) is float


def test_csv_has_the_same_numbers(tiny):
    _, sensitivity = tiny
    rows = list(csv.DictReader(sensitivity.to_csv().splitlines()))
    assert len(rows) == len(sensitivity.groups) + len(sensitivity.modules)
    for row in rows:
        if row["level"] == "group":
            group = sensitivity.groups[row["name"]]
            assert (row["kind"], int(row["layer"])) == (group.kind, group.layer)
            found = {metric: values[row["name"]] for metric, values in sensitivity.metrics.items()}
        else:
            module = sensitivity.modules[row["name"]]
            assert (int(row["out"]), int(row["in"])) == module.shape
            found = module.values
        assert {m: float(row[m]) for m in METRICS if row[m]} == found
    down = [row for row in rows if row["name"] == "model.layers.3.mlp.down_proj"]
    assert [(row["level"], row["kind"], row["layer"]) for row in down] == [
        ("group", "down", "3"), ("module", "down", "3"),
    ]  # fmt: skip


def test_csv_holds_no_formulas(tiny):
    sensitivity = tiny[1]
    text = json.dumps(sensitivity.to_json()).replace("model.layers.0", "=cmd|' /C calc'!A0.\\u001b")
    hostile = json.loads(text)
    rows = sensitivity_from(hostile).to_csv()
    assert "\x1b" not in rows
    assert "=cmd" in rows
    assert not any(cell.startswith("=") for row in csv.reader(rows.splitlines()) for cell in row)


def sensitivity_from(content) -> Sensitivity:
    return Sensitivity.from_json(content)


# --- hostile and damaged files ----------------------------------------------------------------

GROUP, MODULE = "model.layers.1.self_attn.qkv_proj", "model.layers.1.self_attn.k_proj"

DAMAGES = {
    "no format": (lambda c: c.pop("format"), '"format": 1'),
    "format of text": (lambda c: c.update(format="1"), '"format": 1'),
    "format true": (lambda c: c.update(format=True), '"format": 1'),
    "newer": (lambda c: c.update(format=2), "format 2; this version of qwq-quant knows 1"),
    "no model": (lambda c: c.pop("model"), "model is NoneType, dict is needed"),
    "model of text": (lambda c: c.update(model="QwQ"), "model is str"),
    "revision a number": (lambda c: c["model"].update(revision=1), "model, revision is int"),
    "odd field": (lambda c: c["model"].update(extra=1), "extra"),
    "no fingerprint": (lambda c: c["model"].pop("fingerprint"), "fingerprint"),
    "tokens true": (lambda c: c["calibration"].update(n_tokens=True), "n_tokens is bool"),
    "tokens half": (lambda c: c["calibration"].update(n_tokens=0.5), "n_tokens is float"),
    "no quant_type": (lambda c: c["quantization"].pop("quant_type"), "quant_type"),
    "versions nested": (lambda c: c["versions"].update(a={}), "versions, a is dict"),
    "no groups": (lambda c: c.update(groups={}), "there are no groups"),
    "groups a list": (lambda c: c.update(groups=[]), "groups is list"),
    "group a number": (lambda c: c["groups"].update({GROUP: 1}), "qkv_proj is int"),
    "no kind": (lambda c: c["groups"][GROUP].pop("kind"), "kind is NoneType"),
    "kind a list": (lambda c: c["groups"][GROUP].update(kind=[]), "kind is list"),
    "odd kind": (lambda c: c["groups"][GROUP].update(kind="mlp"), "no known kind"),
    "layer of text": (lambda c: c["groups"][GROUP].update(layer="1"), "layer is str"),
    "layer negative": (lambda c: c["groups"][GROUP].update(layer=-1), "in layer -1"),
    "layer huge": (lambda c: c["groups"][GROUP].update(layer=10**300), "in layer 1000"),
    "shape huge": (lambda c: c["modules"][MODULE].update(shape=[10**300, 2]), "is no matrix"),
    "no modules": (lambda c: c["groups"][GROUP].update(modules=[]), "has no modules"),
    "modules numbers": (lambda c: c["groups"][GROUP].update(modules=[[]]), "modules is list"),
    "module unknown": (
        lambda c: c["groups"][GROUP]["modules"].append("x\x1b"),
        r"x\x1b of model.layers.1.self_attn.qkv_proj was not measured",
    ),
    "module twice": (lambda c: c["groups"][GROUP]["modules"].append(MODULE), "is in two groups"),
    "module homeless": (lambda c: c["groups"].pop(GROUP), "in no group"),
    "module lacking": (lambda c: c["modules"].pop(MODULE), "was not measured"),
    "no shape": (lambda c: c["modules"][MODULE].pop("shape"), "shape is NoneType"),
    "shape 3-d": (lambda c: c["modules"][MODULE].update(shape=[1, 2, 3]), "is no matrix"),
    "shape zero": (lambda c: c["modules"][MODULE].update(shape=[0, 2]), "is no matrix"),
    "shape half": (lambda c: c["modules"][MODULE].update(shape=[1.5, 2]), "is float"),
    "no weight": (lambda c: c["groups"][GROUP].pop("weight"), "weight is missing of the groups"),
    "kld in part": (lambda c: c["groups"][GROUP].pop("kld"), "kld is missing of the groups model"),
    "odd metric": (lambda c: c["groups"][GROUP].update(vibes=1.0), "no metric vibes"),
    "odd module metric": (lambda c: c["modules"][MODULE].update(vibes=1.0), "no metric vibes"),
    "module in part": (
        lambda c: c["modules"][MODULE].pop("activation"),
        f"activation is missing of the modules {MODULE}",
    ),
    "NaN": (lambda c: c["groups"][GROUP].update(kld=math.nan), f"kld of {GROUP} is nan"),
    "infinite": (lambda c: c["groups"][GROUP].update(kld=math.inf), f"kld of {GROUP} is inf"),
    "NaN module": (
        lambda c: c["modules"][MODULE].update(weight=math.nan),
        f"weight of {MODULE} is nan",
    ),
    "negative": (lambda c: c["groups"][GROUP].update(weight=-1e-9), f"weight of {GROUP} is -1e-09"),
    "too large": (lambda c: c["groups"][GROUP].update(weight=10**400), "too large"),
    "metric of text": (lambda c: c["groups"][GROUP].update(weight="0.1"), "weight is str"),
    "metric true": (lambda c: c["groups"][GROUP].update(weight=True), "weight is bool"),
    "metric null": (lambda c: c["groups"][GROUP].update(weight=None), "weight is NoneType"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_with_the_reason(damage, tiny, tmp_path):
    content = copy.deepcopy(tiny[1].to_json())
    change, reason = DAMAGES[damage]
    change(content)
    path = write(tmp_path / "s.json", content)
    with pytest.raises(BadInput) as caught:
        read_sensitivity(path)
    error = caught.value
    assert error.what == f"{path} is no usable file of sensitivities."
    assert error.next_step.startswith("Measure again: qwq-quant measure")
    assert reason in error.why
    assert error.why.isprintable()


@pytest.mark.parametrize("value", [-1e-9, 1e13, 1e308, -1e308, 10**400])
@pytest.mark.parametrize("metric", ["kld", "gradient", "activation"])
def test_no_damage_below_nothing_or_beyond_reason(tiny, tmp_path, metric, value):
    """Those who add them up and divide by them need not fear what comes out."""
    content = tiny[1].to_json()
    for group in content["groups"].values():
        group[metric] = 1e12
    path = write(tmp_path / "s.json", content)
    assert read_sensitivity(path).values(metric)[GROUP] == 1e12
    content["groups"][GROUP][metric] = value
    with pytest.raises(BadInput, match="no usable file of sensitivities") as caught:
        read_sensitivity(write(path, content))
    assert "Measure again" in caught.value.next_step


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b'{"format": 1, "format": 1}', b"\xff\xfe{}", b"GGUF" + b"\0" * 20,
            b'{"a":' * 5000 + b"1" + b"}" * 5000, b'{"format": NaN}']
)  # fmt: skip
def test_what_is_no_json_object_is_refused(raw, tmp_path):
    path = tmp_path / "s.json"
    path.write_bytes(raw)
    with pytest.raises(BadInput) as caught:
        read_sensitivity(path)
    assert "qwq-quant measure" in caught.value.next_step  # not: download it again


def test_no_file_a_folder_a_fifo_a_giant(tmp_path):
    with pytest.raises(InputMissing):
        read_sensitivity(tmp_path / "none.json")
    with pytest.raises(BadInput, match="folder"):
        read_sensitivity(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BadInput, match="FIFO"):
        read_sensitivity(tmp_path / "fifo")
    with open(tmp_path / "giant", "wb") as file:
        file.truncate(10**12)  # sparse
    with pytest.raises(BadInput, match=f"more than {MAX_NBYTES} bytes"):
        read_sensitivity(tmp_path / "giant")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_value_anywhere_is_refused_or_read(data, tiny, tmp_path_factory):
    """No other exception than our own, whatever stands in the file."""
    content = copy.deepcopy(tiny[1].to_json())
    place = content
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(1)))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(json_values)
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    try:
        read_sensitivity(write(path, content)).to_csv()
    except QwqQuantError as error:
        assert error.why


def test_what_cannot_be_is_not_even_made(tiny):
    s = tiny[1]
    parts = [s.model, s.calibration, s.quantization, s.versions, s.modules, s.groups]
    with pytest.raises(ValueError, match="is nan"):
        Sensitivity(*parts, {"weight": dict.fromkeys(s.groups, math.nan)})
    with pytest.raises(ValueError, match="weight is missing"):
        Sensitivity(*parts, {"kld": dict.fromkeys(s.groups, 0.0)})
    with pytest.raises(ValueError, match="are no groups"):
        Sensitivity(*parts, {"weight": dict.fromkeys([*s.groups, "x"], 0.0)})


# --- the model it belongs to ------------------------------------------------------------------


def test_its_own_model_fits(tiny, tiny_qwq, tmp_path):
    checkpoint, sensitivity = tiny
    assert check_model(sensitivity, checkpoint) == []
    shutil.copytree(tiny_qwq, tmp_path / "moved")
    assert check_model(sensitivity, Checkpoint.open(tmp_path / "moved")) == []


def test_another_revision_of_the_same_layout_is_mentioned(tiny, tiny_qwq):
    content = tiny[1].to_json()
    content["model"]["revision"] = "a" * 40
    sensitivity = sensitivity_from(content)
    (note,) = check_model(sensitivity, Checkpoint.open(tiny_qwq, "tiny", "b" * 40))
    assert "aaaa" in note
    assert "bbbb" in note
    assert check_model(sensitivity, Checkpoint.open(tiny_qwq)) == []


def test_a_fine_tuned_model_is_mentioned(tiny, tiny_qwq, tmp_path):
    shutil.copytree(tiny_qwq, tmp_path / "tuned")
    path = tmp_path / "tuned" / "model.safetensors"
    info = Checkpoint.open(tiny_qwq).tensors["model.layers.2.mlp.up_proj.weight"]
    content = bytearray(path.read_bytes())
    content[info.offset] ^= 1
    path.write_bytes(content)
    (note,) = check_model(tiny[1], Checkpoint.open(tmp_path / "tuned"))
    assert "the same layout, but other weights" in note


def refused(sensitivity, checkpoint) -> str:
    with pytest.raises(BadInput, match="those of another model") as caught:
        check_model(sensitivity, checkpoint)
    return caught.value.why


def test_another_model_is_told_by_what_differs(tiny, made_models):
    other = Checkpoint.open(made_models("qwen3")[0])
    why = refused(tiny[1], other)
    assert "Architecture: Qwen2ForCausalLM was measured, this is Qwen3ForCausalLM." in why
    assert "Modules that were measured in another shape: " in why
    assert "Measured groups that this model does not have: " in why
    assert "Groups of this model that were not measured: " in refused(measured(other), tiny[0])


def test_more_layers_or_another_width(tiny, made_models, tmp_path):
    base = Checkpoint.open(made_models("qwen2")[0])
    make_model("qwen2", tmp_path / "wide", intermediate_size=256)
    wide = Checkpoint.open(tmp_path / "wide")
    why = refused(measured(base), wide)
    assert "gate_proj (192 x 128, this is 256 x 128)" in why
    assert "Architecture" not in why
    assert "groups" not in why


def test_fused_otherwise(tiny):
    checkpoint, _ = tiny
    content = tiny[1].to_json()
    content["groups"]["model.layers.0.mlp.gate_up_proj"]["modules"].reverse()
    why = refused(sensitivity_from(content), checkpoint)
    assert "measured of other modules: model.layers.0.mlp.gate_up_proj." in why


def test_groups_that_the_model_lacks_are_not_believed(tiny):
    """The right fingerprint, but a name that is not of this model."""
    content = json.loads(json.dumps(tiny[1].to_json()).replace("layers.2.", "layers.77."))
    why = refused(sensitivity_from(content), tiny[0])
    assert "Groups of this model that were not measured: model.layers.2.mlp.down_proj," in why
    assert "model.layers.77.mlp.down_proj" in why


def test_the_fingerprint_sees_headers_only(tiny_qwq, tmp_path):
    shutil.copytree(tiny_qwq, tmp_path / "m")
    first = fingerprint(Checkpoint.open(tiny_qwq))
    assert first == fingerprint(Checkpoint.open(tmp_path / "m"))
    assert len(first) == 64
    (shard,) = (tmp_path / "m").glob("*.safetensors")
    with open(shard, "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    assert first == fingerprint(Checkpoint.open(tmp_path / "m"))


def test_the_fingerprint_sees_names_dtypes_shapes_and_shards(made_models, tmp_path):
    folder = made_models("qwen2")[0]
    checkpoint = Checkpoint.open(folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    variants = {
        "dtype": {**tensors, name: tensors[name].astype(np.float16)},
        "dtype, same bytes": {**tensors, name: tensors[name].view(np.int32)},
        "shape": {**tensors, name: np.ascontiguousarray(tensors[name].T)},
        "name": {name + "x" if n == name else n: t for n, t in tensors.items()},
        "more": {**tensors, "extra": np.zeros(1, np.float32)},
    }
    found = {fingerprint(checkpoint)}
    for label, changed in variants.items():
        shutil.copytree(folder, tmp_path / label)
        save_file(changed, tmp_path / label / "model.safetensors", metadata={"format": "pt"})
        found.add(fingerprint(Checkpoint.open(tmp_path / label)))
    made_models("qwen2")[1].save_pretrained(tmp_path / "sharded", max_shard_size="500KB")
    sharded = Checkpoint.open(tmp_path / "sharded")
    assert len({t.path for t in sharded.tensors.values()}) > 1
    assert {n: t.shape for n, t in sharded.tensors.items()} == {
        n: t.shape for n, t in checkpoint.tensors.items()
    }
    found.add(fingerprint(sharded))
    assert len(found) == 2 + len(variants)
    why = refused(measured(checkpoint), sharded)
    assert why.startswith("Fingerprint: ")
    assert "sizes of shards" in why


def test_importing_needs_no_torch():
    code = (
        "import sys, quant.sensitivity, quant.selection, quant.groups, quant.skip_list;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'bitsandbytes')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
