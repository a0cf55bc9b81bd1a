"""Markdown on a terminal while it is being written: finished blocks are printed once, and the last is drawn anew."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from rich.console import Console
    from rich.markdown import Markdown

_PAUSE = 0.05  # seconds between two drawings: a fast model writes faster than a terminal draws
# A text could move the cursor, change the title or write to the clipboard with these: C0 but for tab and newline, DEL, and C1.
_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), 127, *range(128, 160)))


def strip_controls(text: str) -> str:
    """Takes the characters out of a text that would steer a terminal."""
    return text.translate(_CONTROLS)


class MarkdownStream:
    """A context in which pieces of Markdown are shown as they come.

    Only the last block can still change, so only it is drawn anew. It is cut to the terminal's height until it is finished.
    console: the terminal; standard output by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = console or Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="ellipsis")
        self._text = ""  # of the blocks that are not printed yet
        self._printed = False
        self._drawn = 0.0

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()
        self._print(self._text)

    def push(self, piece: str) -> None:
        """Shows a piece more, or keeps it for the next drawing."""
        self._text += strip_controls(piece)
        if time.monotonic() - self._drawn < _PAUSE:
            return
        end = find_last_block(self._text)
        if end:
            self._live.update("", refresh=True)
            self._print(self._text[:end])
            self._text = self._text[end:]
        self._live.update(_render(self._text), refresh=True)
        self._drawn = time.monotonic()

    def _print(self, text: str) -> None:
        if not text.strip():
            return
        if self._printed:
            self._console.print()
        self._console.print(_render(text))
        self._printed = True


def find_last_block(text: str) -> int:
    """Finds the place in a text where its last block starts, by CommonMark."""
    from markdown_it import MarkdownIt

    starts = [token.map[0] for token in MarkdownIt("commonmark").enable("table").parse(text) if token.map and token.level == 0]
    if len(starts) < 2:
        return 0
    return sum(len(line) + 1 for line in text.split("\n")[: starts[-1]])


def _render(text: str) -> Markdown:
    from rich.markdown import Markdown

    return Markdown(text, hyperlinks=False)  # so that every address can be read
