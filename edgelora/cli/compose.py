"""`edgelora compose`: mixes adapters into one, and groups search, learn and report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgelora.cli.arguments import JsonOption, is_given, parse_adapters, parse_paths
from edgelora.cli.choices import DTYPES, choose
from edgelora.cli.examples import show_example
from edgelora.cli.learn import learn
from edgelora.cli.search import search
from edgelora.cli.terminal import print_json, print_line, print_next, print_note, quote_path, show_progress
from edgelora.mix.methods import DEFAULT_DENSITY, MIX_METHODS
from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelora.composing.compose import ComposeReport
    from edgelora.mix.weights import Weight

_MERGE, _OTHER = "How to merge", "Other forms of input and output"  # headings of groups in --help

_BEST = "best"  # in place of a method: choose it on rows

app = typer.Typer(invoke_without_command=True, no_args_is_help=True)


@app.callback(
    epilog="\n\n".join((*(f"{name}: {method.summary}" for name, method in MIX_METHODS.items()), show_example("compose")))
)
def compose(
    context: typer.Context,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]ADAPTER[:WEIGHT]",
            help="An adapter's folder or GGUF file, with weight 1 and its own name if omitted; repeat for each adapter.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Folder for the mixed adapter, or *.gguf for llama.cpp, or folder for the merged checkpoint."
        ),
    ] = None,
    method: Annotated[
        str,
        choose(
            [*MIX_METHODS, _BEST],
            "How to merge the deltas; explained below. best tries some methods on --data, and takes a minute or so.",
            kind="METHOD",
            panel=_MERGE,
        ),
    ] = "linear",
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]HELDOUT.jsonl",
            help="With --method best: a task's held-out rows, by the name of its adapter; repeat for each.",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    density: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Share of a delta's entries to keep, for methods that drop some.", rich_help_panel=_MERGE
        ),
    ] = DEFAULT_DENSITY,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Random seed, for methods that drop entries at random.", rich_help_panel=_MERGE)
    ] = 0,
    rank: Annotated[
        int | None,
        typer.Option(metavar="N", help="Truncate the mix to this rank, and print the error.", rich_help_panel=_MERGE),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            help='Weights by module: a table weights.NAME with lines such as "model.layers.0.*" = 0.2.',
            rich_help_panel=_MERGE,
        ),
    ] = None,
    merge_into: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            help="Add the mix to this base and save a plain Hugging Face checkpoint.",
            rich_help_panel=_OTHER,
        ),
    ] = None,
    mergekit: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Read a mergekit configuration of base+adapter models instead of --adapter.",
            rich_help_panel=_OTHER,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        choose(
            DTYPES,
            "Type of the output. With --merge-into, the base's own if omitted; for *.gguf float32 if omitted.",
            panel=_OTHER,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            help="Folder or hub id of the base, whose config GGUF adapters need, and which --method best measures on; what an "
            "adapter names if omitted.",
            rich_help_panel=_OTHER,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Mix adapters into one, without retraining."""
    if context.invoked_subcommand is not None:
        given = [f"--{name.replace('_', '-')}" for name in context.params if is_given(context, name)]
        if given:
            raise UsageError(f"{', '.join(given)}: options of compose {context.invoked_subcommand} go after its name")
        return
    if mergekit is not None:
        _compose_mergekit(context, mergekit, output, (base, dtype), seed=seed, rank=rank, json=json)
        return
    if absent := [name for name, value in (("--adapter", adapter), ("--output", output)) if not value]:
        raise UsageError(f"compose needs {' and '.join(absent)}")
    assert adapter and output is not None
    if method in MIX_METHODS and (
        idle := [n for n in ("density", "seed") if is_given(context, n) and n not in MIX_METHODS[method].settings]
    ):
        raise UsageError(f"--{idle[0]} has no effect on method {method}; leave it out")
    mixed = parse_adapters(adapter, _read_weights(weights))
    if method == _BEST:
        if idle := [n for n in ("density", "seed") if is_given(context, n)]:
            raise UsageError(f"--{idle[0]} does not go with --method best; name a method")
        method, mixed = _choose_best(mixed, data, base or merge_into)
    elif data:
        raise UsageError("--data is for --method best; compose search and compose learn take it, too")
    if merge_into is not None:
        if rank is not None:
            raise UsageError("--rank is for an adapter; leave it out with --merge-into")
        if base is not None:
            raise UsageError("--base is for GGUF adapters; with --merge-into, its BASE is the base")
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
                on_note=print_note,
            )
        if json:
            print_json(merged)
        else:
            print_line(f"{merged.output}: {merge_into} with {merged.modules} modules changed")
            print_next(f"it is a base of its own: edgelora train --base {quote_path(merged.output)} …, or any tool that reads it")
        return
    _check_dtype(dtype, output)
    from edgelora.composing.compose import compose as run_composition

    with show_progress("composing") as on_progress:
        report = run_composition(
            mixed,
            output,
            method=method,
            density=density,
            seed=seed,
            rank=rank,
            base=base,
            dtype=dtype or "float32",
            on_progress=on_progress,
            on_note=print_note,
        )
    _show_result(report, json=json)


def _choose_best(
    mixed: dict[str, tuple[str, Weight]], data: list[str] | None, base: str | None
) -> tuple[str, dict[str, tuple[str, Weight]]]:
    """Chooses a method and a factor on the weights by the loss on rows, and says what each mix that was tried keeps."""
    if absent := [name for name, value in (("--base", base), ("--data", data)) if not value]:
        raise UsageError(f"--method best needs {' and '.join(absent)}")
    assert base is not None and data
    from edgelora.search.best_method import choose_best_mix

    paths = {name: Path(path) for name, path in parse_paths(data, "--data [NAME=]HELDOUT.jsonl").items()}
    with show_progress("trying") as on_progress:
        best = choose_best_mix(base, mixed, paths, on_progress=on_progress, on_note=print_note)
    for mix in sorted(best.tried, key=lambda mix: -mix.mean):
        each = ", ".join(f"{task} {share:.2f}" for task, share in mix.kept.items())
        print_note(f"{mix.method}, weights × {mix.factor:g}: keeps {mix.mean:.3f} ({each})")
    return best.method, {name: (path, best.weights[name]) for name, (path, _) in mixed.items()}


def _check_dtype(dtype: str | None, output: Path) -> None:
    if dtype is not None and output.suffix != ".gguf":
        raise UsageError("--dtype needs --merge-into, or an --output named *.gguf")


def _compose_mergekit(
    context: typer.Context,
    path: Path,
    output: Path | None,
    gguf: tuple[str | None, str | None],
    *,
    seed: int,
    rank: int | None,
    json: bool,
) -> None:
    """Composes what a mergekit file says. gguf: --base and --dtype."""
    if idle := [name for name in ("adapter", "method", "data", "density", "weights", "merge_into") if is_given(context, name)]:
        raise UsageError(f"--{idle[0].replace('_', '-')} does not go with --mergekit; the file holds those settings")
    if output is None:
        raise UsageError("compose needs --output")
    base, dtype = gguf
    _check_dtype(dtype, output)
    from edgelora.composing.compose import compose_mergekit

    with show_progress("composing") as on_progress:
        report = compose_mergekit(
            path,
            output,
            seed=seed,
            rank=rank,
            base=base,
            dtype=dtype or "float32",
            on_progress=on_progress,
            on_note=print_note,
        )
    _show_result(report, json=json)


def _show_result(report: ComposeReport, *, json: bool) -> None:
    if json:
        print_json(report)
    else:
        error = (
            f", nearest matrices (relative error {report.mean_error:.2g} on average, {report.largest_error:.2g} at most)"
            if report.largest_error > 1e-6
            else ", exact"
        )
        print_line(f"{report.output}: {report.modules} modules, rank {report.rank}{error}")
        if report.output.suffix == ".gguf":
            print_next(f"llama-cli -m BASE.gguf --lora {quote_path(report.output)}")
        else:
            print_next("edgelora init, which writes a recipe of the adapters in this folder")


app.command(epilog=show_example("search"))(search)
app.command(epilog=show_example("learn"))(learn)


@app.command(epilog=show_example("report"))
def report(
    adapter: Annotated[
        list[str], typer.Option(metavar="[NAME=]ADAPTER", help="An adapter's folder; repeat for each adapter, at least two.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for report.json, report.html and recipe.toml.")],
    base: Annotated[
        str | None, typer.Option(help="Folder, GGUF file or hub id of the base, to count its bytes and measure on it.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]ROWS.jsonl",
            help="Held-out rows of an adapter's task, to measure every pair on; one file per adapter.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="Use only this many rows of each file, from the first.")] = 100,
    disk: Annotated[str | None, typer.Option(metavar="4GiB", help="Limit on the bundle's size on disk.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="2GiB", help="Limit on the size of all variants when loaded.")] = None,
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
            parse_paths(adapter, "--adapter [NAME=]ADAPTER"),
            base=base,
            data=parse_paths(data or [], "--data [NAME=]ROWS.jsonl"),
            budget=min(limits, default=None),
            limit=limit,
            on_progress=on_progress,
            on_note=print_note,
        )
    files = write_composition(found, output)
    if json:
        print_json(found)
    else:
        show_composition(found)
        print_line(f"written: {', '.join(map(str, files))}")
        page, recipe = (quote_path(output / name) for name in ("report.html", "recipe.toml"))
        print_next(f"read {page}, then edgelora export {recipe} --output BUNDLE")


def _read_weights(path: Path | None) -> Mapping[str, Weight]:
    if path is None:
        return {}
    from edgelora.mix.weights import read_weights

    return read_weights(path)
