"""`edgelora compose search`: finds the weights of a mix on held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgelora.cli.arguments import (
    AdaptersOption,
    BaseOption,
    JsonOption,
    SeedOption,
    TemplateOptions,
    parse_paths,
    parse_range,
    parse_template_options,
)
from edgelora.cli.choices import choose
from edgelora.cli.terminal import print_json, print_line, print_next, print_note, print_table, show_progress
from edgelora.mix.methods import MIX_METHODS
from edgelora.search.config import OBJECTIVES, SAMPLERS

if TYPE_CHECKING:
    from edgelora.search.report import SearchReport
    from edgelora.search.space import Point


def search(
    base: BaseOption,
    adapter: AdaptersOption,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]HELDOUT.jsonl", help="A task's held-out rows, by the name of its adapter; repeat for each task."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the trials, the report, and the best mix as an adapter.")],
    budget: Annotated[
        int, typer.Option(help="Configurations to try, including the base, each single adapter and equal weights.")
    ],
    method: Annotated[
        str,
        choose(
            ("all", *MIX_METHODS),
            "Methods to choose from, separated by commas; or all, which leaves out methods equivalent to another.",
            kind="METHOD",
            several=True,
        ),
    ] = "linear",
    weights: Annotated[str, typer.Option(metavar="LOW:HIGH", help="Range of every adapter's weight.")] = "0:1.5",
    density: Annotated[str, typer.Option(metavar="LOW:HIGH", help="Range of the density, for methods that use one.")] = "0.1:0.9",
    scale: Annotated[
        str | None, typer.Option(metavar="LOW:HIGH", help="Range of a common factor on all weights; 1 if omitted.")
    ] = None,
    objective: Annotated[str, choose(OBJECTIVES, "score is slot F1 or exact match, and takes longer.")] = "loss",
    sampler: Annotated[str, choose(SAMPLERS, "Optuna's sampler; auto is gp if scipy is installed.")] = "auto",
    confirm: Annotated[
        float, typer.Option(help="Share of the rows to keep out of the search and measure the best mix on.")
    ] = 0.5,
    template_option: TemplateOptions = None,
    max_tokens: Annotated[int, typer.Option(help="With --objective score: maximum number of tokens to write.")] = 64,
    parallel: Annotated[
        int, typer.Option(help="Trials to propose at a time, which affects what is tried; --ray also runs them in parallel.")
    ] = 1,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run trials on Ray: auto, an address, or local to start a local instance."),
    ] = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Search weights, and optionally method and density, on held-out rows. Run it again to continue an interrupted search."""
    from edgelora.search.config import DISTINCT_METHODS, SearchConfig
    from edgelora.search.run import search as run_search

    config = SearchConfig(
        base=base,
        adapters={name: Path(path) for name, path in parse_paths(adapter, "--adapter [NAME=]ADAPTER").items()},
        data={name: Path(path) for name, path in parse_paths(data, "--data [NAME=]HELDOUT.jsonl").items()},
        output=output,
        budget=budget,
        methods=DISTINCT_METHODS if method == "all" else tuple(method.split(",")),
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
        template_options=parse_template_options(template_option),
    )
    with show_progress("searching") as on_progress:
        report = run_search(config, on_progress=on_progress, on_note=print_note)
    if json:
        print_json(report)
    else:
        show_search(report)
        print_next("put these lines into the recipe, then edgelora export RECIPE.toml --output BUNDLE")


def show_search(report: SearchReport) -> None:
    """Prints the scores as a table, then the best mix and its lines for a recipe."""
    confirmed = all(kept for _, kept in report.rows.values())
    rows = ", ".join(f"{(kept if confirmed else searched)} {task}" for task, (searched, kept) in report.rows.items())
    named = {"base": report.base, **report.adapters, "equal weights": report.equal.figures, "best": report.best.figures}
    kept = {"equal weights": report.equal.kept, "best": report.best.kept}
    print_table(
        f"{report.objective} on {rows} rows {'kept out of the search' if confirmed else 'used by the search'}",
        ["", *report.rows, "kept"],
        [
            [name, *(f"{figures[task]:.4f}" for task in report.rows), f"{kept[name]:.3f}" if name in kept else ""]
            for name, figures in named.items()
        ],
    )
    resumed = f", {report.resumed} of them in earlier runs" if report.resumed else ""
    print_line(f"{report.configurations} configurations tried{resumed}")
    print_line(f"best: {_describe_mix(report.best.mix)}, trial {report.best.trial}")
    low, high = report.interval
    equal = _describe_mix(report.equal.mix)
    print_line(f"keeps {report.difference:+.3f} over equal weights, {equal}; 95% interval {low:+.3f} to {high:+.3f}")
    if not confirmed:
        print_line("the interval is optimistic: the best mix was chosen on the same rows; --confirm keeps some rows apart")
    if report.written_kept is not None:
        print_line(
            f"{report.adapter} is the nearest adapter of rank {report.rank} (relative error up to {report.largest_error:.2f}) "
            f"and keeps {report.written_kept:.3f}; a merged variant of the recipe below is the mix itself"
        )
    print_line(f"{report.adapter}")
    print_line()
    for line in report.recipe.splitlines():
        print_line(line)


def _describe_mix(mix: Point) -> str:
    weights = " + ".join(f"{weight:g} {name}" for name, weight in mix.weights.items())
    return ", ".join([f"{mix.method}({weights}", *(f"{name} {value:g}" for name, value in mix.settings.items())]) + ")"
