"""The skeleton of any report: one HTML page with sections of prose, tables, facts and figures.

It works offline and asks nothing of the network: figures are inline SVG, CSS and script
stand in it, downloads are data URLs. A Content-Security-Policy says the same to the browser: no
request, and no script but ours. Whatever is a str is escaped; only Markup made here is not.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from quant.display import printable
from quant.report.drawing import Drawing
from quant.report.style import COLOURS


@dataclass(frozen=True)
class Number:
    """A cell that is aligned and sorted as a number. None is shown as a dash, and sorts last."""

    value: float | None
    text: str  # the value as people read it


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Markup]


def page(title: str, sections: Sequence[Section], lead: str = "", kind: str = "Report") -> str:
    """The whole page. `kind` stands small above the title, `lead` is the sentence below it."""
    return _TEMPLATES.get_template("page.html").render(
        title=title,
        kind=kind,
        lead=lead,
        sections=sections,
        css=Markup(_css()),
        script=Markup(_SCRIPT),
        script_hash=base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode(),
    )


def prose(text: str) -> Markup:
    """A paragraph."""
    return _BLOCKS.prose(text)


def tiles(numbers: Sequence[tuple[str, str, str]]) -> Markup:
    """The few numbers that matter, large: (number, what it is, what it is compared with)."""
    return _BLOCKS.tiles(numbers)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Number]],
    caption: str,
    marked: Sequence[int] = (),
) -> Markup:
    """A table that sorts by the column whose head is pressed; `marked` rows stand out.

    A column is a column of numbers if its first cell is a Number.
    """
    numeric = [isinstance(cell, Number) for cell in rows[0]] if rows else []
    return _BLOCKS.table(columns, rows, caption, frozenset(marked), numeric)


def facts(pairs: Sequence[tuple[str, str]]) -> Markup:
    """Names and values in two columns: settings, provenance."""
    return _BLOCKS.facts(pairs)


def figure(drawing: Drawing) -> Markup:
    """A drawing with its caption, and its numbers to download."""
    numbers = base64.b64encode(drawing.csv.encode()).decode()
    return _BLOCKS.figure(drawing, Markup(drawing.inline), numbers)


def _is_number(cell: str | Number) -> bool:
    return isinstance(cell, Number)


def _variables(shade: str) -> str:
    return "".join(f"--{name}:{getattr(colour, shade)};" for name, colour in COLOURS.items())


def _css() -> str:
    light, dark = _variables("light"), _variables("dark")
    return (
        f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        f"@media print{{:root{{{light}}}}}\n{_read('page.css')}"
    )


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


_TEMPLATES = Environment(
    loader=PackageLoader(__package__, "."),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
    finalize=lambda value: value if isinstance(value, Markup) else printable(value, 10_000),
)
_TEMPLATES.tests["number"] = _is_number
_BLOCKS = _TEMPLATES.get_template("blocks.html").module
_SCRIPT = _read("page.js")
