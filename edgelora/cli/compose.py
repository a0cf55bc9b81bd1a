"""The command line's `compose`: a mix of adapters, and the verbs below it."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import TYPE_CHECKING, Annotated

import typer

from edgelora.cli.arguments import (
    AdaptersOption,
    BaseOption,
    JsonOption,
    SeedOption,
    is_given,
    parse_adapters,
    parse_pairs,
    parse_paths,
    parse_range,
)
from edgelora.mix.methods import DEFAULT_DENSITY, METHODS
from edgelora.terminal import print_json, print_note, show_progress
from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelora.composing.compose import ComposeReport
    from edgelora.mix.weights import Weight

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
    mergekit: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="Read a mergekit configuration of base+adapter models, in place of --adapter."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="With --merge-into: float32, float16 or bfloat16; the base's own without it.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Mix adapters into one, without retraining."""
    if context.invoked_subcommand is not None:
        given = [f"--{name.replace('_', '-')}" for name in context.params if is_given(context, name)]
        if given:
            raise UsageError(f"{', '.join(given)}: options of compose {context.invoked_subcommand} go behind its name")
        return
    if mergekit is not None:
        _compose_mergekit(context, mergekit, output, seed, rank, json=json)
        return
    if absent := [name for name, value in (("--adapter", adapter), ("--output", output)) if not value]:
        raise UsageError(f"compose needs {' and '.join(absent)}")
    assert adapter and output is not None
    if method in METHODS and (
        idle := [n for n in ("density", "seed") if is_given(context, n) and n not in METHODS[method].settings]
    ):
        raise UsageError(f"--{idle[0]} means nothing to method {method}; leave it out")
    mixed = parse_adapters(adapter, _read_weights(weights))
    if merge_into is not None:
        if rank is not None:
            raise UsageError("--rank is an adapter's; with --merge-into leave it out")
        from edgelora.composing.merge_into_base import merge_into as run_merge

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
    from edgelora.composing.compose import compose as run_composition

    with show_progress("composing") as on_progress:
        report = run_composition(mixed, output, method=method, density=density, seed=seed, rank=rank, on_progress=on_progress)
    _show_composition(report, json=json)


def _compose_mergekit(
    context: typer.Context, path: Path, output: Path | None, seed: int, rank: int | None, *, json: bool
) -> None:
    if idle := [name for name in ("adapter", "method", "density", "weights", "merge_into", "dtype") if is_given(context, name)]:
        raise UsageError(f"--{idle[0].replace('_', '-')} does not go with --mergekit, whose file says everything")
    if output is None:
        raise UsageError("compose needs --output")
    from edgelora.composing.compose import compose_mergekit

    with show_progress("composing") as on_progress:
        report = compose_mergekit(path, output, seed=seed, rank=rank, on_progress=on_progress, on_note=print_note)
    _show_composition(report, json=json)


def _show_composition(report: ComposeReport, *, json: bool) -> None:
    if json:
        print_json(report)
    else:
        error = (
            f", nearest matrices (relative error {report.mean_error:.2g} in the mean, up to {report.largest_error:.2g})"
            if report.largest_error > 1e-6
            else ", exact"
        )
        print(f"{report.output}: {report.modules} modules, rank {report.rank}{error}")


@app.command()
def search(
    base: BaseOption,
    adapter: AdaptersOption,
    data: Annotated[
        list[str],
        typer.Option(metavar="NAME=HELDOUT.jsonl", help="A task's held-out rows, by its adapter's name; repeat for each."),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the trials, the report and the best mix as an adapter.")],
    budget: Annotated[int, typer.Option(help="Configurations to try in all; base, single adapters and equal weights count.")],
    method: Annotated[str, typer.Option(help="Methods to choose from, separated by commas; or all that differ.")] = "linear",
    weights: Annotated[str, typer.Option(metavar="LOW:HIGH", help="Range of each adapter's weight.")] = "0:1.5",
    density: Annotated[
        str, typer.Option(metavar="LOW:HIGH", help="Range of the density, for methods that have one.")
    ] = "0.1:0.9",
    scale: Annotated[
        str | None, typer.Option(metavar="LOW:HIGH", help="Range of a factor on all weights, beside them; 1 without it.")
    ] = None,
    objective: Annotated[str, typer.Option(help="loss, or score: slot F1 or exact match, which takes longer.")] = "loss",
    sampler: Annotated[str, typer.Option(help="Optuna's gp or tpe; auto is gp where scipy is installed.")] = "auto",
    confirm: Annotated[float, typer.Option(help="Share of the rows kept out of the search, to measure the best mix on.")] = 0.5,
    max_tokens: Annotated[int, typer.Option(help="With --objective score: tokens to write at the most.")] = 64,
    parallel: Annotated[int, typer.Option(help="Trials at a time, which decides what is tried; run at once with --ray.")] = 1,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run trials on Ray: auto, an address, or local for one of its own.")
    ] = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Find weights, and if wanted method and density, on held-out rows; a search that was killed goes on when run again."""
    from edgelora.search.config import DISTINCT, SearchConfig
    from edgelora.search.report import show_report
    from edgelora.search.run import search as run_search

    config = SearchConfig(
        base=base,
        adapters=parse_paths(adapter, "--adapter NAME=ADAPTER"),
        data=parse_paths(data, "--data NAME=HELDOUT.jsonl"),
        output=output,
        budget=budget,
        methods=DISTINCT if method == "all" else tuple(method.split(",")),
        weights=parse_range(weights, "--weights"),
        density=parse_range(density, "--density"),
        scale=None if scale is None else parse_range(scale, "--scale"),
        objective=objective,
        sampler=sampler,
        confirm=confirm,
        max_tokens=max_tokens,
        parallel=parallel,
        address=ray,
        seed=seed,
    )
    with show_progress("searching") as on_progress:
        report = run_search(config, on_progress=on_progress, on_note=print_note)
    if json:
        print_json(report)
    else:
        show_report(report)


@app.command()
def learn(
    base: BaseOption,
    adapter: AdaptersOption,
    output: Annotated[Path, typer.Option(help="Folder for the mixed adapter.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=ROWS.jsonl", help="Labelled rows of an adapter's task; without any the start is the result."),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=ROWS.jsonl", help="Rows to start from, instead of those that the adapter was trained on."),
    ] = None,
    start: Annotated[
        str, typer.Option(help="regmean: what serves each adapter's own inputs best; or linear: equal shares.")
    ] = "regmean",
    grain: Annotated[
        str, typer.Option(help="What is learned: a weight per module or rank, a core between the factors, or the factors.")
    ] = "factors",
    rows: Annotated[int, typer.Option(help="Labelled rows to use of each adapter.")] = 100,
    written: Annotated[
        int, typer.Option(help="Prompts of the rows to start from that each adapter completes itself, to learn from these, too.")
    ] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 240,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; the grain's own without it.")] = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Mix adapters by what their data say: RegMean without labels, and with a few labelled rows what they teach."""
    from edgelora.learn.learn import LearnConfig
    from edgelora.learn.learn import learn as run_learning

    config = LearnConfig(
        base=base,
        adapters=parse_paths(adapter, "--adapter NAME=ADAPTER"),
        output=output,
        labelled=parse_paths(data or [], "--data NAME=ROWS.jsonl"),
        prompts=parse_paths(prompts or [], "--prompts NAME=ROWS.jsonl"),
        start=start,
        grain=grain,
        rows=rows,
        written=written,
        steps=steps,
        lr=lr,
        seed=seed,
    )
    with show_progress("learning") as on_progress:
        report = run_learning(config, on_progress=on_progress, on_note=print_note)
    if json:
        print_json(report)
    else:
        how = f"{report.weights} weights learned, loss {report.loss:.3f}" if report.loss is not None else "nothing learned"
        print(f"{report.output}: {report.modules} modules, rank {report.rank}, {how}")


@app.command()
def report(
    adapter: Annotated[
        list[str], typer.Option(metavar="NAME=FOLDER", help="An adapter's folder; repeat for each, two at least.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for report.json, report.html and recipe.toml.")],
    base: Annotated[str | None, typer.Option(help="Folder or hub id of the base, to count its bytes and to measure on.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=ROWS.jsonl", help="Held-out rows of an adapter's task, to measure every pair on; one for each."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="Use only the first rows of each file.")] = 100,
    disk: Annotated[str | None, typer.Option(metavar="4GiB", help="What the bundle may take on disk.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="2GiB", help="What its variants may take when all are loaded.")] = None,
    json: JsonOption = False,
) -> None:
    """Say what adapters do to each other: for each pair whether to merge or to route, and which mixes are worth compiling."""
    from edgelora.cli.show_composition import show_composition
    from edgelora.report.composition_pages import write_composition
    from edgelora.report.composition_report import report_composition
    from edgelora_runtime.residency.memory import parse_bytes

    limits = [size for size in map(parse_bytes, (disk, memory)) if size is not None]
    with show_progress("comparing") as on_progress:
        found = report_composition(
            parse_pairs(adapter, "--adapter NAME=FOLDER"),
            base=base,
            data=parse_pairs(data or [], "--data NAME=ROWS.jsonl"),
            budget=min(limits, default=None),
            limit=limit,
            on_progress=on_progress,
        )
    files = write_composition(found, output)
    if json:
        print_json(found)
    else:
        show_composition(found)
        print(f"written: {', '.join(map(str, files))}")


def _read_weights(path: Path | None) -> Mapping[str, Weight]:
    if path is None:
        return {}
    from edgelora.mix.weights import read_weights

    return read_weights(path)
