"""`edgelora export`: compiles a recipe into a bundle."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import Annotated

import typer

from edgelora.cli.arguments import JsonOption  # noqa: TC001  (typer reads the annotations)
from edgelora.cli.choices import choose
from edgelora.cli.inspect import show_bundle
from edgelora.cli.terminal import print_next, print_note, quote_path, show_progress
from edgelora_export.bundle.gate import POLICIES


def export(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.toml", help="Names the base, the adapters, and the mixes that become variants.")
    ],
    output: Annotated[Path, typer.Option(metavar="BUNDLE", help="Folder for the bundle.")],
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help='JSON lines of {"text": …}, or rows, to quantize and measure on, in addition to the adapters\' training data.',
        ),
    ] = None,
    gate: Annotated[
        str | None,
        choose(POLICIES, "What to do about a variant that loses its adapter; off measures none. The recipe's choice if omitted."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for an index page, and a page per variant that shows what each layer keeps."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Compile a recipe's mixes into a bundle of ONNX variants, and check what each keeps of its adapters."""
    import edgelora  # its lazy export names the extra if torch or onnx is missing
    from edgelora_runtime import Bundle

    with show_progress("exporting") as on_progress:
        edgelora.export(recipe, output, calibration=calibration, gate=gate, on_progress=on_progress, on_note=print_note)
    opened = Bundle.open(output)
    if report is not None:
        from edgelora.report.fidelity_pages import write_fidelity

        for path in write_fidelity(opened, report):
            print_note(f"{path}")
    show_bundle(opened, as_json=json)
    if not json:
        print_next(f'edgelora run {quote_path(output)} "…", or edgelora chat {quote_path(output)}')
