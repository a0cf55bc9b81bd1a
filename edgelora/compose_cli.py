"""The command line's `compose`: a mix of adapters, and the verbs below it."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import Annotated

import typer

from edgelora.arguments import JsonOption, parse_adapters
from edgelora.terminal import print_json, show_progress
from edgelora_runtime.errors import UsageError

app = typer.Typer(invoke_without_command=True, no_args_is_help=True)


@app.callback()
def compose(
    context: typer.Context,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=ADAPTER:WEIGHT", help="An adapter's folder and weight; repeat for each.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the mixed adapter, or for the merged checkpoint.")] = None,
    method: Annotated[str, typer.Option(help="linear or ties.")] = "linear",
    density: Annotated[float, typer.Option(help="Share of each delta's entries that ties keeps.")] = 0.2,
    merge_into: Annotated[
        str | None, typer.Option(metavar="BASE", help="Add the mix to this base, and save a plain Hugging Face checkpoint.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="With --merge-into: float32, float16 or bfloat16; the base's own without it.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Mix adapters into one, without retraining."""
    if context.invoked_subcommand is not None:
        given = [f"--{name.replace('_', '-')}" for name in context.params if _is_given(context, name)]
        if given:
            raise UsageError(f"{', '.join(given)}: options of compose {context.invoked_subcommand} go behind its name")
        return
    if absent := [name for name, value in (("--adapter", adapter), ("--output", output)) if not value]:
        raise UsageError(f"compose needs {' and '.join(absent)}")
    assert adapter and output is not None
    if merge_into is not None:
        from edgelora.merging import merge_into as run_merge

        with show_progress("merging") as on_progress:
            merged = run_merge(
                merge_into,
                parse_adapters(adapter),
                output,
                method=method,
                density=density,
                dtype=dtype,
                on_progress=on_progress,
            )
        if json:
            print_json(merged)
        else:
            print(f"{merged.output}: {merge_into} with {merged.modules} modules changed")
        return
    if dtype is not None:
        raise UsageError("--dtype goes with --merge-into")
    from edgelora.composing import compose as run_composition

    with show_progress("composing") as on_progress:
        report = run_composition(parse_adapters(adapter), output, method=method, density=density, on_progress=on_progress)
    if json:
        print_json(report)
    else:
        error = (
            f", nearest rank-{report.rank} matrices (relative error up to {report.largest_error:.2f})"
            if report.largest_error > 1e-6
            else ", exact"
        )
        print(f"{report.output}: {report.modules} modules, rank {report.rank}{error}")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
