"""From sensitivity.json to the folder of figures, as a library and on the command line."""

import csv
import io
import json
import re
from xml.etree import ElementTree

import click
import pytest
from click.testing import CliRunner
from report_makers import HOSTILE, measured

from quant.budget import Budget, Levels
from quant.cli import plot
from quant.errors import BadInput, CannotCreate, InputMissing, UsageError
from quant.formats.nf4 import Bnb4bit
from quant.report.choice import Choice, Result
from quant.report.files import write_files
from quant.report.sensitivity_report import sensitivity_report
from quant.sensitivity import METRICS, read_sensitivity

KEPT = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.qkv_proj")
CHOICE = Choice(
    "activation",
    KEPT,
    curve=((6_600_000, 0.4), (7_000_000, 0.2), (7_260_000, 0.1), (13_600_000, 0.0)),
    chosen=(7_260_000, 0.1),
    threshold=0.15,
    results=(
        Result("source", 13_600_000, 8192, 5.912, 0.031),
        Result("plain NF4", 6_600_000, 8192, 6.104, 0.033, 0.04213, 0.0011, 0.9312),
        Result("dynamic 4-bit", 7_260_000, 8192, 6.011, 0.032, 0.02318, 0.0008, 0.9544),
    ),
)
FILES = {
    f"{name}.{end}" for name in ("errors", "heatmap", "damage") for end in ("png", "svg", "csv")
}


@pytest.fixture
def path(tmp_path):
    """A sensitivity.json of six layers."""
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps(measured(6)))
    return path


def rows_of(page: str, i: int) -> list[list[str]]:
    """The cells of the page's i-th table."""
    body = re.findall("<tbody>.*?</tbody>", page, re.DOTALL)[i]
    rows = re.findall("<tr.*?</tr>", body, re.DOTALL)
    return [re.findall("<td[^>]*>(.*?)</td>", row) for row in rows]


def test_a_measurement_alone(path):
    files = sensitivity_report(read_sensitivity(path))
    assert set(files) == FILES | {"report.html"}
    page = files["report.html"].decode()
    assert "chosen" not in page and "Ring" not in page and "least" not in page
    rows = rows_of(page, 0)
    assert len(rows) == 24 and {row[0] for row in rows[:2]} == set(KEPT)
    assert rows[0][2:5] == ["q k v", "0.0085", "0.15"]
    assert [float(row[5]) for row in rows] == sorted((float(row[5]) for row in rows), reverse=True)
    for text in ("0123456789abcdef", "cd" * 32, "65,536", "2.13.0", "double quant", "nf4"):
        assert text in page


def test_a_choice_is_shown(path):
    files = sensitivity_report(read_sensitivity(path), CHOICE)
    assert set(files) == FILES | {"report.html"}
    page = files["report.html"].decode()
    assert rows_of(page, 0)[0] == ["source", "13.6 MB", "5.912 ± 0.031", "–", "–", "8,192"]
    assert rows_of(page, 0)[2][3:5] == ["0.02318 ± 0.00080", "95.44 %"]
    assert {row[0] for row in rows_of(page, 1) if row[-1] == "16 bit"} == set(KEPT)
    for text in ("+10.0 % against plain NF4", "2 of 24", "−75.0 %", "least kept"):
        assert text in page
    rings = [line for line in files["errors.csv"].decode().splitlines() if ",yes," in line]
    assert len(rings) == 6  # one down_proj, the group and the module; qkv, q, k and v


def texts(svg: bytes) -> list[str]:
    return ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter() if e.text]


def levels_of(sensitivity) -> Levels:
    """As plan_4bit makes them; the rest of the model has a million bytes."""
    groups = list(sensitivity.groups.values())
    sizes = [(36_000 * len(g.modules), 131_072 * len(g.modules)) for g in groups]
    return Levels(groups, sizes, rest=1_000_000)


@pytest.mark.parametrize("metric", ["gradient", "activation"])
def test_what_the_program_chose_is_marked_and_its_threshold_drawn(tmp_path, metric):
    """The default metric is one of groups: it has its own panel, which the line belongs to."""
    data = measured(6)
    for group in data["groups"].values():
        group["gradient"] = group["kld"] / 3
    path = tmp_path / "s.json"
    path.write_text(json.dumps(data))
    sensitivity = read_sensitivity(path)
    damage = [(value, 0.0) for value in sensitivity.values(metric).values()]
    choice, _ = levels_of(sensitivity).choose(metric, damage, Budget("share", 0.3))
    assert 2 < len(choice.kept) < 10
    files = sensitivity_report(sensitivity, choice)
    least = min(sensitivity.values(metric)[name] for name in choice.kept)
    said = texts(files["errors.svg"])
    noun = {"gradient": "Gradient-weighted error", "activation": "Activation error"}[metric]
    assert {f"{noun}, by group", "Activation error", "Weight error"} <= set(said)
    assert said.count("least kept") == 1 and f"{least:.3g}" in said
    rows = list(csv.DictReader(io.StringIO(files["errors.csv"].decode())))
    of_groups = {row["name"]: row for row in rows if row["level"] == "group"}
    assert {name for name, row in of_groups.items() if row["kept_16_bit"] == "yes"} == set(
        choice.kept
    )
    assert {name: float(row[metric]) for name, row in of_groups.items()} == sensitivity.values(
        metric
    )
    header = files["heatmap.csv"].split(b"\n")[0].decode()
    assert header.endswith(noun.lower())
    assert "The dashed line is the least that does" in files["report.html"].decode()


def test_the_curve_of_a_measurement_alone_is_that_of_its_layers(path):
    """From the shapes in the file: 24 groups of 256 x 256 in NF4, and in 16 bits."""
    files = sensitivity_report(read_sensitivity(path))
    rows = list(csv.DictReader(io.StringIO(files["damage.csv"].decode())))
    assert int(rows[-1]["nbytes"]) == 42 * 2 * 256 * 256 and rows[-1]["label"] == "16 bit"
    assert rows[0]["label"] == "plain NF4" and int(rows[0]["nbytes"]) == 42 * Bnb4bit().nbytes(
        (256, 256)
    )
    total = sum(read_sensitivity(path).values("kld").values())
    assert float(rows[0]["predicted_damage"]) == pytest.approx(total)
    page = files["report.html"].decode()
    assert "What more bytes would buy" in page and "by KL divergence" in page
    weight = sensitivity_report(read_sensitivity(path), metric="weight")
    assert "by weight error" in weight["report.html"].decode()


def test_half_of_the_curve_is_where_the_first_bytes_are_spent(tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(measured(32)))
    sensitivity = read_sensitivity(path)
    damage = [(value, 0.0) for value in sensitivity.values("kld").values()]
    nbytes = [n for n, _ in levels_of(sensitivity).curve(damage)]
    early = nbytes[0] + 0.3 * (nbytes[-1] - nbytes[0])
    assert nbytes == sorted(nbytes) and len(nbytes) > 40
    assert 0.5 <= sum(n <= early for n in nbytes) / len(nbytes) < 0.6


def test_two_roundings_have_two_names(tmp_path):
    """bitsandbytes' own is in the table; the curve starts from what was measured."""
    data = measured(6)
    data["quantization"]["search_scales"] = True
    path = tmp_path / "s.json"
    path.write_text(json.dumps(data))
    page = sensitivity_report(read_sensitivity(path), CHOICE)["report.html"].decode()
    assert "+10.0 % against NF4 with searched scales" in page
    assert "predicted damage against NF4 with searched scales" in page
    assert "plain NF4, 6.6 MB" not in page and "NF4 with searched scales, 6.6 MB" in page
    assert rows_of(page, 0)[1][0] == "plain NF4"
    assert "Plain NF4 is bitsandbytes&#39; own rounding" in page


def test_tiny_matrices_have_no_curve(tmp_path):
    """Their scales' tables take more than 16 bits would."""
    data = measured(2)
    for module in data["modules"].values():
        module["shape"] = [4, 4]
    path = tmp_path / "s.json"
    path.write_text(json.dumps(data))
    files = sensitivity_report(read_sensitivity(path))
    assert "damage.csv" not in files and b"What more bytes" not in files["report.html"]


def test_an_endless_name_is_cut(tmp_path):
    data = measured(2, "x" * 3000)
    data["versions"]["torch"] = "y" * 3000
    path = tmp_path / "s.json"
    path.write_text(json.dumps(data))
    page = sensitivity_report(read_sensitivity(path))["report.html"].decode()
    assert "x" * 50 in page and "x" * 121 not in page and "y" * 121 not in page
    assert "x" * 61 not in re.search("<h1>.*?</h1>", page)[0]


def test_the_map_shows_the_metric_that_is_asked_for(path):
    sensitivity = read_sensitivity(path)
    maps = {
        metric: sensitivity_report(sensitivity, metric=metric)["heatmap.csv"].split(b"\n")[0]
        for metric in (None, "weight", "kld")
    }
    ends = {metric: header.rpartition(b",")[2] for metric, header in maps.items()}
    assert ends == {None: b"KL divergence", "weight": b"weight error", "kld": b"KL divergence"}
    with pytest.raises(BadInput, match="block"):
        sensitivity_report(sensitivity, metric="block")


def test_weights_alone_make_one_panel(tmp_path):
    data = measured(2)
    for entry in [*data["modules"].values(), *data["groups"].values()]:
        entry.pop("activation")
        entry.pop("kld", None)
    data["calibration"] = {}
    path = tmp_path / "s.json"
    path.write_text(json.dumps(data))
    files = sensitivity_report(read_sensitivity(path))
    assert files["heatmap.csv"].split(b"\n")[0].endswith(b",weight error")
    said = texts(files["errors.svg"])
    assert {"Weight error", "Weight error, by group"} <= set(
        said
    ) and "Activation error" not in said
    assert b"ctivation" not in files["report.html"]


def test_a_group_that_does_nothing(tmp_path):
    data = measured(2)
    next(iter(data["groups"].values()))["kld"] = 0
    path = tmp_path / "s.json"
    path.write_text(json.dumps(data))
    files = sensitivity_report(read_sensitivity(path), metric="kld")
    assert rows_of(files["report.html"].decode(), 0)[-1][5] == "0"
    assert b"1 without any error" in files["report.html"]


def test_hostile_names_are_text_in_every_file(tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(measured(2, HOSTILE, prefix=HOSTILE)))
    files = sensitivity_report(read_sensitivity(path))
    page = files["report.html"].decode()
    assert page.count("<script") == 1 and "<img" not in page and "\x1b" not in page
    for name in ("errors.svg", "heatmap.svg"):
        tags = {e.tag.rpartition("}")[2] for e in ElementTree.fromstring(files[name]).iter()}
        assert not tags & {"script", "img"}
    assert b"\x1b" not in files["errors.csv"]


# --- in a folder ------------------------------------------------------------------------------


def run(*args):
    return CliRunner().invoke(plot.command, [str(a) for a in args], catch_exceptions=False)


def test_plot_writes_all_and_says_so(path, tmp_path):
    folder = tmp_path / "figures"
    result = run(path, "-o", folder)
    assert result.exit_code == 0
    assert {p.name for p in folder.iterdir()} == FILES | {"report.html"}
    expected = sensitivity_report(read_sensitivity(path))
    assert all((folder / name).read_bytes() == data for name, data in expected.items())
    assert len(result.output.splitlines()) == 10 and "report.html" in result.output


def test_plot_replaces_only_what_it_made_and_only_when_told(path, tmp_path):
    folder = tmp_path / "figures"
    run(path, "-o", folder, "--metric", "activation")
    with pytest.raises(CannotCreate, match="--force"):
        run(path, "-o", folder, "--metric", "kld")
    assert b"activation error" in (folder / "heatmap.csv").read_bytes()
    assert run(path, "-o", folder, "--metric", "kld", "--force").exit_code == 0
    assert b"KL divergence" in (folder / "heatmap.csv").read_bytes()
    before = (folder / "errors.png").read_bytes()
    (folder / "heatmap.svg").write_text("my notes")
    with pytest.raises(CannotCreate, match=r"heatmap\.svg"):
        run(path, "-o", folder, "--force")
    assert (folder / "heatmap.svg").read_text() == "my notes"
    assert (folder / "errors.png").read_bytes() == before
    assert b"KL divergence" in (folder / "heatmap.csv").read_bytes()  # nothing was begun


def test_plot_never_writes_over_its_source(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(json.dumps(measured(2)))
    with pytest.raises(UsageError, match="source"):
        run(path, "-o", tmp_path, "--force")


@pytest.mark.parametrize(
    ("content", "error"),
    [(None, InputMissing), ("{}", BadInput), ("<!doctype html>", BadInput), ("[1]", BadInput)],
)
def test_plot_of_something_else(content, error, tmp_path):
    path = tmp_path / "s.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error):
        run(path, "-o", tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_plot_into_a_file_or_nowhere(path, tmp_path):
    with pytest.raises(CannotCreate, match="not a folder"):
        run(path, "-o", path)
    with pytest.raises(CannotCreate, match="no folder"):
        run(path, "-o", tmp_path / "a" / "b")


def test_plot_knows_the_metrics():
    assert tuple(METRICS) == plot.METRICS
    result = run("s.json", "-o", "f", "--metric", "wieght")
    assert result.exit_code == click.UsageError.exit_code


def test_write_files_checks_before_it_writes(tmp_path):
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(CannotCreate):
        write_files(tmp_path, {"a.csv": b"a", "b.csv": b"b"}, force=True)
    assert not (tmp_path / "a.csv").exists()
