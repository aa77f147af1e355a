"""A file of a given size: every tensor's format chosen by measured errors, judged by llama.cpp."""

import itertools
import json
import re
import shlex
import shutil

import gguf
import llama_oracle
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from quant.assembly import Assembly, Piece
from quant.cli import cli
from quant.errors import BadRecipe, UsageError
from quant.evaluation.chunks import cut_chunks
from quant.evaluation.divergence import Accumulator, compare_logits
from quant.evaluation.runners.gguf import GgufRunner
from quant.formats import FORMATS
from quant.gguf_file import open_gguf, padded
from quant.importance import write_importance
from quant.mixtures import MIXTURES, NEEDS_IMPORTANCE, Choices
from quant.plan import Assignment, Plan
from quant.source import open_source
from quant.target_size import (
    KIND_WEIGHT,
    LADDER,
    OUTPUT_WEIGHT,
    Measured,
    Target,
    choose_formats,
    damage_weights,
    ladder,
    measure,
    sample_rows,
)
from quant.tensors import TensorInfo, TensorReader
from quant.texts import read_texts
from quant.to_gguf import Wishes, plan_gguf
from quant.write_gguf import write_gguf


def plan(model, bits=None, nbytes=None, **wishes):
    return plan_gguf(open_source(str(model)), Wishes(target=Target(bits, nbytes), **wishes))


def run(*args):
    return CliRunner().invoke(cli, [str(a) for a in args])


def tensor(name, w, importance=None, format="BF16"):
    """An assignment of the weights themselves."""
    source = Assembly(name, w.shape, constant=w.reshape(-1, w.shape[-1]))
    return Assignment(source, FORMATS[format], "", importance)


def weights(rng, *shape):
    return (rng.standard_normal(shape) * 0.02).astype(np.float32)


@pytest.fixture(scope="module")
def imatrix(tiny_qwq, texts, tmp_path_factory):
    """tiny-qwq's importance matrix from 4096 tokens."""
    from quant.calibration.streamed_model import StreamedModel
    from quant.calibration.tokens import cut_tokens
    from quant.imatrix import measure_importance

    source = open_source(str(tiny_qwq))
    tokens = cut_tokens(source, read_texts(texts / "calibration.jsonl"), 4096, 256)
    squares, counts = measure_importance(StreamedModel(source), tokens)
    path = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    write_importance(path, squares, counts, 256, len(tokens.ids), ["calibration"])
    return path


# --- what it is for ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out(tiny_qwq, texts, tmp_path_factory):
    """A function: mean KL divergence of a GGUF file from the BF16 one, over some 1900 positions."""
    path = tmp_path_factory.mktemp("reference") / "bf16.gguf"
    write_gguf(plan_gguf(open_source(str(tiny_qwq)), Wishes("BF16")), path)
    with GgufRunner(path) as runner:
        chunks = cut_chunks(runner, read_texts(texts / "heldout.jsonl"), 256, 4000)
        reference = list(runner.logits(chunks.inputs, chunks.first))

    def divergence(file) -> float:
        found = Accumulator()
        with GgufRunner(file) as runner:
            candidate = runner.logits(chunks.inputs, chunks.first)
            for p, q, targets in zip(reference, candidate, chunks.targets, strict=True):
                found.add(compare_logits(p, q, targets))
        return found.statistics().kld.value

    return divergence


@pytest.mark.parametrize("with_importance", [False, True])
def test_it_diverges_less_than_the_mixture_of_its_size(
    with_importance, tiny_qwq, imatrix, held_out, tmp_path
):
    wishes = {"imatrix": imatrix if with_importance else None}
    usual = plan_gguf(open_source(str(tiny_qwq)), Wishes("Q4_K_M", **wishes))
    write_gguf(usual, tmp_path / "usual.gguf")
    nbytes = (tmp_path / "usual.gguf").stat().st_size
    write_gguf(plan(tiny_qwq, nbytes=nbytes, **wishes), tmp_path / "target.gguf")
    assert 0.999 * nbytes < (tmp_path / "target.gguf").stat().st_size <= nbytes
    assert held_out(tmp_path / "target.gguf") < 0.95 * held_out(tmp_path / "usual.gguf")


@pytest.mark.parametrize("bits", [2.7, 3.3, 4.5, 6.0, 9.0, 15.0])
def test_bits_per_weight_are_met_and_used(bits, tiny_qwq):
    job = plan(tiny_qwq, bits=bits)
    assert 0.985 * bits < job.plan.bits_per_weight <= bits
    assert job.type_name == f"{job.plan.bits_per_weight:.2f}bpw"


@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied", "qwen3moe", "llama3", "mistral"])
def test_files_of_every_kind_of_model_are_as_large_as_asked_and_load(name, made_models, tmp_path):
    """Rows of 96, 128 and 192 weights: no blocks of 256, but blocks of 32."""
    folder, _ = made_models(name)
    largest = plan_gguf(open_source(str(folder)), Wishes("BF16")).plan.nbytes
    nbytes = round(0.45 * largest)
    job = plan(folder, nbytes=nbytes)
    write_gguf(job, tmp_path / "m.gguf")
    assert 0.97 * nbytes < (tmp_path / "m.gguf").stat().st_size <= nbytes
    assert np.isfinite(llama_oracle.logits(tmp_path / "m.gguf", [1, 2, 3])).all()
    for a in job.plan.assignments:
        assert a.source.n_columns % a.format.block_size == 0
    narrow = [a for a in job.plan.assignments if a.error is not None and a.source.n_columns % 256]
    assert len({a.format.name for a in narrow} & set(LADDER[32])) > 1


def test_all_parts_of_a_split_file_together_are_as_large_as_asked(tiny_qwq, tmp_path):
    job = plan(tiny_qwq, nbytes=4_000_000, max_file_nbytes=100_000)
    result = write_gguf(job, tmp_path / "m.gguf")
    assert len(result.files) > 30
    assert 3_960_000 < sum(file.path.stat().st_size for file in result.files) <= 4_000_000


def test_what_cannot_be_as_small_as_planned_is_told_with_what_to_do(tiny_qwq, tmp_path):
    """A NaN in a row that is kept in 16 bits: the true size, and the option that makes room."""
    model, output = tmp_path / "nan", tmp_path / "m.gguf"
    shutil.copytree(tiny_qwq, model)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][5, 3] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    args = ["to-gguf", model, "-o", output, "--target-bpw", "5.6", "--nan-policy", "keep-16bit"]
    first = run(*args, "--format", "json")
    true = 8 * sum(t.nbytes for t in open_gguf(output).tensors.values()) / 6.82e6
    assert json.loads(first.stdout)["bits_per_weight"] == pytest.approx(true, rel=1e-3)
    assert true > 6 and "over the target" in first.stderr
    (option,) = shlex.split(first.stderr.splitlines()[-1])
    assert option == r"--tensor-type=^output\.weight$=BF16"
    again = run(*args, option, "--force")
    assert "over the target" not in again.stderr
    said = re.search(r"([\d.]+) bits per weight", again.stdout)
    assert 5.5 < float(said[1]) <= 5.6


def test_what_the_user_fixed_is_counted_in_the_budget(tiny_qwq):
    fixed = Choices(output_type="Q8_0", embedding_type="Q6_K", tensor_types=((r"attn_v", "F16"),))
    job = plan(tiny_qwq, bits=5.5, choices=fixed)
    formats = {a.name: a.format.name for a in job.plan.assignments}
    assert formats["output.weight"] == "Q8_0" and formats["token_embd.weight"] == "Q6_K"
    assert {f for n, f in formats.items() if "attn_v.weight" in n} == {"F16"}
    assert {f for n, f in formats.items() if "norm" in n or "bias" in n} == {"F32"}
    assert 0.985 * 5.5 < job.plan.bits_per_weight <= 5.5


def test_formats_that_need_importance_are_used_only_with_it(tiny_qwq, imatrix):
    def chosen(path):
        job = plan(tiny_qwq, bits=2.9, imatrix=path)
        return {a.format.name: a.importance is not None for a in job.plan.assignments}

    assert not chosen(None).keys() & set(NEEDS_IMPORTANCE)
    with_importance = chosen(imatrix)
    assert with_importance.keys() & set(NEEDS_IMPORTANCE)
    assert all(with_importance[name] for name in with_importance.keys() & set(NEEDS_IMPORTANCE))


def test_the_number_of_threads_changes_nothing(tiny_qwq, monkeypatch):
    from quant import target_size

    chosen = []
    for n in (1, 7):
        monkeypatch.setattr(target_size, "worker_count", lambda n=n: n)
        chosen.append([(a.format.name, a.error) for a in plan(tiny_qwq, 4.5).plan.assignments])
    assert chosen[0] == chosen[1]


def test_a_16_bit_gguf_gives_what_its_checkpoint_gives(tiny_qwq, tmp_path):
    write_gguf(plan_gguf(open_source(str(tiny_qwq)), Wishes("BF16")), tmp_path / "bf16.gguf")
    write_gguf(plan(tiny_qwq, bits=4.5), tmp_path / "direct.gguf")
    write_gguf(plan(tmp_path / "bf16.gguf", bits=4.5), tmp_path / "two.gguf")
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "direct.gguf").read_bytes()
    result = run("to-gguf", tmp_path / "two.gguf", "-o", tmp_path / "x.gguf", "--target-bpw", "4")
    assert result.exit_code == 65 and "quantized already" in result.output


def test_ladders_by_row_length():
    def names(n_columns, importance=None, dtype="BF16"):
        info = TensorInfo("x", (2, n_columns), dtype, None, 0, 0)
        source = Assembly("x", (2, n_columns), (Piece.whole(info),))
        return [f.name for f in ladder(Assignment(source, FORMATS["F32"], "", importance))]

    assert names(512, np.ones((1, 512), np.float32)) == [*LADDER[256], "BF16"]
    assert names(512) == [n for n in LADDER[256] if n not in NEEDS_IMPORTANCE] + ["BF16"]
    assert names(96, dtype="F16") == [*LADDER[32], "F16"]
    assert names(100) == ["BF16"]
    for rungs in LADDER.values():
        bits = [FORMATS[name].bits_per_weight for name in rungs]
        assert bits == sorted(bits)


def test_nothing_left_to_choose(tiny_qwq):
    with pytest.raises(BadRecipe, match="nothing to choose"):
        plan(tiny_qwq, bits=5, choices=Choices(tensor_types=((r".", "Q4_K"),)))


@pytest.mark.parametrize(("name", "is_advised"), [("tiny", True), ("qwen2", False)])
def test_a_matrix_is_advised_only_where_it_helps(name, is_advised, tiny_qwq, made_models):
    """Rows of 96 and 128 have no formats that need one."""
    model = tiny_qwq if name == "tiny" else made_models(name)[0]
    with pytest.raises(BadRecipe, match="too small") as caught:
        plan(model, bits=1.2)
    assert ("--imatrix" in caught.value.next_step) == is_advised


def test_the_verdict_near_16_bits(tiny_qwq, tmp_path):
    """All in 16 bits is no damage; a little less, and the bound is near 0: no ratio is said."""
    (file,) = write_gguf(
        plan_gguf(open_source(str(tiny_qwq)), Wishes("BF16")), tmp_path / "bf16.gguf"
    ).files
    for less, words in ((0, "damage 0, the least possible"), (2000, "is the bound")):
        notes = plan(tiny_qwq, nbytes=file.nbytes - less).notes
        (note,) = [n for n in notes if n.startswith("Target")]
        assert words in note and "inf" not in note, note


# --- the file says what it is -----------------------------------------------------------------


def test_the_file_type_is_that_of_most_weights(tiny_qwq, tmp_path):
    job = plan(tiny_qwq, bits=5.6)
    n_weights = {}
    for a in job.plan.assignments:
        n_weights[a.format.name] = n_weights.get(a.format.name, 0) + a.source.n_weights
    assert max(n_weights, key=n_weights.get) == "Q5_K"
    assert job.metadata["general.file_type"].data == MIXTURES["Q5_K_M"].file_type
    write_gguf(job, tmp_path / "m.gguf")
    llama_oracle.metadata(tmp_path / "m.gguf")
    assert "Q5_K - Medium" in "".join(llama_oracle.LOG)
    kept = plan(tiny_qwq, bits=5.6, overrides=("general.file_type=u32:32",))
    assert kept.metadata["general.file_type"].data == 32


def test_every_format_has_a_file_type():
    from quant.mixtures import mostly

    for format in FORMATS.values():
        a = Assignment(Assembly("x.weight", (2, 256)), format, "")
        assert MIXTURES[mostly([a]).name].default == format.name


def test_a_split_speaks_only_of_tensors_that_are_too_large_in_their_format(tiny_qwq):
    """In 16 bits, the embedding takes 2.1 MB."""
    assert not [n for n in plan(tiny_qwq, 4.5, max_file_nbytes=10**6).notes if "larger than" in n]
    assert [n for n in plan(tiny_qwq, 4.5, max_file_nbytes=10**5).notes if "larger than" in n]


# --- the plan says why ------------------------------------------------------------------------


def test_the_plan_gives_reasons_and_fits_80_columns(tiny_qwq, tmp_path):
    args = ("to-gguf", tiny_qwq, "-o", tmp_path / "m.gguf", "--target-bpw", "4.5", "--dry-run")
    table = run(*args)
    assert table.exit_code == 0, table.output
    assert max(map(len, table.output.splitlines())) <= 80
    assert re.search(r"error 0\.\d+", table.output) and re.search(r"layers 0", table.output)
    assert "Target 4.5 bits per weight: estimated damage" in " ".join(table.output.split())
    assert re.search(r"% above the bound|least possible", " ".join(table.output.split()))
    found = json.loads(run(*args, "--format", "json").stdout)
    assert found["type"].endswith("bpw")
    rules = {t["name"]: t["rule"] for t in found["tensors"]}
    assert len(rules) == 75
    assert re.fullmatch(
        r"target 4\.5 bits per weight: error [\d.e-]+, damage [\d.e-]+"
        r"(; \w+ costs [\d.]+ \w+ more and mends [\d.e-]+)?",
        rules["blk.3.ffn_down.weight"],
    )
    assert not (tmp_path / "m.gguf").exists()


def test_layers_are_folded_to_ranges():
    from quant.cli.plan_table import _ranges

    assert _ranges((5, 0, 1, 2, 9, 8)) == "0-2, 5, 8-9"
    assert _ranges((3,)) == "3"


def test_a_folder_as_output_names_the_file_after_its_bits(tiny_qwq, tmp_path):
    result = run("to-gguf", tiny_qwq, "-o", tmp_path, "--target-bpw", "4.5")
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*.gguf")
    assert re.fullmatch(r"tiny-qwq-4\.(49|50)bpw\.gguf", path.name)


# --- targets that cannot be -------------------------------------------------------------------


@pytest.mark.parametrize("options", [("--target-bpw", "1"), ("--target-size", "1MB"),
                                     ("--target-bpw", "17"), ("--target-size", "1GB")])  # fmt: skip
def test_a_target_out_of_reach_says_how_far_one_can_go(options, tiny_qwq, tmp_path):
    command = ("to-gguf", tiny_qwq, "-o", tmp_path / "m.gguf")
    result = run(*command, *options)
    assert result.exit_code == 78 and not list(tmp_path.iterdir())
    limit = re.search(r"it takes ([\d.]+) bits|\((\d+) bytes\)", result.output)
    limit = limit[1] or limit[2]
    assert run(*command, options[0], limit, "--dry-run").exit_code == 0
    beyond = 0.999 if options[1].startswith("1") and options[1] in ("1", "1MB") else 1.001
    beyond = float(limit) * beyond
    beyond = str(int(beyond)) if "size" in options[0] else str(beyond)
    assert run(*command, options[0], beyond, "--dry-run").exit_code == 78


def test_a_target_out_of_reach_is_known_before_weights_are_read(tiny_qwq):
    seen = []
    with pytest.raises(BadRecipe, match="too small"):
        plan_gguf(
            open_source(str(tiny_qwq)), Wishes(target=Target(2.0)), lambda *at: seen.append(at)
        )
    assert not seen
    plan_gguf(open_source(str(tiny_qwq)), Wishes(target=Target(4.0)), lambda *at: seen.append(at))
    assert seen == [(i, 44) for i in range(1, 45)]


@pytest.mark.parametrize(
    "options",
    [("--target-bpw", "nan"), ("--target-bpw", "0"), ("--target-bpw", "inf"),
     ("--target-bpw", "many"), ("--target-size", "0"), ("--target-bpw", "4", "--type", "Q4_0"),
     ("--target-bpw", "4", "--target-size", "4MB"), ("--target-bpw", "4", "--pure")],
)  # fmt: skip
def test_wishes_that_make_no_sense(options, tiny_qwq, tmp_path):
    result = run("to-gguf", tiny_qwq, "-o", tmp_path / "m.gguf", *options)
    assert result.exit_code == 2 and "target" in result.output


# --- errors -----------------------------------------------------------------------------------


def test_an_error_is_the_weighted_squared_error_over_the_weighted_square():
    rng = np.random.default_rng(0)
    w, importance = weights(rng, 3, 32, 256), rng.gamma(0.5, size=(3, 256)).astype(np.float32)
    format = FORMATS["Q4_K"]
    with TensorReader() as reader:
        found = measure(tensor("blk.0.ffn_up_exps.weight", w, importance), [format], reader)
        plain = measure(tensor("blk.0.ffn_up_exps.weight", w), [format], reader)
    error = energy = 0.0
    for matrix, row in zip(w, importance, strict=True):
        w_hat = format.decode(format.encode(matrix, row), matrix.shape)
        error += float(((matrix - w_hat).astype(np.float64) ** 2 @ row).sum())
        energy += float((matrix.astype(np.float64) ** 2 @ row).sum())
    assert found.errors["Q4_K"] == pytest.approx(error / energy, rel=1e-5)
    assert found.standard_error == 0.0
    flat = w.reshape(96, 256)
    w_hat = format.decode(format.encode(flat), flat.shape)
    assert plain.errors["Q4_K"] == pytest.approx(
        ((flat - w_hat) ** 2).sum() / (flat**2).sum(), 1e-5
    )
    assert plain.row_energy == pytest.approx((flat**2).sum() / 96, 1e-5)


def test_a_sample_says_how_far_it_may_be_off(monkeypatch):
    """Rows of very different sizes; over many tensors its estimates scatter as it claims."""
    from quant import target_size

    rng = np.random.default_rng(0)
    off = []
    with TensorReader() as reader:
        for _ in range(40):
            scale = np.exp(0.3 * rng.standard_normal((2048, 1))).astype(np.float32)
            a = tensor("blk.0.ffn_up.weight", weights(rng, 2048, 64) * scale)
            monkeypatch.setattr(target_size, "SAMPLE_WEIGHTS", 1 << 30)
            whole = measure(a, [FORMATS["Q4_0"]], reader)
            monkeypatch.setattr(target_size, "SAMPLE_WEIGHTS", 512 * 64)
            part = measure(a, [FORMATS["Q4_0"]], reader)
            assert 0 < part.standard_error < 0.1 and whole.standard_error == 0
            off.append((part.errors["Q4_0"] / whole.errors["Q4_0"] - 1) / part.standard_error)
    assert 0.6 < np.std(off) < 1.4 and np.abs(off).max() < 4


def test_the_sample_is_spread_over_all_rows_and_always_the_same():
    rows = sample_rows(Assembly("x", (100_000, 2048)))
    assert len(rows) == (1 << 19) // 2048 and (np.diff(rows) > 0).all()
    assert (rows // (100_000 / 256) == np.arange(256)).all()  # one of every stratum
    assert (rows == sample_rows(Assembly("y", (100_000, 2048)))).all()
    assert len(np.unique(rows % 128)) > 64
    assert (sample_rows(Assembly("z", (200, 2048))) == np.arange(200)).all()


def test_a_format_that_cannot_hold_a_tensor_is_not_chosen(tiny_qwq):
    rng = np.random.default_rng(0)
    w = weights(rng, 64, 256)
    w[3, 7] = 1e9
    a = tensor("blk.0.ffn_up.weight", w)
    with TensorReader() as reader:
        assert not measure(a, ladder(a)[:-1], reader).errors
    others = [tensor(f"blk.0.{k}.weight", weights(rng, 64, 256)) for k in ("attn_q", "attn_k")]
    free = {x.name for x in (a, *others)}
    chosen, _ = choose_formats(Plan((a, *others)), free, Target(9.0))
    formats = {x.name: x.format.name for x in chosen.assignments}
    assert formats.pop("blk.0.ffn_up.weight") == "BF16" and "BF16" not in formats.values()
    with pytest.raises(BadRecipe, match="too small"):
        choose_formats(Plan((a, *others)), free, Target(5.0))


def test_weights_that_are_not_finite_count_as_zeros():
    w = weights(np.random.default_rng(0), 8, 256)
    zeroed = w.copy()
    zeroed[0, :3] = 0
    w[0, :3] = np.nan, np.inf, -np.inf
    with TensorReader() as reader:
        found, expected = (measure(tensor("x", x.copy()), [FORMATS["Q4_K"]], reader)
                           for x in (w, zeroed))  # fmt: skip
    assert found == expected


# --- what an error costs ----------------------------------------------------------------------


def model(n_layers, importance=True, tied=False, experts=1):
    """Assignments of a model's matrices, and what measuring them would say."""
    shape = (experts, 8, 256) if experts > 1 else (8, 256)
    names = {"token_embd.weight": 2.0} | ({} if tied else {"output.weight": 1.0})
    down = "ffn_down_exps" if experts > 1 else "ffn_down"
    for layer in range(n_layers):
        gate = down.replace("down", "gate")
        names |= {f"blk.{layer}.{k}.weight": 1.0 for k in ("attn_q", "attn_v", gate)}
        names[f"blk.{layer}.attn_output.weight"] = 0.25  # x 8 rows: 2
        names[f"blk.{layer}.{down}.weight"] = 1.5  # x 8 rows: 12
    assignments, measured = [], {}
    for name, energy in names.items():
        n = experts if "exps" in name else 1
        given = np.ones((n, 256), np.float32) if importance and name.startswith("blk") else None
        source = Assembly(name, shape if "exps" in name else (8, 256))
        assignments.append(Assignment(source, FORMATS["BF16"], "", given))
        measured[name] = Measured({}, energy, 0.0)
    return assignments, measured


def test_a_block_weighs_what_it_adds_to_the_residual_stream():
    found = damage_weights(*model(2))
    for layer, stream in ((0, 2.0), (1, 16.0)):
        attention, ffn = 2 / (stream + 2), 12 / (stream + 14)
        assert found[f"blk.{layer}.attn_output.weight"] == pytest.approx(attention)
        assert found[f"blk.{layer}.attn_v.weight"] == pytest.approx(attention)
        assert found[f"blk.{layer}.attn_q.weight"] == pytest.approx(
            KIND_WEIGHT["attn_q"] * attention
        )
        assert found[f"blk.{layer}.ffn_down.weight"] == pytest.approx(ffn)
        assert found[f"blk.{layer}.ffn_gate.weight"] == pytest.approx(ffn)
    assert found["token_embd.weight"] == 1 and found["output.weight"] == OUTPUT_WEIGHT


def test_experts_add_what_the_chosen_ones_add():
    found = damage_weights(*model(1, experts=4), n_experts_used=2)
    assert found["blk.0.ffn_down_exps.weight"] == pytest.approx(6 / (2 + 2 + 6))
    assert found["blk.0.ffn_gate_exps.weight"] == found["blk.0.ffn_down_exps.weight"]


def test_without_importance_blocks_weigh_alike_but_for_the_first_and_last():
    found = damage_weights(*model(16, importance=False))
    for kind, usual in (("ffn_down", 1), ("attn_output", 0.5)):
        weight = [16 * found[f"blk.{layer}.{kind}.weight"] / usual for layer in range(16)]
        assert weight == [2] * 2 + [1] * 12 + [2] * 2


def test_a_tied_embedding_counts_as_output_too():
    assert damage_weights(*model(1, tied=True))["token_embd.weight"] == 1 + OUTPUT_WEIGHT


def test_an_expert_that_saw_no_token_does_not_distort_the_stream():
    rng = np.random.default_rng(0)
    importance = np.full((4, 256), 1e-3, np.float32)
    w = weights(rng, 4, 16, 256)
    with TensorReader() as reader:
        seen = measure(tensor("x", w, importance), [], reader).row_energy
        importance[2] = 1
        unseen = measure(tensor("x", w, importance), [], reader).row_energy
    assert unseen == pytest.approx(seen, rel=0.1)


# --- the choice -------------------------------------------------------------------------------


def test_no_other_choice_is_better():
    rng = np.random.default_rng(0)
    shapes = {"attn_q": (64, 256), "attn_v": (16, 256), "ffn_down": (48, 512)}
    tensors = [tensor(f"blk.0.{k}.weight", weights(rng, *s)) for k, s in shapes.items()]
    tensors.append(tensor("blk.0.attn_norm.weight", weights(rng, 256), format="F32"))
    whole, free = Plan(tuple(tensors)), {a.name for a in tensors[:3]}
    with TensorReader() as reader:
        measured = {a.name: measure(a, ladder(a)[:-1], reader) for a in tensors[:3]}
    weight = damage_weights(tensors, measured)

    def cost(choice):
        errors = [measured[a.name].errors.get(f.name, 0.0) for a, f in choice]
        return sum(weight[a.name] * e for (a, _), e in zip(choice, errors, strict=True))

    def size(choice):
        return 1024 + sum(padded(f.nbytes(a.source.shape)) for a, f in choice)

    every = [list(zip(tensors, fs, strict=False))
             for fs in itertools.product(*(ladder(a) for a in tensors[:3]))]  # fmt: skip
    for bits in (3.0, 4.1, 5.5, 8.2, 12.0):
        budget = bits * whole.n_weights / 8
        chosen, notes = choose_formats(whole, free, Target(bits))
        best = min(cost(choice) for choice in every if size(choice) <= budget)
        ours = [(a, a.format) for a in chosen.assignments[:3]]
        assert size(ours) <= budget
        assert cost(ours) == pytest.approx(best, rel=1e-9)
        assert chosen.assignments[3].format.name == "F32"
        assert notes[0].startswith(f"Target {bits:g} bits per weight")


# --- --refine ---------------------------------------------------------------------------------


def test_refine_swaps_the_encoders_and_nothing_else(tiny_qwq, tmp_path):
    files = {}
    for refine in (False, True):
        files[refine] = tmp_path / f"{refine}.gguf"
        job = plan_gguf(open_source(str(tiny_qwq)), Wishes("Q4_K_S", refine=refine))
        write_gguf(job, files[refine])
    plain, better = ({t.name: t for t in gguf.GGUFReader(f).tensors} for f in files.values())
    exact = plan_gguf(open_source(str(tiny_qwq)), Wishes("F32")).plan.assignments
    with TensorReader() as reader:
        for a in (a for a in exact if len(a.source.shape) == 2):
            w = a.source.read_float32(reader, 0, a.source.n_rows)
            assert plain[a.name].tensor_type == better[a.name].tensor_type
            before, after = (
                np.square(w - gguf.dequantize(t[a.name].data, t[a.name].tensor_type)).sum()
                for t in (plain, better)
            )
            assert after < before, a.name


def test_refine_counts_when_a_target_is_to_be_met(tiny_qwq):
    def damage(refine):
        job = plan(tiny_qwq, bits=4.5, refine=refine)
        return float(re.search(r"damage ([\d.e-]+)", " ".join(job.notes))[1])

    assert damage(True) < damage(False)


def test_refine_where_there_is_nothing_to_refine(tiny_qwq, tmp_path):
    with pytest.raises(UsageError, match="would change nothing"):
        plan_gguf(open_source(str(tiny_qwq)), Wishes("BF16", refine=True))
    write_gguf(plan_gguf(open_source(str(tiny_qwq)), Wishes("Q8_0")), tmp_path / "m.gguf")
    result = run("to-gguf", tmp_path / "m.gguf", "-o", tmp_path / "n.gguf", "--refine")
    assert result.exit_code == 2 and "--refine" in result.output
    assert open_gguf(tmp_path / "m.gguf")
