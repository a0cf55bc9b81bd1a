"""`edgelora compose learn`: mixes adapters on data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgelora.cli.arguments import (
    AdaptersOption,
    BaseOption,
    JsonOption,
    SeedOption,
    TemplateOptions,
    parse_paths,
    parse_template_options,
)
from edgelora.cli.choices import GRAINS, STARTS, choose
from edgelora.cli.terminal import print_json, print_line, print_next, print_note, show_progress


def learn(
    base: BaseOption,
    adapter: AdaptersOption,
    output: Annotated[Path, typer.Option(help="Folder for the mixed adapter.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]ROWS.jsonl", help="Labelled rows of an adapter's task. Without any, the result is the start."
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]ROWS.jsonl", help="Rows for the start, instead of those that the adapter was trained on."),
    ] = None,
    start: Annotated[
        str, choose(STARTS, "regmean is the least-squares fit to each adapter on its own inputs; linear has equal weights.")
    ] = "regmean",
    grain: Annotated[
        str,
        choose(GRAINS, "What to learn: a weight per module or per rank, a core matrix between the factors, or the factors."),
    ] = "factors",
    template_option: TemplateOptions = None,
    rows: Annotated[int, typer.Option(help="Labelled rows to use per adapter.")] = 100,
    written: Annotated[
        int, typer.Option(help="Prompts per adapter that it completes itself; the mix also learns from these.")
    ] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 240,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; a default per grain if omitted.")] = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Mix adapters on data: with RegMean, which needs no labels, then by training on a few labelled rows."""
    from edgelora.learn.learn import LearnConfig
    from edgelora.learn.learn import learn as run_learning

    config = LearnConfig(
        base=base,
        adapters={name: Path(path) for name, path in parse_paths(adapter, "--adapter [NAME=]ADAPTER").items()},
        output=output,
        labelled={name: Path(path) for name, path in parse_paths(data or [], "--data [NAME=]ROWS.jsonl").items()},
        prompts={name: Path(path) for name, path in parse_paths(prompts or [], "--prompts [NAME=]ROWS.jsonl").items()},
        start=start,
        grain=grain,
        rows=rows,
        written=written,
        steps=steps,
        lr=lr,
        seed=seed,
        template_options=parse_template_options(template_option),
    )
    with show_progress("learning") as on_progress:
        report = run_learning(config, on_progress=on_progress, on_note=print_note)
    if json:
        print_json(report)
    else:
        how = f"{report.weights} weights learned, loss {report.loss:.3f}" if report.loss is not None else "nothing learned"
        print_line(f"{report.output}: {report.modules} modules, rank {report.rank}, {how}")
        print_next("edgelora init, which writes a recipe of the adapters in this folder")
