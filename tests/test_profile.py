"""profile: what is measured is what was run; what is planned is arithmetic, and says so."""

import csv
import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from model_makers import make_model
from transformers.cache_utils import DynamicCache

from quant.cli import cli
from quant.errors import BadInput
from quant.kv_cache import Int8Cache
from quant.profiling.cases import BATCHES, LENGTHS, Case, make_cases, nearest
from quant.profiling.figure import memory_and_speed
from quant.profiling.measure import (
    Job,
    Measured,
    cache_nbytes,
    load_model,
    measure,
    model_nbytes,
    run_case,
)
from quant.profiling.planned import Shape, read_shape
from quant.profiling.profile import Machine, Profile, Row

MB = 1_000_000

QWEN_7B = Shape(15_443_000_000, 32, 128, (None,) * 32)
"""Qwen-7B: 7.72 billion weights, and as many key heads as query heads."""


def run(*words) -> object:
    return CliRunner().invoke(cli, [str(w) for w in words])


def unwrapped(text: str) -> str:
    """Notes as one line each would be."""
    return " ".join(text.split())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def four_bit(tiny_qwq, tmp_path_factory) -> Path:
    """tiny-qwq in bitsandbytes' NF4."""
    folder = tmp_path_factory.mktemp("models") / "tiny-4bit"
    options = ("--budget", "0", "--tokens", "64", "--no-check", "--no-search-scales")
    made = run("dynamic-4bit", tiny_qwq, "-o", folder, *options)
    assert made.exit_code == 0, made.output
    return folder


# --- what is run ------------------------------------------------------------------------------


def test_the_cases_on_cuda_are_those_of_qwens_tables():
    cases = make_cases(LENGTHS["cuda"], BATCHES["cuda"])
    assert cases[0] == Case(1, 2048, 1) and cases[0].is_encoding
    generated = {(case.batch, case.length) for case in cases[1:]}
    assert generated == {(1, n) for n in (512, 1024, 2048, 4096, 8192)} | {
        (b, 1024) for b in (4, 16, 32, 64, 100)
    }
    assert len(cases) == 11


def test_other_lengths_take_the_nearest():
    assert make_cases([64, 8], [2, 1, 2]) == [
        Case(1, 64, 1), Case(1, 1, 8), Case(1, 1, 64), Case(2, 1, 64),
    ]  # fmt: skip
    assert nearest([4096, 3000], 2048) == 3000 and nearest([512, 1500], 1024) == 512


def test_it_generates_to_the_end_whatever_the_folder_says(tiny_qwq):
    """Its own settings would end at once: every token ends an answer."""
    model = load_model(tiny_qwq, "cpu")
    model.generation_config.eos_token_id = list(range(4096))
    case = Case(2, 3, 6)
    for is_int8, kind in ((False, DynamicCache), (True, Int8Cache)):
        cache = run_case(model, is_int8, case)
        assert type(cache) is kind
        assert cache.get_seq_length() == case.n_cached == 8


# --- bytes ------------------------------------------------------------------------------------


def test_planned_bytes_of_qwen_7b():
    """512 kB a token in bf16: at batch 64 more than the 48.7 GB that Qwen needed at 32."""
    bf16 = QWEN_7B.planned(Case(64, 1, 1025), False)
    int8 = QWEN_7B.planned(Case(64, 1, 1025), True)
    assert bf16.cache_nbytes == 64 * 1025 * 524_288
    assert int8.cache_nbytes == bf16.cache_nbytes * 132 // 256
    assert bf16.total == bf16.cache_nbytes + QWEN_7B.model_nbytes


@pytest.mark.parametrize("case", [Case(1, 16, 1), Case(3, 1, 32)])
@pytest.mark.parametrize("window", [None, 8])
def test_the_cache_takes_what_was_planned(tmp_path, case, window):
    """Two layers of full attention and, with a window, one that keeps 7 tokens in bf16."""
    options = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 2}
    make_model("qwen2", tmp_path, **(options if window else {}))
    shape = read_shape(tmp_path)
    assert shape.windows == (None, None, window and window - 1)
    model = load_model(tmp_path, "cpu")
    assert cache_nbytes(run_case(model, False, case)) == shape.planned(case, False).cache_nbytes
    # 16 and 32 tokens: the int8 cache allocates multiples of 16.
    assert cache_nbytes(run_case(model, True, case)) == shape.planned(case, True).cache_nbytes


def test_weights_take_what_was_planned(tiny_qwq, four_bit, made_models):
    """Also a checkpoint in float32, tied embeddings, and 4 bits with the scales of their scales."""
    for folder in (tiny_qwq, four_bit, made_models("qwen2-tied")[0]):
        model = load_model(folder, "cpu")
        weights = model_nbytes(model)
        planned = read_shape(folder).model_nbytes
        assert planned == pytest.approx(weights, rel=0.003)
    assert read_shape(four_bit).model_nbytes < 0.55 * read_shape(tiny_qwq).model_nbytes


def test_the_peak_is_what_was_there_at_once(tiny_qwq):
    """What was freed before does not count, nor what is freed before the peak.

    In a process of its own, as a measurement is: here other tests' freed memory would join in.
    """
    code = f"""if True:
        import torch
        from pathlib import Path
        from quant.profiling.measure import PeakMemory, load_model
        memory = PeakMemory(load_model(Path({str(tiny_qwq)!r}), "cpu"))
        x = torch.ones({200 * MB}, dtype=torch.uint8)
        del x
        memory.begin()
        for _ in range(3):
            x = torch.ones({60 * MB}, dtype=torch.uint8)
            del x
        print(memory.peak_nbytes() - memory.model_nbytes)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 59 * MB < int(done.stdout) < 90 * MB


def test_too_little_memory_is_no_failure(tiny_qwq):
    job = Job(tiny_qwq, False, Case(1, 10**14, 1), "cpu", 1)
    assert measure(job, lambda *message: None) is None


def test_a_folder_that_is_no_model_is_refused(tmp_path, tiny_qwq):
    shutil.copytree(tiny_qwq, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "nothing\\u001b[2J"}')
    with pytest.raises(BadInput, match="cannot make a model") as error:
        read_shape(tmp_path / "m")
    assert "\x1b" not in str(error.value)


# --- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profiled(tiny_qwq, tmp_path_factory):
    """The result and the folder of a run where 4 tokens fit in memory and 64 do not, and a third
    model cannot be loaded."""
    folder = tmp_path_factory.mktemp("profiled")
    broken = folder / "broken"
    shutil.copytree(tiny_qwq, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 512}))
    shape = read_shape(tiny_qwq)
    with pytest.MonkeyPatch.context() as patch:
        free = shape.planned(Case(1, 1, 4), False).total
        patch.setattr("quant.profiling.profile.available_memory", lambda: free)
        sizes = ("--lengths", "4,64", "--batches", "1,2", "--repeats", 2, "--device", "cpu")
        done = run("profile", tiny_qwq, broken, "-o", folder / "out", *sizes)
    return done, folder / "out"


def test_what_fits_is_measured_and_the_rest_is_planned(profiled, tiny_qwq):
    _, out = profiled
    with (out / "profile.csv").open() as file:
        rows = {
            (row["model"], row["task"], row["batch"], row["generated_tokens"]): row
            for row in csv.DictReader(file)
        }
    assert len(rows) == 3 * 4
    shape = read_shape(tiny_qwq)
    for name, is_int8 in (("bf16", False), ("bf16, int8 KV cache", True)):
        measured = rows[name, "generate", "1", "4"]
        assert measured["status"] == "measured" and measured["repeats"] == "2"
        low, middle, high = (
            float(measured[f"{which}tokens_per_s"]) for which in ("slowest_", "", "fastest_")
        )
        assert 0 < low <= middle <= high
        parts = int(measured["model_nbytes"]) + int(measured["cache_nbytes"])
        assert parts <= int(measured["peak_nbytes"]) < parts + 50 * MB
        for key in (("encode", "1", "1"), ("generate", "1", "64"), ("generate", "2", "64")):
            planned = rows[(name, *key)]
            assert planned["status"] == "planned" and "does not fit" in planned["why"]
            assert planned["peak_nbytes"] == planned["tokens_per_s"] == ""
        expected = shape.planned(Case(2, 1, 64), is_int8)
        assert int(rows[name, "generate", "2", "64"]["cache_nbytes"]) == expected.cache_nbytes
    assert measured["machine"] and measured["date"] and measured["torch"]


def test_a_model_that_fails_is_named_and_the_others_stand(profiled):
    done, out = profiled
    assert done.exit_code == 65
    assert "broken could not be run to the end" in done.output
    assert "12 are planned (failed)" in done.output
    assert (out / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "profile.svg").is_file()


def test_the_screen_is_80_columns_wide(profiled):
    done, _ = profiled
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert " ± " in done.stdout and "generating 64 tokens, batch 2" in done.stdout


def test_no_report_is_replaced_unless_forced(profiled, tiny_qwq):
    """And that is known before anything is measured."""
    _, out = profiled
    again = run("profile", tiny_qwq, "-o", out)
    assert again.exit_code == 73 and "--force" in again.output
    (out.parent / "other").mkdir()
    (out.parent / "other" / "profile.csv").write_text("precious")
    refused = run("profile", tiny_qwq, "-o", out.parent / "other", "--force")
    assert (
        refused.exit_code == 73 and "precious" in (out.parent / "other" / "profile.csv").read_text()
    )


@pytest.mark.parametrize(
    ("place", "words"),
    [("file", "is not a folder"), ("none/out", "There is no folder"), ("file/out", "no folder")],
)
def test_places_that_cannot_be_are_refused_before_anything_runs(tiny_qwq, tmp_path, place, words):
    (tmp_path / "file").write_text("precious")
    done = run("profile", tiny_qwq, "-o", tmp_path / place, "--lengths", "2", "--repeats", 1)
    assert done.exit_code == 73 and words in done.output
    assert "Profiling" not in done.output


def test_a_dry_run_is_arithmetic_for_machines_that_are_not_here(tiny_qwq, four_bit, tmp_path):
    options = ("-o", tmp_path / "out", "--device", "cuda", "--dry-run")
    done = run("profile", tiny_qwq, four_bit, four_bit, *options, "--format", "json")
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and not (tmp_path / "out").exists()
    assert len(found["rows"]) == 4 * 11
    assert {row["status"] for row in found["rows"]} == {"planned"}
    names = list(dict.fromkeys(row["model"] for row in found["rows"]))
    assert names == ["bf16", "bf16, int8 KV cache", "tiny-4bit", "tiny-4bit (2)"]
    bf16, int8 = (
        next(r for r in found["rows"] if r["model"] == name and r["batch"] == 100)
        for name in names[:2]
    )
    assert bf16["cache_nbytes"] == 100 * 1024 * 6 * 2 * 256
    assert int8["cache_nbytes"] == 100 * 1024 * 6 * 2 * 136
    printed = run("profile", tiny_qwq, *options).stdout
    assert "22 of 22 are planned (dry run)" in printed


NO_INT8 = {
    "qwen3": (
        {"head_dim": 24},
        "the model has a head size of 24 in 8 bits: it must be a multiple of 16",
    ),
    "mistral": ({"sliding_window": 8}, "none of the model's 3 layers is one of full attention"),
}
"""Models without an int8 cache: name -> config, and why."""


@pytest.mark.parametrize(
    ("name", "dry_run"), [("qwen3", True), ("mistral", True), ("mistral", False)]
)
def test_an_int8_cache_that_there_cannot_be_is_left_out(tmp_path, name, dry_run):
    """No bytes of it are planned, nothing fails, and a note says why."""
    config, why = NO_INT8[name]
    make_model(name, tmp_path / "m", **config)
    options = ("--lengths", "4", "--batches", "1", "--repeats", "1", "--device", "cpu")
    options += ("--dry-run",) if dry_run else ()
    done = run("profile", tmp_path / "m", "-o", tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    assert f"Note: bf16, int8 KV cache is left out: {why}." in unwrapped(done.stdout)
    assert done.stdout.count("int8 KV cache") == 1  # in no table
    if not dry_run:
        with (tmp_path / "out" / "profile.csv").open() as file:
            assert {row["model"] for row in csv.DictReader(file)} == {"bf16"}


def test_an_int8_cache_is_planned_where_some_layers_are_of_full_attention(tmp_path):
    options = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    make_model("qwen2", tmp_path / "m", **options)
    options = ("--lengths", "4", "--batches", "1", "--dry-run", "--format", "json")
    found = json.loads(run("profile", tmp_path / "m", "-o", tmp_path / "out", *options).stdout)
    assert {row["model"] for row in found["rows"]} == {"bf16", "bf16, int8 KV cache"}
    assert found["left_out"] == []


def test_what_libraries_warn_of_is_a_note(tmp_path, capfd):
    """Heads of 16 channels, which the kernel does not read: each step dequantizes the cache, and
    the figures of such a run must not pass for int8 attention's."""
    make_model("qwen3", tmp_path / "m", head_dim=16)
    options = ("--lengths", "4", "--batches", "1", "--repeats", "1", "--device", "cpu")
    done = run("profile", tmp_path / "m", "-o", tmp_path / "out", *options)
    assert done.exit_code == 0 and "Warning" not in capfd.readouterr().err
    words = (
        "Qwen3Attention: int8 attention is not used (head size 16 with values in 8 bits; 32 to 256 "
        "are possible); the cache is dequantized for each step instead"
    )
    assert unwrapped(done.stdout).count(f"Note: bf16, int8 KV cache: {words}") == 1
    with (tmp_path / "out" / "profile.csv").open() as file:
        noted = {(row["model"], row["task"]): row["note"] for row in csv.DictReader(file)}
    assert noted.pop(("bf16, int8 KV cache", "generate")) == words
    assert set(noted.values()) == {""}  # a prompt is encoded by the model's own attention


def test_what_was_warned_of_is_told_also_of_what_did_not_fit(tiny_qwq, monkeypatch):
    def too_much(job, say):
        for _ in range(3):
            warnings.warn("a\x1b[2J  long\n story", stacklevel=1)
        raise MemoryError

    monkeypatch.setattr("quant.profiling.measure._measure", too_much)
    said = []
    assert measure(Job(tiny_qwq, False, Case(1, 1, 2), "cpu", 1), lambda *x: said.append(x)) is None
    assert said == [("note", "a\\x1b[2J long story")]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--lengths", "1,2"], 2, "is no list of numbers from 2 on"),
        (["--lengths", "a\x1b[2J"], 2, "a\\x1b[2J is no list"),
        (["--batches", "0"], 2, "is no list of numbers from 1 on"),
        (["--batches", "1,99999999999"], 2, "is no list"),
        (["--device", "mps", "--dry-run"], 2, "cannot be profiled"),
        (["--device", "nowhere"], 69, "cannot be used"),
    ],
)
def test_wrong_options(tiny_qwq, tmp_path, words, code, message):
    done = run("profile", tiny_qwq, "-o", tmp_path / "out", *words)
    assert done.exit_code == code and message in done.output


def test_a_gguf_file_is_refused(tiny_qwq, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    done = run("profile", tiny_qwq, tmp_path / "m.gguf", "-o", tmp_path / "out", "--dry-run")
    assert done.exit_code == 2 and "is no folder" in done.output


# --- shown ------------------------------------------------------------------------------------


def a_profile(names: list[str]) -> Profile:
    """Qwen's cases of Qwen-7B, as on a machine with 48 GB."""
    rows = []
    for case in make_cases(LENGTHS["cuda"], BATCHES["cuda"]):
        for i, name in enumerate(names):
            planned = QWEN_7B.planned(case, i == 1)
            seconds = tuple(case.n_counted / s for s in (1200.0, 1180.0, 1260.0))
            peak = planned.total + 900 * MB
            measured = Measured(planned.model_nbytes, planned.cache_nbytes, peak, seconds)
            if planned.total > 48e9:
                rows.append(Row(name, case, planned, None, "does not fit: 48.0 GB are free"))
            else:
                rows.append(Row(name, case, planned, measured))
    return Profile(Machine("cuda", "NVIDIA \x1b[2J" + "long " * 30, 0), 3, tuple(rows))


def test_tables_of_large_models_with_long_names_fit(capsys):
    from quant.cli.profile_table import print_profile

    print_profile(a_profile(["bf16", "bf16, int8 KV cache", "Qwen2.5-72B-" + "long-" * 20]))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80 and "\x1b" not in printed
    assert "1,200 ± 40" in printed
    assert "> 69.1 GB" in printed and "900.0 MB" in printed


def test_a_note_of_many_rows_is_printed_once_for_each_variant(capsys):
    from quant.cli.profile_table import print_profile

    found = a_profile(["bf16", "int8"])
    assert len(found.rows) > 4
    rows = tuple(replace(row, notes=("softly warned", "twice")) for row in found.rows)
    print_profile(replace(found, rows=rows))
    printed = unwrapped(capsys.readouterr().out)
    for text in ("softly warned", "twice"):
        assert printed.count(f"Note: bf16: {text}") == printed.count(f"Note: int8: {text}") == 1
        assert printed.count(text) == 2


def test_the_figure_marks_what_is_planned():
    profile = a_profile(["bf16", "int8", "<b>$4$"])
    drawing = memory_and_speed("A <title>", profile.rows, ["model"], [["bf16"]])
    assert "4 of 30 are hatched: planned" in drawing.caption
    for gid in ("memory-batch-0-planned", "memory-batch-1-measured", "memory-length-2-measured"):
        assert gid in drawing.inline
    assert "memory-batch-1-planned" not in drawing.inline
    assert "bf16, generating 1,024 tokens, batch 100: cache 53.7 GB, planned" in drawing.inline
    assert "<b>" not in drawing.inline
    again = memory_and_speed("A <title>", profile.rows, ["model"], [["bf16"]])
    assert again.png == drawing.png and again.svg == drawing.svg
