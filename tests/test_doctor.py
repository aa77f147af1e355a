"""The doctor: each planted defect is found by its id, and models without one are left in peace."""

import functools
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner
from doctor_helpers import (
    RELEASES,
    diagnose,
    edit,
    found,
    rewrite_gguf,
    save_release,
    template_of,
    write_hole,
)
from safetensors.numpy import save_file

from quant.cli import doctor as cli_doctor
from quant.doctor import patient as patient_room
from quant.doctor import template as template_room
from quant.doctor.checks import CHECKS
from quant.doctor.finding import CHECKPOINT, GGUF, NOTE, SEVERITIES
from quant.doctor.sandbox import render
from quant.gguf_file import GgufFile, Value
from quant.inspection.conversation import SPECIAL
from quant.metadata_keys import SAMPLING
from quant.sampling import PREFIX
from quant.source import open_source
from quant.to_gguf import Wishes, plan_gguf
from quant.write_gguf import write_gguf

TINY = {"pad-is-stop", "template-opens-think"}
"""What is true of tiny-qwq as of QwQ-32B, by its makers' choice: two notes."""


@pytest.fixture
def copy(tiny_qwq, tmp_path):
    """A copy of tiny-qwq to plant a defect in; its name still says qwq."""
    return shutil.copytree(tiny_qwq, tmp_path / "tiny-qwq")


@pytest.fixture(scope="module")
def gguf(tiny_qwq, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny-qwq.gguf"
    write_gguf(
        plan_gguf(open_source(str(tiny_qwq)), Wishes("Q8_0", sampling="qwen-official")), path
    )
    return path


# --- models without a defect ------------------------------------------------------------------


def test_the_example_has_two_notes_and_nothing_else(tiny_qwq):
    report = diagnose(tiny_qwq)
    assert {f.id for f in report.findings} == TINY
    assert {f.severity for f in report.findings} == {NOTE}
    assert report.recipe == "qwq-32b" and "tiny-qwq" in report.recipe_why
    assert set(report.not_checked.values()) == {"needs --deep"}


@pytest.mark.parametrize(
    ("name", "true"),
    [
        ("QwQ-32B", {"pad-is-stop", "template-opens-think"}),
        ("Qwen2.5-7B-Instruct", {"pad-is-stop"}),
        ("Qwen3-8B", {"pad-is-stop"}),
        ("Qwen3-4B-Instruct-2507", {"pad-is-stop"}),  # it has <think> and never thinks
        # The one warning, and no false alarm: DeepSeek's distills pad with their end token.
        ("DeepSeek-R1-Distill-Qwen-32B", {"pad-is-eos", "template-opens-think"}),
    ],
)
def test_no_false_alarm_on_the_recipes_own_files(name, true, tmp_path):
    report = diagnose(save_release(tmp_path, name))
    assert report.recipe is not None
    assert {f.id for f in report.findings} == true
    assert not report.of("error")
    assert [f.id for f in report.of("warning")] == sorted(true & {"pad-is-eos"})
    assert not {i for i, why in report.not_checked.items() if why != "needs --deep"}


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2moe", "llama3", "mistral"])
def test_no_false_alarm_on_what_transformers_saves(name, made_models):
    assert found(made_models(name)[0]) == {"template-opens-think"}


YARN_CONFIG = {"factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
OTHER_FAMILIES = {
    "Phi3ForCausalLM": {
        "rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]},
        "original_max_position_embeddings": 4096,
    },
    "Glm4ForCausalLM": {"partial_rotary_factor": 0.5},
    "Gemma3ForCausalLM": {
        "rope_theta": ...,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {},
    },
    "GptOssForCausalLM": {"rope_scaling": {**YARN_CONFIG, "truncate": False}},
    "DeepseekV3ForCausalLM": {"rope_scaling": YARN_CONFIG, "max_position_embeddings": 163840},
    "LlamaForCausalLM": {  # Llama 2 stretched: nobody stated theta then
        "rope_theta": ..., "rope_scaling": {"factor": 8.0, "type": "linear"},
        "model_type": "llama",
    },
}  # fmt: skip
"""Rotary settings of models that we do not convert, or not so, and that are in order."""


@pytest.mark.parametrize("architecture", OTHER_FAMILIES)
def test_no_false_alarm_on_other_families(architecture, copy):
    changes = {"architectures": [architecture], "model_type": "x", "_name_or_path": "x"}
    edit(copy, C, **{**changes, **OTHER_FAMILIES[architecture]})
    report = diagnose(copy)
    assert report.recipe is None
    told = {f.id for f in report.findings if f.id.startswith("rope")}
    assert told <= ({"rope-factor"} if architecture == "GptOssForCausalLM" else set())


def test_settings_of_another_family_that_do_contradict(copy):
    edit(copy, C, architectures=["Phi3ForCausalLM"], rope_parameters={"rope_theta": 5e5})
    assert "rope-contradiction" in found(copy)


def test_a_quantized_folder_is_examined_too(copy):
    """bitsandbytes: packed weights, embedding and head in 16 bits."""
    edit(copy, C, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert found(copy) == TINY
    edit(copy, T, pad_token="<|im_end|>")
    assert doctor(copy, "--strict").return_value == 1


def test_a_good_gguf_has_one_note(gguf):
    report = diagnose(gguf)
    assert {f.id for f in report.findings} == {"template-opens-think"}
    assert report.container == GGUF and report.recipe == "qwq-32b"


def test_the_table():
    for check_id, check in CHECKS.items():
        assert check.id == check_id and check.severity in SEVERITIES
        assert set(check.containers) <= {CHECKPOINT, GGUF} and check.containers
        for words in (check.about, check.because, check.remedy):
            assert len(words) > 8
        assert check.because.endswith((".", ").")) and check.remedy.endswith((".", "."))
        if check.mend is None and check.severity == NOTE:
            assert check.remedy.startswith("Only a note")
        if check.mend is not None:
            assert CHECKPOINT in check.containers and "fix" in check.remedy


# --- planted in a checkpoint ------------------------------------------------------------------


def mark_plain(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for entry in (*tokenizer["added_tokens"], *config["added_tokens_decoder"].values()):
        if entry["content"] == "<|im_end|>":
            entry["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def set_template(folder, text):
    edit(folder, "tokenizer_config.json", chat_template=text)


def without_prompt(folder):
    head = template_of(folder).partition("{%- if add_generation_prompt")[0]
    set_template(folder, head)


def keep_thoughts(folder):
    set_template(folder, template_of(folder).replace(".split('</think>')[-1].lstrip('\\n')", ""))


def yarn(factor, original, **more):
    return {"type": "yarn", "factor": factor, "original_max_position_embeddings": original, **more}


def scale(folder, scaling, **more):
    edit(folder, "config.json", rope_scaling=scaling, **more)


def too_many_tokens(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    extra = {"id": 4096, "content": "<|new|>", "special": True, "normalized": False}
    tokenizer["added_tokens"].append(extra)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def without_head(folder):
    path = folder / "model.safetensors"
    write_hole(path, {"model.embed_tokens.weight": (4096, 256), "model.norm.weight": (256,)})


def tied_but_different(folder):
    edit(folder, "config.json", tie_word_embeddings=True)


KEEPS_FIELD = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.reasoning_content %}{{- '<think>' + m.reasoning_content + '</think>' }}{%- endif %}"
    "{{- m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)
"""Thoughts come in a field of the message, and old ones stay."""

T, C, G = "tokenizer_config.json", "config.json", "generation_config.json"

PLANTED = {
    "pad-missing": lambda f: edit(f, T, pad_token=None),
    "pad-is-eos": lambda f: edit(f, T, pad_token="<|im_end|>"),
    "pad-outside": lambda f: edit(f, G, pad_token_id=4096),
    "pad-outside (no token)": lambda f: edit(f, T, pad_token="<|nope|>"),
    "eos-disagree": lambda f: edit(f, G, eos_token_id=4091),
    "eos-disagree (config)": lambda f: edit(f, C, eos_token_id=4091),
    "never-stops": lambda f: (
        edit(f, T, eos_token="<|endoftext|>"),
        edit(f, C, eos_token_id=4091),
        edit(f, G, eos_token_id=4091),
    ),
    "special-outside": lambda f: edit(f, C, bos_token_id=5000),
    "special-outside (list)": lambda f: edit(f, G, eos_token_id=[4093, 4091, 9999]),
    "not-special": mark_plain,
    "template-missing": lambda f: set_template(f, ...),
    "template-fails": lambda f: set_template(f, "{% if %}"),
    "template-fails (refuses)": lambda f: set_template(f, "{{ raise_exception('no chat') }}"),
    "template-unsafe": lambda f: set_template(f, "{{ ''.__class__.__mro__ }}"),
    "template-no-prompt": without_prompt,
    "template-keeps-thoughts": keep_thoughts,
    "template-keeps-thoughts (field)": lambda f: set_template(f, KEEPS_FIELD),
    "rope-incomplete": lambda f: edit(f, C, rope_theta=...),
    "rope-incomplete (transformers 5)": lambda f: edit(
        f, C, rope_theta=..., rope_parameters={"rope_type": "default"}
    ),
    "rope-incomplete (original)": lambda f: scale(f, {"type": "yarn", "factor": 4.0}),
    "rope-factor": lambda f: scale(f, yarn(4.0, 1024)),
    "yarn-unneeded": lambda f: scale(f, yarn(4.0, 2048)),
    "yarn-always": lambda f: scale(f, yarn(4.0, 512)),
    "generation-unlike": lambda f: edit(f, G, temperature=1.0),
    "generation-unlike (greedy)": lambda f: edit(f, G, do_sample=False),
    "generation-unlike (no file)": lambda f: (f / G).unlink(),
    "dtype-stated": lambda f: edit(f, C, torch_dtype="float16"),
    "head-missing": without_head,
}
"""id, or "id (variant)" -> what plants it. All of these can be mended: test_fix.py does."""

ONLY_TOLD = {
    "too-many-tokens": too_many_tokens,
    "norm-eps": lambda f: edit(f, C, rms_norm_eps=1e-6),
    "rope-theta": lambda f: edit(f, C, rope_theta=10000.0),
    "rope-contradiction": lambda f: edit(f, C, rope_parameters={"rope_theta": 5e5}),
    "rope-contradiction (factor)": lambda f: scale(f, yarn(0.5, 2048)),
    "head-ignored": tied_but_different,
    "shard-left-over": lambda f: write_hole(f / "model-00001-of-00002.safetensors", {"x": (1,)}),
    "file-unreadable": lambda f: (f / "special_tokens_map.json").write_text("{"),
    "tokenizer-missing": lambda f: (f / "tokenizer.json").unlink(),
    "norm-eps (no limit)": lambda f: edit(f, C, rms_norm_eps=10**400),
    "rope-contradiction (no limit)": lambda f: scale(f, yarn(1e308, 2048)),
    "template-unsafe (hidden)": lambda f: set_template(
        f, template_of(f) + "{% if tools %}{{ ''|attr('__class__') }}{% endif %}"
    ),
    "template-fails (changes)": lambda f: set_template(f, "{{ messages.append(1) }}"),
}


@pytest.mark.parametrize("planted", [*PLANTED, *ONLY_TOLD])
def test_planted(planted, copy):
    {**PLANTED, **ONLY_TOLD}[planted](copy)
    check_id = planted.partition(" ")[0]
    report = diagnose(copy)
    ids = {f.id for f in report.findings}
    assert check_id in ids
    finding = next(f for f in report.findings if f.id == check_id)
    assert finding.seen.where and finding.seen.evidence and finding.seen.what.endswith(".")
    # Nothing else is told but what follows from the planted defect.
    assert ids - TINY <= {check_id, *CONSEQUENCES.get(planted, ())}


CONSEQUENCES = {
    "never-stops": ["pad-is-eos"],
    "rope-contradiction": ["rope-theta"],
    "rope-factor": ["yarn-always"],
    "rope-contradiction (factor)": ["yarn-unneeded"],
}


def test_a_damaged_file_stops_no_other_check(copy):
    (copy / G).write_text("[1, 2")
    edit(copy, T, pad_token="<|im_end|>")
    report = diagnose(copy)
    assert {"file-unreadable", "pad-is-eos"} <= {f.id for f in report.findings}
    assert "generation-unlike" in report.not_checked


def test_deep_checks_read_weights_and_ask_llama_cpp(copy):
    path = copy / "model.safetensors"
    tensors = load_file_bits(path)
    tensors["model.layers.2.mlp.down_proj.weight"][5, 7] = 0x7FC0  # NaN
    tensors["model.layers.1.mlp.up_proj.weight"][9] = 0
    save_bits(tensors, path)
    assert not found(copy) & {"weights-not-finite", "weights-zero-rows"}
    report = diagnose(copy, deep=True)
    seen = {f.id: f.seen for f in report.findings}
    assert seen["weights-not-finite"].where == "model.layers.2.mlp.down_proj.weight"
    assert seen["weights-zero-rows"].evidence.startswith("1 of 768 rows")
    assert "token-ids-differ" in report.checked and "token-ids-differ" not in seen


def load_file_bits(path):
    """The BF16 tensors of a file as uint16."""
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        header, data = json.loads(file.read(n)), file.read()
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], np.uint16)
        .reshape(entry["shape"])
        .copy()
        for name, entry in header.items()
    }


def save_bits(tensors, path):
    """Store uint16 arrays as BF16: written as F16, and the header changed."""
    save_file({name: array.view(np.float16) for name, array in tensors.items()}, path)
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    for entry in header.values():
        entry["dtype"] = "BF16"
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + n :])


def test_other_tokens_in_llama_cpp_are_told(tiny_qwq, monkeypatch):
    """Qwen's tokenizer composes decomposed accents first, which llama.cpp does not."""
    from quant.doctor import llama

    monkeypatch.setattr(llama, "TEXTS", ("plain", "e\u0301a\u0308"))
    (told,) = llama.different_ids(open_source(str(tiny_qwq)))
    assert "token 0 is" in told and "in transformers" in told


def test_the_stated_type_is_compared_with_the_stored_one(copy):
    write_hole(copy / "model.safetensors", {"model.embed_tokens.weight": (4096, 8)}, "F32")
    assert {"dtype-stated", "head-missing"} <= found(copy)


CHANNELS = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- if loop.index0 > messages|length - 2 and m.thinking %}{{- m.thinking }}{%- endif %}"
    "{{- '<|im_start|>assistant<|channel|>final\\n' + m.content + '<|im_end|>' }}"
    "{%- else %}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}"
)


def test_a_prompt_may_leave_the_channel_to_the_model(copy):
    """As gpt-oss's does; the content of its answers never holds a thought."""
    set_template(copy, CHANNELS)
    assert found(copy) == {"pad-is-stop"}
    without = CHANNELS.partition("{%- if add_generation_prompt")[0]
    set_template(copy, without)
    assert "template-no-prompt" in found(copy)


# --- planted in a GGUF file -------------------------------------------------------------------


def put(key, kind, data):
    return lambda m: m.__setitem__(key, Value(kind, data))


def drop(*prefixes):
    def change(metadata):
        for key in [k for k in metadata if k.startswith(prefixes)]:
            del metadata[key]

    return change


def twice(metadata):
    prefix = "qwen2.rope.scaling."
    metadata[prefix + "type"] = Value("str", "yarn")
    metadata[prefix + "factor"] = Value("f32", 4.0)
    metadata[prefix + "original_context_length"] = Value("u32", 512)
    metadata[prefix + "attn_factor"] = Value("f32", 1.1386294)


def end_elsewhere(metadata):
    """A template whose turns end with <think>'s neighbour, which is no end anywhere."""
    template = metadata["tokenizer.chat_template"].data.replace("<|im_end|>", "</think>")
    metadata["tokenizer.chat_template"] = Value("str", template)


GGUF_PLANTED = {
    "sampling-sequence": put(PREFIX + "sequence", "str", "top_k,top_p,temperature"),
    "sampling-idle": lambda m: (
        put(PREFIX + "sequence", "str", "top_k;top_p;min_p;temperature;dry;typ_p;xtc")(m),
        put(PREFIX + "penalty_repeat", "f32", 1.1)(m),
    ),
    "sampling-none": drop(PREFIX),
    "sampling-unlike": put(PREFIX + "temp", "f32", 0.8),
    "attn-factor-twice": twice,
    "gguf-pre-tokenizer": put("tokenizer.ggml.pre", "str", "llama-bpe"),
    "gguf-pre-tokenizer (missing)": drop("tokenizer.ggml.pre"),
    "gguf-pre-tokenizer (unknown)": put("tokenizer.ggml.pre", "str", "qwen9"),
    "gguf-add-bos": put("tokenizer.ggml.add_bos_token", "bool", True),
    "gguf-file-type": put("general.file_type", "u32", 15),
    "gguf-metadata": put("qwen2.context_lenght", "u32", 4096),
    "special-outside": put("tokenizer.ggml.eos_token_id", "u32", 70000),
    "never-stops": end_elsewhere,
    "template-missing": drop("tokenizer.chat_template"),
    "template-fails": put("tokenizer.chat_template", "str", "{{ 1/0 }}"),
    "norm-eps": put("qwen2.attention.layer_norm_rms_epsilon", "f32", 1e-6),
    "rope-theta": put("qwen2.rope.freq_base", "f32", 10000.0),
}


@pytest.mark.parametrize("planted", GGUF_PLANTED)
def test_planted_in_a_gguf(planted, gguf, tmp_path):
    path = rewrite_gguf(gguf, tmp_path / "tiny-qwq.gguf", GGUF_PLANTED[planted])
    assert planted.partition(" ")[0] in found(path)


JUNK = (Value("arr[i32]", [1, 2]), Value("str", "x\n\x1b[2J"), Value("i64", -1))
OTHER_KEYS = (
    "general.architecture", "general.name", "general.file_type", "qwen2.context_length",
    "qwen2.rope.scaling.type", "qwen2.rope.scaling.factor", "qwen2.rope.scaling.attn_factor",
    *SPECIAL.values(),
)  # fmt: skip


@pytest.mark.parametrize("junk", JUNK, ids=lambda v: v.type)
def test_any_type_under_any_key_of_a_gguf(junk, gguf, tmp_path, monkeypatch):
    """Each of them is told by one check, and stops none with an error that is not ours."""
    rendered = functools.cache(lambda asked: render(*json.loads(asked)))
    monkeypatch.setattr(patient_room, "render", lambda *a: rendered(json.dumps(a)))
    keys = [k for k in GgufFile.open(gguf).metadata if k.startswith(("tokenizer.", PREFIX))]
    keys += [PREFIX + name for name in SAMPLING if PREFIX + name not in keys]
    for key in (*keys, *OTHER_KEYS):
        report = diagnose(rewrite_gguf(gguf, tmp_path / "qwq.gguf", put(key, junk.type, junk.data)))
        json.dumps(report.as_json())
        if key.startswith(PREFIX) and junk.type == "arr[i32]":
            assert "gguf-metadata" in {f.id for f in report.findings}, key


def test_the_end_of_a_turn_left_to_guess(gguf, tmp_path):
    def change(metadata):
        drop("tokenizer.ggml.eot_token_id")(metadata)
        put("tokenizer.ggml.eos_token_id", "u32", 4091)(metadata)

    assert "gguf-no-eot" in found(rewrite_gguf(gguf, tmp_path / "tiny-qwq.gguf", change))


def test_llama_cpp_refuses_and_weights_are_read(gguf, tmp_path):
    bad = rewrite_gguf(gguf, tmp_path / "a.gguf", put("tokenizer.ggml.pre", "str", "qwen9"))
    report = diagnose(bad, recipe="qwq-32b", deep=True)
    told = next(f.seen for f in report.findings if f.id == "llama-cpp-refuses")
    assert "pre-tokenizer" in told.evidence
    raw = bytearray(gguf.read_bytes())
    from quant.gguf_file import GgufFile

    info = GgufFile.open(gguf).tensors["blk.3.ffn_up.weight"]
    raw[info.offset : info.offset + 2] = b"\x00\x7e"  # the scale of its first block: NaN
    row = info.nbytes // info.n_rows
    raw[info.offset + 5 * row : info.offset + 6 * row] = bytes(row)
    (tmp_path / "b.gguf").write_bytes(raw)
    report = diagnose(tmp_path / "b.gguf", deep=True)
    told = {f.id: f.seen for f in report.findings}
    assert told["weights-not-finite"].evidence == "32 of 196608 values (Q8_0)"
    assert told["weights-zero-rows"].evidence == "1 of 768 rows (Q8_0)"
    assert "llama-cpp-refuses" in report.checked and "llama-cpp-refuses" not in told


# --- hostile templates ------------------------------------------------------------------------

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch PWNED').read() }}",
    "{{ messages.__class__.__base__ }}{% set x = messages.append(1) %}",
    "{{ self._TemplateReference__context.environment.globals['x'].__globals__ }}",
    "{% for f in namespace.__init__.__globals__ %}{{ f }}{% endfor %}",
    "{{ ['']|map(attribute='__class__.__mro__')|list }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
]
RUNAWAYS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% set ns = namespace(t='aaaaaaaa') %}{% for a in range(99) %}"
    "{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "{{ '%099999999999d' % 1 }}",
    "{% include '/etc/passwd' %}",
    "{{ strftime_now('%Y' * 10**8) }}",  # folded while it is compiled
    "{{ '{:>999999999}'.format(1) }}",
    "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "{{ range(10**12) | list }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_an_escape_does_not_run(template, copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_template(copy, template)
    assert found(copy) & {"template-unsafe", "template-fails"} or not secret(template)
    assert not list(tmp_path.rglob("PWNED"))


def secret(template) -> bool:
    """Whether rendering it shows anything of Python's insides."""
    rendered = render(template, [{"messages": []}])[0]
    return rendered.text is not None and ("<class" in rendered.text or "module" in rendered.text)


@pytest.mark.parametrize("template", RUNAWAYS)
def test_a_runaway_ends_soon_and_takes_no_memory(template):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    rendered = render(template, [{"messages": []}] * 3)
    assert time.monotonic() - started < 60
    assert len(rendered) == 3 and all(r.text is None and r.problem for r in rendered)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_even_outside_the_sandbox_the_child_opens_and_starts_nothing(tmp_path):
    """The limits alone: the child's own code tries what an escaped template would."""
    from quant.doctor import sandbox

    source = sandbox.CHILD.read_text().rpartition("\nmain()")[0]
    attack = (
        "\nimport _socket, posix\nlimit_this_process()\n"
        f"for act in (lambda: posix.open({str(tmp_path / 'x')!r}, 0o101),"
        " lambda: _socket.socket(), lambda: bytearray(1 << 30)):\n"
        "    try:\n        act(); print('did it')\n"
        "    except (OSError, MemoryError) as error:\n        print(type(error).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", source + attack], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["OSError", "OSError", "MemoryError"], done.stderr


def test_templates_render_as_in_transformers(tiny_qwq):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_qwq)
    messages = [
        {"role": "user", "content": "Größe? \x7f"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
        {"role": "user", "content": "<b>&amp;</b>"},
    ]
    for name in [tokenizer.chat_template, *(r["template"] for r in RELEASES.values())]:
        for prompt in (True, False):
            theirs = tokenizer.apply_chat_template(
                messages, chat_template=name, add_generation_prompt=prompt, tokenize=False
            )
            variables = {"messages": messages, "add_generation_prompt": prompt}
            tokens = {"bos_token": tokenizer.bos_token or ""}
            assert render(name, [{**variables, **tokens}])[0].text == theirs
    tools = "{{ messages | tojson }} {{ 'a b c' | wordwrap(2) }} {{ messages | pprint }}"
    tools += "{% generation %}a{% endgeneration %}{% break %}"
    tools = "{% for m in messages %}" + tools + "{% endfor %}"
    theirs = tokenizer.apply_chat_template(messages, chat_template=tools, tokenize=False)
    assert render(tools, [{"messages": messages}])[0].text == theirs


def test_our_own_templates_have_no_finding(copy):
    for text in (template_room.CHATML, template_room.CHATML_THINKS):
        set_template(copy, text)
        assert found(copy) <= TINY


# --- the command ------------------------------------------------------------------------------


def doctor(*args):
    runner = CliRunner()
    result = runner.invoke(cli_doctor.command, list(map(str, args)), standalone_mode=False)
    assert result.exception is None, result.exception
    return result


def test_exit_codes(copy, tiny_qwq):
    assert doctor(tiny_qwq, "--strict").return_value == 0
    edit(copy, T, pad_token="<|im_end|>")
    assert doctor(copy).return_value == 0
    assert doctor(copy, "--strict").return_value == 1
    edit(copy, C, eos_token_id=4091)
    assert doctor(copy).return_value == 1


def test_the_table_fits_80_columns_and_hostile_names_are_escaped(copy):
    hostile = "\x1b[2J\x07" + "長" * 50
    edit(copy, T, pad_token=hostile)
    edit(copy, C, _name_or_path=hostile, torch_dtype="float16\n\x1b[2J")
    set_template(copy, "{{ raise_exception('\x1b[2J' * 20) }}")
    output = doctor(copy, "--format", "human").output
    assert "\x1b" not in output and "\x07" not in output
    assert "pad-outside" in output and r"\x1b[2J" in output
    assert max(len(line) for line in output.splitlines()) <= 80


def test_json(copy):
    edit(copy, T, pad_token="<|im_end|>")
    answer = json.loads(doctor(copy, "--format", "json").output)
    finding = next(f for f in answer["findings"] if f["id"] == "pad-is-eos")
    assert finding["severity"] == "warning" and finding["fix"] is True
    assert finding["where"] == "tokenizer_config.json: pad_token"
    assert answer["recipe"] == "qwq-32b" and "pad-is-eos" in answer["checked"]
    assert answer["not_checked"]["token-ids-differ"] == "needs --deep"


def test_a_recipe_can_be_named(copy):
    assert "norm-eps" in found(copy, recipe="qwen2.5")


def test_it_needs_neither_torch_nor_transformers(tiny_qwq):
    code = (
        "import sys, io, contextlib\n"
        f"from quant.cli.doctor import command\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    command([{str(tiny_qwq)!r}], standalone_mode=False)\n"
        "print(*{m.partition('.')[0] for m in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "transformers", "llama_cpp", "jinja2"}
