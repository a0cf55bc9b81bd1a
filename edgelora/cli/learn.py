"""`edgelora compose learn`: mixes adapters by what their data show."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import Annotated

import typer

from edgelora.cli.arguments import AdaptersOption, BaseOption, JsonOption, SeedOption, parse_paths
from edgelora.cli.terminal import print_json, print_note, show_progress


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
