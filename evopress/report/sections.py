"""Sections that experiments add to the report: read from tables of their own, and included whatever they say.

A section is HTML in the style of the page, made with the macros of sections.html.j2, with figures as inline SVG. The
page's content security policy lets nothing run and fetches nothing; what could break the page around a section is
refused when it is read.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import require_same_model
from evopress.artifacts.tables import SECTIONS, read_provenance, read_table
from evopress.util.errors import ArtifactError

_TEXT = "h3 h4 p div span small em strong code pre ul ol li dl dt dd br"
_TABLES = "table caption thead tbody tr th td"
_FIGURES = "figure figcaption svg defs style g path use text tspan clippath rect circle ellipse line polyline polygon"
ELEMENTS = frozenset(f"{_TEXT} {_TABLES} {_FIGURES}".split())
"""What a section may hold: text, tables, and what figures are drawn of."""
_REFERENCES = ("href", "src", "xlink:href")


@dataclass(frozen=True)
class ReportSection:
    """A heading, and the HTML below it."""

    title: str
    html: Markup


def environment() -> Environment:
    """Jinja as the report uses it: everything is escaped, and templates can import sections.html.j2."""
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def read_sections(run: Run, paths: Iterable[Path]) -> list[ReportSection]:
    """Read tables of sections, in their order.

    Args:
        run: the run that they are about.
        paths: tables with the columns of SECTIONS.

    Raises:
        ArtifactError: a table is missing, damaged or of another model, or a section holds what has no place in one.
    """
    sections = []
    for path in paths:
        table = read_table(path, SECTIONS)
        require_same_model(run, read_provenance(path), path)
        for row in table.to_dict("records"):
            try:
                require_harmless(row["html"])
            except ValueError as error:
                raise ArtifactError(f"{path}: section {row['title']!r}: {error}; mend what writes it") from None
            sections.append(ReportSection(row["title"], Markup(row["html"])))  # noqa: S704 (just looked at)
    return sections


def require_harmless(html: str) -> None:
    """Check that ``html`` holds ELEMENTS only, whole ones, and refers to nothing outside the page.

    Raises:
        ValueError: it does not; the message says why.
    """
    checker = _Checker()
    checker.feed(html)
    checker.close()
    if checker.open:
        raise ValueError(f"<{checker.open[-1]}> is not closed")


class _Checker(HTMLParser):
    """Raises a ValueError at the first thing that has no place in a section."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)  # text keeps its &lt;, so that a bare '<' can be told from it
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Refuse other elements, and attributes that run code or refer elsewhere."""
        if tag not in ELEMENTS:
            raise ValueError(f"<{tag}> is none of the elements that a section may hold")
        for name, value in attrs:
            if name.startswith("on") or (name in _REFERENCES and not (value or "").startswith("#")):
                raise ValueError(f"<{tag} {name}> runs code, or refers to something outside the page")
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Refuse an end that does not belong to the element that was opened last."""
        if not self.open or self.open.pop() != tag:
            raise ValueError(f"</{tag}> closes another element than was opened last")

    def handle_data(self, data: str) -> None:
        """Refuse text with a bare `<`."""
        if "<" in data:
            raise ValueError("holds a '<' that begins no element; write &lt;")

    def handle_comment(self, data: str) -> None:
        """Refuse comments."""
        raise ValueError("holds a comment")

    def handle_decl(self, decl: str) -> None:
        """Refuse declarations."""
        raise ValueError("holds a declaration")

    def unknown_decl(self, data: str) -> None:
        """Refuse declarations of other kinds."""
        raise ValueError("holds a declaration")

    def handle_pi(self, data: str) -> None:
        """Refuse processing instructions."""
        raise ValueError("holds a processing instruction")
