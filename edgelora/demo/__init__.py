"""The demo: the whole pipeline on a small model, or on a real one.

Code makes its tasks, and the base of the small one, so that nothing is downloaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from edgelora.demo.report import DemoReport


def run_demo(
    output: Path,
    *,
    seed: int = 1,
    base: str | None = None,
    data: Mapping[str, str] | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> DemoReport:
    """Runs the pipeline on the built-in base and tasks, or the user's.

    base: folder or hub id. data: a file of rows per task, two at least. on_note is told when each stage begins.
    """
    if (base is None) != (not data):
        raise UsageError("--base and --data go together: your own base needs your own rows, and the other way round")
    if data and len(data) < 2:
        raise UsageError("a mix takes at least two tasks; give --data NAME=FILE.jsonl twice or more")
    from edgelora.demo.run import run_built_in_demo, run_user_demo

    if base is None:
        return run_built_in_demo(output, seed, on_progress=on_progress, on_note=on_note)
    return run_user_demo(output, seed, base, data or {}, on_progress=on_progress, on_note=on_note)
