"""What the demo found, as figures and as one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora.terminal import format_bytes, format_share, print_table

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


def show_report(report: DemoReport) -> None:
    """Prints the table and where to go from here."""
    tasks = list(report.test_rows)
    columns = ["variant", *tasks, "first switch", "switch back"]
    switches = {switch.variant: switch for switch in report.switches}
    rows = [["adapter in torch (NF4)", *(format_share(report.torch[task]) for task in tasks), "", ""]]
    for name, scores in report.scores.items():
        switch = switches[name]
        times = [f"{switch.first:.1f} ms", f"{switch.back:.2f} ms"]
        rows.append([name, *(format_share(scores[task]) for task in tasks), *times])
    metrics = ", ".join(f"{report.metrics[task]} on {count} test rows of {task}" for task, count in report.test_rows.items())
    print_table(f"in %: {metrics}", columns, rows)
    kept = ", ".join(f"{format_share(share)}% of {name}" for name, share in report.kept.items())
    print(f"mix: learned from {report.written} answers of each adapter, without labels; it keeps {kept}")
    size = format_bytes(sum(path.stat().st_size for path in report.bundle.iterdir()))
    print(f"{sum(report.seconds.values()):.0f} s in all; the bundle ({size}) lies in {report.bundle}")
    print(f"talk to it:  edgelora chat {report.bundle} --variant mix")
