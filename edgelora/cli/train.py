"""`edgelora train`: fine-tunes a LoRA adapter."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import Annotated, Any

import typer

from edgelora.cli.arguments import BaseOption, JsonOption, SeedOption, TemplateOptions, is_given, parse_template_options
from edgelora.cli.terminal import print_json, show_progress
from edgelora.data.rows import FORM


def train(
    context: typer.Context,
    base: BaseOption,
    data: Annotated[Path, typer.Option(help=f"JSON lines of {FORM}.")],
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    quant: Annotated[
        str, typer.Option(help="Precision of the base while training: nf4, int4 (the grid that export writes) or none.")
    ] = "nf4",
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 16,
    alpha: Annotated[float, typer.Option(help="LoRA alpha; the scale is alpha / rank.")] = 32.0,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-4,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps; overrides --epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per optimizer step.")] = 16,
    seed: SeedOption = 0,
    composable: Annotated[
        int | None,
        typer.Option(metavar="SLOT", help="For adapters to be mixed: freeze A to this slot (0, 1, …) of a shared basis."),
    ] = None,
    template_option: TemplateOptions = None,
    config: Annotated[Path | None, typer.Option(help="TOML with any of TrainConfig's fields; flags override it.")] = None,
    json: JsonOption = False,
) -> None:
    """Fine-tune a LoRA adapter on a 4-bit base (QLoRA)."""
    from edgelora.in_torch.train import train as run_training
    from edgelora.in_torch.train_config import TrainConfig, read_train_config

    flags = {
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
        print(f"{report.output}: {report.steps} steps on {rows} in {report.seconds:.0f} s, loss {report.train_loss:.3f}")
