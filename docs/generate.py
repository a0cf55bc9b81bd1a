"""Writes the pages that the code decides: the recipe's keys, the command line, training's settings, and the map of source files.

`python docs/generate.py` rewrites them; with `--check` it names those that differ from what the code gives, and exits with 1.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- Written by docs/generate.py: change the code, then run it. -->"

# The parts of the map, in the order of the page: heading, folder, and what it is.
PARTS = (
    ("edgelora", "edgelora", "The command line, training, composition, search, reports and the demo."),
    ("edgelora_export", "export/edgelora_export", "Merges, quantizes, builds graphs, writes bundles. May import torch."),
    ("edgelora_runtime", "runtime/edgelora_runtime", "Reads bundles, generates, switches. Never imports torch."),
    ("edgelora-kernels", "runtime/kernels", "int4 products, attention and live adapters in C++, as onnxruntime operators."),
    ("benchmarks", "benchmarks", "One script per claim, side by side with other engines."),
)
_SOURCES = {".py", ".cpp", ".h"}
_KINDS = {"STR": "TEXT", "INT": "INTEGER"}  # kinds of options whose names differ between versions of typer

RECIPE_EXAMPLE = """\
base = "path or hub id"
merge_base = "auto"
targets = ["cpu"]

[adapters]
sql = "adapters/sql"
medical = "adapters/medical"

[quantization]
bits = 4
block_size = 32
method = "gptq"

[gate]
policy = "repair"
retention = 0.8

[variants.base]
mix = {}

[variants.clinic]      # merged: no cost per token
mix = { sql = 0.6, medical = 0.6 }
method = "ties"
density = 0.3

[variants.careful]     # by module: the last pattern that matches counts
mix = { sql = 0.6, medical = { "*" = 0.6, "model.layers.0.*" = 0.2 } }

[variants.sql-live]    # live: any weights at request time
mix = { sql = 1.0 }
kind = "live"

[router]
variants = ["clinic", "careful"]
fallback = "base"
"""


def generate() -> dict[Path, str]:
    """The text of each generated page, by path."""
    return {
        ROOT / "docs" / "reference" / "recipe.md": write_recipe_page(),
        ROOT / "docs" / "reference" / "command-line.md": write_command_page(),
        ROOT / "docs" / "reference" / "training.md": write_settings_page(),
        ROOT / "docs" / "map.md": write_map(),
    }


def write_recipe_page() -> str:
    """The reference of recipe.toml, from the keys that its parser reads and the defaults of its dataclasses."""
    from edgelora.exporting import recipe, recipe_keys
    from edgelora.mix.methods import MIX_METHODS

    owners = {field.name: field.default_factory for field in fields(recipe.Recipe)}
    sections: tuple[tuple[str, str, Mapping[str, recipe_keys.Key], Any], ...] = (
        ("Top level", "", recipe_keys.TOP, recipe.Recipe),
        (
            "Adapters",
            '`[adapters]`: a path per name, `sql = "adapters/sql"`, or a table `[adapters.NAME]`.',
            recipe_keys.ADAPTER,
            recipe.AdapterRecipe,
        ),
        ("Variants", "`[variants.NAME]`, one table per variant.", recipe_keys.VARIANT, recipe.VariantRecipe),
        ("Quantization", "`[quantization]`", recipe_keys.QUANTIZATION, owners["quantization"]),
        (
            "Gate",
            "`[gate]`. What a variant keeps is explained in [Export](../guides/export.md#what-a-variant-keeps).",
            recipe_keys.GATE,
            owners["gate"],
        ),
        (
            "Router",
            "`[router]`, and `[router.data]` for `data`. See [Routing](../guides/routing.md).",
            recipe_keys.ROUTER,
            recipe.RouterRecipe,
        ),
    )
    lines = [
        NOTE,
        "",
        "# Recipe",
        "",
        "A recipe is a TOML file. It names a base, adapters, and the mixes that become variants of one bundle. "
        "`edgelora export RECIPE.toml --output BUNDLE` compiles it. Paths are relative to the recipe's folder. "
        "Unknown keys, wrong types and impossible values are refused, all in one message.",
        "",
        "```toml",
        *RECIPE_EXAMPLE.splitlines(),
        "```",
    ]
    for heading, intro, keys, owner in sections:
        defaults = {field.name: _show_default(field) for field in fields(owner)}
        if unknown := sorted(set(keys) - set(defaults)):
            raise ValueError(f"{owner.__name__} has no field for the recipe's keys {', '.join(unknown)}")
        lines += ["", f"## {heading}", "", *([intro, ""] if intro else []), *_table(("key", "type", "default", "meaning"))]
        lines += [_row(f"`{name}`", _show_types(key.types), defaults[name], key.meaning) for name, key in keys.items()]
    lines += [
        "",
        "## Methods",
        "",
        "[Mixing](../guides/mixing.md) says what they are good for, and where they come from.",
        "",
        *_table(("method", "what it does", "reads")),
        *(
            _row(f"`{name}`", method.summary, ", ".join(f"`{key}`" for key in method.settings))
            for name, method in MIX_METHODS.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _show_types(types: Sequence[type]) -> str:
    names = {str: "string", int: "integer", float: "number", bool: "boolean", list: "list of strings", dict: "table"}
    return names[types[-1]]


def _show_default(field: Any) -> str:
    """A dataclass field's default as TOML writes it; a dash where a key without one is simply absent."""
    value = field.default
    if value is MISSING or value is None or value == {}:
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, tuple):
        return "`[" + ", ".join(f'"{item}"' for item in value) + "]`"
    return f"`{value}`"


def write_command_page() -> str:
    """The reference of the command line, from the tree of its commands."""
    import typer

    from edgelora.cli.app import app

    root: Any = typer.main.get_command(app)
    lines = [
        NOTE,
        "",
        "# Command line",
        "",
        "Every verb takes `--help` and `--json`. With `--json`, standard output has one JSON object and nothing else; progress "
        "and notes go to standard error.",
        "",
        *_table(("exit code", "meaning")),
        _row("0", "success"),
        _row("2", "a wrong call"),
        _row("3", "bad input"),
        _row("4", "failed integrity or fidelity"),
        _row("5", "too little disk or memory"),
        _row("130", "interrupted (Ctrl-C)"),
        _row("141", "the reader of standard output has gone, as with `\\| head`"),
        _row("143", "terminated (SIGTERM)"),
        "",
        "A failure prints one line on standard error. `EDGELORA_DEBUG=1` in the environment shows the traceback of an unexpected "
        "one.",
    ]
    for path, command in _walk_commands(root, ("edgelora",)):
        lines += ["", f"{'#' * len(path)} {' '.join(path)}", "", *_describe_command(path, command)]
    return "\n".join(lines) + "\n"


def write_settings_page() -> str:
    """The reference of training's settings, from TrainConfig."""
    from edgelora.cli.train_options import list_settings, name_flag

    lines = [
        NOTE,
        "",
        "# Settings of training",
        "",
        "Each setting is an option of `edgelora train`, a key of the file that `--config` names, and a field of `TrainConfig`. "
        "[Training](../guides/training.md) says what they are good for.",
    ]
    group = ""
    for each in list_settings():
        said = each.metadata
        if said["group"] != group:
            group = said["group"]
            lines += ["", f"## {group}", "", *_table(("key", "option", "default", "values", "meaning"))]
        values = ", ".join(f"`{choice}`" for choice in said["choices"]) or (said["limit"][1] if said["limit"] else "")
        lines.append(_row(f"`{each.name}`", f"`{name_flag(each)}`", _show_default(each), values, _plain(said["meaning"])))
    return "\n".join(lines) + "\n"


def _walk_commands(group: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands below a group, in the order of its help, each with its path. Any: typer may bring a click of its own."""
    context = group.context_class(group, info_name=path[-1])
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command.hidden:
            continue
        yield (*path, name), command
        if hasattr(command, "list_commands"):
            yield from _walk_commands(command, (*path, name))


def _describe_command(path: Sequence[str], command: Any) -> Iterator[str]:
    shown = [each for each in command.params if not getattr(each, "hidden", False) and each.name != "help"]
    arguments = {each.metavar or each.name.upper(): each for each in shown if each.param_type_name == "argument"}
    options = {_show_option(each, command): each for each in shown if each.param_type_name == "option"}
    yield _plain(command.help or "")
    yield ""
    yield "```text"
    required = [name for name, each in options.items() if each.required]
    yield " ".join((*path, *arguments, *required, *(["[OPTIONS]"] if len(options) > len(required) else [])))
    yield "```"
    if arguments:
        yield ""
        yield from _table(("argument", "meaning"))
        yield from (_row(f"`{name}`", _plain(each.help or "")) for name, each in arguments.items())
    if options:
        yield ""
        yield from _table(("option", "default", "meaning"))
        yield from (_row(f"`{name}`", _option_default(each), _plain(each.help or "")) for name, each in options.items())
    if command.epilog:
        yield ""
        yield from (f"- {_plain(line)}" for line in command.epilog.split("\n\n"))


def _show_option(option: Any, command: Any) -> str:
    """An option's names and the kind of its value, as in `--rank INTEGER`; a flag has none."""
    names = ", ".join((*option.opts, *option.secondary_opts))
    if option.is_flag:
        return names
    display = getattr(option, "display_type", None)  # typer 0.29 tells the kind so, click and older typers by a type with a name
    kind = option.metavar or (option.type.name if display is None else display(command.context_class(command)))
    if "|" in kind:  # choices; a bar would end the table's cell
        return f"{names} {kind.strip('<>[]').replace('|', '/')}"
    if option.metavar:
        return f"{names} {kind}"
    kind = kind.strip("<>[]").removeprefix("list[").upper()
    return f"{names} {_KINDS.get(kind, kind)}"


def _option_default(option: Any) -> str:
    if option.required:
        return "required"
    if option.is_flag or option.default is None or callable(option.default):
        return "–"
    return f"`{option.default}`"


def write_map() -> str:
    """One line per source file: the first sentence of its docstring, or of its leading comment."""
    lines = [NOTE, "", "# Map", "", "One line per source file: the first sentence of what it says about itself."]
    for heading, folder, what in PARTS:
        lines += ["", f"## {heading}", "", f"`{folder}/`. {what}"]
        rooms: dict[str, list[Path]] = {}
        for path in find_sources(ROOT / folder):
            parent = path.parent.relative_to(ROOT / folder).as_posix()
            rooms.setdefault("" if parent == "." else parent, []).append(path)
        for room, paths in sorted(rooms.items()):
            lines += ["", *([f"### {heading}: {room}", ""] if room else []), *_table(("file", "what it holds"))]
            lines += [_row(f"`{path.relative_to(ROOT).as_posix()}`", read_summary(path)) for path in paths]
    return "\n".join(lines) + "\n"


def find_sources(folder: Path) -> list[Path]:
    """The source files below a folder that are not empty."""
    found = (path for path in folder.rglob("*") if path.suffix in _SOURCES and "build" not in path.parts)
    return sorted(path for path in found if path.stat().st_size)


def read_summary(path: Path) -> str:
    """The first sentence that a source file says of itself, without its full stop; ValueError where it says nothing."""
    text = path.read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(text)) if path.suffix == ".py" else _read_comment(text)
    if not said:
        raise ValueError(f"{path} does not say what it holds; begin it with a docstring or a comment")
    paragraph = _clean(said.split("\n\n")[0])
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`'\"])", paragraph)[0].removesuffix(".")


def _read_comment(text: str) -> str:
    """The line comments that a C++ file begins with."""
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("//"):
            break
        lines.append(line.removeprefix("//").strip())
    return "\n".join(lines)


def _clean(text: str) -> str:
    """A docstring's text on one line."""
    return " ".join(inspect.cleandoc(text).split())


def _plain(text: str) -> str:
    """A help text on one line, with nothing in it that Markdown would take for its own."""
    return re.sub(r"([*_<\[`])", r"\\\1", _clean(text))


def _table(columns: Sequence[str]) -> Iterator[str]:
    yield _row(*columns)
    yield "|" + "---|" * len(columns)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def find_stale(pages: Mapping[Path, str]) -> list[Path]:
    """The pages whose file does not hold what the code gives."""
    return [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]


def main(arguments: Iterable[str] | None = None, *, say: Callable[[str], object] = print) -> int:
    """Rewrites the stale pages, or with --check only names them; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is stale")
    check = parser.parse_args(None if arguments is None else list(arguments)).check
    pages = generate()
    stale = find_stale(pages)
    for path in stale:
        say(f"{path.relative_to(ROOT)} {'is stale; run python docs/generate.py' if check else 'rewritten'}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(pages[path], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / part) for part in (".", "export", "runtime")]  # this checkout's code, installed or not
    sys.exit(main())
