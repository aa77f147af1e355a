"""The command line as its users meet it: help, wrong commands, messages, exit codes."""

import json
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from quant.cli import COMMANDS, cli

RUN = "from quant.cli import main; main()"


def run(*args):
    return CliRunner().invoke(cli, [str(a) for a in args], catch_exceptions=False)


def child(*args, **options):
    command = [sys.executable, "-c", RUN, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def modules_after(code: str) -> set[str]:
    """Top-level modules in memory after running `code` in a fresh interpreter."""
    code += "\nimport sys; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_quant_is_light():
    assert not modules_after("import quant") & {"torch", "transformers", "numpy", "click"}


@pytest.mark.parametrize("args", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_is_light(args):
    code = f"import sys; sys.argv = ['qwq-quant', *{args!r}]\n"
    code += "from quant.cli import main\nimport io, contextlib\n"
    code += (
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main()"
    )
    heavy = {"torch", "transformers", "numpy", "numba", "gguf", "huggingface_hub", "rich"}
    assert not modules_after(code) & heavy


def test_a_dry_run_needs_no_torch(tiny_qwq, tmp_path):
    code = f"import sys; sys.argv = ['q', 'to-gguf', {str(tiny_qwq)!r}, '-o', {str(tmp_path)!r}, "
    code += "'--dry-run']\nfrom quant.cli import main\nimport io, contextlib\n"
    code += (
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main()"
    )
    assert not modules_after(code) & {"torch", "transformers", "numba"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name):
    result = run(name, "--help")
    assert result.exit_code == 0
    assert re.search(rf"^ {{4}}qwq-quant {name}\b", result.output, re.MULTILINE)
    assert max(map(len, result.output.splitlines())) <= 80


def test_version():
    from quant import __version__

    assert __version__ in run("--version").output


WRONG = {
    "unknown command": (["to-ggfu", "m"], 2, "to-gguf"),
    "unknown option": (["to-gguf", "m", "-o", "x", "--typ", "Q8_0"], 2, "--type"),
    "unknown type": (["to-gguf", "m", "-o", "x", "--type", "Q9_0"], 2, "Q8_0"),
    "no output": (["to-gguf", "m"], 2, "-o"),
    "no such model": (["to-gguf", "./nowhere", "-o", "x.gguf"], 66, "nowhere"),
    "bad size": (["to-gguf", "m", "-o", "x", "--split-max-size", "big"], 2, "5GB"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_commands(case, tmp_path):
    args, code, words = WRONG[case]
    done = child(*args, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and not list(tmp_path.iterdir())


def test_wrong_overrides_speak(tiny_qwq, tmp_path):
    for override, words in [
        ("qqwen2.context_length=u32:4096", "qwen2.context_length"),
        ("qwen2.context_length=str:4096", "u32"),
    ]:
        args = ("to-gguf", tiny_qwq, "-o", tmp_path / "m.gguf", "--override", override)
        done = child(*args)
        assert done.returncode == 78 and words in done.stderr, done.stderr
        assert child(*args, "--force-override").returncode == 0
        (tmp_path / "m.gguf").unlink()


def test_existing_output_needs_force(tiny_qwq, tmp_path):
    args = ("to-gguf", tiny_qwq, "-o", tmp_path / "m.gguf")
    assert child(*args).returncode == 0
    second = child(*args)
    assert second.returncode == 73 and "--force" in second.stderr
    assert child(*args, "--force").returncode == 0


def test_outputs_that_must_not_be_written(tiny_qwq, tmp_path):
    gguf = tmp_path / "m.gguf"
    assert child("to-gguf", tiny_qwq, "-o", gguf).returncode == 0
    onto_itself = child("to-gguf", gguf, "-o", gguf, "--force")
    assert onto_itself.returncode == 2 and "itself" in onto_itself.stderr
    (tmp_path / "link.gguf").symlink_to(gguf)
    through = child("to-gguf", tiny_qwq, "-o", tmp_path / "link.gguf", "--force")
    assert through.returncode == 73 and "symbolic link" in through.stderr
    nowhere = child("to-gguf", tiny_qwq, "-o", tmp_path / "no" / "m.gguf")
    assert nowhere.returncode == 73 and "mkdir" in nowhere.stderr


def test_files_that_are_no_gguf_are_never_replaced(tiny_qwq, tmp_path):
    import os

    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "pipe.gguf")
    for name in ("config.json", "pipe.gguf", "qwq-quant.json"):
        done = child("to-gguf", tiny_qwq, "-o", tmp_path / name, "--force")
        assert done.returncode == 73, done.stderr
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_foreign_manifest_is_not_overwritten(tiny_qwq, tmp_path):
    for content in ("[]", "not json", '{"outputs": 3}'):
        (tmp_path / "qwq-quant.json").write_text(content)
        done = child("to-gguf", tiny_qwq, "-o", tmp_path / "m.gguf")
        assert done.returncode == 73 and "no manifest" in done.stderr
        assert [p.name for p in tmp_path.iterdir()] == ["qwq-quant.json"]
        assert (tmp_path / "qwq-quant.json").read_text() == content


@pytest.mark.parametrize("form", [["--token", "hf_SECRET"], ["--token=hf_SECRET"]])
def test_the_token_is_written_nowhere(form, tiny_qwq, tmp_path):
    done = child("to-gguf", tiny_qwq, "-o", tmp_path / "m.gguf", *form)
    assert done.returncode == 0 and "SECRET" not in done.stdout + done.stderr
    for path in tmp_path.iterdir():
        assert b"SECRET" not in path.read_bytes()
    assert "***" in (tmp_path / "qwq-quant.json").read_text()


def test_closed_and_full_streams(tiny_qwq, tmp_path):
    command = f"{sys.executable} -c '{RUN}' to-gguf {tiny_qwq} -o {tmp_path} --force"
    cases = ((">&-", 0), ("2>&-", 0), ("--dry-run >/dev/full", 74), ("--type X 2>/dev/full", 2))
    for tail, code in cases:
        done = subprocess.run(["bash", "-c", f"{command} {tail}"], capture_output=True, text=True)
        assert done.returncode == code, (tail, done.stderr)


def test_a_working_folder_that_was_removed(tiny_qwq):
    where = f"cd $(mktemp -d) && rmdir $PWD && {sys.executable} -c '{RUN}'"
    for command in (f"to-gguf {tiny_qwq} -o m.gguf", f"measure {tiny_qwq} -o s.json --dry-run"):
        done = subprocess.run(["bash", "-c", f"{where} {command}"], capture_output=True, text=True)
        assert done.returncode == 66 and "folder you are in was removed" in done.stderr


def test_json_plan_and_result(tiny_qwq, tmp_path):
    args = ("to-gguf", tiny_qwq, "-o", tmp_path / "m.gguf", "--type", "q8_0", "--format", "json")
    plan = json.loads(child(*args, "--dry-run").stdout)
    assert plan["type"] == "Q8_0" and len(plan["tensors"]) == 75
    assert plan["nbytes"] == sum(t["nbytes"] for t in plan["tensors"])
    assert plan["needs"]["fits"] is True
    assert not (tmp_path / "m.gguf").exists()
    result = json.loads(child(*args).stdout)
    assert result["files"][0]["nbytes"] == (tmp_path / "m.gguf").stat().st_size
    assert plan["needs"]["disk"] >= result["files"][0]["nbytes"]


def test_a_plan_that_does_not_fit(tiny_qwq, tmp_path, monkeypatch):
    from quant import preflight

    monkeypatch.setattr(preflight, "available_memory", lambda: 1 << 20)
    dry = run("to-gguf", tiny_qwq, "-o", tmp_path / "m.gguf", "--dry-run")
    assert "DOES NOT FIT" in dry.output and dry.exit_code == 69
    real = run("to-gguf", tiny_qwq, "-o", tmp_path / "m.gguf")
    assert "MB too little" in real.output
    assert real.exit_code == 69 and not list(tmp_path.iterdir())


def test_the_plan_fits_80_columns(tiny_qwq, tmp_path):
    for type_name in ("Q8_0", "Q4_0"):
        out = run("to-gguf", tiny_qwq, "-o", tmp_path, "--dry-run", "--type", type_name).output
        assert "8.52 bits per weight" in out or type_name != "Q8_0"
        assert max(map(len, out.splitlines())) <= 80


def test_closed_pipe_is_quiet(tiny_qwq, tmp_path):
    command = f"{sys.executable} -c '{RUN}' to-gguf {tiny_qwq} -o {tmp_path} --dry-run | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.startswith("tensor")


def test_internal_errors_are_one_message(monkeypatch):
    import quant.cli as module

    monkeypatch.setattr(module, "importlib", None)  # nothing can be loaded any more
    result = run("inspect", "x")
    assert result.exit_code == 70
    assert "fault of the program" in result.output and "AttributeError" in result.output
