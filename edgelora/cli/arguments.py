"""Options that several verbs share, and parsers for arguments such as NAME=VALUE."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgelora.cli.choices import PROVIDERS, choose
from edgelora.cli.completion import complete_mix, complete_variants
from edgelora.data.rows import read_text
from edgelora.formatting import name_path
from edgelora.mix.weights import EVERYWHERE
from edgelora_runtime.errors import UsageError, suggest_name
from edgelora_runtime.session.kernels import KERNELS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora.mix.weights import Weight

_RUNTIME = "Runtime"  # headings of groups in --help
_OUTPUT = "Output"

BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")]
VariantOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The variant, or auto to let the bundle's router pick one per prompt; the bundle's default if omitted.",
        autocompletion=complete_variants,
    ),
]
MixOption = Annotated[
    list[str] | None,
    typer.Option(
        "--mix",
        metavar="ADAPTER[=WEIGHT]",
        help="Mix live adapters for this call, with weight 1 if omitted; repeat for each adapter.",
        autocompletion=complete_mix,
    ),
]
MaxTokensOption = Annotated[int, typer.Option(metavar="N", help="Maximum number of tokens to write.")]
ThreadsOption = Annotated[
    int | None, typer.Option(metavar="N", help="Compute threads; all physical cores if omitted.", rich_help_panel=_RUNTIME)
]
ProviderOption = Annotated[
    str,
    choose(PROVIDERS, "Where to compute; auto takes a GPU if there is one and the bundle has graphs for it.", panel=_RUNTIME),
]
PackedCacheOption = Annotated[
    bool,
    typer.Option(
        "--packed-cache",
        help="Map packed weights from this machine's cache, and add those that it lacks.",
        rich_help_panel=_RUNTIME,
    ),
]
WholeGraphsOption = Annotated[
    bool,
    typer.Option(
        "--whole-graphs",
        help="One session per variant that shares no weights; its steps may be faster.",
        rich_help_panel=_RUNTIME,
    ),
]
KernelsOption = Annotated[
    str, choose(KERNELS, "Kernels to compute with; edgelora's are the package edgelora-kernels.", panel=_RUNTIME)
]
MemoryBudgetOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What loaded variants may take, such as 4GiB; three quarters of the free memory if omitted.",
        show_default=False,
        rich_help_panel=_RUNTIME,
    ),
]
CacheBudgetOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What keys and values of prompts may take; a tenth of the free memory if omitted.",
        show_default=False,
        rich_help_panel=_RUNTIME,
    ),
]
BaseOption = Annotated[str, typer.Option(metavar="BASE", help="Folder, GGUF file or hub id of the base.")]
AdaptersOption = Annotated[
    list[str],
    typer.Option(
        metavar="[NAME=]ADAPTER",
        help="An adapter's folder or GGUF file, named after itself if NAME= is omitted; repeat for each adapter.",
    ),
]
TemplateOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--template-option",
        metavar="KEY=JSON",
        help="What the chat template gets beside the messages of rows, as enable_thinking=false; repeat for each.",
    ),
]
SeedOption = Annotated[int, typer.Option(metavar="N", help="Random seed.")]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object on standard output; everything else goes to standard error.",
        rich_help_panel=_OUTPUT,
    ),
]


def is_given(context: typer.Context, name: str) -> bool:
    """True if the user set the option, even to its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def read_option_file(path: Path | None, option: str) -> str | None:
    """Reads the text of the file that an option names.

    Returns None if the option is absent. Raises InputError for an unreadable file.
    """
    return None if path is None else read_text(path, option)


def parse_mix(items: Sequence[str] | None) -> Mapping[str, float] | None:
    """Weights by live adapter, each from ADAPTER=WEIGHT, or 1 from ADAPTER alone."""
    if not items:
        return None
    pairs = parse_pairs([item if "=" in item else f"{item}=1" for item in items], "--mix ADAPTER[=WEIGHT]")
    return {name: parse_number(value, f"--mix {name}={value}") for name, value in pairs.items()}


def parse_adapters(items: Sequence[str], by_pattern: Mapping[str, Weight] | None = None) -> dict[str, tuple[str, Weight]]:
    """Path and weight by name, each from [NAME=]ADAPTER[:WEIGHT].

    by_pattern: weights from a file. A number in the argument is then the weight of the modules that no pattern matches.
    """
    adapters: dict[str, tuple[str, Weight]] = {}
    by_pattern = by_pattern or {}
    pairs = parse_paths(items, "--adapter [NAME=]ADAPTER[:WEIGHT]", weighted=True)
    if unknown := sorted(set(by_pattern) - set(pairs)):
        raise UsageError(f"the file of weights names {', '.join(unknown)}, but no --adapter does{suggest_name(unknown, pairs)}")
    for name, value in pairs.items():
        path, given = _split_weight(value, f"--adapter {name}={value}")
        weight = by_pattern.get(name)
        if weight is None:
            adapters[name] = (path, 1.0 if given is None else given)
        elif given is None:
            adapters[name] = (path, weight)
        elif isinstance(weight, Mapping) and EVERYWHERE not in weight:
            adapters[name] = (path, {EVERYWHERE: given, **weight})
        else:
            raise UsageError(
                f"--adapter {name}={value}: the file of weights also gives a weight for all modules; give only one of the two"
            )
    return adapters


def parse_paths(items: Sequence[str], form: str, *, weighted: bool = False) -> dict[str, str]:
    """Paths by name, each from [NAME=]PATH. A path without a name is named after itself, without a file's suffix.

    weighted: a weight may follow each path. It stays there, and is left out of the name.
    """
    pairs: dict[str, str] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not equals or "/" in name or "\\" in name or Path(item).exists():  # the sign belongs to the path
            place = Path(_split_weight(item, item)[0] if weighted else item)
            name, path = name_path(place), item
        if not (name and path):
            raise UsageError(f"{item!r} is not of the form {form}")
        if name in pairs:
            raise UsageError(f"{name} is given twice; each needs a name of its own, {form}")
        pairs[name] = path
    return pairs


def _split_weight(value: str, where: str) -> tuple[str, float | None]:
    """Splits ADAPTER[:WEIGHT]. A colon that no number follows belongs to the path, unless what precedes it is a path."""
    path, colon, text = value.rpartition(":")
    if not colon or Path(value).exists():
        return value, None
    try:
        return path, float(text)
    except ValueError:
        if Path(path).exists():
            raise UsageError(f"{where}: {text!r} is not a number") from None
        return value, None


def parse_pairs(items: Sequence[str], form: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{item!r} is not of the form {form}")
        if name in pairs:
            raise UsageError(f"{name} is given twice; each name needs one {form}")
        pairs[name] = value
    return pairs


def parse_template_options(items: Sequence[str] | None) -> dict[str, Any]:
    """Values by name, each given as JSON. Raises UsageError for what is no JSON."""
    options: dict[str, Any] = {}
    for name, text in parse_pairs(items or (), "--template-option KEY=JSON").items():
        try:
            options[name] = json.loads(text)
        except (ValueError, RecursionError):
            hint = f"put a text in quotes: {name}='{json.dumps(text)}'"
            raise UsageError(f"--template-option {name}={text} is no JSON; {hint}") from None
    return options


def parse_range(text: str, where: str) -> tuple[float, float]:
    low, colon, high = text.partition(":")
    if not colon:
        raise UsageError(f"{where} {text}: write the lowest and the highest value, for example 0:1.5")
    return parse_number(low, f"{where} {text}"), parse_number(high, f"{where} {text}")


def parse_number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{where}: {text!r} is not a number") from None
