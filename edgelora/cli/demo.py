"""`edgelora demo`: runs the whole pipeline on a small model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgelora.cli.arguments import JsonOption, SeedOption, parse_paths
from edgelora.cli.terminal import print_json, print_line, print_next, print_note, print_table, quote_path, show_progress
from edgelora.formatting import format_bytes, format_share

if TYPE_CHECKING:
    from edgelora.demo.report import DemoReport


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the demo's files.")] = Path("edgelora-demo"),
    seed: SeedOption = 1,  # docs/log.md says why not 0
    base: Annotated[str | None, typer.Option(help="A base to use instead of the built-in one; needs --data.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE.jsonl",
            help="A task's rows, with --base; repeat for each task. The demo trains an adapter per task and mixes them.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Train, mix, export and switch adapters on a tiny model made on the spot, or on your own base and data."""
    from edgelora.demo import run_demo

    rows = parse_paths(data or [], "--data [NAME=]FILE.jsonl")
    with show_progress("demo") as on_progress:
        report = run_demo(output, seed=seed, base=base, data=rows, on_progress=on_progress, on_note=print_note)
    if json:
        print_json(report)
    else:
        show_demo(report)


def show_demo(report: DemoReport) -> None:
    """Prints scores and switching times as a table, and what to do next."""
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
    print_line(f"mix: learned from {report.written} answers of each adapter, without labels; it keeps {kept}")
    size = format_bytes(sum(path.stat().st_size for path in report.bundle.iterdir()))
    print_line(f"{sum(report.seconds.values()):.0f} s in all; the bundle ({size}) is in {report.bundle}")
    print_next(f"talk to it: edgelora chat {quote_path(report.bundle)} --variant mix")
