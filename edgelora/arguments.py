"""What the command line's verbs share: options that mean the same everywhere, and arguments of the form NAME=VALUE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, all else on standard error.")]


def parse_mix(items: Sequence[str] | None) -> Mapping[str, float] | None:
    if not items:
        return None
    pairs = parse_pairs(items, "--mix ADAPTER=WEIGHT")
    return {name: parse_number(value, f"--mix {name}={value}") for name, value in pairs.items()}


def parse_adapters(items: Sequence[str]) -> dict[str, tuple[str, float]]:
    adapters = {}
    for name, value in parse_pairs(items, "--adapter NAME=ADAPTER:WEIGHT").items():
        folder, colon, weight = value.rpartition(":")
        if not colon:
            raise UsageError(f"--adapter {name}={value} has no weight; write {name}={value}:1.0")
        adapters[name] = (folder, parse_number(weight, f"--adapter {name}={value}"))
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
