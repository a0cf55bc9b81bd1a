"""`edgelora train`: fine-tunes a LoRA adapter."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import Annotated, Any

import typer

from edgelora.cli.arguments import BaseOption, JsonOption, SeedOption, TemplateOptions, is_given, parse_template_options
from edgelora.cli.choices import choose
from edgelora.cli.inspect_data import show_rows
from edgelora.cli.terminal import print_json, print_line, print_next, show_progress
from edgelora.data.rows import FORM
from edgelora.data.shapes import FORMATS
from edgelora.in_torch.train_config import QUANTS
from edgelora_runtime.errors import UsageError

_ADAPTER, _RUN = "Adapter", "Run"  # headings of groups in --help


def train(
    context: typer.Context,
    base: BaseOption,
    data: Annotated[Path, typer.Option(metavar="DATA", help=f"A file, folder or data set of rows, such as {FORM}.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for the adapter; needed without --inspect.", show_default=False)
    ] = None,
    format: Annotated[  # noqa: A002 - the option's name
        str, choose(FORMATS, "Shape of the rows; auto looks.", panel=_RUN)
    ] = "auto",
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Show rows as training would see them, and train nothing.", rich_help_panel=_RUN)
    ] = False,
    quant: Annotated[
        str, choose(QUANTS, "Form of the base while training; int4 is the grid that export writes.", panel=_ADAPTER)
    ] = "nf4",
    rank: Annotated[int, typer.Option(metavar="N", help="LoRA rank.", rich_help_panel=_ADAPTER)] = 16,
    alpha: Annotated[
        float, typer.Option(metavar="NUMBER", help="LoRA alpha; the scale is alpha / rank.", rich_help_panel=_ADAPTER)
    ] = 32.0,
    epochs: Annotated[float, typer.Option(metavar="NUMBER", help="Passes over the data.", rich_help_panel=_RUN)] = 1.0,
    lr: Annotated[float, typer.Option(metavar="NUMBER", help="Learning rate.", rich_help_panel=_RUN)] = 2e-4,
    max_steps: Annotated[
        int | None, typer.Option(metavar="N", help="Optimizer steps; overrides --epochs.", rich_help_panel=_RUN)
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Rows per optimizer step.", rich_help_panel=_RUN)] = 16,
    seed: SeedOption = 0,
    composable: Annotated[
        int | None,
        typer.Option(
            metavar="SLOT",
            help="For adapters to be mixed: freeze A to this slot (0, 1, …) of a shared basis.",
            rich_help_panel=_ADAPTER,
        ),
    ] = None,
    template_option: TemplateOptions = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Any of TrainConfig's fields; flags override it.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Fine-tune a LoRA adapter on a 4-bit base (QLoRA)."""
    from edgelora.in_torch.train import train as run_training
    from edgelora.in_torch.train_config import TrainConfig, read_train_config

    flags = {
        "format": format,
        "quant": quant,
        "rank": rank,
        "alpha": alpha,
        "epochs": epochs,
        "lr": lr,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "seed": seed,
        "composable": composable,
    }
    options = parse_template_options(template_option)
    given: dict[str, Any] = {name: value for name, value in flags.items() if is_given(context, name)}
    given |= {"template_options": options} if options else {}
    settings = {**(read_train_config(config) if config else {}), **given}
    if inspect:
        seen = {name: settings[name] for name in ("format", "max_length", "template_options") if name in settings}
        show_rows(base, data, json=json, **seen)
        return
    if output is None:
        raise UsageError("--output is missing; give a folder for the adapter, or --inspect to look at the rows")
    with show_progress("training") as on_progress:
        report = run_training(TrainConfig(**{**settings, "base": base, "data": data, "output": output}), on_progress=on_progress)
    if json:
        print_json(report)
    else:
        kept = ", ".join(
            f"{count} {what}"
            for count, what in ((report.rows_cut, "cut"), (report.rows_left_out, "left out as too long"))
            if count
        )
        rows = f"{report.rows} rows" + (f" ({kept})" if kept else "")
        print_line(f"{report.output}: {report.steps} steps on {rows} in {report.seconds:.0f} s, loss {report.train_loss:.3f}")
        print_next("edgelora init, which writes a recipe of the adapters in this folder, or edgelora compose to mix them")
