"""The frame and style of all report pages: title, sections, tables.

A page is one file that loads nothing else.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files as package_files
from typing import TYPE_CHECKING

from edgelora.report.elements import Html, element, join
from edgelora.report.palette import render_colors
from edgelora_runtime._version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NONE = "–"  # a figure that does not exist

# A page may use its own style and nothing else. Even a name that got past the escaping could not load or run anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def render_page(title: str, lead: str, *sections: str, context: str = "", links: Sequence[tuple[str, str]] = ()) -> Html:
    """Renders a whole page.

    context: what the browser's tab shows after the title. links: text and address of pages above this one.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", f"{title} · {context}" if context else title),
        Html(f"<style>{render_colors()}\n{_read_style()}</style>"),
    )
    above = element("nav", *(element("a", f"← {name}", href=address) for name, address in links), aria_label="Up")
    header = element("header", *([above] if links else []), element("h1", title), element("p", lead, class_="lead"))
    footer = element("footer", f"Written by edgelora {__version__}.")
    body = element("body", header, element("main", *sections), footer)
    return Html(f"<!doctype html>\n{element('html', head, body, lang='en')}\n")


@cache
def _read_style() -> str:
    return package_files("edgelora.report").joinpath("style.css").read_text(encoding="utf-8")


def render_section(key: str, heading: str, *parts: str) -> Html:
    """Renders a part of a page under a heading, which #key leads to."""
    return element("section", element("h2", heading, id=key), *parts, aria_labelledby=key)


def render_contents(sections: Iterable[tuple[str, str]]) -> Html:
    """Links to sections of the same page, given as key and heading."""
    links = (element("a", heading, href=f"#{key}") for key, heading in sections)
    return element("nav", *links, class_="contents", aria_label="On this page")


def render_note(*parts: str) -> Html:
    """A paragraph that explains what is around it."""
    return element("p", *parts, class_="note")


def render_chip(word: str, *, solid: bool = False) -> Html:
    """A word on a filled or an outlined label."""
    return element("span", word, class_="chip solid" if solid else "chip")


def render_cards(facts: Iterable[tuple[str, str, str]]) -> Html:
    """A few large figures, each with its name and a remark."""
    cards = (element("div", element("dt", name), element("dd", value, element("small", remark))) for name, value, remark in facts)
    return element("dl", *cards, class_="cards")


def render_table(label: str, columns: Sequence[str], rows: Iterable[Sequence[str]], figures: Iterable[int] = ()) -> Html:
    """Renders a table whose first column names its rows.

    label: its name, for screen readers. figures: columns to align right.
    """
    right = frozenset(figures)

    def style(place: int) -> str | None:
        return "figure" if place in right else None

    head = element("tr", *(element("th", name, scope="col", class_=style(place)) for place, name in enumerate(columns)))
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell, class_=style(place)) for place, cell in enumerate(row[1:], 1)),
        )
        for row in rows
    ]
    table = element("table", element("thead", head), element("tbody", *body), class_="list named", aria_label=label)
    return element("div", render_scroll(label, table), class_="box")


def render_facts(label: str, facts: Iterable[tuple[str, str]]) -> Html:
    """A table of names and values."""
    rows = (element("tr", element("th", name, scope="row"), element("td", value)) for name, value in facts)
    table = element("table", element("tbody", *rows), class_="list facts", aria_label=label)
    return element("div", table, class_="box")


def render_scroll(label: str, content: Html) -> Html:
    """Renders a box that scrolls sideways, by keyboard too, if its content is wider than the page."""
    return element("div", content, class_="scroll", role="region", aria_label=label, tabindex=0)


def render_lines(lines: Iterable[str]) -> Html:
    """Several lines in one cell."""
    return join(element("div", line) for line in lines)
