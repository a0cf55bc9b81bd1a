"""Reads a report page as a browser would, and checks what every page must be: well formed, accessible, self-contained."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

EMPTY = {"meta", "br", "link", "img", "input", "hr"}
HEADINGS = {f"h{level}": level for level in range(1, 7)}


@dataclass
class Node:
    """An element. parts: its text and its elements, in order."""

    tag: str
    attributes: dict[str, str]
    parts: list[Node | str] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        yield self
        for part in self.parts:
            if isinstance(part, Node):
                yield from part.walk()

    def all(self, tag: str, **attributes: str) -> list[Node]:
        """The elements below with a tag, and with attributes such as class_="box"."""
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [node for node in self.walk() if node.tag == tag and wanted.items() <= node.attributes.items()]

    def one(self, tag: str, **attributes: str) -> Node:
        (found,) = self.all(tag, **attributes)
        return found

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)

    @property
    def rows(self) -> list[list[str]]:
        """The texts of a table's cells."""
        return [[cell.text for cell in row.parts if isinstance(cell, Node)] for row in self.all("tr")]


class _Reader(HTMLParser):
    """Builds the tree; refuses an end tag that closes another element."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Node("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> repeats an attribute"
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].parts.append(node)
        if tag not in EMPTY:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.open[-1].parts.append(data)


def read_page(html: str) -> Node:
    """The root of a whole page."""
    assert html.startswith("<!doctype html>\n<html lang=")
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert len(reader.open) == 1, f"never closed: {[node.tag for node in reader.open[1:]]}"
    return reader.open[0].one("html")


def check_page(html: str, files: set[str]) -> Node:
    """Reads a page and checks it. files: the names of the files beside it, itself among them."""
    page = read_page(html)
    _check_self_contained(page, files)
    _check_accessible(page)
    return page


def _check_self_contained(page: Node, files: set[str]) -> None:
    ids = [node.attributes["id"] for node in page.walk() if "id" in node.attributes]
    assert len(set(ids)) == len(ids), "an id stands for two elements"
    for node in page.walk():
        assert node.tag not in {"script", "img", "iframe", "object", "embed", "link", "base", "form", "svg"}, node.tag
        for name, value in node.attributes.items():
            assert not name.startswith("on"), f"{name} runs a script"
            assert name not in {"src", "srcset", "action", "background", "ping"}, f"{name} loads {value}"
            if name == "href":
                assert (value[1:] in ids) if value.startswith("#") else value in files, f"{value} leads nowhere"
                assert not re.match(r"[a-z]+:|/", value.lower()), f"{value} leads away"
            if name == "style":
                assert re.fullmatch(r"(width|left):[0-9.]+%", value), value
    style = page.one("head").one("style").text
    assert not re.search(r"url\(|@import|https?:|//", style), "the style loads something"
    classes = {name for node in page.walk() for name in node.attributes.get("class", "").split()}
    assert not [name for name in classes if not re.search(rf"\.{name}\b", style)], "a class without a style"
    assert "default-src 'none'" in page.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]


def _check_accessible(page: Node) -> None:
    assert page.attributes["lang"] == "en"
    assert page.one("head").one("title").text.startswith(page.one("h1").text)
    levels = [HEADINGS[node.tag] for node in page.walk() if node.tag in HEADINGS]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in pairwise(levels)), levels
    for table in page.all("table"):
        assert table.attributes.get("aria-label"), "a table without a name"
        assert all(head.attributes.get("scope") in {"row", "col", "colgroup"} for head in table.all("th"))
        assert all(row.all("th", scope="row") for row in table.one("tbody").all("tr")), "a row without a name"
    for node in page.walk():
        if node.attributes.get("role") == "region":
            assert node.attributes.get("aria-label") and node.attributes["tabindex"] == "0"
        if node.tag == "figure":
            assert node.one("figcaption").one("h3").text and node.one("figcaption").one("p").text.endswith(".")
            assert node.all("div", class_="legend") or node.all("div", class_="scale"), "a picture without a legend"
