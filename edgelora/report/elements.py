"""HTML elements that escape all the text and attributes they are given."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_EMPTY = frozenset({"meta"})  # elements without content, and so without an end tag


class Html(str):
    """Finished markup. Any other string counts as plain text, and is escaped."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str | int | None) -> Html:
    """Renders one element.

    Attributes drop a trailing underscore, use hyphens for the others, and are left out where they are None.
    """
    given = "".join(f' {_spell(key)}="{escape(str(value))}"' for key, value in attributes.items() if value is not None)
    return Html(f"<{name}{given}>" if name in _EMPTY else f"<{name}{given}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """Markup and plain text, one after the other."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def _spell(key: str) -> str:
    """Spells the attribute that a Python keyword argument means.

    class_ is class, aria_label is aria-label.
    """
    return key.rstrip("_").replace("_", "-")
