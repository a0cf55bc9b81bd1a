"""Elements that escape, the frame of a page, and the pictures in it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelora.report import palette
from edgelora.report.elements import Html, element, join
from edgelora.report.page import render_contents, render_facts, render_page, render_section, render_table
from edgelora.report.pictures import Bar, HeatMap, draw_bars, draw_heat_map, draw_heat_maps, format_cell, round_up
from tests.edgelora.report.parsed_page import Node, check_page, read_page

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]))


def on_page(*parts: str) -> Node:
    """Parts of a page, checked as a page."""
    return check_page(render_page("title", "lead", render_section("part", "Part", *parts)), {"page.html"}).one("main")


def draw(**changes: object) -> HeatMap:
    given: dict[str, object] = {
        "title": "map",
        "note": "Read it.",
        "scale": palette.KEPT,
        "rows_are": "product",
        "rows": ["up", "down"],
        "columns_are": "layer",
        "columns": ["0", "1", "2"],
        "cells": [[0.0, 0.5, 1.0], [-0.2, None, 1.3]],
        "ends": ("0: none", "1: all"),
    }
    return HeatMap(**{**given, **changes})  # type: ignore[arg-type]


@given(TEXT, TEXT)
def test_any_text_comes_back_as_it_was(content: str, attribute: str) -> None:
    found = read_page(f"<!doctype html>\n<html lang=en>{element('p', content, title=attribute)}</html>").one("p")
    assert (found.text, found.attributes["title"]) == (content, attribute)


def test_only_markup_stays_markup() -> None:
    assert element("p", "<b>", element("b", "&")) == "<p>&lt;b&gt;<b>&amp;</b></p>"
    assert join(["<", Html("<i></i>")]) == "&lt;<i></i>"
    assert element("p", f"{element('b')}") == "<p>&lt;b&gt;&lt;/b&gt;</p>", "text built around markup is text"


def test_attributes_are_spelled_as_in_html() -> None:
    found = element("td", class_="x", aria_label="a", colspan=2, title=None)
    assert found == '<td class="x" aria-label="a" colspan="2"></td>'
    assert element("meta", name="viewport") == '<meta name="viewport">'


def test_a_page_has_title_lead_contents_and_a_way_up() -> None:
    html = render_page(
        "What it shows",
        "In a sentence.",
        render_contents([("one", "First")]),
        render_section("one", "First", "text"),
        context="bundle",
        links=[("All", "index.html")],
    )
    page = check_page(html, {"index.html"})
    assert page.one("title").text == "What it shows · bundle"
    assert page.one("header").one("p").text == "In a sentence."
    assert [link.attributes["href"] for link in page.all("a")] == ["index.html", "#one"]
    assert page.one("meta", name="viewport").attributes["content"].startswith("width=device-width")


def test_tables_and_facts() -> None:
    main = on_page(
        render_table("sizes", ("name", "size"), [["a", "1"], ["b", "2"]], figures=[1]), render_facts("all", [("x", "y")])
    )
    sizes, facts = main.all("table")
    assert sizes.rows == [["name", "size"], ["a", "1"], ["b", "2"]]
    assert [cell.attributes.get("class") for cell in sizes.one("tbody").all("td")] == ["figure", "figure"]
    assert [head.attributes["scope"] for head in sizes.all("th")] == ["col", "col", "row", "row"]
    assert facts.rows == [["x", "y"]]


def test_a_heat_map_shows_every_figure_and_its_scale() -> None:
    found = on_page(draw_heat_map(draw())).one("figure")
    assert found.one("table").rows[2:] == [["up", "0.00", "0.50", "1.00"], ["down", "−0.20", "–", "1.30"]]
    classes = [[cell.attributes["class"] for cell in row.all("td")] for row in found.one("tbody").all("tr")]
    assert classes == [["kept-0", "kept-5", "kept-10"], ["kept-0", "none", "kept-10"]]
    legend = found.one("div", class_="scale")
    assert [step.attributes["class"] for step in legend.all("i")] == [f"kept-{step}" for step in range(11)]
    assert [end.text for end in legend.all("span")] == ["0: none", "1: all"]
    assert found.one("div", class_="legend").text == "– no figure"


def test_rings_are_said_in_words() -> None:
    found = on_page(draw_heat_map(draw(ringed=frozenset({(0, 1)}), ring="stored in 8 bits"))).one("figure")
    ringed = found.one("tbody").all("td", class_="kept-5 ring")
    assert [cell.text for cell in ringed] == ["0.50 (stored in 8 bits)"]
    assert "stored in 8 bits" in found.one("div", class_="legend").text


def test_wide_maps_take_a_row_of_their_own() -> None:
    long = draw(columns=[str(place) for place in range(20)], cells=[[0.1] * 20] * 2)
    figures = on_page(draw_heat_maps([draw(), long])).all("figure")
    assert [figure.attributes["class"] for figure in figures] == ["box map", "box map long"]


def test_bars_have_an_axis_that_they_fit_on() -> None:
    bars = [Bar("a", 3.3, "3.3", "kept"), Bar("b", 0.0, "0", "share"), Bar("c", -1.0, "−1", "kept")]
    found = on_page(draw_bars("chart", "Read it.", "nats per token", bars, {"kept": "what is kept"})).one("figure")
    assert found.one("table").rows[1:-1] == [["a", "", "3.3"], ["b", "", "0"], ["c", "", "−1"]]
    widths = [bar.attributes["style"] for bar in found.all("span") if bar.attributes.get("class", "").startswith("bar ")]
    assert widths == ["width:82.50%", "width:0.00%", "width:0.00%"]
    assert [tick.text for tick in found.one("tfoot").all("span")] == ["0", "1", "2", "3", "4"]
    assert found.one("div", class_="legend").text == "what is keptAxis: nats per token"
    most = draw_bars("chart", "Read it.", "share", [Bar("a", 0.3, "0.3", "kept")], {}, most=1.0)
    assert "width:30.00%" in most


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (-1, 1),
        (0, 1),
        (1, 1),
        (1.01, 2),
        (3, 4),
        (5, 8),
        (9, 10),
        (0.03, 0.04),
        (167.3, 200),
        (0.1, 0.1),
        (5e-324, 1),
        (1e300, 1e300),
    ],
)
def test_axes_end_at_round_values(value: float, rounded: float) -> None:
    assert round_up(value) == pytest.approx(rounded)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0.00"),
        (-0.001, "0.00"),
        (-0.15, "−0.15"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (99.96, "100"),
        (1234, "1234"),
    ],
)
def test_cells_are_short(value: float | None, text: str) -> None:
    assert format_cell(value) == text


def test_cells_with_a_sign() -> None:
    assert [format_cell(value, sign=True) for value in (0.5, 0.0, -0.5)] == ["+0.50", "0.00", "−0.50"]


def test_the_style_uses_only_colors_that_the_themes_have() -> None:
    style = read_page(render_page("t", "l")).one("style").text
    used, given = set(re.findall(r"var\(--([a-z]+)\)", style)), set(re.findall(r"--([a-z]+):", style))
    assert used <= given
