"""The page: well formed, alone in the world, and indifferent to what names say."""

import base64
import csv
import hashlib
import html.parser
import io
import re
import shutil
import socket
import subprocess
from functools import cache

import pytest
from report_makers import HOSTILE, curve, group_points, panels

from quant.report.figures import damage_curve, error_panels, heat_map
from quant.report.page import Number, Section, facts, figure, page, prose, table, tiles

VOID = {"meta", "br", "img", "link", "input", "hr"}


@cache
def whole_page(name: str = "tiny", n_layers: int = 2) -> str:
    """Every block there is; every text of it is `name` or holds it."""
    points = curve()
    drawings = [
        error_panels(name, panels(n_layers, prefix=name)),
        heat_map(name, name, name, group_points(n_layers), 0.04),
        damage_curve(name, name, points, points[2], name, name),
    ]
    rows = [
        (f"{name} {i}", Number(value, name)) for i, value in enumerate([3e-5, None, 2.0, 1e3, 0.5])
    ]
    blocks = [
        tiles([(name, name, name)] * 3),
        prose(name),
        *map(figure, drawings),
        table([name, name], rows, name, marked=[1]),
        facts([(name, name)]),
    ]
    return page(name, [Section(name, blocks)], name, name)


class Outline(html.parser.HTMLParser):
    """Elements with their attributes, text, ids; fails on a tag that is not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.open, self.texts, self.comments = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def handle_comment(self, data):
        self.comments.append(data)

    def structure(self) -> list:
        """Tags and names of attributes, without those of the drawings' insides."""
        inside = {"g", "path", "use", "defs", "clipPath", "clippath", "rect", "text", "tspan"}
        return [(tag, sorted(attrs)) for tag, attrs in self.elements if tag not in inside]

    def text_of(self, tag: str) -> str:
        return "".join(text for inside, text in self.texts if inside == tag)


def test_it_is_well_formed():
    outline = Outline(whole_page())
    tags = [tag for tag, _ in outline.elements]
    assert tags.count("svg") == 3 and tags.count("table") == tags.count("h1") == 1
    ids = [attrs["id"] for _, attrs in outline.elements if "id" in attrs]
    assert len(ids) > 100 and len(set(ids)) == len(ids)
    for _, attrs in outline.elements:
        for target in re.findall(r"url\(#([^)]*)\)", " ".join(v or "" for v in attrs.values())):
            assert target in ids
        if attrs.get("href", "").startswith("#"):
            assert attrs["href"][1:] in ids


def test_it_asks_nothing_of_the_network():
    text = whole_page()
    assert "://" not in text and "@import" not in text
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    for tag, attrs in Outline(text).elements:
        assert tag not in ("link", "img", "image", "iframe", "object", "embed", "base", "form")
        assert not attrs.keys() & {"src", "srcset", "action", "poster", "background", "ping"}
        assert attrs.get("href", "#").startswith(("#", "data:text/csv;base64,"))


def test_only_our_script_may_run():
    outline = Outline(whole_page())
    policy = outline.elements[3][1]["content"]
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    digest = base64.b64encode(hashlib.sha256(outline.text_of("script").encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy


def test_names_change_only_text():
    tame, hostile = Outline(whole_page()), Outline(whole_page(HOSTILE))
    assert hostile.structure() == tame.structure()
    assert not hostile.comments
    for _, text in hostile.texts:
        assert text.replace("\n", "").isprintable()
    for _, attrs in hostile.elements:
        assert not [key for key in attrs if key.startswith("on")]
        assert all((value or "").replace("\n", "").isprintable() for value in attrs.values())
    assert "49" not in hostile.text_of("h1") and "{{7*7}}" in hostile.text_of("h1")
    assert "<script>document.title='hit'" in hostile.text_of("title")


def test_both_papers_are_there():
    """Nothing in a drawing has a colour of its own, so that it can follow the page's."""
    text = whole_page()
    assert "@media (prefers-color-scheme:dark){:root{--paper:#0f1317" in text
    drawn = text[text.index("<svg") : text.rindex("</svg>")]
    assert "var(--ink)" in drawn
    assert re.findall(r"(?:fill|stroke): (?!var|none|url)[^;\"]+", drawn) == []
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    assert used <= set(re.findall(r"--([\w-]+):#", text))


def test_numbers_can_be_taken_out():
    link = next(a["href"] for t, a in Outline(whole_page()).elements if t == "a")
    text = base64.b64decode(link.partition("base64,")[2]).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["name"] for row in rows] == [p.name for p in panels(2, prefix="tiny")[0].points]


def test_an_empty_table_and_a_page_without_words():
    text = page("t", [Section("s", [table(["a"], [], "c")])])
    assert 'class="lead"' not in text and "<tbody>\n</tbody>" in text


# --- in a browser -----------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path):
    """text of a page -> the DOM after it has run, or a screenshot, in Chromium."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium here: Debian's package of that name shows the page for real")
    options = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync --hide-scrollbars"
    )
    options += " --disable-background-networking"

    def run(text: str, *more: str) -> str:
        path = tmp_path / "page.html"
        path.write_text(text)
        command = [program, *options.split(), f"--user-data-dir={tmp_path / 'profile'}", *more]
        done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=60)
        return done.stdout

    return run


def instrumented(text: str, script: str) -> str:
    """The page with one more script, which is let in; what it returns becomes the title."""
    text = re.sub("<meta http-equiv[^>]*>", "", text)
    return text.replace(
        "</body>", f"<script>document.title = (() => {{{script}}})()</script></body>"
    )


def title(dom: str) -> str:
    return re.search("<title>(.*?)</title>", dom)[1]


def test_browser_sorts_numbers_as_numbers(browser):
    script = """
    const head = document.querySelectorAll("th button")[1];
    const order = () => Array.from(document.querySelectorAll("tbody tr"),
        (row) => row.cells[0].textContent.slice(-1)).join("");
    const orders = [order()];
    for (let i = 0; i < 3; i++) { head.click(); orders.push(order()); }
    document.querySelectorAll("th button")[0].click(); orders.push(order());
    return orders.join(" ");
    """
    dom = browser(instrumented(whole_page(), script), "--dump-dom")
    assert title(dom) == "01234 32401 04231 32401 01234"


@pytest.mark.parametrize("width", [500, 1280])
def test_browser_page_fits_the_window(browser, width):
    """Wide things scroll in their own box; the page itself never sideways. Figures have a size."""
    script = """
    const wide = document.documentElement.scrollWidth - window.innerWidth;
    const sizes = Array.from(document.querySelectorAll("svg"), (e) => e.getBoundingClientRect());
    return [window.innerWidth, wide, ...sizes.map((r) => r.width > 400 && r.height > 100)].join();
    """
    dom = browser(instrumented(whole_page(), script), "--dump-dom", f"--window-size={width},900")
    assert title(dom) == f"{width},0,true,true,true"


def test_browser_runs_no_other_script(browser):
    script = "<script>document.title = 'hit'</script>"
    assert title(browser(whole_page().replace("</body>", f"{script}</body>"), "--dump-dom")) == (
        "tiny · tiny"
    )
    plain = re.sub("<meta http-equiv[^>]*>", "", whole_page()).replace(
        "</body>", f"{script}</body>"
    )
    assert title(browser(plain, "--dump-dom")) == "hit"  # the policy is what stopped it


def test_browser_makes_no_request_for_a_hostile_name(browser):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        for attack in ("<img src={}>", "<link rel=stylesheet href={}>", "<script src={}></script>"):
            name = "</title></svg></style>" + attack.format(address)
            dom = browser(whole_page(name), "--dump-dom")
            assert title(dom).startswith("&lt;/title&gt;") and attack.split()[0] + " " not in dom
        with pytest.raises(TimeoutError):
            server.accept()


def test_browser_shows_light_and_dark(browser, tmp_path):
    from PIL import Image

    seen = {}
    for mode, number in (("light", 1), ("dark", 0)):
        picture = tmp_path / f"{mode}.png"
        browser(
            whole_page(),
            f"--screenshot={picture}",
            f"--blink-settings=preferredColorScheme={number}",
            "--window-size=1000,1600",
        )
        greys = Image.open(picture).convert("L").tobytes()
        assert len(set(greys)) > 60  # something was drawn
        seen[mode] = sum(grey > 128 for grey in greys) / len(greys)
    assert seen["light"] > 0.9 and seen["dark"] < 0.1
