"""Answers outlive a kill: the next run draws only those that are missing."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import ROOT
from evaluation_helpers import to_gguf

from quant.evaluation.answer_file import AnswerFile
from quant.evaluation.evaluate import WORK
from quant.evaluation.loops import Answer


def an_answer(seed: int) -> dict:
    text = "1 + 1 = 2\n\u2028<|im_end|>\x0b é"
    return asdict(Answer("sum", seed, 3, False, None, 0.25, 2, text))


def test_answers_come_back_and_a_torn_one_is_dropped(tmp_path):
    path = tmp_path / "a.jsonl"
    with AnswerFile(path) as file:
        assert file.answers == []
        file.append(an_answer(1))
        file.append(an_answer(2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with AnswerFile(path) as file:
        assert file.answers == [an_answer(1)]
        file.append(an_answer(2))
        assert file.answers == [an_answer(1), an_answer(2)]
    assert path.read_bytes() == whole


@pytest.fixture(scope="module")
def command(tiny_qwq, tmp_path_factory) -> list[str]:
    """evaluate with loops and questions, but for -o."""
    folder = tmp_path_factory.mktemp("command")
    lines = (ROOT / "examples" / "tiny-qwq" / "questions.jsonl").read_text().splitlines()[:6]
    (folder / "q.jsonl").write_text("\n".join(lines))
    models = [to_gguf(tiny_qwq, name, folder / f"{name}.gguf") for name in ("Q8_0", "Q4_0")]
    return [
        sys.executable, "-c", "from quant.cli import main; main()", "evaluate", *map(str, models),
        "--context", "64", "--tokens", "300", "--loops", "--seeds", "2", "--loop-tokens", "64",
        "--sampling", "qwen-official", "--sampling", "unsloth", "--questions",
        str(folder / "q.jsonl"),
    ]  # fmt: skip


def run(command: list[str], output: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [*command, "-o", str(output)], cwd=output.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def n_answered(output: Path) -> int:
    return sum(f.read_bytes().count(b"\n") for f in (output / WORK).glob("*.answers.jsonl"))


def figures(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def test_a_killed_run_goes_on_with_the_next_answer(command, tmp_path):
    """2 models x (2 profiles x 5 prompts x 2 seeds + 6 questions) = 52; killed twice."""
    killed = tmp_path / "killed"
    for n_wanted in (3, 33):  # within the reference's answers, and the candidate's
        process = run(command, killed)
        while n_answered(killed) < n_wanted and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, process.stderr.read()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.3)
        n = n_answered(killed)
        time.sleep(0.5)
        assert n_wanted <= n == n_answered(killed)  # the process of the model ended too
    process = run(command, killed)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "Q8_0.gguf answers" not in said  # not one of the reference's was drawn again
    process = run(command, tmp_path / "whole")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert figures(killed) == figures(tmp_path / "whole")
    assert len(figures(killed)["reference"]["texts"]) == 20
