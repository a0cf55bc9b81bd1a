"""The demo: its tasks and base are made by code, so that it needs no download."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgelora.demo.report import DemoReport


def run_demo(output: Path, *, seed: int = 1, base: str | None = None, data: Mapping[str, str] | None = None) -> DemoReport:
    """Runs the pipeline on the built-in base and tasks, or on a base and at least two files of rows of one's own."""
    if (base is None) != (not data):
        raise UsageError("--base and --data go together: your own base needs your own rows, and the other way round")
    if data and len(data) < 2:
        raise UsageError("a mix takes at least two tasks; give --data NAME=FILE.jsonl twice or more")
    from edgelora.demo.run import run_built_in, run_own

    return run_built_in(output, seed) if base is None else run_own(output, seed, base, data or {})
