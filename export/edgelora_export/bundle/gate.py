"""The gate: a variant ships when onnxruntime, running it as shipped, still says what its unmerged adapter says."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from edgelora_export.bundle.fidelity import Comparison, Teacher, compare, run_teacher
from edgelora_runtime import Runtime
from edgelora_runtime.bundle.manifest import FidelityEntry
from edgelora_runtime.errors import InputError, IntegrityError
from edgelora_runtime.residency.memory import return_freed_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgelora_export.bundle.draft import Draft
    from edgelora_export.plan.variants import Variant
    from edgelora_runtime.bundle.manifest import Manifest

    Outcome = Literal["measured", "passed", "repaired", "live"]

POLICIES = ("repair", "fail", "live", "off")
_REPAIR_SHARES = (0.25, 0.5, 1.0)  # of the products that the adapter changes, the noisiest first
_NAMED = 5  # layers that a refusal names


@dataclass(frozen=True)
class Gate:
    """What a merged variant must keep, and what happens to one that does not.

    policy: repair (the float base where the variant was merged into another by choice, then more bits for the noisiest
    products, and if that is not enough a live variant), live (a live variant at once), fail (no bundle), off (nothing is
    measured). retention: the least share of the adapter's effect that must survive, 1 - KL(teacher ‖ variant) /
    KL(teacher ‖ bare base). max_kl: nats per token, and min_top1: share of tokens, at most and at least; None asks for
    neither.
    """

    policy: str = "repair"
    retention: float = 0.8
    max_kl: float | None = None
    min_top1: float | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InputError(f"gate {self.policy!r}: use one of {', '.join(POLICIES)}")
        if not self.retention <= 1:
            raise InputError(f"gate retention = {self.retention}: use a share, at most 1")
        if self.max_kl is not None and not self.max_kl > 0:
            raise InputError(f"gate max_kl = {self.max_kl}: use nats per token, more than 0")
        if self.min_top1 is not None and not 0 <= self.min_top1 <= 1:
            raise InputError(f"gate min_top1 = {self.min_top1}: use a share, from 0 to 1")

    def shortfalls(self, found: Comparison) -> list[str]:
        """What a variant's figures lack, in words; empty where it passes."""
        lacking = []
        if (kept := retention(found)) is not None and kept < self.retention:
            lacking.append(f"keeps {kept:.2f} of its adapter's effect, less than {self.retention:g}")
        if self.max_kl is not None and found.kl_mean > self.max_kl:
            lacking.append(f"strays {found.kl_mean:.3g} nats per token, more than {self.max_kl:g}")
        if self.min_top1 is not None and found.top1 < self.min_top1:
            lacking.append(f"agrees on {found.top1:.3f} of the tokens, less than {self.min_top1:g}")
        return lacking


def retention(found: Comparison) -> float | None:
    """The share of the adapter's effect that a variant keeps: 1 is all, 0 what the bare float base says; None without one."""
    return 1 - found.kl_mean / found.adapter_kl if found.adapter_kl > 0 else None


def judged(draft: Draft) -> list[str]:
    """The variants that have held-out samples."""
    return [name for name in draft.variants if draft.calibration_of(name).held_out]


def judge(draft: Draft, gate: Gate) -> Manifest:
    """Measures every variant that has held-out samples, mends those that fall short, and writes the bundle with the figures.

    Raises IntegrityError, naming variants and layers, where the policy is to fail or nothing helps.
    """
    draft.write(final=False)
    refused = [refusal for name in judged(draft) if (refusal := _judge_variant(draft, name, gate))]
    if refused:
        raise IntegrityError(f"{'; '.join(refused)}; use --gate repair, more bits, or kind = 'live'")
    return draft.write(final=True)


def _judge_variant(draft: Draft, name: str, gate: Gate) -> str | None:
    """Judges one variant and forgets what it took; says what it lacks where the policy is to fail."""
    variant = draft.variants[name]
    teacher = run_teacher(draft, name, draft.progress.through(f"checking {name}"))
    found = _measure(draft, name, teacher)
    outcome: Outcome = "measured" if variant.live is None else "live"
    refusal = None
    if variant.delta is not None and variant.live is None:
        outcome = "passed"
        lacking = gate.shortfalls(found)
        if lacking and gate.policy == "fail":
            refusal = f"{name} {' and '.join(lacking)}; most is lost in {_name_worst(teacher)}"
        elif lacking:
            outcome, found, teacher = _mend(draft, name, gate, teacher, found)
    draft.fidelity[name] = _describe(found, teacher, outcome)
    return refusal


def _mend(draft: Draft, name: str, gate: Gate, teacher: Teacher, found: Comparison) -> tuple[Outcome, Comparison, Teacher]:
    """Merges into the float base and raises products to int8 until the variant passes, else makes it live."""
    if gate.policy == "repair":
        if draft.variants[name].merge_base == "trained" and draft.variants[name].merge_losses:
            draft.merge_into_float(name)
            draft.write(final=False)
            found, teacher = _measure(draft, name, teacher), run_teacher(draft, name)
            if not gate.shortfalls(found):
                return "repaired", found, teacher
        for products in _rounds(draft, name, teacher):
            draft.progress.show(f"repairing {name}, {len(products)} products to 8 bits")
            draft.raise_to_int8(name, products)
            draft.write(final=False)
            found = _measure(draft, name, teacher)
            if not gate.shortfalls(found):
                return "repaired", found, run_teacher(draft, name)
    variant = draft.variants[name]
    if reason := _why_not_live(draft, variant):
        raise IntegrityError(f"{name} {' and '.join(gate.shortfalls(found))}, and cannot be made live: {reason}")
    draft.make_live(name)
    draft.write(final=False)
    return "live", _measure(draft, name, teacher), replace(teacher, products={})


def _rounds(draft: Draft, name: str, teacher: Teacher) -> Iterator[list[str]]:
    """Products to raise, more each round: those with the most noise for the adapter's effect, then everything."""
    low = [product for product, grid in draft.weights_of(name).grids.items() if grid.bits < 8]
    noisiest = [product for product in _by_noise(teacher) if product in low]
    for share in _REPAIR_SHARES if noisiest else ():
        yield noisiest[: math.ceil(share * len(noisiest))]
    if len(low) > len(noisiest):
        yield low


def _why_not_live(draft: Draft, variant: Variant) -> str | None:
    if variant.method != "linear":
        return f"its method {variant.method} gives no sum of adapters; make it one adapter with edgelora compose"
    if variant.weights:
        return f"{', '.join(variant.weights)} weighs by module; make it one adapter with edgelora compose"
    if absent := sorted(set(variant.mix) - set(draft.factors)):
        return f"{', '.join(absent)} cannot be applied as A and B"
    return None


def _measure(draft: Draft, name: str, teacher: Teacher) -> Comparison:
    return_freed_memory()  # what quantizing, the teacher and an earlier session freed, since this one packs the whole model
    with Runtime(draft.folder, provider="cpu") as runtime:
        return compare(draft, teacher, lambda tokens, count: runtime.iterate_logits(tokens, variant=name, positions=count))


def _by_noise(teacher: Teacher) -> list[str]:
    return sorted(teacher.products, key=lambda product: -teacher.products[product].noise)


def _name_worst(teacher: Teacher) -> str:
    return ", ".join(
        f"{product} (noise {teacher.products[product].noise:.2g} of the adapter)" for product in _by_noise(teacher)[:_NAMED]
    )


def _describe(found: Comparison, teacher: Teacher, outcome: Outcome) -> FidelityEntry:
    return FidelityEntry(
        outcome=outcome,
        tokens=found.tokens,
        kl_mean=found.kl_mean,
        kl_p99=found.kl_p99,
        adapter_kl=found.adapter_kl,
        retention=retention(found),
        top1=found.top1,
        perplexity=found.perplexity,
        teacher_perplexity=found.teacher_perplexity,
        products=teacher.products,
        trained_kl=found.trained_kl,
    )
