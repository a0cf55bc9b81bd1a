"""`edgelora train`: fine-tunes a LoRA adapter."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import Annotated, Any

import typer

from edgelora.cli.arguments import BaseOption, JsonOption, SeedOption, TemplateOptions, is_given, parse_template_options
from edgelora.cli.choices import choose
from edgelora.cli.terminal import print_json, print_line, print_next, show_progress
from edgelora.data.rows import FORM
from edgelora.in_torch.train_config import QUANTS
from edgelora_runtime.errors import UsageError

_ADAPTER, _RUN = "Adapter", "Run"  # headings of groups in --help
_HEALING = frozenset({"quant", "lr", "batch_size", "seed"})  # options that --heal takes, beside files and folders


def train(
    context: typer.Context,
    base: BaseOption,
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    data: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help=f"JSON lines of {FORM}. Only --heal does without.")
    ] = None,
    quant: Annotated[
        str, choose(QUANTS, "Form of the base while training; int4 is the grid that export writes.", panel=_ADAPTER)
    ] = "nf4",
    merge_aware: Annotated[
        bool,
        typer.Option(
            "--merge-aware",
            help="With --quant int4: train the merged weights as they ship, rounded. Export keeps their codes.",
            rich_help_panel=_ADAPTER,
        ),
    ] = False,
    heal_steps: Annotated[
        int | None,
        typer.Option(
            "--heal",
            metavar="N",
            help="Train nothing new: N steps that make the adapter of --from merge-aware, without labels.",
            rich_help_panel=_ADAPTER,
        ),
    ] = None,
    from_adapter: Annotated[
        Path | None, typer.Option("--from", metavar="ADAPTER", help="The adapter to heal.", rich_help_panel=_ADAPTER)
    ] = None,
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
    if heal_steps is not None or from_adapter is not None:
        _heal(context, base, output, data, json=json)
        return
    if data is None:
        raise UsageError("train needs --data FILE.jsonl; only --heal does without")
    from edgelora.in_torch.train import train as run_training
    from edgelora.in_torch.train_config import TrainConfig, read_train_config

    flags = {
        "quant": quant,
        "merge_aware": merge_aware,
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
        print_line(f"{report.output}: {report.steps} steps on {rows} in {report.seconds:.0f} s, loss {report.train_loss:.3f}")
        print_next("edgelora init, which writes a recipe of the adapters in this folder, or edgelora compose to mix them")


def _heal(context: typer.Context, base: str, output: Path, data: Path | None, *, json: bool) -> None:
    """Heals the adapter of --from, with those of train's options that a healing run has."""
    from edgelora.in_torch.heal import HealConfig, heal

    given = {name: value for name, value in context.params.items() if is_given(context, name)}
    steps, adapter = given.pop("heal_steps", None), given.pop("from_adapter", None)
    if steps is None or adapter is None:
        raise UsageError("--heal N and --from ADAPTER go together: the steps, and the adapter that they heal")
    for name in ("base", "output", "data", "json"):
        given.pop(name, None)
    if idle := sorted(given.keys() - _HEALING):
        names = ", ".join("--" + name.replace("_", "-") for name in idle)
        raise UsageError(f"--heal N takes no {names}; leave it out")
    with show_progress("healing") as on_progress:
        report = heal(HealConfig(base, adapter, output, steps, data, **given), on_progress=on_progress)
    if json:
        print_json(report)
        return
    print_line(
        f"{report.output}: {report.steps} steps on {report.samples} samples of {report.source} in {report.seconds:.0f} s; "
        f"KL of the merged int4 from the unmerged adapter {report.kl_before:.4f} → {report.kl_after:.4f} nats per token"
    )
    print_next("edgelora init, which writes a recipe of the adapters in this folder; export keeps the healed codes")
