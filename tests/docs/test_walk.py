"""docs/how/walk.md tells the functions of an export in their order, and an export calls each of them once."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.exporting.export import export

if TYPE_CHECKING:
    from types import FrameType

ROOT = Path(__file__).resolve().parents[2]


def told_functions() -> list[str]:
    """The functions that the page's numbered lists begin with, up to the bundle."""
    text = (ROOT / "docs" / "how" / "walk.md").read_text(encoding="utf-8").partition("## From a bundle to an answer")[0]
    return re.findall(r"^\d\. `(\w+)`", text, re.MULTILINE)


def test_an_export_calls_the_functions_of_the_walk_in_order_and_once(tiny_recipe: Path, tmp_path: Path) -> None:
    told = told_functions()
    called: list[str] = []

    def note_call(frame: FrameType, event: str, argument: object) -> None:
        name, ours = frame.f_code.co_name, str(frame.f_globals.get("__name__")).startswith(("edgelora.", "edgelora_export."))
        caller = frame.f_back.f_code.co_name if frame.f_back else ""
        opens = frame.f_back is not None and str(frame.f_back.f_globals.get("__name__")).startswith("edgelora_export.base.")
        if event == "call" and ours and name in told and name != caller and not opens:  # a stage may call one of its own name
            called.append(name)

    sys.setprofile(note_call)
    try:
        export(tiny_recipe, tmp_path / "bundle")
    finally:
        sys.setprofile(None)
    assert len(told) == 11
    assert called == told
