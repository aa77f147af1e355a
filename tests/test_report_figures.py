"""The figures: what they show, that all can read them, and that their bytes do not change."""

import csv
import hashlib
import io
import os
import subprocess
import sys
from functools import cache
from itertools import combinations, pairwise
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report_makers import HOSTILE, curve, group_panel, group_points, panels

from quant.groups import KINDS as GROUP_KINDS
from quant.report.axes import _log_ticks
from quant.report.drawing import csv_text
from quant.report.figures import Panel, Point, damage_curve, error_panels, heat_map
from quant.report.style import COLOURS, KINDS, N_SHADES

SVG = "{http://www.w3.org/2000/svg}"


@cache
def every_figure(n_layers: int = 6, title: str = "tiny"):
    points = curve()
    return [
        error_panels(title, [group_panel(n_layers), *panels(n_layers)]),
        heat_map(title, "activation error", "relative squared error", group_points(n_layers), 0.04),
        damage_curve(title, "activation error", points, points[2], "plain NF4"),
    ]


def texts(svg: str) -> list[str]:
    return ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def inline(drawing) -> ElementTree.Element:
    return ElementTree.fromstring(drawing.inline)


def tips(drawing) -> list[str]:
    return [e.text for e in inline(drawing).iter("title")]


# --- files ------------------------------------------------------------------------------------


def test_every_file_is_whole():
    for drawing in every_figure():
        files = drawing.files()
        assert sorted(files) == [f"{drawing.name}.{end}" for end in ("csv", "png", "svg")]
        image = Image.open(io.BytesIO(files[f"{drawing.name}.png"]))
        image.load()
        assert image.width == 1600 and image.height > 300
        assert ElementTree.fromstring(drawing.svg).tag == f"{SVG}svg"
        assert drawing.title in texts(drawing.svg)
        assert drawing.title not in "".join(inline(drawing).itertext())  # the page says it


def test_the_same_numbers_give_the_same_bytes():
    """Whatever the user has set in matplotlib, and in another process; which needs no pyplot."""
    before = [drawing.files() for drawing in every_figure()]
    with matplotlib.rc_context({"font.size": 30, "axes.labelpad": 20, "svg.fonttype": "path"}):
        assert [drawing.files() for drawing in every_figure.__wrapped__()] == before
        assert matplotlib.rcParams["font.size"] == 30
    code = "import hashlib, sys, test_report_figures as t; print([hashlib.sha256(b).hexdigest() "
    code += "for d in t.every_figure() for b in d.files().values()]); print(*sys.modules)"
    environment = os.environ | {"PYTHONHASHSEED": "5", "TZ": "Asia/Tokyo"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    hashes, modules = done.stdout.splitlines()
    here = [hashlib.sha256(data).hexdigest() for files in before for data in files.values()]
    assert hashes == str(here)
    assert "matplotlib.figure" in modules.split()
    assert not {"matplotlib.pyplot", "torch", "transformers"} & set(modules.split())


def test_the_numbers_beside_a_picture_are_exact():
    errors, heat, damage = every_figure()
    activation, weight = panels(6)
    rows = list(csv.DictReader(io.StringIO(errors.csv)))
    groups, modules = ([r for r in rows if r["level"] == of] for of in ("group", "module"))
    assert [float(row["activation"]) for row in modules] == [p.value for p in activation.points]
    assert [float(row["weight"]) for row in modules] == [p.value for p in weight.points]
    assert [row["name"] for row in modules if row["kept_16_bit"] == "yes"] == [
        p.name for p in weight.points if p.kept
    ]
    assert [(r["name"], float(r["activation"]), r["weight"]) for r in groups] == [
        (p.name, p.value, "") for p in group_points(6)
    ]
    rows = list(csv.DictReader(io.StringIO(heat.csv)))
    assert [float(row["activation error"]) for row in rows] == [p.value for p in group_points(6)]
    rows = list(csv.DictReader(io.StringIO(damage.csv)))
    assert [(int(r["nbytes"]), float(r["predicted_damage"])) for r in rows[:-1]] == curve()
    assert rows[-1]["label"] == "chosen" and int(rows[-1]["nbytes"]) == curve()[2][0]


def test_a_spreadsheet_finds_no_formula_in_a_name():
    text = csv_text(["module", "value"], [("=HYPERLINK(A1)", -1.5), ('a"b\n', None)])
    assert list(csv.reader(io.StringIO(text)))[1:] == [
        ["'=HYPERLINK(A1)", "-1.5"],
        ['a"b\\n', ""],
    ]


# --- what they show ---------------------------------------------------------------------------


def test_what_is_kept_is_marked_and_the_threshold_drawn():
    errors, heat, _ = every_figure()
    kept = {p.name for points in (panels(6)[0].points, group_points(6)) for p in points if p.kept}
    assert len(kept) == 5  # down of layer 0, a group of its own; qkv, q, k and v of layer 1
    said = {tip.partition(":")[0] for tip in tips(errors) if tip.endswith("kept in 16 bits")}
    assert said == kept
    assert {"least kept", "0.04", "kept in 16 bits"} <= set(texts(errors.svg))
    assert "The line in the scale is the least that does: 0.04." in heat.caption
    assert "worse groups" not in heat.caption
    low = heat_map("t", "e", "u", group_points(6), threshold=0.001)
    assert "Some worse groups do not" in low.caption
    bare = [group_panel(6, threshold=None), *panels(6)]
    assert "least kept" not in texts(error_panels("tiny", bare).svg)
    assert texts(errors.svg).count("least kept") == 1  # a group's value is no module's
    marks = [e for e in inline(heat).iter("use") if "var(--ink)" in e.get("style", "")]
    assert len([e for e in marks if "fill: var(--surface)" in e.get("style")]) == 2


def test_every_point_says_its_name_and_value():
    errors, heat, damage = every_figure()
    wanted = {f"{p.name}: {p.value:.3g} relative squared error" for p in panels(6)[0].points}
    assert wanted <= {tip.removesuffix(", kept in 16 bits") for tip in tips(errors)}
    assert len(tips(errors)) == 24 + 2 * 42 and len(tips(heat)) == 24 and len(tips(damage)) == 21


def test_points_of_a_layer_stand_in_order_and_in_their_place():
    """The marks are where their numbers are: deeper to the right, worse further up."""
    points = panels(6)[0].points
    root = inline(error_panels("tiny", panels(6)))
    at = {}
    for mark in root.iter("use"):
        title = mark.find("title")
        if title is not None:
            at.setdefault(
                title.text.partition(":")[0], (float(mark.get("x")), float(mark.get("y")))
            )
    xs = [at[p.name][0] for p in points]
    assert xs == sorted(xs)
    logs, ys = np.log([p.value for p in points]), np.array([at[p.name][1] for p in points])
    assert np.allclose(np.polyval(np.polyfit(logs, ys, 1), logs), ys, atol=1e-3)
    assert np.polyfit(logs, ys, 1)[0] < 0  # SVG counts downwards


def test_worse_cells_are_stronger():
    points = [Point(f"g{i}", i, "o", 10.0 ** (i - 8)) for i in range(8)]
    cells = {
        e.find("title").text.partition(":")[0]: e.get("style")
        for e in inline(heat_map("t", "error", "unit", points)).iter("path")
        if e.find("title") is not None
    }
    shades = [int(cells[p.name].partition("var(--shade-")[2].partition(")")[0]) for p in points]
    assert shades == sorted(shades) and shades[0] == 0 and shades[-1] == N_SHADES - 1


@pytest.mark.parametrize("chosen", [0, 1, 2, 9, 19, 20])
def test_the_chosen_point_is_named_with_its_price(chosen):
    points = curve()
    said = texts(damage_curve("t", "error", points, points[chosen], "plain NF4").svg)
    text = next(text for text in said if text.startswith("chosen, "))
    share = 100 * (points[chosen][1] / points[0][1] - 1)
    assert f"{share:+.1f} % predicted damage".replace("-", "−") in text
    assert ("plain NF4, 6.6 MB" in said) == (chosen > 0)
    assert ("16 bit, 13.6 MB" in said) == (chosen < 20)


# --- every input ------------------------------------------------------------------------------


@pytest.mark.parametrize("n_layers", [1, 2, 64, 128])
def test_any_depth(n_layers):
    drawing = error_panels("t", panels(n_layers))
    labels = [int(text) for text in texts(drawing.svg) if text.isdigit()]
    assert 0 in labels and len(set(labels)) <= 18
    assert len(tips(drawing)) == 14 * n_layers
    assert len(tips(heat_map("t", "e", "u", group_points(n_layers)))) == 4 * n_layers


@pytest.mark.parametrize(
    "values", [(0, 0, 0), (0, 1, 2), (1, 1, 1), (1e-300, 1, 1e300), (5e-324, 1e-9, 1e308)]
)
def test_any_value(values):
    points = tuple(Point(f"m{i}", i, "down", float(v)) for i, v in enumerate(values))
    drawing = error_panels("t", [Panel("weight", "weight error", "u", points, 1e-5)])
    assert len(tips(drawing)) == 3
    assert ("lower edge" in drawing.caption) == (0 in values)
    assert len(tips(heat_map("t", "e", "u", points, 1e-5))) == 3


def test_a_curve_without_a_choice():
    drawing = damage_curve("t", "error", curve(), None, "plain NF4", sized="size of the layers")
    said = texts(drawing.svg)
    assert {"plain NF4, 6.6 MB", "16 bit, 13.6 MB", "size of the layers in MB"} <= set(said)
    assert "chosen" not in drawing.svg + drawing.caption + drawing.csv


def test_nothing_to_lose_is_drawn_too():
    points = [(10, 0.0), (20, 0.0)]
    assert "±0 %" in damage_curve("t", "error", points, points[0], "plain NF4").svg


def test_names_are_only_text():
    for drawing in every_figure(title=HOSTILE):
        root = ElementTree.fromstring(drawing.svg)
        assert not {"script", "img"} & {e.tag.removeprefix(SVG) for e in root.iter()}
        assert drawing.title in texts(drawing.svg)
        assert drawing.title.isprintable() and "${{7*7}}$^2\\x1b[2J" in drawing.title
    hostile = error_panels("t", panels(2, prefix=HOSTILE))
    assert {e.tag for e in inline(hostile).iter()} == {
        e.tag for e in inline(error_panels("t", panels(2))).iter()
    }
    assert all(tip.isprintable() for tip in tips(hostile))


@given(st.floats(-30, 30), st.floats(0.05, 60))
def test_a_log_axis_has_a_few_round_labels(start, decades):
    low, high = 10.0**start, 10.0 ** (start + decades)
    ticks = _log_ticks(low, high)
    assert 2 <= len(ticks) <= 10 and ticks == sorted(ticks)
    assert all(low <= tick <= high for tick in ticks)
    assert all(float(f"{tick:.4g}") == pytest.approx(tick, rel=1e-9) for tick in ticks)


@pytest.mark.parametrize(
    ("low", "high"), [(1.15e-3, 7.2e-3), (1.1e-3, 0.2), (2e-6, 0.4), (0.0061, 0.0108)]
)
def test_labels_reach_both_ends_of_an_axis(low, high):
    """No third of the axis is without a label."""
    ticks = [low, *_log_ticks(low, high), high]
    assert max(b / a for a, b in pairwise(ticks)) < (high / low) ** (1 / 3)


# --- eyes -------------------------------------------------------------------------------------


# Machado, Oliveira and Fernandes 2009, severity 1; on linear RGB.
EYES = {
    "all cones": np.eye(3),
    "no red": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no blue": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def linear(colour: str) -> np.ndarray:
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear sRGB, white D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.clip(to_xyz @ rgb, 0, None) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(a: str, b: str) -> float:
    """WCAG 2's ratio of luminances."""
    bright, dark = sorted((linear(c) @ [0.2126, 0.7152, 0.0722] for c in (a, b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("shade", ["light", "dark"])
def test_kinds_differ_for_every_kind_of_eye(eyes, shade):
    """20 is plain to see side by side; what is nearer must differ in its marker, and all do."""
    seen = {
        kind: lab(np.clip(np.array(EYES[eyes]) @ linear(getattr(COLOURS[kind], shade)), 0, 1))
        for kind in ("q", "k", "v", "o", "gate", "up", "down")
    }
    near = {(a, b): np.linalg.norm(seen[a] - seen[b]) for a, b in combinations(seen, 2)}
    assert min(near.values()) > 15, min(near, key=near.get)
    assert sum(distance < 20 for distance in near.values()) <= 3


def test_kinds_differ_without_colour():
    markers = [KINDS[kind].marker for kind in ("q", "k", "v", "o", "gate", "up", "down", "other")]
    assert len(set(markers)) == len(markers)


def test_every_kind_of_group_can_be_drawn():
    assert {kind.name for kind in GROUP_KINDS} <= KINDS.keys()


@pytest.mark.parametrize("shade", ["light", "dark"])
@pytest.mark.parametrize("paper", ["paper", "surface"])
def test_text_and_marks_stand_out_from_the_paper(shade, paper):
    on = getattr(COLOURS[paper], shade)
    for role in ("ink", "muted", "accent"):
        assert contrast(getattr(COLOURS[role], shade), on) > 4.5, role
    for kind in KINDS.values():
        assert contrast(getattr(COLOURS[kind.colour], shade), on) > 1.9, kind.label


def test_shades_grow_in_contrast():
    for shade in ("light", "dark"):
        paper = getattr(COLOURS["surface"], shade)
        steps = [contrast(getattr(COLOURS[f"shade-{i}"], shade), paper) for i in range(N_SHADES)]
        assert all(b > 1.04 * a for a, b in pairwise(steps))
    assert len({colour.light for colour in COLOURS.values()}) == len(COLOURS)
