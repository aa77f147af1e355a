"""The benchmark of the int8 cache: every step of it at toy sizes; its checks on CUDA, if there."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_kv_cache.py"

without_cuda = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a CUDA device: test_checks_on_cuda runs instead"
)


@pytest.fixture
def script(monkeypatch):
    """script(*arguments) -> exit code, in this process."""
    spec = importlib.util.spec_from_file_location("bench_kv_cache", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_kv_cache", module)  # dataclasses look there
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as for a script that is run
    spec.loader.exec_module(module)

    def run(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        return module.main()

    run.module = module
    return run


@without_cuda
def test_every_step_runs(script, tmp_path):
    assert script("--tiny", "--csv", tmp_path / "kv.csv") == 0
    with (tmp_path / "kv.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["part"] for row in rows} >= {"check", "timing", "table"}
    assert all(row["verdict"] == "ok" for row in rows if row["part"] == "check")
    assert all(float(row["value"]) > 0 for row in rows)
    assert all(row["torch"] and row["date"] for row in rows)


@without_cuda
def test_one_part_replaces_its_own_rows_alone(script, tmp_path):
    """A rerun of the timings leaves checks and tables as they were, whatever columns they have."""
    path = tmp_path / "kv.csv"
    path.write_text(
        "part,case,measure,value,driver\n"
        + "".join(f"{part},old,x,1,550\n" for part in ("check", "timing", "tuning", "table"))
    )
    with path.open() as file:
        before = [row for row in csv.DictReader(file) if row["part"] in ("check", "table")]
    assert script("--tiny", "--only", "timings", "--csv", path) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    new = rows[len(before) :]
    kept = [{name: row[name] for name in before[0]} for row in rows[: len(before)]]
    assert kept == before
    assert {row["part"] for row in new} == {"timing"}  # tuning is for GPUs; its older rows are gone
    assert all(row["case"] != "old" and row["date"] and row["driver"] == "" for row in new)


@without_cuda
def test_toy_sizes_are_written_only_where_it_is_said(script, tmp_path, monkeypatch, capsys):
    """They would take the place of what a GPU measured."""
    monkeypatch.setattr(script.module, "ROOT", tmp_path)
    monkeypatch.setattr(script.module, "BENCHMARKS", tmp_path / "benchmarks", raising=False)
    assert script("--tiny", "--only", "tables") == 0
    assert not list(tmp_path.iterdir())
    assert " rows after " in capsys.readouterr().out


@without_cuda
def test_nothing_is_timed_after_a_failed_check(script, tmp_path, monkeypatch):
    from qwq_kernels import kv_int8

    right = kv_int8.quantize
    monkeypatch.setattr(kv_int8, "quantize", lambda x, *a: (right(x, *a)[0] ^ 1, right(x, *a)[1]))
    assert script("--tiny", "--csv", tmp_path / "kv.csv") == 1
    with (tmp_path / "kv.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["part"] for row in rows} == {"check"}
    assert rows[0]["verdict"] == "MISSED"


@without_cuda
def test_what_fails_is_a_row_and_nothing_that_was_found_is_lost(script, tmp_path, monkeypatch):
    """The first run finds no memory, the second an error; in the third someone presses Ctrl-C."""
    errors = iter([torch.OutOfMemoryError("none left"), ValueError("broken"), KeyboardInterrupt()])

    def decode_row(*arguments):
        raise next(errors)

    monkeypatch.setattr(script.module, "decode_row", decode_row)
    with pytest.raises(KeyboardInterrupt):
        script("--tiny", "--only", "tables", "--csv", tmp_path / "new" / "kv.csv")
    with (tmp_path / "new" / "kv.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["measure"] for row in rows] == [
        "weights", "bf16 out of memory", "failed: ValueError"
    ]  # fmt: skip
    assert rows[2]["verdict"] == "MISSED" and rows[2]["date"]


@without_cuda
def test_a_failed_part_is_told_by_the_exit_code_and_the_next_one_runs(
    script, tmp_path, monkeypatch
):
    monkeypatch.setattr(script.module, "time_quantizing", lambda *arguments: 1 / 0)
    assert script("--tiny", "--only", "timings", "--csv", tmp_path / "kv.csv") == 1
    with (tmp_path / "kv.csv").open() as file:
        measures = [row["measure"] for row in csv.DictReader(file)]
    assert measures[:3] == ["bandwidth", "failed: ZeroDivisionError", "share of copy"]


@without_cuda
def test_what_is_late_is_left_out(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.module, "TIMINGS_END_S", -1)
    assert script("--tiny", "--only", "timings", "--csv", tmp_path / "kv.csv") == 0
    assert "decode 2 x 130, heads 4/2: left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "published", "expected"),
    [
        ("bf16", (16.3, 15.5), ("Qwen's 16.3", None)),
        ("bf16", (None, 48.2), ("Qwen's failed", None)),
        ("int8", (16.3, 15.5), ("< 15.5", True)),
        ("int8", (16.3, 14.9), ("< 14.9", False)),
        ("int8", None, ("", None)),
    ],
)
def test_qwens_figures_stand_beside_ours(script, name, published, expected):
    assert script.module.beside(name, published, 15.0) == expected


@without_cuda
def test_without_cuda_it_says_what_to_do(script, tmp_path, capsys):
    assert script("--csv", tmp_path / "kv.csv") == 2
    assert "--tiny" in capsys.readouterr().out
    assert not (tmp_path / "kv.csv").exists()


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA device: the kernels are interpreted and compiled, not run",
)
def test_checks_on_cuda(tmp_path):
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--only", "checks", "--csv", tmp_path / "kv.csv"],
        capture_output=True, text=True, env=compiled,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
