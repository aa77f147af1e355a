"""Rules for linears with other bits, as GPTQModel, vLLM and transformers would take them."""

import re
from pathlib import Path

import numpy as np
import pytest

from quant.dynamic_rules import check_rules, exceptions, stored_bits
from quant.errors import QwqQuantError
from quant.groups import find_groups
from quant.tensors import TensorInfo

SHAPES = {
    "self_attn.q_proj": (128, 128), "self_attn.k_proj": (64, 128), "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128), "mlp.gate_proj": (192, 128), "mlp.up_proj": (192, 128),
    "mlp.down_proj": (128, 192),
}  # fmt: skip
GROUPS = find_groups(
    (f"model.layers.{layer}.{name}.weight", shape)
    for layer in range(12)
    for name, shape in SHAPES.items()
)


def stored(bits: dict[str, int], base: int) -> dict[str, int]:
    return {module: bits.get(g.name, base) for g in GROUPS for module in g.modules}


def config_of(bits: dict[str, int], base: int = 4) -> dict:
    of_all = {group.name: bits.get(group.name, base) for group in GROUPS}
    return {"bits": base, **exceptions(GROUPS, of_all, base)}


def refused(config: dict, bits: dict[str, int]) -> str:
    with pytest.raises(QwqQuantError) as caught:
        check_rules(config, GROUPS, stored(bits, config["bits"]))
    return str(caught.value)


@pytest.mark.parametrize("base", [4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_all_readers_take_what_is_written_alike(base, seed):
    choices = np.random.default_rng(seed).choice([4, 8, 16] if base == 4 else [8, 16], len(GROUPS))
    bits = {group.name: int(n) for group, n in zip(GROUPS, choices, strict=True)}
    config = config_of(bits, base)
    check_rules(config, GROUPS, stored(bits, base))
    assert ("modules_in_block_to_quantize" in config) == (base == 8)
    for pattern in config["dynamic"]:  # in the form that newer readers look up
        assert re.fullmatch(r"[+-]:\^(?:[a-z0-9_]+|\\\.)+\$", pattern)


def test_the_rules_are_spelled_as_gptqmodel_spells_them():
    config = config_of({"model.layers.1.mlp.gate_up_proj": 8, "model.layers.10.mlp.down_proj": 16})
    assert config["dynamic"] == {
        r"+:^model\.layers\.1\.mlp\.gate_proj$": {"bits": 8},
        r"+:^model\.layers\.1\.mlp\.up_proj$": {"bits": 8},
        r"+:^model\.layers\.1\.mlp\.gate_up_proj$": {"bits": 8},
        r"-:^model\.layers\.10\.mlp\.down_proj$": {},
    }


def test_nothing_is_said_where_nothing_differs():
    assert config_of({}) == {"bits": 4}
    check_rules({"bits": 4}, GROUPS, stored({}, 4))


QKV = "model.layers.1.self_attn.qkv_proj"


def without(config: dict, part: str) -> dict:
    rules = {key: value for key, value in config["dynamic"].items() if part not in key}
    return {**config, "dynamic": rules}


def rules(**found: dict) -> dict:
    return {"bits": 4, "dynamic": found}


BAD = {
    "no fused names": (without(config_of({QKV: 8}), "qkv"), {QKV: 8}, "vLLM before"),
    "only fused names": (
        rules(**{r"+:^model\.layers\.1\.self_attn\.qkv_proj$": {"bits": 8}}), {QKV: 8}, "GPTQModel"
    ),
    "one part forgotten": (without(config_of({QKV: 8}), "k_proj"), {QKV: 8}, "GPTQModel"),
    "layers 10 and 11 caught too": (
        rules(**{r"+:model\.layers\.1.*\.(q|k|v|qkv)_proj": {"bits": 8}}), {QKV: 8}, "layers.10"
    ),
    "the first rule wins": (
        {"bits": 4, "dynamic": {"-:.*self_attn": {}, **config_of({QKV: 8})["dynamic"]}},
        {QKV: 8}, "16 to it",
    ),
    "no rule": ({"bits": 4}, {QKV: 16}, "16 bits on disk, 4 to it"),
    "a rule too many": (config_of({QKV: 8}), {}, "4 bits on disk, 8 to it"),
    "no list for transformers": (
        {key: value for key, value in config_of({QKV: 16}).items() if key in ("bits", "dynamic")},
        {QKV: 16}, "transformers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rules_are_refused(name):
    config, bits, expected = BAD[name]
    assert expected in refused(config, bits)


def test_parts_of_one_matrix_that_differ():
    """As nobody plans it, but as a folder on the disk might have it."""
    config = without(without(config_of({QKV: 8}), "qkv"), "k_proj")
    found = stored({QKV: 8}, 4)
    found["model.layers.1.self_attn.k_proj"] = 4
    with pytest.raises(QwqQuantError, match="its parts differ in bits"):
        check_rules(config, GROUPS, found)


def test_names_that_no_rule_can_spell():
    odd = find_groups([("model.layers.0.mlp.down_proj.weight", (8, 8))])
    (group,) = odd
    object.__setattr__(group, "modules", ("model.layers.0.mlp.down(proj",))
    with pytest.raises(QwqQuantError, match="No rule can name"):
        check_rules({"bits": 4}, odd, {"model.layers.0.mlp.down(proj": 4})


def test_bits_are_seen_on_the_disk():
    bits = dict(zip((group.name for group in GROUPS[:4]), (4, 8, 16, 4), strict=True))
    tensors = {}
    for group in GROUPS[:4]:
        for module in group.modules:
            if (n := bits[group.name]) == 16:
                tensors[f"{module}.weight"] = info(128, 192)
            else:
                tensors[f"{module}.qweight"] = info(192 * n // 32, 128)
                tensors[f"{module}.g_idx"] = info(192)
    found = stored_bits(tensors, GROUPS[:4])
    assert found == {m: bits[group.name] for group in GROUPS[:4] for m in group.modules}


def info(*shape: int) -> TensorInfo:
    return TensorInfo("x", shape, "I32", Path(), 0, 0)
