"""`edgelora bench`: measures a bundle's variants on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgelora.cli.arguments import BundleArgument, JsonOption  # noqa: TC001  (typer reads the annotations)
from edgelora.cli.completion import complete_variants
from edgelora.cli.runtime_options import RuntimeOptions, takes_runtime_options
from edgelora.cli.terminal import print_json, print_line, print_next, print_table, quote_path, show_progress
from edgelora.formatting import format_bytes

if TYPE_CHECKING:
    from edgelora.bench import BenchReport


@takes_runtime_options
def bench(
    bundle: BundleArgument,
    runtime_options: RuntimeOptions,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A variant to measure; repeat for each. All variants if omitted.",
            autocompletion=complete_variants,
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(metavar="N", help="Tokens of the prompt.")] = 128,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to write.")] = 64,
    rounds: Annotated[int, typer.Option(metavar="N", help="Rounds; each measures every variant once.")] = 5,
    json: JsonOption = False,
) -> None:
    """Measure switching, prefill, decode and memory of a bundle's variants on this machine."""
    from edgelora.bench import bench as run_bench

    with (
        runtime_options.open(bundle) as runtime,
        show_progress("measuring") as on_progress,
    ):
        names = list(dict.fromkeys(variant or runtime.variants))
        report = run_bench(runtime, names, prompt=prompt, tokens=tokens, rounds=rounds, on_progress=on_progress)
    if json:
        print_json(report)
    else:
        show_bench(report)
        print_next(
            f'edgelora run {quote_path(bundle)} "…" --variant {min(names, key=lambda name: -report.variants[name].decode)}'
        )


def show_bench(report: BenchReport) -> None:
    """Prints a report as a table, and a line about memory."""
    columns = ["variant", "cold switch ms", "warm switch ms", "prefill tok/s", "decode tok/s", "cached prompt ms"]
    rows = [
        [
            name,
            f"{figures.cold_ms:.0f}",
            f"{figures.warm_ms:.2f}",
            f"{figures.prefill:.1f}",
            f"{figures.decode:.1f}",
            f"{figures.again_ms:.1f}",
        ]
        for name, figures in report.variants.items()
    ]
    title = (
        f"prompt {report.prompt}, {report.tokens} tokens, medians of {report.rounds} rounds, {report.provider}, {report.kernels}"
    )
    print_table(title, columns, rows)
    resident = "" if report.resident is None else f"; the process holds {format_bytes(report.resident)} beside its files"
    print_line(
        f"loaded: {format_bytes(report.mapped)} of weights, {format_bytes(report.shared)} of them shared, "
        f"{format_bytes(report.private)} packed{resident}"
    )
