"""`edgelora init`: writes a recipe of the adapters in this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgelora.cli.arguments import JsonOption  # noqa: TC001  (typer reads the annotations)
from edgelora.cli.terminal import print_json, print_line, print_next, print_note, quote_path
from edgelora_export.weights.full_disk import told_by_name
from edgelora_runtime.errors import InputError


def init(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.toml", help="The file to write; nothing that exists is overwritten.")
    ] = Path("recipe.toml"),
    json: JsonOption = False,
) -> None:
    """Write a recipe with comments, of the adapters in this folder and those below it, and of their base."""
    from edgelora.exporting.draft_recipe import draft_recipe

    if recipe.exists() or recipe.is_symlink():
        raise InputError(f"{recipe} exists; name another file, or remove it first")
    draft = draft_recipe(Path(), recipe)
    recipe.parent.mkdir(parents=True, exist_ok=True)
    _write_new(recipe, draft.text)
    for note in draft.notes:
        print_note(f"note: {note}")
    if json:
        print_json({"recipe": recipe, "base": draft.base, "adapters": draft.adapters, "left_out": draft.left_out})
        return
    for adapter in draft.adapters:
        print_line(f"{adapter.name}: {adapter.path}, {adapter.summary}")
    print_line(f"{recipe}: base {draft.base or 'unknown'}, {len(draft.adapters)} adapters")
    export = f"edgelora export {quote_path(recipe)} --output bundle"
    print_next(export if draft.base else f"write the base into {quote_path(recipe)}, then {export}")


def _write_new(path: Path, text: str) -> None:
    """Writes a file that does not exist yet, whole or not at all."""
    with told_by_name(path):
        file = path.open("x", encoding="utf-8")
        try:
            with file:
                file.write(text)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
