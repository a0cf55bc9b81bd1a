"""What the demo found, as figures and as one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Switch:
    """Two switches to a variant, in milliseconds: the first, which creates its session, and one back to it after others."""

    variant: str
    first: float
    back: float


@dataclass(frozen=True)
class DemoReport:
    """Scores are shares from 0 to 1, on test rows that nothing was chosen on.

    torch: per task, its adapter in PEFT on the base that it was trained on. scores: per variant and task, in onnxruntime.
    written: answers of each adapter that the mix was learned from. kept: the share of each single adapter's score that the mix
    keeps on its task.
    """

    bundle: Path
    test_rows: Mapping[str, int]
    metrics: Mapping[str, str]
    torch: Mapping[str, float]
    scores: Mapping[str, Mapping[str, float]]
    written: int
    kept: Mapping[str, float]
    switches: Sequence[Switch]
    seconds: Mapping[str, float]
