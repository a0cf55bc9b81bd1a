"""Weights of a mix: a number per adapter, or numbers by module pattern."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeAlias

from edgelora_export.base.files import read_toml
from edgelora_runtime.bundle.manifest import FLOAT32_MAX
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

Weight: TypeAlias = float | Mapping[str, float]
"""A number for all modules, or numbers by fnmatch pattern of module names. The last matching pattern wins, else 0."""

EVERYWHERE = "*"


def weight_at(weight: Weight, module: str) -> float:
    """An adapter's weight in a module.

    >>> weight_at({"*": 0.6, "model.layers.0.*": 0.2}, "model.layers.0.mlp.up_proj")
    0.2
    """
    if not isinstance(weight, Mapping):
        return weight
    return next((value for pattern, value in reversed(list(weight.items())) if fnmatchcase(module, pattern)), 0.0)


def describe_weight(weight: Weight, name: str) -> str:
    """A weight with its adapter's name: "0.6 sql", or "{*: 0.6, model.layers.0.*: 0.2} sql"."""
    if not isinstance(weight, Mapping):
        return f"{weight:g} {name}"
    return f"{{{', '.join(f'{pattern}: {value:g}' for pattern, value in weight.items())}}} {name}"


def idle_patterns(weight: Weight, modules: Iterable[str]) -> list[str]:
    """The patterns of a weight that match none of an adapter's modules."""
    if not isinstance(weight, Mapping):
        return []
    modules = list(modules)
    return [pattern for pattern in weight if not any(fnmatchcase(module, pattern) for module in modules)]


def check_weight(weight: Any, where: str) -> list[str]:
    """Lists the mistakes in a weight from a file.

    It must be a finite number, or a table of them. where: its place in the file.
    """
    if isinstance(weight, Mapping):
        wrong = [] if weight else [f"{where} = {{}} is empty; give at least one pattern a weight"]
        return wrong + [mistake for pattern, value in weight.items() for mistake in _check_number(value, f'{where}."{pattern}"')]
    return _check_number(weight, where)


def _check_number(value: Any, where: str) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return [f"{where} = {value!r} is not a weight"]
    return [] if abs(value) <= FLOAT32_MAX else [f"{where} = {value}: weights must be finite numbers that float32 can hold"]


def read_weights(path: Path) -> dict[str, Weight]:
    """Reads a TOML file of weights.

    It has [weights] with a number per adapter, or [weights.NAME] with a number per pattern.
    """
    value = read_toml(path, "it gives weights by pattern of module names")
    table = value.get("weights")
    wrong = [f"{key} is not a known key; known: weights" for key in value if key != "weights"]
    if not isinstance(table, dict):
        wrong.append('weights must be a table; write [weights.NAME] and lines such as "model.layers.0.*" = 0.2')
    else:
        wrong += [mistake for name, weight in table.items() for mistake in check_weight(weight, f"weights.{name}")]
    if wrong:
        raise InputError(f"{path}: {'; '.join(wrong[:8])}{' …' if len(wrong) > 8 else ''}")
    assert isinstance(table, dict)
    return table
