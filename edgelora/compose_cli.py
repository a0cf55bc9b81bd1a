"""The command line's `compose`: a mix of adapters, and the verbs below it."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import TYPE_CHECKING, Annotated

import typer

from edgelora.arguments import JsonOption, parse_adapters
from edgelora.methods import DEFAULT_DENSITY, METHODS
from edgelora.terminal import print_json, show_progress
from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelora.weights import Weight

app = typer.Typer(invoke_without_command=True, no_args_is_help=True)


@app.callback(epilog="\n\n".join(f"{name}: {method.summary}" for name, method in METHODS.items()))
def compose(
    context: typer.Context,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=ADAPTER:WEIGHT", help="An adapter's folder and weight; repeat for each.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the mixed adapter, or for the merged checkpoint.")] = None,
    method: Annotated[str, typer.Option(help="How the deltas become one; see below.")] = "linear",
    density: Annotated[
        float, typer.Option(help="Share of a delta's entries that is kept, by methods that drop some.")
    ] = DEFAULT_DENSITY,
    seed: Annotated[int, typer.Option(help="For methods that drop entries at random.")] = 0,
    rank: Annotated[int | None, typer.Option(help="Cut the mix to this rank; the error is printed.")] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml", help='Weights by module: a table weights.NAME with lines such as "model.layers.0.*" = 0.2.'
        ),
    ] = None,
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
    if method in METHODS and (
        idle := [n for n in ("density", "seed") if _is_given(context, n) and n not in METHODS[method].settings]
    ):
        raise UsageError(f"--{idle[0]} means nothing to method {method}; leave it out")
    mixed = parse_adapters(adapter, _read_weights(weights))
    if merge_into is not None:
        if rank is not None:
            raise UsageError("--rank is an adapter's; with --merge-into leave it out")
        from edgelora.merging import merge_into as run_merge

        with show_progress("merging") as on_progress:
            merged = run_merge(
                merge_into,
                mixed,
                output,
                method=method,
                density=density,
                seed=seed,
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
        report = run_composition(mixed, output, method=method, density=density, seed=seed, rank=rank, on_progress=on_progress)
    if json:
        print_json(report)
    else:
        error = (
            f", nearest matrices (relative error {report.mean_error:.2g} in the mean, up to {report.largest_error:.2g})"
            if report.largest_error > 1e-6
            else ", exact"
        )
        print(f"{report.output}: {report.modules} modules, rank {report.rank}{error}")


def _read_weights(path: Path | None) -> Mapping[str, Weight]:
    if path is None:
        return {}
    from edgelora.weights import read_weights

    return read_weights(path)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
