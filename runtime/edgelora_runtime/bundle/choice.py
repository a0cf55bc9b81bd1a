"""The graph and weights behind a variant's name or a mix of live adapters.

A request runs with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgelora_runtime.arguments import is_number, show
from edgelora_runtime.bundle.manifest import FLOAT32_MAX
from edgelora_runtime.bundle.router import AUTO
from edgelora_runtime.errors import UsageError, suggest_name

if TYPE_CHECKING:
    from edgelora_runtime.bundle.manifest import Manifest, TextsEntry


LiveWeights = tuple[tuple[str, float], ...]  # (live adapter, weight), sorted by name, no weight 0


@dataclass(frozen=True)
class Choice:
    """A graph and, if it is live, the weight of each adapter.

    Together they determine the result. label: its name in receipts. texts: the tokenizer, template and end tokens that its
    adapters brought, None for the bundle's own. Comparisons ignore both, so a variant and a mix that compute the same are equal.
    """

    label: str = field(compare=False)
    graph: str
    live: LiveWeights | None
    texts: TextsEntry | None = field(default=None, compare=False)


def choose_variant(manifest: Manifest, target: str, variant: str) -> Choice:
    """Returns the choice for a variant's name.

    Raises UsageError if the bundle has no such variant.
    """
    if not isinstance(variant, str):
        raise UsageError(f"variant = {show(variant)}: use the name of a variant; this bundle has {', '.join(manifest.variants)}")
    if variant == AUTO:
        raise UsageError(f"variant {AUTO!r} is chosen per prompt: give it to generate, stream or route; here, give a name")
    entry = manifest.variants.get(variant)
    if entry is None:
        near = suggest_name([variant], manifest.variants) if isinstance(variant, str) else ""
        raise UsageError(f"no variant {show(variant)} in this bundle; it has {', '.join(manifest.variants)}{near}")
    live = _sort_weights(entry.live) if entry.kind == "live" else None
    return Choice(variant, entry.graphs[target].file, live, entry.texts)


def choose_mix(manifest: Manifest, target: str, mix: Mapping[str, float]) -> Choice:
    """Returns the choice for weights of live adapters.

    Raises UsageError for an adapter that the bundle lacks, for a weight that is not finite, and for adapters that brought
    different tokenizers or templates.
    """
    if not isinstance(mix, Mapping) or not all(isinstance(name, str) for name in mix):
        raise UsageError(f"mix = {show(mix)}: use an object of live adapters' names and their weights, such as {{'sql': 0.7}}")
    graph = manifest.live_graph(target)
    adapters = [name for name, entry in manifest.adapters.items() if entry.file is not None]
    if graph is None:
        raise UsageError("this bundle has no live variant, so it cannot mix at request time; export one with kind = 'live'")
    if unknown := sorted(set(mix) - set(adapters)):
        near = suggest_name(unknown, adapters)
        raise UsageError(f"no live adapter {', '.join(unknown)} in this bundle; it has {', '.join(adapters)}{near}")
    if wrong := [f"{name} = {show(weight)}" for name, weight in mix.items() if not _is_weight(weight)]:
        raise UsageError(f"weights of a mix must be finite numbers: {', '.join(wrong)}")
    live = _sort_weights(mix)
    brought = {entry: name for name, _ in live if (entry := manifest.adapters[name].texts) is not None}
    if len(brought) > 1:
        raise UsageError(f"adapters {', '.join(brought.values())} have different tokenizers or templates; use one at a time")
    label = " + ".join(f"{weight:g} {name}" for name, weight in live) or "base (live)"
    return Choice(label, graph.file, live, next(iter(brought), None))


def choose(manifest: Manifest, target: str, *, variant: str | None, mix: Mapping[str, float] | None, current: Choice) -> Choice:
    """Returns the choice of a call that may name a variant or a mix, but not both.

    Returns the current choice if the call names neither.
    """
    if variant is not None and mix is not None:
        raise UsageError(f"both variant {variant!r} and a mix are given; use one of them")
    if mix is not None:
        return choose_mix(manifest, target, mix)
    return current if variant is None else choose_variant(manifest, target, variant)


def _is_weight(value: object) -> bool:
    """True for a number that is finite as float32, too, in which a graph takes it."""
    return is_number(value) and abs(value) <= FLOAT32_MAX


def _sort_weights(mix: Mapping[str, float]) -> LiveWeights:
    return tuple(sorted((name, float(weight)) for name, weight in mix.items() if weight != 0))
