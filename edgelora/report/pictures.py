"""Pictures of a report page, with legend and scale: heat maps and bars.

They are HTML tables that show every figure as text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora.report.elements import Html, element, join
from edgelora.report.page import NONE, render_note, render_scroll

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edgelora.report.palette import Scale

_TICKS = 4  # parts of a bar chart's axis
_LONG = 8  # a heat map with more columns has a row of the page to itself
_LEAST = 1e-300  # a smaller value counts as 0, as the power of ten below it could be 0


@dataclass(frozen=True)
class HeatMap:
    """A figure for each row and column.

    rows, columns: their names. rows_are, columns_are: what they stand for. cells: by row, None where there is no figure.
    ends: what the ends of the scale mean. ringed: row and column of cells with a ring around them. ring: what it means.
    """

    title: str
    note: str
    scale: Scale
    rows_are: str
    rows: Sequence[str]
    columns_are: str
    columns: Sequence[str]
    cells: Sequence[Sequence[float | None]]
    ends: tuple[str, str]
    ringed: frozenset[tuple[int, int]] = frozenset()
    ring: str = ""


@dataclass(frozen=True)
class Bar:
    """A bar.

    value: in the chart's unit. figure: the value as it is shown. color: kept, disturbance or share.
    """

    name: str
    value: float
    figure: str
    color: str


def draw_heat_map(picture: HeatMap) -> Html:
    """Draws a table of colored cells with figures, and the scale above it."""
    head = [
        element(
            "tr",
            element("th", picture.rows_are, scope="col", rowspan=2),
            element("th", picture.columns_are, scope="colgroup", colspan=len(picture.columns)),
        ),
        element("tr", *(element("th", name, scope="col") for name in picture.columns)),
    ]
    body = [
        element(
            "tr",
            element("th", name, scope="row"),
            *(_draw_cell(picture, row, column, value) for column, value in enumerate(picture.cells[row])),
        )
        for row, name in enumerate(picture.rows)
    ]
    table = element("table", element("thead", *head), element("tbody", *body), aria_label=picture.title)
    kind = "map long" if len(picture.columns) > _LONG else "map"
    return _frame(kind, picture.title, picture.note, _draw_legend(picture), render_scroll(picture.title, table))


def draw_heat_maps(pictures: Iterable[HeatMap]) -> Html:
    """Draws several heat maps, small ones side by side on a wide page."""
    return element("div", *map(draw_heat_map, pictures), class_="maps")


def draw_bars(title: str, note: str, unit: str, bars: Sequence[Bar], legend: Mapping[str, str], most: float = 0.0) -> Html:
    """Draws bars on an axis that starts at 0.

    The axis ends at a round value past all bars and past most. legend: what each color means.
    """
    end = round_up(max((most, *(bar.value for bar in bars))))
    keys = (element("span", element("span", class_=f"key {color}"), meaning) for color, meaning in legend.items())
    rows = [
        element(
            "tr",
            element("th", bar.name, scope="row"),
            element(
                "td",
                element("span", class_=f"bar {bar.color}", style=f"width:{100 * max(0.0, bar.value) / end:.2f}%"),
                class_="track",
                aria_hidden="true",
            ),
            element("td", bar.figure, class_="figure"),
        )
        for bar in bars
    ]
    shares = [tick / _TICKS for tick in range(_TICKS + 1)]
    ticks = (element("span", f"{end * share:g}", style=f"left:{100 * share:g}%") for share in shares)
    axis = element("tr", element("td"), element("td", element("div", *ticks, class_="axis")), element("td"), aria_hidden="true")
    heads = (element("th", element("span", name, class_="hidden"), scope="col") for name in ("name", "bar", unit))
    head = element("thead", element("tr", *heads))
    table = element("table", head, element("tbody", *rows), element("tfoot", axis), aria_label=title)
    return _frame("bars", title, note, element("div", *keys, f"Axis: {unit}", class_="legend"), render_scroll(title, table))


def round_up(value: float) -> float:
    """Rounds a value up to 1, 2, 4 or 8 times a power of ten.

    Returns 1 for a value that is not above 0.
    """
    if value < _LEAST:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 8, 10) if step * power >= value * (1 - 1e-9))


def format_cell(value: float | None, *, sign: bool = False) -> str:
    """Formats a figure in few characters.

    It has two decimals below 10, and fewer above. None is a dash. sign: whether to write + above 0.
    """
    if value is None:
        return NONE
    size = abs(value)
    text = f"{size:.2f}" if size < 9.995 else f"{size:.1f}" if size < 99.95 else f"{size:.0f}"
    if not float(text):
        return text
    return f"−{text}" if value < 0 else f"+{text}" if sign else text


def _draw_cell(picture: HeatMap, row: int, column: int, value: float | None) -> Html:
    if value is None:
        return element("td", NONE, class_="none")
    style = f"{picture.scale.name}-{picture.scale.step(value)}"
    if (row, column) not in picture.ringed:
        return element("td", format_cell(value), class_=style)
    return element("td", format_cell(value), element("span", f" ({picture.ring})", class_="hidden"), class_=f"{style} ring")


def _draw_legend(picture: HeatMap) -> Html:
    scale = picture.scale
    ramp = element("div", *(element("i", class_=f"{scale.name}-{step}") for step in range(scale.steps)))
    ends = element("div", *(element("span", end) for end in picture.ends))
    parts = []
    if picture.ringed:
        parts.append(element("span", element("span", class_="key ring"), picture.ring))
    if any(value is None for cells in picture.cells for value in cells):
        parts.append(element("span", f"{NONE} no figure"))
    return join((element("div", ramp, ends, class_="scale"), *([element("div", *parts, class_="legend")] if parts else [])))


def _frame(kind: str, title: str, note: str, *parts: Html) -> Html:
    caption = element("figcaption", element("h3", title), render_note(note))
    return element("figure", caption, *parts, class_=f"box {kind}")
