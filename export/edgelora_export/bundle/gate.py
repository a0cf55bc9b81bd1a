"""The rules of the gate: how much of its adapters a merged variant must keep, and the repairs to try if it keeps less."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from edgelora_export.bundle.fidelity import Comparison
    from edgelora_export.plan.variants import Variant
    from edgelora_export.quantize.int4 import Grid
    from edgelora_runtime.bundle.manifest import ProductFidelity

POLICIES = ("repair", "fail", "live", "off")
_REPAIR_SHARES = (0.25, 0.5, 1.0)  # of the products that the adapter changes, the noisiest first
_NAMED_COUNT = 5  # products that a refusal names
_LEAST_ANSWERS = 10  # fewer say nothing about a share


@dataclass(frozen=True)
class Gate:
    """The limits for a merged variant, and the policy for one that misses them.

    policy: repair tries, in this order, the float base if edgelora chose another one, 8 bits for the noisiest products, and a
    live variant. live makes the variant live at once. fail writes no bundle. off measures nothing.
    retention: the least share of the adapter's effect that must survive, 1 - KL(teacher ‖ variant) / KL(teacher ‖ bare base).
    answers: the least share of the answers that the adapter would write by itself, token for token, that the variant would write
    too. It counts if there are at least 10 of them. Retention is blind to it: after a divergence that is small beside the
    adapter's effect, one wrong token makes a wrong answer.
    max_kl: the most nats per token. min_top1: the least share of tokens with the same most likely token. None for no limit.
    """

    policy: str = "repair"
    retention: float = 0.8
    answers: float = 0.8
    max_kl: float | None = None
    min_top1: float | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InputError(f"gate {self.policy!r}: use one of {', '.join(POLICIES)}")
        if not self.retention <= 1:
            raise InputError(f"gate retention = {self.retention}: use a share, at most 1")
        if not self.answers <= 1:
            raise InputError(f"gate answers = {self.answers}: use a share, at most 1")
        if self.max_kl is not None and not self.max_kl > 0:
            raise InputError(f"gate max_kl = {self.max_kl}: use nats per token, more than 0")
        if self.min_top1 is not None and not 0 <= self.min_top1 <= 1:
            raise InputError(f"gate min_top1 = {self.min_top1}: use a share, from 0 to 1")

    def find_shortfalls(self, found: Comparison) -> list[str]:
        """Describes each limit that a variant misses. Returns [] if it passes."""
        lacking = []
        if found.retention is not None and found.retention < self.retention:
            lacking.append(f"keeps {found.retention:.2f} of its adapter's effect, less than {self.retention:g}")
        kept = found.answers_share
        if kept is not None and found.answers >= _LEAST_ANSWERS and kept < self.answers:
            lacking.append(
                f"writes {found.answers_kept} of the {found.answers} held-out answers that its adapter writes, "
                f"a share under {self.answers:g}"
            )
        if self.max_kl is not None and found.kl_mean > self.max_kl:
            lacking.append(f"diverges by {found.kl_mean:.3g} nats per token, more than {self.max_kl:g}")
        if self.min_top1 is not None and found.top1 < self.min_top1:
            lacking.append(f"agrees with its adapter on {found.top1:.3f} of the tokens, less than {self.min_top1:g}")
        return lacking


@dataclass(frozen=True)
class MergeIntoFloat:
    """The repair that merges the variant again, into the float base."""


@dataclass(frozen=True)
class RaiseToInt8:
    """The repair that stores these products in 8 bits."""

    products: tuple[str, ...]


@dataclass(frozen=True)
class MakeLive:
    """The repair that drops the merged weights and runs the mix live on the bare base."""


Repair = MergeIntoFloat | RaiseToInt8 | MakeLive


def propose_repairs(
    gate: Gate, variant: Variant, grids: Mapping[str, Grid], products: Mapping[str, ProductFidelity]
) -> Iterator[Repair]:
    """Yields the repairs to try in this order until the variant passes. The last one is always MakeLive.

    grids: of the variant's stored products. products: figures of those that the mix changes.
    """
    if gate.policy == "repair" and not variant.keeps_codes:  # other codes are what its training did not see
        if variant.merge_base == "trained" and variant.merge_losses:  # edgelora's choice, not the recipe's
            yield MergeIntoFloat()
        low = [product for product, grid in grids.items() if grid.bits < 8]
        noisiest = [product for product in _sort_by_noise(products) if product in low]
        for share in _REPAIR_SHARES if noisiest else ():
            yield RaiseToInt8(tuple(noisiest[: math.ceil(share * len(noisiest))]))
        if len(low) > len(noisiest):
            yield RaiseToInt8(tuple(low))
    yield MakeLive()


def find_live_obstacle(variant: Variant, live_adapters: Collection[str]) -> str | None:
    """Returns the reason a merged variant cannot be made live, or None if it can."""
    if variant.method != "linear":
        return f"its method {variant.method} does not sum adapters; make it one adapter with edgelora compose"
    if variant.weights:
        return f"{', '.join(variant.weights)} weighs by module; make it one adapter with edgelora compose"
    if absent := sorted(set(variant.mix) - set(live_adapters)):
        return f"{', '.join(absent)} cannot be applied as A and B"
    return None


def name_worst(products: Mapping[str, ProductFidelity]) -> str:
    """Names the products with the most noise, for a message."""
    worst = _sort_by_noise(products)[:_NAMED_COUNT]
    return ", ".join(f"{product} (noise {products[product].noise:.2g} of the adapter)" for product in worst)


def _sort_by_noise(products: Mapping[str, ProductFidelity]) -> list[str]:
    return sorted(products, key=lambda product: -products[product].noise)
