"""Finds what an adapter's config names and its file lacks: target modules and layers without factors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from edgelora.adapters.names import show_names

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,6})\.(.+)")


def list_gaps(config: Mapping[str, Any], modules: Collection[str]) -> list[str]:
    """Lists, as notes for the user, what the config names and no module answers to.

    modules: names of those with factors or weights. A target given as an expression, or as all-linear, says nothing about one
    module, so that only gaps between layers are found.

    >>> list_gaps({"target_modules": ["q_proj", "k_proj"]}, ["model.layers.0.q_proj", "model.layers.2.q_proj"])
    ['target_modules names k_proj, which has no factors', 'q_proj has factors in layers 0 and 2, but not in 1']
    """
    notes = []
    targets = config.get("target_modules")
    names = [str(name) for name in targets] if isinstance(targets, list | tuple | set) else []
    if absent := [name for name in names if not any(f".{module}".endswith(f".{name}") for module in modules)]:
        notes.append(f"target_modules names {show_names(absent, 5)}, which {'has' if len(absent) == 1 else 'have'} no factors")
    layers: dict[str, list[int]] = {}
    for module in modules:
        if found := _LAYER.search(module):
            layers.setdefault(found[2], []).append(int(found[1]))
    wanted = _read_layers(config)
    if wanted and (lost := sorted(wanted.difference(*layers.values()))):
        notes.append(f"layers_to_transform names {_show_layers(lost)}, where nothing has factors")
    for name, found_in in sorted(layers.items()):
        expected = wanted & {*_span(layers.values())} if wanted else {*range(min(found_in), max(found_in) + 1)}
        if gap := sorted(expected - {*found_in}):
            notes.append(
                f"{show_names([name])} has factors in layers {_show_layers(sorted(found_in))}, but not in {_show_layers(gap)}"
            )
    return notes


def _read_layers(config: Mapping[str, Any]) -> set[int]:
    layers = config.get("layers_to_transform")
    found = layers if isinstance(layers, list) else [layers]
    return {layer for layer in found if isinstance(layer, int) and not isinstance(layer, bool)}


def _span(layers: Collection[Sequence[int]]) -> set[int]:
    return {layer for each in layers for layer in each}


def _show_layers(layers: Sequence[int], count: int = 6) -> str:
    """Joins numbers of layers: "0, 1 and 5"."""
    shown = [str(layer) for layer in layers[:count]]
    if len(layers) > count:
        shown.append(f"{len(layers) - count} more")
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
