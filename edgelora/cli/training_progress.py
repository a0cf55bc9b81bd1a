"""The progress of a training run: a bar on a terminal, a line every few steps elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgelora.cli.terminal import print_note, show_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    OnProgress = Callable[[int, int, str], None]


@contextmanager
def show_steps(every: int | None) -> Iterator[OnProgress]:
    """Yields the callback (done, total, what) of a training run.

    every: steps between lines where standard error is no terminal. None shows nothing.
    """
    if every is None:
        yield lambda done, total, what: None
    elif sys.stderr.isatty():
        with show_progress("training") as on_progress:
            yield on_progress
    else:
        yield _report_steps(every)


def _report_steps(every: int) -> OnProgress:
    """Returns the callback that prints a line every few steps, and one for the last."""
    begun: tuple[float, int] | None = None

    def report(done: int, total: int, what: str) -> None:
        nonlocal begun
        now = time.monotonic()
        begun = begun or (now, done)
        if done % every == 0 or done == total:
            print_note(f"step {done} of {total}: {what}{_show_rest(now - begun[0], done - begun[1], total - done)}")

    return report


def _show_rest(seconds: float, done: int, left: int) -> str:
    """Shows the time left at the speed of the steps so far."""
    if not (done and left):
        return ""
    rest = seconds / done * left
    return (
        f", {rest / 3600:.1f} h left" if rest >= 5400 else f", {rest / 60:.0f} min left" if rest >= 90 else f", {rest:.0f} s left"
    )
