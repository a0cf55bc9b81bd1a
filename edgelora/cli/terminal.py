"""Terminal output: tables and JSON on stdout, notes and progress bars on stderr."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgelora.formatting import to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


def print_json(value: object) -> None:
    """Prints one JSON object on standard output."""
    print(to_json(value))


def print_note(text: str) -> None:
    """Prints a line for the user on standard error."""
    print(text, file=sys.stderr, flush=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table on standard output. All columns but the first are right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


@contextmanager
def show_progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Shows a progress bar on standard error, if that is a terminal.

    Yields a callback (done, total, what) that drives it.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
