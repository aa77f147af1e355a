"""Every row of the table of broken inputs: refused with its code and its words, nothing lost."""

import ast
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from hostile_inputs import CASES, ELSEWHERE, NOT_SHOWN, ROWS
from hostile_runs import COMMANDS, MIDWAY, Place, go_on, prepare, run_case, seen, stopped_midway

from quant.cli import cli

TESTS = Path(__file__).parent


def some(number: int, commands: tuple[str, ...]) -> set[str]:
    """The first command, and of the others one after the other; check_reliability.py runs all."""
    return {commands[0], commands[-1 - number % max(1, len(commands) - 1)]}


RUNS = [
    (case, command)
    for number, case in enumerate(CASES)
    for command in case.commands
    if command in some(number, case.commands)
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize(
    ("case", "command"), RUNS, ids=[f"{c.row}-{c.name[:40]!a}-{command}" for c, command in RUNS]
)
def test_refused_in_plain_words_and_nothing_is_lost(case, command, prepared, tmp_path):
    ended = run_case(case, command, prepared, tmp_path / "case")
    assert not ended.wrong


def test_every_row_is_shown_or_says_why_not():
    shown = {case.row for case in CASES} | set(ELSEWHERE) | set(NOT_SHOWN)
    assert shown == set(ROWS) == set(range(1, 43))
    names = Counter((case.row, case.name, command) for case, command in RUNS)
    assert max(names.values()) == 1
    assert all(case.words for case in CASES if case.code)


def test_the_tests_named_elsewhere_exist():
    for name in set().union(*ELSEWHERE.values()):
        path, test = name.split("::")
        tree = ast.parse((TESTS / path).read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


# --- in the middle of a run -------------------------------------------------------------------


def placed(command, prepared, folder) -> Place:
    shutil.copytree(prepared, folder)
    place = Place(folder, command)
    remove(place.out / COMMANDS[command][0])
    return place


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("command", MIDWAY)
def test_a_second_run_on_an_output_is_refused_and_the_first_ends_well(command, prepared, tmp_path):
    place = placed(command, prepared, tmp_path / "case")
    with stopped_midway(place) as first:
        before = seen(tmp_path)
        second = CliRunner().invoke(cli, place.arguments(force=True))
        assert second.exit_code == 73 and "Another run is writing" in second.output, second.output
        assert seen(tmp_path) == before
        code, said = go_on(first)
    assert code == 0, said
    name = COMMANDS[command][0]
    assert weights(place.out / name) == weights(prepared / "out" / name)
    assert not [name for name in seen(tmp_path) if Path(name).name.startswith(".")]


def weights(path: Path) -> dict[str, bytes]:
    """The weight files of an output; manifests and cards tell the time."""
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return {file.name: file.read_bytes() for file in files}


def grow(shard: Path) -> None:
    with open(shard, "ab") as file:
        file.write(b"\0")


CHANGES = {
    "its time": lambda shard: os.utime(shard, ns=(1, 1)),
    "its size": grow,
    "another file of its name": lambda shard: (
        shutil.copy(shard, shard.with_suffix(".new")) and shard.with_suffix(".new").replace(shard)
    ),
}


@pytest.mark.parametrize(
    ("command", "change"),
    [("to-gguf", change) for change in CHANGES] + [("dynamic-4bit", "its time")],
)
def test_a_source_that_changes_midway_is_not_published(command, change, prepared, tmp_path):
    place = placed(command, prepared, tmp_path / "case")
    shutil.copytree(prepared / "out", place.out, dirs_exist_ok=True)  # an older output
    older = seen(place.out)
    with stopped_midway(place) as process:
        CHANGES[change](place.shard)
        code, said = go_on(process)
    assert code == 65 and "changed while it was being read" in said, said
    assert seen(place.out) == older and "Traceback" not in said


def test_a_shard_that_shrinks_midway_is_refused(prepared, tmp_path):
    place = placed("to-gguf", prepared, tmp_path / "case")
    with stopped_midway(place, at=2) as process:
        os.truncate(place.shard, place.shard.stat().st_size // 2)
        code, said = go_on(process)
    assert code == 65 and "Traceback" not in said and "model.safetensors" in said, said
    assert not (place.out / "m.gguf").exists()
