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
    spec.loader.exec_module(module)

    def run(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        return module.main()

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
