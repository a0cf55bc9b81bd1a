"""What the command line's verbs share: options that mean the same everywhere, and arguments of the form NAME=VALUE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgelora.data.rows import read_text
from edgelora.mix.weights import EVERYWHERE
from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora.mix.weights import Weight
    from edgelora_runtime import Runtime

BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")]
VariantOption = Annotated[
    str | None, typer.Option(help="The variant, or auto: the bundle's router picks one per prompt. The default without it.")
]
MixOption = Annotated[
    list[str] | None,
    typer.Option("--mix", metavar="ADAPTER=WEIGHT", help="Mix live adapters for this call; repeat for each."),
]
MaxTokensOption = Annotated[int, typer.Option(help="Tokens to write at the most.")]
ThreadsOption = Annotated[int | None, typer.Option(help="Compute threads; all physical cores without it.")]
ProviderOption = Annotated[
    str, typer.Option(help="cpu, cuda, webgpu, or auto: a GPU where there is one and the bundle has graphs for it.")
]
PackedCacheOption = Annotated[
    bool, typer.Option("--packed-cache", help="Map packed weights from this machine's cache; what is not there yet is written.")
]
WholeGraphsOption = Annotated[
    bool, typer.Option("--whole-graphs", help="One session per variant that shares nothing, for steps that may be faster.")
]
KernelsOption = Annotated[
    str, typer.Option(help="Whose kernels compute: edgelora (the package edgelora-kernels), onnxruntime, or auto.")
]
BaseOption = Annotated[str, typer.Option(help="Folder or hub id of the base.")]
AdaptersOption = Annotated[list[str], typer.Option(metavar="NAME=ADAPTER", help="An adapter's folder; repeat for each.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, all else on standard error.")]


def open_runtime(
    bundle: Path, threads: int | None, provider: str, packed_cache: bool, whole_graphs: bool, kernels: str
) -> Runtime:
    """Opens a bundle with the options that all verbs share."""
    from edgelora_runtime import PackedCache, Runtime

    cache = PackedCache() if packed_cache else None
    return Runtime(bundle, threads=threads, provider=provider, packed_cache=cache, whole_graphs=whole_graphs, kernels=kernels)


def is_given(context: typer.Context, name: str) -> bool:
    """Whether a call names an option, rather than leaving it at its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def read_option_file(path: Path | None, option: str) -> str | None:
    """The text of a file that an option names, if it does; InputError where it cannot be read."""
    return None if path is None else read_text(path, option)


def parse_mix(items: Sequence[str] | None) -> Mapping[str, float] | None:
    if not items:
        return None
    pairs = parse_pairs(items, "--mix ADAPTER=WEIGHT")
    return {name: parse_number(value, f"--mix {name}={value}") for name, value in pairs.items()}


def parse_adapters(items: Sequence[str], by_pattern: Mapping[str, Weight] | None = None) -> dict[str, tuple[str, Weight]]:
    """Folder and weight by name. by_pattern: weights from a file, which a number given here is the default of."""
    adapters: dict[str, tuple[str, Weight]] = {}
    by_pattern = by_pattern or {}
    pairs = parse_pairs(items, "--adapter NAME=ADAPTER:WEIGHT")
    if unknown := sorted(set(by_pattern) - set(pairs)):
        raise UsageError(f"the file of weights names {', '.join(unknown)}, which no --adapter does")
    for name, value in pairs.items():
        folder, colon, text = value.rpartition(":")
        if name not in by_pattern:
            if not colon:
                raise UsageError(f"--adapter {name}={value} has no weight; write {name}={value}:1.0")
            adapters[name] = (folder, parse_number(text, f"--adapter {name}={value}"))
            continue
        weight = by_pattern[name]
        try:
            default = float(text) if colon else None
        except ValueError:  # the colon is the folder's
            default = None
        if default is None:
            adapters[name] = (value, weight)
        elif isinstance(weight, Mapping) and EVERYWHERE not in weight:
            adapters[name] = (folder, {EVERYWHERE: default, **weight})
        else:
            raise UsageError(f"--adapter {name}={value}: the file of weights has a weight for all modules, too; give one of them")
    return adapters


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


def parse_paths(items: Sequence[str], form: str) -> dict[str, Path]:
    return {name: Path(path) for name, path in parse_pairs(items, form).items()}


def parse_range(text: str, where: str) -> tuple[float, float]:
    low, colon, high = text.partition(":")
    if not colon:
        raise UsageError(f"{where} {text}: write the lowest and the highest value, as in 0:1.5")
    return parse_number(low, f"{where} {text}"), parse_number(high, f"{where} {text}")


def parse_number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{where}: {text!r} is not a number") from None
