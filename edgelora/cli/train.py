"""`edgelora train`: fine-tunes a LoRA adapter."""

from __future__ import annotations

import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from edgelora.cli.arguments import BaseOption, JsonOption  # noqa: TC001  (as above)
from edgelora.cli.inspect_data import show_rows
from edgelora.cli.interruption import describe_interruption, stop_when_interrupted
from edgelora.cli.terminal import print_json, print_line, print_next, print_note, show_progress
from edgelora.cli.train_options import takes_settings
from edgelora.cli.training_progress import show_steps
from edgelora.data.rows import FORM
from edgelora_runtime.errors import UsageError

_STOPPING = "stopping after this step, with a checkpoint; once more ends at once and loses the steps since the last one"


@takes_settings
def train(
    base: BaseOption,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DATA", help=f"A file, folder or data set of rows, such as {FORM}. Only --heal does without."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the adapter; needed without --inspect.", show_default=False)
    ] = None,
    inspect: Annotated[bool, typer.Option("--inspect", help="Show rows as training would see them, and train nothing.")] = False,
    heal: Annotated[
        int | None,
        typer.Option(metavar="N", help="Train nothing new: N steps that make the adapter of --from merge-aware, without labels."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Any of the settings of --help-all; options override it.")
    ] = None,
    json: JsonOption = False,
    *,
    given: dict[str, Any],
) -> None:
    """Fine-tune a LoRA adapter on a 4-bit base (QLoRA)."""
    from edgelora.in_torch.run.processes import is_first_process
    from edgelora.in_torch.train import TrainingStoppedError
    from edgelora.in_torch.train import train as run_training
    from edgelora.in_torch.train_config import TrainConfig, read_train_config

    values = {**(read_train_config(config) if config else {}), **given}
    if heal is not None:
        _heal(base, heal, data, output, values, json=json)
        return
    if data is None:
        raise UsageError("--data is missing; give a file, folder or data set of rows")
    if inspect:
        seen = {name: values[name] for name in ("format", "max_length", "template_options") if name in values}
        show_rows(base, data, json=json, **seen)
        return
    if output is None:
        raise UsageError("--output is missing; give a folder for the adapter, or --inspect to look at the rows")
    settings = TrainConfig(**{**values, "base": base, "data": data, "output": output})
    first = is_first_process()
    try:
        with show_steps(settings.log_every if first else None) as on_progress:
            report = run_training(
                settings,
                on_progress=on_progress,
                on_message=print_note,
                watch_for_stop=lambda: stop_when_interrupted(_STOPPING if first else None),
            )
    except TrainingStoppedError as error:
        word, code = describe_interruption()
        if not first:
            raise typer.Exit(code) from error
        error.exit_code = code
        error.args = (f"{word}: {error.progress}; go on with: {_show_command()}",)
        raise
    if not first:
        return
    if json:
        print_json(report)
        return
    kept = ", ".join(
        f"{count} {what}" for count, what in ((report.rows_cut, "cut"), (report.rows_left_out, "left out as too long")) if count
    )
    rows = f"{report.rows} rows" + (f" ({kept})" if kept else "")
    loss = f"loss {report.train_loss:.3f}"
    if report.validation_loss is not None:
        loss += f", validation loss {report.validation_loss:.3f} after step {report.kept_step}, which is kept"
    print_line(f"{report.output}: {report.steps} steps on {rows} in {report.seconds:.0f} s, {loss}")
    print_next("edgelora init, which writes a recipe of the adapters in this folder, or edgelora compose to mix them")


def _heal(base: str, steps: int, data: Path | None, output: Path | None, values: dict[str, Any], *, json: bool) -> None:
    """Heals the adapter of --from, with those of the settings that a healing run has."""
    from edgelora.in_torch.heal import HealConfig, heal

    adapter = values.pop("from_adapter", None)
    if adapter is None or output is None:
        raise UsageError("--heal N needs --from ADAPTER, which it heals, and --output FOLDER for the result")
    known = {each.name for each in fields(HealConfig)}
    if idle := sorted(values.keys() - known):
        raise UsageError(f"--heal N takes no {', '.join('--' + name.replace('_', '-') for name in idle)}; leave it out")
    with show_progress("healing") as on_progress:
        report = heal(HealConfig(base, Path(adapter), output, steps, data, **values), on_progress=on_progress)
    if json:
        print_json(report)
        return
    print_line(
        f"{report.output}: {report.steps} steps on {report.samples} samples of {report.source} in {report.seconds:.0f} s; "
        f"KL of the merged int4 from the unmerged adapter {report.kl_before:.4f} → {report.kl_after:.4f} nats per token"
    )
    print_next("edgelora init, which writes a recipe of the adapters in this folder; export keeps the healed codes")


def _show_command() -> str:
    """Shows the command that goes on with this run."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    return shlex.join(["edgelora", *arguments, "--resume"])
