"""Terminal output: tables and JSON on stdout, notes and progress on stderr. Nothing printed here can drive the terminal."""

from __future__ import annotations

import os
import shlex
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unicodedata import category

from edgelora.formatting import to_json
from edgelora_runtime.errors import make_printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

PROGRESS_SECONDS = 3.0  # between two lines of progress, where standard error is no terminal

_LONGEST_LINE = 20_000  # characters
_WIDTH = 120  # columns of a table that goes to a file or a pipe, unless COLUMNS says otherwise


def print_json(value: object) -> None:
    """Prints one JSON object on standard output."""
    print(to_json(value))


def print_line(text: str = "") -> None:
    """Prints a line of results on standard output, without what a terminal would obey."""
    print(make_printable(text, _LONGEST_LINE))


def print_note(text: str) -> None:
    """Prints a line for the user on standard error, without what a terminal would obey."""
    print(make_printable(text, _LONGEST_LINE), file=sys.stderr, flush=True)


def print_next(text: str) -> None:
    """Prints what to do next, as the last line of a verb, on standard error. Not for a call with --json."""
    sys.stdout.flush()  # so that it is the last line where both streams meet
    print_note(f"next: {text}")


def quote_path(path: Path | str) -> str:
    """Quotes a path as shells need it, for a command that the user may copy."""
    return shlex.quote(str(path))


def print_piece(piece: str) -> None:
    """Prints a piece of an answer on standard output at once.

    A terminal gets it without control characters other than line breaks and tabs. A file or a pipe gets it unchanged.
    """
    print("".join(filter(_is_harmless, piece)) if sys.stdout.isatty() else piece, end="", flush=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table on standard output. All columns but the first are right-aligned.

    Where the width is too narrow for its words, each row becomes a paragraph of one line per column. The width is the
    terminal's, or that of COLUMNS, or else 120 columns.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns, rows = [make_printable(column) for column in columns], [list(map(make_printable, row)) for row in rows]
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDTH, highlight=False)
    if _measure_table(columns, rows) > console.width:
        _print_paragraphs(title, columns, rows)
        return
    table = Table(title=Text(make_printable(title, _LONGEST_LINE)) if title else None, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


@contextmanager
def show_progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Shows the progress of a verb on standard error: a bar on a terminal, otherwise a line every few seconds.

    Yields a callback (done, total, what) that drives it.
    """
    if not sys.stderr.isatty():
        yield _report_lines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=make_printable(what))


def _is_harmless(character: str) -> bool:
    """True for text: no control character, no lone surrogate, no mark that turns the direction of writing."""
    if character in "\n\t":
        return True
    return (
        category(character) not in ("Cc", "Cs")
        and not "\u202a" <= character <= "\u202e"
        and not "\u2066" <= character <= "\u2069"
    )


def _report_lines(title: str) -> Callable[[int, int, str], None]:
    """Returns the callback of a progress in lines. Work that is over within seconds prints none."""
    last = time.monotonic()

    def report(done: int, total: int, what: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_SECONDS:
            last = now
            print_note(f"{title}: {done} of {total}" + (f", {what}" if what else ""))

    return report


def _measure_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Counts the terminal columns that a table needs without a broken word."""
    from rich.cells import cell_len

    cells = zip(columns, *rows, strict=True)
    widths = [max(cell_len(word) for text in column for word in (text.split() or [""])) for column in cells]
    return sum(widths) + 3 * len(widths) + 1


def _print_paragraphs(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if title:
        print_line(title)
    for row in rows:
        print_line(" ".join(part for part in (columns[0], row[0]) if part))
        for column, cell in zip(columns[1:], row[1:], strict=True):
            print_line(f"  {column}: {cell}")
