"""Self-contained pages with pictures for a browser: tables, bars and heat maps, as HTML with SVG inside."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_WIDTH, _ROW, _LABEL = 300, 18, 220  # pixels: of a bar of full length, of a row, of the names
_CELL, _LETTER = 46, 7  # pixels: the width of a heat map's cell, and of a letter of its names; columns' names stand aslant
_WARM, _COLD, _NONE = (200, 60, 40), (50, 100, 200), "#ddd"
_STYLE = (
    "body{font:14px system-ui;margin:2em;color:#222;background:#fff}td,th{padding:.2em 1em .2em 0;text-align:left}"
    "text{font:12px system-ui}svg{margin:1em 0}pre{background:#f4f4f4;padding:1em}"
)


def render_page(title: str, *parts: str) -> str:
    """A whole page, from HTML."""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{escape(title)}</h1>{''.join(parts)}</html>\n"
    )


def render_table(rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, the first of each row its heading."""
    return f"<table>{''.join(_render_row(row) for row in rows)}</table>"


def _render_row(row: Sequence[str]) -> str:
    return f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"


def draw_bars(title: str, values: Mapping[str, float], color: str) -> str:
    """A bar per name; the longest stands for the largest value, or for 1."""
    largest = max(1.0, *values.values())
    rows = []
    for place, (name, value) in enumerate(values.items()):
        y = place * _ROW
        length = max(0.0, value) / largest * _WIDTH
        rows.append(
            f"<text x={_LABEL - 8} y={y + 13} text-anchor=end>{escape(name)}</text>"
            f'<rect x={_LABEL} y={y + 2} width={length:.1f} height={_ROW - 5} fill="{color}"/>'
            f"<text x={_LABEL + length + 6:.1f} y={y + 13}>{value:.3f}</text>"
        )
    return _picture(title, _LABEL + _WIDTH + 80, len(values) * _ROW, rows)


def draw_heat_map(title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]]) -> str:
    """A cell per row and column: warm above 0, cold below, of full color from 1 on; grey where there is no value."""
    left = max([_LABEL, *(_LETTER * len(row) + 12 for row in rows)])
    top = 20 + _LETTER * max(map(len, columns), default=0) * 3 // 4
    drawn = [
        f'<text transform="translate({left + place * _CELL + _CELL // 2} {top - 6}) rotate(-45)">{escape(column)}</text>'
        for place, column in enumerate(columns)
    ]
    for place, (row, cells) in enumerate(zip(rows, values, strict=True)):
        y = top + place * _ROW
        drawn.append(f"<text x={left - 8} y={y + 13} text-anchor=end>{escape(row)}</text>")
        for column, value in enumerate(cells):
            x = left + column * _CELL
            drawn.append(f'<rect x={x} y={y} width={_CELL - 1} height={_ROW - 1} fill="{_shade(value)}"/>')
            if value is not None:
                ink = "#fff" if abs(value) > 0.6 else "#222"
                drawn.append(f'<text x={x + _CELL / 2} y={y + 13} text-anchor=middle fill="{ink}">{value:.2f}</text>')
    return _picture(title, left + len(columns) * _CELL + top, top + len(rows) * _ROW, drawn)


def _shade(value: float | None) -> str:
    if value is None:
        return _NONE
    color = _WARM if value >= 0 else _COLD
    mixed = (round(255 + (tone - 255) * min(1.0, abs(value))) for tone in color)
    return "#" + "".join(f"{tone:02x}" for tone in mixed)


def _picture(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    return f"<h2>{escape(title)}</h2><svg width={width} height={height} role=img>{''.join(parts)}</svg>"
