"""The skip list as its readers take it: the real function of transformers, and the known traps."""

import re

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from model_makers import MODELS
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.quantizers_utils import should_convert_module

from quant.checkpoint import Checkpoint
from quant.errors import QwqQuantError
from quant.groups import find_groups, find_linears
from quant.skip_list import READERS, check_skip_list, make_skip_list, skipped_by

TRANSFORMERS_4, BEFORE_FIX, TRANSFORMERS_5, VLLM = READERS


def linears_of(n_layers=64, prefix="model.", head="lm_head"):
    """The linears of QwQ-32B."""
    leaves = [f"self_attn.{x}_proj" for x in "qkvo"]
    leaves += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    layers = [f"{prefix}layers.{i}.{leaf}" for i in range(n_layers) for leaf in leaves]
    return [*layers, head] if head else layers


QWQ = linears_of()


def keep(*patterns, linears=QWQ):
    """Modules of which a pattern is the whole name, or starts it at a dot; always the head."""
    return {
        name
        for name in linears
        if name.endswith("lm_head") or any(name == p or name.startswith(p + ".") for p in patterns)
    }


LAYER_1 = "model.layers.1."
QKV = [LAYER_1 + f"self_attn.{x}_proj" for x in "qkv"]
GATE_UP = [LAYER_1 + "mlp.gate_proj", LAYER_1 + "mlp.up_proj"]

# what the list says, what was meant, and what each reader takes for 16-bit: counts of QwQ's
# linears, lm_head among them. Research 2.4 has 1 for the bare name under transformers 4, but its
# _replace_with_bnb_linear also asks whether a module's last name is in the list.
TABLE = [
    (["model.layers.1.mlp", "model.layers.40.self_attn"], None, (8, 8, 8, 8)),
    (QKV, QKV, (4, 4, 4, 1)),
    ([*QKV, LAYER_1 + "self_attn.qkv_proj"], QKV, (4, 4, 4, 4)),
    ([*GATE_UP, LAYER_1 + "mlp.gate_up_proj"], GATE_UP, (3, 3, 3, 3)),
    ([LAYER_1 + "mlp.gate_up_proj"], GATE_UP, (1, 1, 1, 3)),
    ([LAYER_1 + "mlp.down_proj"], None, (2, 2, 2, 2)),
    (["model.layers.1"], None, (8, 78, 8, 8)),
    (["down_proj"], [LAYER_1 + "mlp.down_proj"], (65, 65, 65, 65)),
    (["layers.1.mlp"], [LAYER_1 + "mlp"], (4, 1, 1, 1)),
]


@pytest.mark.parametrize(("entries", "meant", "counts"), TABLE)
def test_what_each_reader_makes_of_a_list(entries, meant, counts):
    entries = ["lm_head", *entries]
    assert tuple(len(skipped_by(reader, entries, QWQ)) for reader in READERS) == counts
    kept = keep(*(entries if meant is None else meant))
    if len(set(counts)) == 1 and counts[0] == len(kept):
        check_skip_list(entries, QWQ, kept)
        return
    with pytest.raises(QwqQuantError) as caught:
        check_skip_list(entries, QWQ, kept)
    wrong = [r.name for r, n in zip(READERS, counts, strict=True) if n != len(kept)]
    assert caught.value.what.startswith(f"{wrong[0]} would misread the list")
    assert any(name in caught.value.why for name in (*QKV, *GATE_UP, "layers.10.", ".down_proj"))


@pytest.mark.parametrize("index", [4, 7])
def test_bad_lists_are_caught_whatever_they_were_meant_for(index):
    """gate_up_proj alone with both 4-bit; down_proj alone with all of them 16-bit."""
    entries = ["lm_head", *TABLE[index][0]]
    kept = {n for n in QWQ if n == "lm_head" or (index == 7 and n.endswith("down_proj"))}
    with pytest.raises(QwqQuantError):
        check_skip_list(entries, QWQ, kept)


# --- the list we make -------------------------------------------------------------------------


def groups_of(linears):
    return find_groups((f"{name}.weight", (64, 64)) for name in linears)


@st.composite
def choices(draw):
    """A model, and any of its groups to keep."""
    prefix = draw(st.sampled_from(["model.", "language_model.model.", "model.language_model."]))
    heads = [None, "lm_head", *(["language_model.lm_head"] if prefix != "model." else [])]
    linears = linears_of(draw(st.integers(1, 12)), prefix, draw(st.sampled_from(heads)))
    groups = groups_of(linears)
    chosen = draw(st.sets(st.integers(0, len(groups) - 1)))
    return linears, [groups[i] for i in sorted(chosen)]


@given(choices())
@settings(max_examples=60, deadline=None)
def test_any_choice_of_groups_is_read_alike_by_all(choice):
    linears, groups = choice
    kept = {module for group in groups for module in group.modules} | keep(linears=linears)
    entries = make_skip_list(linears, kept)
    check_skip_list(entries, linears, kept)
    assert entries[0] == "lm_head"
    assert len(entries) == len(set(entries))
    for group in groups:
        assert {group.name, *group.modules} <= set(entries)


def test_every_entry_is_needed():
    """Dropping any of them, or adding a module, is noticed: so the check can fail."""
    kept = keep(*QKV, *GATE_UP, LAYER_1 + "mlp.down_proj", "model.layers.10.self_attn.o_proj")
    entries = make_skip_list(QWQ, kept)
    assert entries == [
        "lm_head", QKV[0], LAYER_1 + "self_attn.qkv_proj", QKV[1], QKV[2],
        GATE_UP[0], LAYER_1 + "mlp.gate_up_proj", GATE_UP[1], LAYER_1 + "mlp.down_proj",
        "model.layers.10.self_attn.o_proj",
    ]  # fmt: skip
    check_skip_list(entries, QWQ, kept)
    for i in range(len(entries)):
        with pytest.raises(QwqQuantError, match="misread"):
            check_skip_list(entries[:i] + entries[i + 1 :], QWQ, kept)
    with pytest.raises(
        QwqQuantError,
        match=r"4-bit on disk, .*layers\.2\.mlp\.gate_proj, model\.layers\.2\.mlp\.up_proj\.",
    ):
        both = [f"model.layers.2.mlp.{x}_proj" for x in ("gate", "up", "gate_up")]
        check_skip_list(entries + both, QWQ, kept)


def test_half_a_fused_matrix_is_an_error_of_its_own():
    kept = keep(QKV[0], QKV[2])
    entries = make_skip_list(QWQ, kept)
    assert LAYER_1 + "self_attn.qkv_proj" not in entries
    with pytest.raises(QwqQuantError) as caught:
        check_skip_list(entries, QWQ, kept)
    assert caught.value.what == (
        "vLLM could not load model.layers.1.self_attn.qkv_proj: it is half 4-bit."
    )
    assert caught.value.why.startswith(f"{QKV[0]}, {QKV[2]} of it would be 16-bit")


def test_a_4_bit_head_is_never_right():
    with pytest.raises(QwqQuantError, match=r"4-bit on disk, but 16-bit to it: lm_head\."):
        check_skip_list(["lm_head"], QWQ, set())


def test_tied_embeddings_still_need_the_head():
    """No lm_head.weight on disk, but the module exists and may not be converted."""
    linears = linears_of(2, head=None)
    check_skip_list(make_skip_list(linears, set()), linears, set())
    with pytest.raises(QwqQuantError, match="transformers 4 would misread"):
        check_skip_list([LAYER_1 + "mlp.down_proj"], linears, {LAYER_1 + "mlp.down_proj"})


@pytest.mark.parametrize(
    "entry", ["model.layers.1", "model.layers.5.mlp.router", "q_proj", "model", "mlp.down_proj"]
)
def test_entries_are_full_names_of_what_is_there(entry):
    """Even where all readers happen to agree, as on a whole layer of a small model."""
    linears = linears_of(2)
    kept = {n for n in linears if n == "lm_head" or n.startswith("model.layers.1.")}
    entries = make_skip_list(linears, kept)
    with pytest.raises(QwqQuantError):
        check_skip_list([*entries, entry], linears, kept)
    if entry == "model.layers.1":
        with pytest.raises(QwqQuantError, match=r"too much, or nothing: model\.layers\.1\."):
            check_skip_list([*entries, entry], linears, kept)


@pytest.mark.parametrize("name", ["model.layers.1.a[b", "model.layers.*", "a+", "x|y", "", "\x1b"])
def test_what_is_a_regular_expression_is_refused(name):
    with pytest.raises(QwqQuantError, match="cannot name"):
        check_skip_list(["lm_head", name], QWQ, {"lm_head"})
    with pytest.raises(QwqQuantError, match="cannot name") as caught:
        check_skip_list(["lm_head"], [*QWQ, name], {"lm_head"})
    assert "\x1b" not in str(caught.value)


def test_a_name_that_starts_anothers():
    """transformers 5 once took mlp.gate for mlp.gate_proj, and mlp.shared_expert for its gate."""
    linears = ["model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj", "lm_head"]
    kept = {"lm_head", "model.layers.0.mlp.gate"}
    with pytest.raises(QwqQuantError, match="before the boundary fix would misread") as caught:
        check_skip_list(make_skip_list(linears, kept), linears, kept)
    assert "model.layers.0.mlp.gate_proj" in caught.value.why


def test_qwen_30b_a3b_in_reasonable_time():
    linears = []
    for i in range(48):
        layer = f"model.layers.{i}."
        linears += [f"{layer}self_attn.{x}_proj" for x in "qkvo"] + [layer + "mlp.gate"]
        for x in ("gate", "up", "down"):
            linears += [f"{layer}mlp.experts.{e}.{x}_proj" for e in range(128)]
    kept = {n for n in linears if ".mlp." in n or n.startswith("model.layers.3.")}
    entries = make_skip_list(linears, kept)
    assert len(entries) == 1 + 2 * 48 + 5
    check_skip_list(entries, linears, kept)


# --- the emulation against transformers -------------------------------------------------------

PIECES = [
    "model", "layers", "1", "10", "mlp", "gate", "gate_proj", "lm_head", ".", ".*", "|", "[0-9]",
    "a", "_", "(", ")", "?", "$", "^", "+",
]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)
names = st.lists(st.sampled_from(PIECES[:8]), min_size=1, max_size=6).map(".".join)


@given(st.lists(texts | names, min_size=1, max_size=4), st.lists(names, min_size=1, max_size=8))
@settings(max_examples=500, deadline=None)
def test_emulation_equals_transformers_5(entries, modules):
    try:
        real = {name for name in modules if not should_convert_module(name, entries)}
    except re.error:
        return  # raised or not, it depends on the order; check_skip_list refuses such entries
    try:
        assert skipped_by(TRANSFORMERS_5, entries, modules) == real
    except re.error:
        assert any(not re.fullmatch(r"[\w.]+", entry) for entry in entries)


def before_the_fix(name, patterns):
    """should_convert_module as it was: an open prefix, and the suffix."""
    return not any(re.match(key, name) or name.endswith(key) for key in patterns)


def test_the_fix_is_what_tells_the_two_apart():
    assert not before_the_fix("model.layers.10.mlp.up_proj", ["model.layers.1"])
    assert should_convert_module("model.layers.10.mlp.up_proj", ["model.layers.1"])
    for entries, _, _ in TABLE:
        old = {name for name in QWQ if not before_the_fix(name, entries)}
        assert skipped_by(BEFORE_FIX, entries, QWQ) == old


def converted_by_transformers(model, entries):
    """Which linears transformers itself makes 4-bit."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = replace_with_bnb_linear(model, entries, config)
    return {name for name, m in model.named_modules() if type(m).__name__ == "Linear4bit"}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_converts_exactly_the_others(name, made_models):
    """Real models of every architecture, on the meta device; every second group is kept."""
    folder, made = made_models(name)
    tensors = list(Checkpoint.open(folder).tensors.values())
    linears = find_linears(tensors)
    quantized = {module for group in find_groups(tensors)[::2] for module in group.modules}
    kept = set(linears) - quantized
    entries = make_skip_list(linears, kept)
    check_skip_list(entries, linears, kept)
    with torch.device("meta"):
        model = type(made)(made.config)
    assert converted_by_transformers(model, entries) == quantized


def test_transformers_converts_exactly_the_others_in_a_multimodal_model(tmp_path):
    """The file says language_model.model.layers, the module is model.language_model.layers."""
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=12,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=3)
    )
    model.save_pretrained(tmp_path)
    tensors = Checkpoint.open(tmp_path).tensors
    assert "language_model.model.layers.0.mlp.up_proj.weight" in tensors
    linears = find_linears(tensors.values())
    groups = find_groups(tensors.values())
    quantized = {module for group in groups if group.layer != 1 for module in group.modules}
    kept = set(linears) - quantized
    entries = make_skip_list(linears, kept)
    check_skip_list(entries, linears, kept)
    converted = converted_by_transformers(model, entries)
    moved = {
        name.replace("language_model.model.", "model.language_model.", 1) for name in quantized
    }
    assert converted == moved


def test_readers_are_named_as_people_know_them():
    assert [r.name for r in READERS if r.fuses] == ["vLLM"]
    assert len({r.name for r in READERS}) == 4
    assert skipped_by(VLLM, ["lm_head"], ["lm_head", "model.lm_head.x"]) == {
        "lm_head", "model.lm_head.x",
    }  # fmt: skip
    assert skipped_by(TRANSFORMERS_4, ["mlp"], ["a.mlp.b", "a.b_mlp.c", "mlp", "x.mlp"]) == {
        "a.mlp.b", "a.b_mlp.c", "mlp", "x.mlp",
    }  # fmt: skip
