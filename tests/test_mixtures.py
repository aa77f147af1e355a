"""Which tensor gets which format: the same as the real llama_model_quantize, tensor by tensor."""

import ctypes
import re
from pathlib import Path

import gguf
import llama_cpp
import llama_oracle
import numpy as np
import pytest
from model_makers import make_model

from quant.assembly import Assembly, Piece
from quant.errors import BadRecipe
from quant.formats import FORMATS
from quant.gguf_file import open_gguf
from quant.mixtures import FALLBACK, MIXTURES, Choices, Model, assign_formats
from quant.source import open_source
from quant.to_gguf import Wishes, plan_gguf
from quant.write_gguf import write_gguf

SHAPES = {
    "gqa 1": ("llama2", {"num_attention_heads": 8, "num_key_value_heads": 8}),
    "gqa 2, tied": ("qwen2-tied", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "gqa 4": ("qwen2", {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "qwen3 gqa 8": ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 1}),
    "80 layers": ("qwen2", {"num_hidden_layers": 80, "num_attention_heads": 8}),
    "80 layers, llama": ("llama2", {"num_hidden_layers": 80, "num_attention_heads": 8}),
    "shared expert": ("qwen2moe", {"num_attention_heads": 8, "num_key_value_heads": 8}),
    "4 experts": ("qwen3moe", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "8 experts": ("qwen3moe", {"num_experts": 8, "num_attention_heads": 8}),
    "odd rows": ("qwen2", {"hidden_size": 288, "intermediate_size": 328, "num_attention_heads": 4}),
}
"""Name -> (architecture of model_makers, config): what the rules look at, in many combinations."""

_PRINTED = re.compile(r"\] +(\S+) +- .*?type = +(\w+),(.*)")


@pytest.fixture(scope="module")
def bf16_files(tmp_path_factory):
    """name -> a BF16 GGUF file of that shape, written by us."""
    files = {}

    def get(name: str) -> Path:
        if name not in files:
            base, config = SHAPES[name]
            folder = tmp_path_factory.mktemp("shape")
            common = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 20}
            if "moe" in base:
                common |= {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
            make_model(base, folder / "model", **{**common, **config})
            job = plan_gguf(open_source(str(folder / "model")), Wishes("BF16"))
            write_gguf(job, folder / "bf16.gguf")
            files[name] = folder / "bf16.gguf"
        return files[name]

    return get


def quantize(
    source: Path, output: Path, mixture, dry_run=False, pure=False, importance=None
) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    if importance:
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            flat = np.ascontiguousarray(values.ravel())
            importance[name] = flat.reshape(values.shape)  # keeps it alive
            entry.name = name.encode()
            entry.data = flat.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = flat.size
        params.imatrix = entries
    params.ftype, params.nthread, params.dry_run, params.pure = mixture.file_type, 1, dry_run, pure
    llama_oracle.listen()
    result = llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), params)
    assert result == 0, "".join(llama_oracle.LOG[-4:])


def llama_types(source: Path, mixture, pure: bool, with_importance: bool) -> dict[str, str]:
    """Tensor name -> format that llama.cpp would choose, from what its dry run prints."""
    importance = {"any.weight": np.ones((1, 32), np.float32)} if with_importance else None
    output = source.with_suffix(".none")
    quantize(source, output, mixture, dry_run=True, pure=pure, importance=importance)
    found = {}
    for line in "".join(llama_oracle.LOG).splitlines():
        if match := _PRINTED.search(line):
            name, stored, rest = match.groups()
            target = re.search(r"\((\w+)\)\s*$", rest)
            found[name] = (target.group(1) if target else stored).upper()
    return found


@pytest.mark.parametrize("options", ["", "pure", "with importance"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_choice_is_llama_cpp_s(shape, options, bf16_files):
    source = open_gguf(bf16_files(shape))
    tensors = [Assembly(t.name, t.shape, (Piece.whole(t),)) for t in source.tensors.values()]
    model = Model.from_metadata(source.metadata)
    choices = Choices(pure=options == "pure", has_importance=options == "with importance")
    checked = 0
    for mixture in MIXTURES.values():
        if mixture.name in ("F32", "F16", "BF16"):
            continue
        ours = {a.name: a.format.name for a in assign_formats(tensors, mixture, model, choices)}
        theirs = llama_types(source.path, mixture, choices.pure, choices.has_importance)
        assert ours == theirs, mixture.name
        checked += len(ours)
    assert checked > 1000


NEED_NO_IMPORTANCE = [n for n in MIXTURES if not n.startswith(("IQ", "F", "BF")) and n != "Q2_K_S"]


@pytest.mark.parametrize("name", NEED_NO_IMPORTANCE)
def test_whole_files_hold_llama_cpp_s_bytes(name, tiny_qwq, tmp_path):
    for output, source, type_name in (("bf16", tiny_qwq, "BF16"), ("ours", tiny_qwq, name)):
        job = plan_gguf(open_source(str(source)), Wishes(type_name))
        write_gguf(job, tmp_path / f"{output}.gguf")
    quantize(tmp_path / "bf16.gguf", tmp_path / "theirs.gguf", MIXTURES[name])
    ours = {t.name: t for t in gguf.GGUFReader(tmp_path / "ours.gguf").tensors}
    theirs = gguf.GGUFReader(tmp_path / "theirs.gguf").tensors
    assert len(ours) == len(theirs) == 75
    for tensor in theirs:
        assert tensor.tensor_type == ours[tensor.name].tensor_type
        assert np.array_equal(tensor.data, ours[tensor.name].data), tensor.name


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two layers whose rows fill blocks of 256, as a BF16 file; a random importance matrix for all
    their weights: its file, and name -> float32."""
    from quant.importance import write_importance

    folder, rng = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    config = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    make_model("qwen2", folder / "model", **config, num_attention_heads=4, num_key_value_heads=2)
    job = plan_gguf(open_source(str(folder / "model")), Wishes("BF16"))
    write_gguf(job, folder / "bf16.gguf")
    sums = {
        a.name: rng.gamma(0.5, size=(1, a.source.n_columns)).astype(np.float32) * 100
        for a in job.plan.assignments
        if a.name.startswith("blk.") and len(a.source.shape) == 2
    }
    counts = {name: np.full(1, 2048, np.float32) for name in sums}
    path = folder / "imatrix.gguf"
    write_importance(path, sums, counts, chunk_size=512, n_chunks=4, datasets=["random"])
    values = {name: values / np.float32(2048) for name, values in sums.items()}
    return folder / "bf16.gguf", path, values


@pytest.mark.parametrize("name", sorted(MIXTURES.keys() - {"F32", "F16", "BF16"}))
def test_whole_files_with_importance_hold_llama_cpp_s_bytes(name, small, tmp_path):
    source, path, values = small
    write_gguf(plan_gguf(open_source(str(source)), Wishes(name, imatrix=path)), tmp_path / "ours")
    quantize(source, tmp_path / "theirs", MIXTURES[name], importance=values)
    ours = {t.name: t for t in gguf.GGUFReader(tmp_path / "ours").tensors}
    theirs = gguf.GGUFReader(tmp_path / "theirs").tensors
    assert len(ours) == len(theirs) == 27
    for tensor in theirs:
        assert tensor.tensor_type == ours[tensor.name].tensor_type
        assert np.array_equal(tensor.data, ours[tensor.name].data), tensor.name


def test_stacked_experts_have_each_their_importance(bf16_files, tmp_path):
    from quant.importance import write_importance

    source = bf16_files("4 experts")
    rng = np.random.default_rng(1)
    sums = {}
    for info in open_source(str(source)).tensors.values():
        if info.name.startswith("blk.") and info.name.endswith("weight") and len(info.shape) > 1:
            n = info.shape[0] if len(info.shape) == 3 else 1
            sums[info.name] = rng.gamma(0.5, size=(n, info.shape[-1])).astype(np.float32)
    counts = {name: np.full(len(v), 512, np.float32) for name, v in sums.items()}
    write_importance(tmp_path / "i.gguf", sums, counts, 512, 1, ["random"])
    job = plan_gguf(open_source(str(source)), Wishes("Q4_K_S", imatrix=tmp_path / "i.gguf"))
    write_gguf(job, tmp_path / "ours.gguf")
    values = {name: v / np.float32(512) for name, v in sums.items()}
    quantize(source, tmp_path / "theirs.gguf", MIXTURES["Q4_K_S"], importance=values)
    ours = {t.name: t for t in gguf.GGUFReader(tmp_path / "ours.gguf").tensors}
    for tensor in gguf.GGUFReader(tmp_path / "theirs.gguf").tensors:
        assert np.array_equal(tensor.data, ours[tensor.name].data), tensor.name


def test_a_type_that_needs_importance_and_has_none(tiny_qwq):
    with pytest.raises(BadRecipe, match="needs an importance matrix"):
        plan(tiny_qwq, "Q2_K_S")
    with pytest.raises(BadRecipe, match="1 of 75 tensors get it, such as token_embd"):
        plan(tiny_qwq, "Q4_K_M", embedding_type="IQ2_XXS")


def plan(model, mixture="Q4_K_M", **choices):
    job = plan_gguf(open_source(str(model)), Wishes(mixture, choices=Choices(**choices)))
    return {a.name: a.format.name for a in job.plan.assignments}


def test_choices_by_hand(tiny_qwq):
    usual = plan(tiny_qwq)
    chosen = plan(
        tiny_qwq,
        output_type="Q8_0",
        embedding_type="Q5_0",
        tensor_types=((r"blk\.0\.", "F16"), ("attn_v", "Q8_0")),
    )
    assert chosen["output.weight"] == "Q8_0" and chosen["token_embd.weight"] == "Q5_0"
    assert chosen["blk.0.attn_v.weight"] == "F16"  # the first match wins
    assert chosen["blk.1.attn_v.weight"] == "Q8_0"
    assert chosen["blk.0.attn_norm.weight"] == "F32"
    rest = [n for n in usual if "blk.0." not in n and "attn_v" not in n and n.startswith("blk")]
    assert all(chosen[n] == usual[n] for n in rest)  # no pattern was shifted


def test_a_pattern_that_matches_nothing_speaks(tiny_qwq):
    with pytest.raises(BadRecipe, match=r"matches no tensor.*down_porj"):
        plan(tiny_qwq, tensor_types=(("ffn_down_porj", "Q8_0"),))
    with pytest.raises(
        BadRecipe, match=r"matches only blk\.0\.attn_norm\.weight, which stays exact"
    ):
        plan(tiny_qwq, tensor_types=(("attn_norm", "Q8_0"),))


def test_a_pattern_goes_before_the_output_s_type_where_the_embedding_is_the_output(made_models):
    folder, _ = made_models("qwen2-tied")
    by_hand = {"output_type": "Q8_0", "tensor_types": (("token_embd", "Q5_0"),)}
    assert plan(folder, **by_hand)["token_embd.weight"] == "Q5_0"
    assert plan(folder, output_type="Q8_0", pure=True)["token_embd.weight"] == "Q8_0"


def test_reasons_are_short(made_models, tmp_path):
    """Rows that fit no block of 256, and a long pattern, in 80 columns."""
    from click.testing import CliRunner

    from quant.cli import cli

    folder, _ = made_models("qwen2")
    words = ["to-gguf", folder, "-o", tmp_path, "--type", "Q4_K_M", "--dry-run", "--tensor-type"]
    printed = CliRunner().invoke(cli, [*map(str, words), f"attn_q|{'a' * 90}=Q8_0"]).output
    assert "do not fit Q4_K" in printed and "--tensor-type attn_q" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_every_fallback_exists():
    for wanted, fallback in FALLBACK.items():
        assert FORMATS[wanted].block_size == 256
        assert FORMATS[fallback].block_size == 32
