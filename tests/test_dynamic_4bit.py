"""Planning and writing 4-bit folders: transformers' own quantization is the oracle."""

import json
import shutil
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from model_makers import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from quant import folder_run
from quant import write_4bit as writing
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens, cut_tokens
from quant.check_4bit import check_4bit
from quant.checkpoint import Checkpoint
from quant.dynamic_4bit import Budget, Plan4bit, find_quantizable, plan_4bit
from quant.errors import BadInput, BadRecipe, CannotCreate, OutputFailed, QwqQuantError
from quant.formats.nf4 import Bnb4bit
from quant.measuring.measure import measure
from quant.sensitivity import Sensitivity, read_sensitivity
from quant.texts import held_out_texts
from quant.write_4bit import check_written, write_4bit

MODELS = ("qwen2", "qwen2-tied", "qwen3", "llama2", "llama3", "llama-bias", "mistral")
PLAIN, ALL = Budget("share", 0.0), Budget("all")
FORMATS = {
    "nf4": Bnb4bit(),
    "nf4, absmax in float32": Bnb4bit(double_quant=False),
    "fp4": Bnb4bit("fp4"),
    "fp4, absmax in float32": Bnb4bit("fp4", double_quant=False),
}
IDS = torch.arange(7, 4000, 166)[None]  # (1, 25)


def plan_keeping(folder: Path, *kept: str, format: Bnb4bit = FORMATS["nf4"]) -> Plan4bit:
    """A plan that keeps the named groups, whatever they cost."""
    plain = plan_4bit(Checkpoint.open(folder), format, PLAIN)
    assert {group.name for group in plain.groups}.issuperset(kept)
    return replace(plain, kept=frozenset(kept))


KEPT = ("model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.down_proj")


def peer_model(source: Path, plan: Plan4bit):
    """What transformers makes of the source with the same list of exceptions."""
    dtype = getattr(torch, plan.dtype)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=plan.format.quant_type,
        bnb_4bit_use_double_quant=plan.format.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=plan.skip_list,
    )
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=dtype)


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: w for file in files for name, w in load_file(file).items()}


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    a, b = load_tensors(ours), load_tensors(theirs)
    assert a.keys() == b.keys()
    for name, w in a.items():
        assert w.dtype == b[name].dtype and torch.equal(w, b[name]), name


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def assert_as_transformers_has_it(source: Path, plan: Plan4bit, folder: Path) -> None:
    """Every byte that transformers would save, and every logit that it would compute."""
    peer = peer_model(source, plan)
    peer.save_pretrained(folder.with_name("peer"))
    assert_same_tensors(folder, folder.with_name("peer"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(peer))


# --- loading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_bytes_and_logits_are_those_of_transformers_own_quantization(made_models, tmp_path, name):
    source, _ = made_models(name)
    plan = plan_keeping(source, *KEPT)
    write_4bit(plan, tmp_path / "out")
    assert_as_transformers_has_it(source, plan, tmp_path / "out")


@pytest.mark.parametrize("name", FORMATS)
def test_of_every_format_on_a_trained_model(tiny_qwq, tmp_path, name):
    plan = plan_keeping(tiny_qwq, *KEPT, format=FORMATS[name])
    write_4bit(plan, tmp_path / "out")
    assert_as_transformers_has_it(tiny_qwq, plan, tmp_path / "out")


def test_of_float16(made_models, tmp_path):
    model = made_models("qwen2")[1]
    folder = tmp_path / "half"
    make_model("qwen2", folder).half().save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    plan = plan_keeping(folder, *KEPT)
    write_4bit(plan, tmp_path / "out")
    assert_as_transformers_has_it(folder, plan, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float16
    assert model.dtype == torch.float32


def as_fp8(source: Path, folder: Path, block: int = 64) -> None:
    """Linears in FP8 with a scale for each block, and beside them what they stand for in bf16."""
    for target in (folder / "fp8", folder / "decoded"):
        shutil.copytree(source, target)
    stored, decoded = {}, {}
    for name, w in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = decoded[name] = w
            continue
        rows, columns = w.shape
        blocks = w.float().reshape(rows // block, block, columns // block, block)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        stored[name], stored[f"{name}_scale_inv"] = codes.reshape(rows, columns), scale
        decoded[name] = (codes.float() * scale[:, None, :, None]).reshape(rows, columns).bfloat16()
    save_file(stored, folder / "fp8" / "model.safetensors")
    save_file(decoded, folder / "decoded" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block]}
    (folder / "fp8" / "config.json").write_text(json.dumps(config))


def test_of_fp8_with_block_scales(tiny_qwq, tmp_path):
    as_fp8(tiny_qwq, tmp_path)
    plan = plan_keeping(tmp_path / "fp8", *KEPT)
    write_4bit(plan, tmp_path / "out")
    assert_as_transformers_has_it(tmp_path / "decoded", plan, tmp_path / "out")
    names = load_tensors(tmp_path / "out")
    assert not any("scale_inv" in name for name in names)


@pytest.mark.parametrize("name", ["qwen2moe", "qwen3moe"])
def test_of_a_mixture_of_experts_all_but_the_experts(made_models, tmp_path, name):
    source, _ = made_models(name)
    plan = plan_keeping(source, KEPT[0])
    assert "its experts, " in plan.notes[0] and "stay 16-bit" in plan.notes[0]
    write_4bit(plan, tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(ours), logits(peer_model(source, plan)))
    experts = {n: w for n, w in load_tensors(tmp_path / "out").items() if ".mlp." in n}
    assert {w.dtype for w in experts.values()} == {torch.bfloat16}


def test_exactly_the_kept_groups_are_plain_linears(tiny_qwq, tmp_path):
    write_4bit(plan_keeping(tiny_qwq, *KEPT), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    linears = {n for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    attention = {f"model.layers.0.self_attn.{part}_proj" for part in "qkv"}
    assert linears == {"lm_head", "model.layers.1.mlp.down_proj", *attention}


def test_it_generates_and_remembers_its_templates(tiny_qwq, tmp_path):
    write_4bit(plan_keeping(tiny_qwq, *KEPT), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    message = [{"role": "user", "content": "What is 33 + 89?"}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=150, do_sample=False)
    assert "122" in tokenizer.decode(output[0], skip_special_tokens=True)
    assert model.generation_config.eos_token_id == [4093, 4091]


def test_a_lora_is_attached_and_learns(tiny_qwq, tmp_path):
    from peft import LoraConfig, get_peft_model

    write_4bit(plan_keeping(tiny_qwq, *KEPT), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    targets = ["q_proj", "down_proj"]  # some of either are 4-bit, one of either is 16-bit
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 6
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("name", ["tiny", "qwen2-tied"])
def test_a_16_bit_copy(tiny_qwq, made_models, tmp_path, name):
    source = tiny_qwq if name == "tiny" else made_models(name)[0]
    plan = plan_4bit(Checkpoint.open(source), FORMATS["nf4"], ALL)
    write_4bit(plan, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    expected = {name: w.bfloat16() for name, w in load_tensors(source).items()}
    found = load_tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], w) for name, w in expected.items())
    source_model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(source_model)
    )


def test_plain_4_bit_keeps_nothing_but_the_head(made_models, tmp_path):
    source, _ = made_models("qwen2")
    plan = plan_4bit(Checkpoint.open(source), FORMATS["nf4"], PLAIN)
    assert plan.skip_list == ["lm_head"] and not plan.kept and plan.choice is None
    write_4bit(plan, tmp_path / "out")
    assert_as_transformers_has_it(source, plan, tmp_path / "out")


def test_searched_scales_load_too_and_differ_in_codes_alone(tiny_qwq, tmp_path):
    plan = plan_keeping(tiny_qwq, *KEPT, format=Bnb4bit(search_scales=True))
    write_4bit(plan, tmp_path / "out")
    write_4bit(plan_keeping(tiny_qwq, *KEPT), tmp_path / "plain")
    searched, plain = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "plain")
    differing = {name for name, w in searched.items() if not torch.equal(w, plain[name])}
    down = "model.layers.2.mlp.down_proj.weight"
    assert {name for name in differing if name.startswith(down)} == {
        down, f"{down}.absmax", f"{down}.nested_absmax", f"{down}.quant_state.bitsandbytes__nf4"
    }  # fmt: skip
    source = logits(AutoModelForCausalLM.from_pretrained(tiny_qwq, dtype=torch.bfloat16))
    loss = {
        name: float((logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)) - source).norm())
        for name in ("out", "plain")
    }
    assert loss["out"] < loss["plain"]


def test_shards_in_and_shards_out(tiny_qwq, tmp_path, monkeypatch):
    source = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(tiny_qwq, dtype=torch.bfloat16)
    model.save_pretrained(source, max_shard_size="3MB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_qwq / file, source)
    assert len(list(source.glob("*.safetensors"))) > 3
    sink = partial(folder_run.ShardedSink, max_shard_nbytes=2_000_000)
    monkeypatch.setattr(folder_run, "ShardedSink", sink)
    plan = plan_keeping(source, *KEPT)
    write_4bit(plan, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert_as_transformers_has_it(source, plan, tmp_path / "out")


# --- the plan ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tiny_qwq) -> Sensitivity:
    """Of the trained model, on few tokens."""
    checkpoint = Checkpoint.open(tiny_qwq)
    tokens = cut_tokens(checkpoint, held_out_texts(), 512, 128)
    model = StreamedModel(checkpoint)
    return measure(model, tokens, Bnb4bit(), "bfloat16", frozenset({"activation", "gradient"}))


@pytest.mark.parametrize("name", [*FORMATS, "searched"])
def test_sizes_are_known_before_anything_is_written(tiny_qwq, tmp_path, name):
    format = FORMATS.get(name, Bnb4bit(search_scales=True))
    plan = plan_keeping(tiny_qwq, *KEPT, format=format)
    write_4bit(plan, tmp_path / "out")
    nbytes = sum(w.numel() * w.element_size() for w in load_tensors(tmp_path / "out").values())
    n_4bit = sum(t.is_4bit for t in plan.tensors)
    assert 0 <= plan.nbytes - nbytes <= 20 * n_4bit
    extra = sum(plan.extra_nbytes[name] for name in KEPT)
    assert plan.nbytes - plan_keeping(tiny_qwq, format=format).nbytes == extra


@pytest.mark.parametrize(
    ("budget", "share"),
    [
        (Budget("share", 0.10), 0.10),
        (Budget("bytes", 500_000), None),
        (Budget("bits_per_weight", 5.0), None),
    ],
)
def test_the_choice_is_the_best_of_all_that_fit(tiny_qwq, measured, budget, share):
    """Of every set of at most six groups; more never fit in 10 %."""
    checkpoint = Checkpoint.open(tiny_qwq)
    plain = plan_4bit(checkpoint, FORMATS["nf4"], PLAIN)
    plan = plan_4bit(checkpoint, FORMATS["nf4"], budget, measured)
    linears = sum(2 * np.prod(checkpoint.tensors[f"{m}.weight"].shape) for m in measured.modules)
    room = {
        "share": budget.value * plain.nbytes,
        "bytes": budget.value,
        "bits_per_weight": (budget.value - plain.bits_per_weight) * linears / 16,
    }[budget.unit]
    assert 0 < plan.nbytes - plain.nbytes <= room
    value, cost = measured.values("gradient"), plain.extra_nbytes
    best = max(
        sum(value[name] for name in names)
        for n in range(1, 7)
        for names in combinations(value, n)
        if sum(cost[name] for name in names) <= room
    )
    assert sum(value[name] for name in plan.kept) == pytest.approx(best)
    assert plan.choice.chosen == (plan.nbytes, pytest.approx(sum(value.values()) - best))
    assert plan.bits_per_weight == pytest.approx(
        plain.bits_per_weight + 16 * (plan.nbytes - plain.nbytes) / linears
    )


def test_the_curve_goes_from_plain_4_bit_to_16_bits(tiny_qwq, measured):
    checkpoint = Checkpoint.open(tiny_qwq)
    plan = plan_4bit(checkpoint, FORMATS["nf4"], sensitivity=measured)
    curve = plan.choice.curve
    assert curve[0][0] == plan_4bit(checkpoint, FORMATS["nf4"], PLAIN).nbytes
    assert curve[-1] == (plan_4bit(checkpoint, FORMATS["nf4"], ALL).nbytes, 0.0)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(curve))


@pytest.mark.parametrize(
    "budget", [Budget("share", 0.001), Budget("bytes", 1000), Budget("bits_per_weight", 4.2)]
)
def test_a_budget_that_buys_nothing_says_what_would(tiny_qwq, measured, budget):
    checkpoint = Checkpoint.open(tiny_qwq)
    with pytest.raises(BadRecipe, match="buys nothing") as caught:
        plan_4bit(checkpoint, FORMATS["nf4"], budget, measured)
    assert (
        "o_proj, costs" in caught.value.what and "1.4 % or 4.38 bits per weight" in caught.value.why
    )
    enough = Budget("bits_per_weight", 4.39)
    assert len(plan_4bit(checkpoint, FORMATS["nf4"], enough, measured).kept) == 1


def test_sensitivities_of_another_model_format_or_metric(tiny_qwq, made_models, measured):
    other = Checkpoint.open(made_models("qwen2")[0])
    with pytest.raises(BadInput, match="those of another model"):
        plan_4bit(other, FORMATS["nf4"], sensitivity=measured)
    checkpoint = Checkpoint.open(tiny_qwq)
    with pytest.raises(BadInput, match="kld is not among"):
        plan_4bit(checkpoint, FORMATS["nf4"], sensitivity=measured, metric="kld")
    assert not plan_4bit(checkpoint, FORMATS["nf4"], sensitivity=measured).notes
    (note,) = plan_4bit(checkpoint, FORMATS["fp4"], sensitivity=measured).notes
    assert note == "the sensitivities were measured with quant_type nf4, not fp4"


def test_models_that_cannot_be_quantized_so(tiny_qwq, tmp_path):
    shutil.copytree(tiny_qwq, tmp_path / "other")
    config = json.loads((tiny_qwq / "config.json").read_text())
    config["architectures"] = ["MambaForCausalLM"]
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="Mamba"):
        find_quantizable(Checkpoint.open(tmp_path / "other"))
    checkpoint = Checkpoint.open(tiny_qwq)
    embedding = {"model.embed_tokens.weight": checkpoint.tensors["model.embed_tokens.weight"]}
    with pytest.raises(BadInput, match="no linear layers"):
        find_quantizable(replace(checkpoint, tensors=embedding))


# --- the folder -------------------------------------------------------------------------------


def test_what_is_in_the_folder(tiny_qwq, measured, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_qwq, source)
    front = "---\nlicense: apache-2.0\nlanguage: en\nlicense_name: a: b # c\n---\nOurs."
    (source / "README.md").write_text(front)
    (source / "LICENSE").write_text("terms")
    (source / "training_args.bin").write_text("pickle")
    plan = plan_4bit(Checkpoint.open(source), FORMATS["nf4"], sensitivity=measured)
    write_4bit(plan, tmp_path / "out", base_model="Qwen/QwQ-32B", command=("qwq-quant", "x"))
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "LICENSE", "README.md", "config.json", "figures", "generation_config.json",
        "model.safetensors", "qwq-quant.json", "sensitivity.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"]["bnb_4bit_quant_storage"] == "uint8"
    assert config["quantization_config"]["llm_int8_skip_modules"] == plan.skip_list
    assert read_sensitivity(out / "sensitivity.json") == measured
    figures = {p.suffix for p in (out / "figures").iterdir()}
    assert figures == {".csv", ".html", ".png", ".svg"}
    card = (out / "README.md").read_text()
    assert 'base_model: "Qwen/QwQ-32B"\nbase_model_relation: quantized\n' in card
    assert "license: apache-2.0\n" in card and "a: b" not in card
    assert all(f"`{name}`" in card for name in plan.kept)
    manifest = json.loads((out / "qwq-quant.json").read_text())["outputs"]["."]
    listed = {file["name"] for file in manifest["files"]} | {"qwq-quant.json"}
    assert listed == {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert manifest["kept"] == sorted(plan.kept) and manifest["command"] == ["qwq-quant", "x"]


def test_a_name_cannot_break_out_of_the_card(made_models, tmp_path):
    source = tmp_path / "<img src=x>`](http:\x1b[2J)"
    shutil.copytree(made_models("qwen2")[0], source)
    write_4bit(plan_4bit(Checkpoint.open(source), FORMATS["nf4"], PLAIN), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\x1b" not in card and "<img" not in card.replace("\\<img", "")


def test_any_number_of_threads_writes_the_same_bytes(tiny_qwq, tmp_path, monkeypatch):
    plan = plan_keeping(tiny_qwq, *KEPT, format=Bnb4bit(search_scales=True))
    for n in (1, 5):
        monkeypatch.setattr(writing, "worker_count", lambda n=n: n)
        write_4bit(plan, tmp_path / f"{n}")
    assert (tmp_path / "1" / "model.safetensors").read_bytes() == (
        tmp_path / "5" / "model.safetensors"
    ).read_bytes()


def test_progress_counts_every_weight(tiny_qwq, tmp_path):
    seen = []
    plan = plan_keeping(tiny_qwq, *KEPT)
    write_4bit(plan, tmp_path / "out", progress=seen.append)
    assert sum(seen) == plan.n_weights == 6_822_144


def nothing_but(tmp_path: Path, *names: str) -> bool:
    return {p.name for p in tmp_path.iterdir()} == set(names)


def spoiled(source: Path, folder: Path, name: str, value: float) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["self_attn.q_proj.weight", "input_layernorm.weight"])
def test_nan_and_infinite_weights_leave_nothing_behind(made_models, tmp_path, part, value):
    name = f"model.layers.1.{part}"
    folder = spoiled(made_models("qwen2")[0], tmp_path / "bad", name, value)
    with pytest.raises(BadInput, match=r"layers\.1\..* has 1 NaN or infinite weights"):
        write_4bit(plan_keeping(folder), tmp_path / "out")
    assert nothing_but(tmp_path, "bad")


def test_weights_that_float16_cannot_hold(made_models, tmp_path):
    folder = spoiled(made_models("qwen2")[0], tmp_path / "big", "model.norm.weight", 7e4)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    with pytest.raises(BadInput, match=r"model\.norm\.weight has weights that float16") as caught:
        write_4bit(plan_keeping(folder), tmp_path / "out")
    assert "bfloat16" in caught.value.next_step
    assert nothing_but(tmp_path, "big")


def test_a_source_that_changes_while_it_is_read(made_models, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(made_models("qwen2")[0], source)
    plan = plan_keeping(source)

    def touch(_):
        (source / "model.safetensors").touch()

    with pytest.raises(BadInput, match="changed while it was being read"):
        write_4bit(plan, tmp_path / "out", progress=touch)
    assert nothing_but(tmp_path, "source")


def test_a_failing_check_leaves_an_older_output_as_it_was(made_models, tmp_path):
    plan = plan_keeping(made_models("qwen2")[0])
    write_4bit(plan, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").stat().st_ino
    with pytest.raises(CannotCreate, match="exists already"):
        write_4bit(plan, tmp_path / "out")

    def check(plan, folder):
        assert folder.name == ".out.partial"
        raise BadInput("no good")

    with pytest.raises(BadInput, match="no good"):
        write_4bit(plan, tmp_path / "out", force=True, check=check)
    assert (tmp_path / "out" / "model.safetensors").stat().st_ino == before
    write_4bit(plan, tmp_path / "out", force=True)
    assert nothing_but(tmp_path, "out")


def test_a_full_disk_is_seen_before_anything_is_written(made_models, tmp_path, monkeypatch):
    plan = plan_keeping(made_models("qwen2")[0])
    monkeypatch.setattr(Plan4bit, "nbytes", 1 << 60)
    with pytest.raises(OutputFailed, match=r"needs 1152921.5 TB, but only .* are free"):
        write_4bit(plan, tmp_path / "out")
    assert nothing_but(tmp_path)


def test_a_folder_whose_list_does_not_fit_its_weights_is_caught(made_models, tmp_path):
    source, _ = made_models("qwen2")
    write_4bit(plan_keeping(source, *KEPT), tmp_path / "out")
    for kept in (KEPT[:1], (*KEPT, "model.layers.2.self_attn.o_proj")):
        with pytest.raises(QwqQuantError, match="would misread"):
            check_written(plan_keeping(source, *kept), tmp_path / "out")


def test_a_wrong_list_ends_the_run_and_leaves_nothing(made_models, tmp_path, monkeypatch):
    plan = plan_keeping(made_models("qwen2")[0], *KEPT)
    monkeypatch.setattr(Plan4bit, "skip_list", ["lm_head", "model.layers.1"])
    with pytest.raises(QwqQuantError, match="would misread"):
        write_4bit(plan, tmp_path / "out")
    assert nothing_but(tmp_path)


# --- the check at the end ---------------------------------------------------------------------


def expected_scores(source, folder, ids) -> tuple[float, float, float]:
    """transformers' in float32, weights as bitsandbytes decodes them: KL, same top, perplexity."""
    from bitsandbytes.functional import dequantize_4bit

    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    candidate = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, module in loaded.named_modules():
        if "4bit" in type(module).__name__:
            w = dequantize_4bit(module.weight.data, module.weight.quant_state)
            candidate.get_submodule(name).weight.data = w.float()
    half, ids = ids.shape[1] // 2, torch.from_numpy(ids)
    with torch.no_grad():
        p, q = (m(ids).logits[:, half:-1].double().log_softmax(-1) for m in (reference, candidate))
    kld = (p.exp() * (p - q)).sum(-1).mean()
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    nll = -q.gather(-1, ids[:, half + 1 :, None]).mean()
    return float(kld), float(same), float(nll.exp())


def test_the_check_scores_what_is_on_the_disk(tiny_qwq, tmp_path):
    checkpoint = Checkpoint.open(tiny_qwq)
    tokens = cut_tokens(checkpoint, held_out_texts(), 512, 128)
    plan = plan_keeping(tiny_qwq, *KEPT, format=Bnb4bit(search_scales=True))
    steps, folders = [], []

    def check(plan, folder):
        folders.append(folder)
        return check_4bit(plan, folder, tokens, "cpu", steps.append)

    written = write_4bit(plan, tmp_path / "out", check=check)
    source, plain, own = written.results
    assert steps == [1] * 18 and [r.name for r in written.results] == [
        "source", "plain NF4", "dynamic 4-bit"
    ]  # fmt: skip
    write_4bit(plan_keeping(tiny_qwq), tmp_path / "plain")
    for result, folder in ((plain, "plain"), (own, "out")):
        kld, same, perplexity = expected_scores(tiny_qwq, tmp_path / folder, tokens.ids)
        assert result.kld == pytest.approx(kld, rel=1e-3)
        assert result.same_top == pytest.approx(same, abs=1e-9)
        assert result.perplexity == pytest.approx(perplexity, rel=1e-4)
        assert result.n_tokens == 4 * 63
    assert source.kld is None and source.perplexity < own.perplexity * 1.05
    assert own.kld < plain.kld
    assert f"{own.kld:.5f}" in (tmp_path / "out" / "README.md").read_text()


def test_a_16_bit_copy_has_lost_nothing(made_models, tmp_path):
    checkpoint = Checkpoint.open(made_models("qwen3moe")[0])
    ids = np.random.default_rng(0).integers(0, 4000, (2, 32))
    plan = plan_4bit(checkpoint, FORMATS["nf4"], ALL)
    results = write_4bit(
        plan,
        tmp_path / "out",
        check=lambda plan, folder: check_4bit(plan, folder, Tokens(ids, "x", "0" * 64), "cpu"),
    ).results
    assert results[2].name == "16-bit copy" and 0 <= results[2].kld < 1e-4 < results[1].kld
