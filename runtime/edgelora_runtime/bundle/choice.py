"""What a request runs on: a variant by name, or a mix of live adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgelora_runtime.bundle.router import AUTO
from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelora_runtime.bundle.manifest import Manifest

LiveWeights = tuple[tuple[str, float], ...]  # weight by live adapter, sorted by name, none of them 0


@dataclass(frozen=True)
class Choice:
    """A graph, and for live graphs the weight of each adapter, which together say what is computed.

    label: what receipts call it; a variant and a mix that compute the same are equal.
    """

    label: str = field(compare=False)
    graph: str
    live: LiveWeights | None


def choose_variant(manifest: Manifest, target: str, variant: str) -> Choice:
    """The choice that a variant's name stands for; UsageError where there is none."""
    if variant == AUTO:
        raise UsageError(f"variant {AUTO!r} is chosen per prompt: give it to generate, stream or route, and a name here")
    entry = manifest.variants.get(variant)
    if entry is None:
        raise UsageError(f"no variant {variant!r} in this bundle; it has {', '.join(manifest.variants)}")
    live = _sort_weights(entry.live) if entry.kind == "live" else None
    return Choice(variant, entry.graphs[target].file, live)


def choose_mix(manifest: Manifest, target: str, mix: Mapping[str, float]) -> Choice:
    """The choice of live adapters by weight; UsageError for what the bundle does not have and weights that are not finite."""
    graph = manifest.live_graph(target)
    adapters = [name for name, entry in manifest.adapters.items() if entry.file is not None]
    if graph is None:
        raise UsageError("this bundle has no live variant, so no mix can be made at request time; export one with kind = 'live'")
    if unknown := sorted(set(mix) - set(adapters)):
        raise UsageError(f"no live adapter {', '.join(unknown)} in this bundle; it has {', '.join(adapters)}")
    if wrong := [f"{name} = {weight}" for name, weight in mix.items() if not math.isfinite(weight)]:
        raise UsageError(f"weights of a mix must be finite: {', '.join(wrong)}")
    live = _sort_weights(mix)
    return Choice(" + ".join(f"{weight:g} {name}" for name, weight in live) or "base (live)", graph.file, live)


def _sort_weights(mix: Mapping[str, float]) -> LiveWeights:
    return tuple(sorted((name, float(weight)) for name, weight in mix.items() if weight != 0))
