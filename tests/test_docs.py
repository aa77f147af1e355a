"""The words outside the code are held to what the code does."""

import re
from pathlib import Path

import pytest

from quant.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_ci_runs_the_readme_s_test_command():
    wanted = '.venv/bin/pip install -c constraints.txt -e ".[test]" && .venv/bin/pytest'
    assert wanted in README
    command = (ROOT / ".ci" / "run").read_text().replace("pip install -q", "pip install")
    assert wanted in command


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme(name):
    assert f"qwq-quant {name}" in README


def test_the_file_map_names_files_that_exist():
    map_ = README.partition("## Map")[2]
    names = re.findall(r"^ *([\w./-]+(?:\.py|\.toml|\.md|\.txt|/)) {2,}\S", map_, re.MULTILINE)
    assert len(names) > 40
    folder = ROOT
    for name in names:
        places = (ROOT / name, ROOT / "quant" / name, ROOT / "quant" / "formats" / name)
        assert any(place.exists() for place in places), (name, folder)


def test_links_and_figures_point_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_the_numbers_are_the_committed_ones():
    import csv

    with open(ROOT / "benchmarks" / "convert.csv") as file:
        rows = list(csv.DictReader(file))
    assert "@" not in re.sub(r"`[^`]*`|\S+@\S+", "", README)
    for row in rows:
        times = row["times_faster"].split(" (")[0]
        assert times in README and row["ours_peak_mb"].split(" (")[0] in README


def test_the_example_is_what_the_program_prints(tmp_path):
    """The table and the notes; disk and memory free, and seconds, are the machine's own."""
    from click.testing import CliRunner

    from quant.cli import cli

    model = ROOT / "examples" / "tiny-qwq"
    args = ["to-gguf", str(model), "-o", str(tmp_path / "m.gguf"), "--type", "Q4_K_M", "--dry-run"]
    printed = CliRunner().invoke(cli, args).output.splitlines()
    shown = {line.strip() for line in README.splitlines()}
    kept = [line.strip() for line in printed if not line.startswith(("Disk:", "Memory:", "Time:"))]
    assert len(kept) > 18
    assert [line for line in kept if line and line not in shown] == []
    written = CliRunner().invoke(cli, args[:-1]).stdout.partition("sha256")[2].split()[0]
    assert f"tiny-qwq-Q4_K_M.gguf  4.4 MB  sha256 {written}" in README
