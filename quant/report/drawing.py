"""A matplotlib figure as files: PNG, SVG, an SVG for inside a page, and the numbers as CSV.

The same numbers give the same bytes: no date, no random ids, a font that comes with matplotlib.
matplotlib's settings are global while a figure is drawn: draw from one thread at a time.
"""

import csv
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from quant.display import printable
from quant.report.style import COLOURS, MATPLOTLIB

_VARIABLES = {colour.light: f"var(--{name})" for name, colour in COLOURS.items()}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))

Tips = dict[str, list[str]]
"""gid of a collection of marks -> what to say when the pointer rests on each."""


@dataclass(frozen=True)
class Drawing:
    """One figure in every form it is needed in."""

    name: str  # of its files
    title: str
    caption: str  # says in words what the picture shows; read aloud instead of it
    png: bytes
    svg: str  # stands alone
    inline: str  # for a page: no title, no colours of its own
    csv: str

    def files(self) -> dict[str, bytes]:
        """File name -> content."""
        return {
            f"{self.name}.png": self.png,
            f"{self.name}.svg": self.svg.encode(),
            f"{self.name}.csv": self.csv.encode(),
        }


def render(
    name: str,
    title: str,
    caption: str,
    draw: Callable[[Figure], Tips],
    header: Sequence[str],
    rows: Sequence[Sequence],
) -> Drawing:
    """The Drawing of `draw`, which fills an empty figure and returns the tips of its marks.

    header, rows: the numbers in the picture. Every text may be untrusted.
    """
    title, caption = printable(title), printable(caption, 1000)
    with matplotlib.style.context(MATPLOTLIB, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # Chinese in a PNG
        bare, tips = _figure(draw)
        titled, _ = _figure(draw)
        titled.suptitle(title, x=0.012, ha="left", fontsize=11.5, fontweight="bold")
        return Drawing(
            name,
            title,
            caption,
            _saved(titled, "png", {"Software": None}),
            _saved(titled, "svg", _NO_METADATA).decode(),
            inline_svg(_saved(bare, "svg", _NO_METADATA).decode(), name, caption, tips),
            csv_text(header, rows),
        )


def _figure(draw: Callable[[Figure], Tips]) -> tuple[Figure, Tips]:
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    tips = draw(figure)
    for text in figure.findobj(Text):  # a control character would make the SVG unreadable
        text.set_text("\n".join(map(printable, text.get_text().split("\n"))))
    return figure, tips


def _saved(figure: Figure, kind: str, metadata: dict) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata=metadata)
    return file.getvalue()


# --- numbers ----------------------------------------------------------------------------------


def csv_text(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Rows as CSV, with full precision; None is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(map(_csv_cell, row) for row in rows)
    return file.getvalue()


def _csv_cell(value):
    """Text that a spreadsheet would run as a formula gets an apostrophe before it."""
    if not isinstance(value, str):
        return value
    text = printable(value, 1000)
    return "'" + text if text.startswith(("=", "+", "-", "@")) else text


# --- an SVG inside a page ---------------------------------------------------------------------


def inline_svg(svg: str, name: str, caption: str, tips: Mapping[str, Sequence[str]]) -> str:
    """matplotlib's SVG as an HTML element that takes colours and font from the page.

    Every id starts with `name`, so that figures of one page do not collide. Marks of the
    collections in `tips` say their line when the pointer rests on them.
    """
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            element.set(key.rpartition("}")[2], value)  # xlink:href is plain href since SVG 2
    for element in root.iter():
        for outdated in [child for child in element if child.tag in ("metadata", "style")]:
            element.remove(outdated)
        if element.get("id") in tips:
            _add_tips(element, tips[element.get("id")])
        _adapt_attributes(element, name)
    root.attrib = {"viewBox": root.get("viewBox"), "role": "img", "aria-label": caption}
    return ElementTree.tostring(root, encoding="unicode")


def _adapt_attributes(element: ElementTree.Element, name: str) -> None:
    for key, value in element.attrib.items():
        if key == "id":
            value = f"{name}-{value}"
        elif key == "href":
            value = value.replace("#", f"#{name}-", 1)
        elif key == "style":
            value = re.sub(r"font-family: [^;]*(; |$)", "", value)
            value = re.sub(r"#[0-9a-f]{6}", lambda hex: _VARIABLES.get(hex[0], hex[0]), value)
        elif value.startswith("url(#"):
            value = value.replace("#", f"#{name}-", 1)
        element.set(key, value)


def _add_tips(group: ElementTree.Element, lines: Sequence[str]) -> None:
    """A <title> for each mark of a collection: uses of one shape, or paths where they are few."""
    templates = {mark for defs in group.iter("defs") for mark in defs.iter()}
    marks = [e for e in group.iter() if e.tag in ("use", "path") and e not in templates]
    for mark, line in zip(marks, lines, strict=True):
        ElementTree.SubElement(mark, "title").text = printable(line)
