"""Which base a mix is merged into: the float one, or the one that its adapters were trained on; the held-out loss decides."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgelora_export.bundle.fidelity import measure_loss

if TYPE_CHECKING:
    from edgelora_export.decoder.description import Decoder
    from edgelora_export.plan.variants import Variant
    from edgelora_export.weights.base import Base


def choose_merge_base(base: Base, decoder: Decoder, variant: Variant) -> Variant:
    """The variant with its merge base settled: float or trained.

    An adapter makes up for the rounding of the base that it was trained on, which the float base lacks; but that rounding
    costs what the float base has. Neither wins always, so both are streamed over the held-out samples before quantization.
    Without samples, without another base to merge into, and for a live variant, auto means float.
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
