"""The plan of a bundle: everything that decides its content, checked before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgelora_export.bundle.texts import read_bundle_texts
from edgelora_export.plan.adapted_decoder import adapt_decoder, explain_not_live, find_own_matrices
from edgelora_export.plan.calibration import Calibration
from edgelora_export.plan.targets import CPU, check_targets
from edgelora_export.plan.variants import Quantization
from edgelora_export.weights.merged import check_delta, check_modules, check_vocab
from edgelora_runtime.bundle.manifest import check_variant_name
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgelora_export.base.base import Base
    from edgelora_export.bundle.gate import Gate
    from edgelora_export.bundle.texts import BundleTexts
    from edgelora_export.decoder.description import Decoder
    from edgelora_export.plan.variants import LowRank, PackedRouter, Variant
    from edgelora_runtime.bundle.manifest import AdapterEntry


@dataclass(frozen=True)
class BundlePlan:
    """The input of build_bundle. Raises InputError for names, modules or settings that cannot be built.

    base, decoder: the weights, and the layout of the decoder (read_decoder). variants: in the bundle's order. adapters: the
    manifest's entry of each. The builder adds the files.
    live_adapters: factors by adapter name, for live variants and for those that the gate makes live. base_calibration: the
    samples on which the bare base is quantized. gate: the limits for variants. None measures nothing.
    default: the variant with which a runtime starts, None for the first. targets: names of Targets, cpu among them. router: picks
    a variant for a prompt. draft_tables: bytes by adapter. texts: tokenizers, chat templates and end tokens, by default the
    base's.
    resume_key: one line that two plans share only if they lead to the same weights. A later run with the same key reuses what an
    interrupted run has finished. With None an interrupted run leaves nothing.
    """

    base: Base
    decoder: Decoder
    variants: tuple[Variant, ...]
    quantization: Quantization = field(default_factory=Quantization)
    adapters: Mapping[str, AdapterEntry] = field(default_factory=dict)
    live_adapters: Mapping[str, LowRank] = field(default_factory=dict)
    base_calibration: Calibration = field(default_factory=Calibration)
    gate: Gate | None = None
    default: str | None = None
    targets: tuple[str, ...] = (CPU.name,)
    router: PackedRouter | None = None
    draft_tables: Mapping[str, bytes] = field(default_factory=dict)
    texts: BundleTexts = None  # type: ignore[assignment]  # None only until __post_init__
    resume_key: str | None = None

    def __post_init__(self) -> None:
        if self.texts is None:
            object.__setattr__(self, "texts", read_bundle_texts(self.base, self.decoder.vocab_size))
        check_targets(self.targets)
        check_names(self.variants)
        check_vocab(self.base, self.decoder)
        for variant in self.variants:
            if variant.delta is not None:
                check_delta(self.decoder, variant.delta, f"variant {variant.name}")
            if variant.live is not None and (reason := explain_not_live(self.decoder, variant.delta)):
                raise InputError(f"variant {variant.name} cannot be live: {reason}; use kind = 'merged'")
        for name, adapter in self.live_adapters.items():
            check_modules(self.decoder, adapter.modules, f"adapter {name}")
        with_files = {*self.live_adapters, *self.texts.own}
        folded = [name.lower() for name in with_files]
        if twice := sorted({name for name in with_files if folded.count(name.lower()) > 1}):
            raise InputError(f"adapters {', '.join(twice)} differ only in case, and so would their files; rename one")
        vocab = dict.fromkeys(product for variant in self.variants for product in self.decoder_of(variant).vocab_modules)
        products = [*(linear.name for linear in self.decoder.linears), *vocab]
        if idle := self.quantization.idle_patterns(products):
            raise InputError(
                f"int8 = {', '.join(idle)}: no product matches; products are named from {products[0]} to {products[-1]}"
            )

    @property
    def default_variant(self) -> str:
        """The name of the variant with which a runtime starts."""
        return self.variants[0].name if self.default is None else self.default

    def decoder_of(self, variant: Variant) -> Decoder:
        """Returns the decoder as a variant's delta adapts it: with its own biases, head and vocabulary size."""
        return adapt_decoder(self.decoder, variant.delta)

    def find_own_matrices(self, variant: Variant) -> list[str]:
        """Names the vocabulary matrices that a variant has for itself: `embedding`, `head`, both or none.

        A variant that keeps the codes of its training has a head of its own: the one that all share is calibrated.
        """
        decoder = self.decoder_of(variant)
        own = find_own_matrices(self.decoder, decoder, variant.delta)
        if variant.keeps_codes and self.quantization.calibrated and decoder.head_product not in own:
            own.append(decoder.head_product)
        return own

    def find_calibration(self, variant: Variant) -> Calibration:
        """Returns the samples on which a variant is measured: its own, or the base's if it has no delta."""
        return self.base_calibration if variant.delta is None else variant.calibration


def check_names(variants: Sequence[Variant]) -> None:
    """Raises InputError if there are no variants, or for names that are invalid or differ only in case."""
    if not variants:
        raise InputError("the recipe has no variants; add at least [variants.base] with mix = {}")
    seen: set[str] = set()
    for variant in variants:
        if reason := check_variant_name(variant.name):
            raise InputError(f"variant {variant.name!r}: {reason}")
        if variant.name.lower() in seen:
            raise InputError(f"variant {variant.name!r} is named twice; two names must differ in more than case, so rename one")
        seen.add(variant.name.lower())
