"""Chooses by held-out loss the base of a mix: the float base, or the one on which its adapters were trained."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgelora_export.bundle.fidelity import measure_loss

if TYPE_CHECKING:
    from edgelora_export.base.base import Base
    from edgelora_export.decoder.description import Decoder
    from edgelora_export.plan.variants import Variant


def choose_merge_base(base: Base, decoder: Decoder, variant: Variant) -> Variant:
    """Returns the variant with its merge base chosen, float or trained. decoder: the variant's own.

    An adapter compensates for the rounding of the base on which it was trained, and the float base has no such rounding. But the
    rounding itself loses some of the float base. Neither is always better, so both run over the held-out samples before
    quantization.
    auto means float for a live variant, without samples, and without another base to merge into.
    """
    if variant.merge_base != "auto":
        return variant
    trained, samples = variant.trained, variant.calibration.held_out
    if variant.delta is None or variant.live is not None or trained is None or not samples:
        return replace(variant, merge_base="float")
    losses = {
        "float": measure_loss(base, decoder, samples, variant.delta),
        "trained": measure_loss(base, decoder, samples, trained.merged),
    }
    better = "trained" if losses["trained"] < losses["float"] else "float"
    return replace(variant, merge_base=better, merge_losses=losses)
