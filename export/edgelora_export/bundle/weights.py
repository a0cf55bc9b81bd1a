"""Stores the weights of a bundle's variants: those that all share, the bare base's products, and each merged variant's own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgelora_export.bundle.progress import GPTQ_COST
from edgelora_export.plan.targets import CPU, TARGETS
from edgelora_export.plan.variants import Merge
from edgelora_export.stream.embeddings import find_vocab_grid, store_embeddings, store_own_matrices
from edgelora_export.stream.products import compensates, raise_to_int8, store_products
from edgelora_export.weights.fp16_copies import Fp16Copies
from edgelora_export.weights.journal import Journal
from edgelora_export.weights.merged import changes_linear
from edgelora_export.weights.publish import locate_journal
from edgelora_export.weights.stored import Storage, StoredWeights, store_biases, store_norms, store_vocab_matrix

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from edgelora_export.bundle.plan import BundlePlan
    from edgelora_export.bundle.progress import Progress
    from edgelora_export.plan.calibration import Calibration
    from edgelora_export.plan.variants import Variant
    from edgelora_export.weights.journal import JournalSection


class BundleWeights:
    """The weights of a bundle, in blobs of one folder, so that equal weights are stored once.

    shared: norms, rotary tables, embedding and head. bare: every product of the bare base, None if no variant runs one.
    """

    def __init__(self, plan: BundlePlan, folder: Path, progress: Progress) -> None:
        self._plan, self._progress = plan, progress
        self._storage = Storage(plan.base, plan.decoder, folder, plan.quantization)
        self._bare_merge = Merge(None, plan.base_calibration)
        self._journal = Journal(None if plan.resume_key is None else locate_journal(folder), folder)
        self._merged: dict[str, StoredWeights] = {}
        self.shared: StoredWeights | None = None
        self.bare: StoredWeights | None = None

    def get(self, variant: Variant) -> StoredWeights:
        """Returns a variant's weights. A live variant, or one without a delta, has those of the bare base."""
        weights = self._merged.get(variant.name, self.bare)
        assert weights is not None
        return weights

    def expect_progress(self, variants: Mapping[str, Variant]) -> None:
        """Adds the passes that store() will make to the progress."""
        seen = [self._plan.base_calibration, *(each.calibration for each in variants.values() if _is_calibrated(each))]
        self._progress.expect(sum(compensates(self._plan.quantization, calibration) for calibration in seen))
        if self._needs_bare(variants):
            self._progress.expect(1, self._cost(self._plan.base_calibration))
        for variant in variants.values():
            if _is_merged(variant):
                self._progress.expect(1, self._cost_of(variant))

    def store(self, variants: Mapping[str, Variant]) -> None:
        """Stores the weights that the variants need and that are not stored yet.

        Requires: the merge base of each variant is chosen.
        Ensures: get() finds the weights of each variant. Weights that were stored before do not change.
        """
        if self.shared is None:
            merges = [
                self._bare_merge,
                *(each.merge for each in variants.values() if each.change and not self._has_own_head(each)),
            ]
            finished, on_layer = self._journal.section(""), self._progress.start_pass("embedding")
            norms = store_norms(self._storage)
            self._check_range(norms)
            self.shared = norms | store_embeddings(self._storage, merges, finished, on_layer)
        if self.bare is None and self._needs_bare(variants):
            finished = self._journal.section("")
            on_layer = self._progress.start_pass("base", self._cost(self._plan.base_calibration))
            self.bare = store_products(self._storage, self._bare_merge, self.shared, finished, on_layer=on_layer)
        for name, variant in variants.items():
            if name not in self._merged and _is_merged(variant):
                finished = self._journal.section(f"{name}, {variant.merge_base} base")  # the gate may change the base
                self._merged[name] = store_products(
                    self._storage_of(variant),
                    variant.merge,
                    self.shared | self._store_own(variant, finished),
                    finished,
                    bare=None if variant.keeps_codes else self.bare,
                    on_layer=self._progress.start_pass(name, self._cost_of(variant)),
                )

    def drop(self, name: str) -> None:
        """Drops a merged variant's weights, so that store() stores them again."""
        del self._merged[name]

    def raise_to_int8(self, variant: Variant, products: Collection[str]) -> None:
        """Stores some products of a merged variant again, in 8 bits. Other variants keep theirs."""
        storage = self._storage_of(variant)
        linears = [linear for linear in storage.decoder.linears if linear.name in products]
        stored = raise_to_int8(storage, variant.change, linears)
        for name in storage.decoder.vocab_modules.keys() & set(products):
            grid = find_vocab_grid(storage, name)
            assert grid is not None
            stored.update(store_vocab_matrix(storage, name, variant.change, replace(grid, bits=8)))
        self._merged[variant.name].update(stored)

    def _check_range(self, norms: StoredWeights) -> None:
        """Raises InputError for norms or biases that fp16 cannot hold, if a graph needs that, before hours of quantization."""
        if any(TARGETS[name].float_type != CPU.float_type for name in self._plan.targets):
            Fp16Copies(self._storage.folder, self._plan.decoder.wide_norms).copy(norms)

    def _needs_bare(self, variants: Mapping[str, Variant]) -> bool:
        """True if some variant runs products of the bare base.

        All do, except merged ones that change every product or keep the codes of their training.
        """
        return not all(
            variant.keeps_codes or (variant.live is None and changes_linear(variant.delta, linear))
            for variant in variants.values()
            for linear in self._plan.decoder.linears
        )

    def _storage_of(self, variant: Variant) -> Storage:
        """Returns the storage with the variant's own decoder, and with its own method if it keeps the codes of its training."""
        quantization = self._storage.quantization
        if variant.keeps_codes:
            quantization = replace(quantization, method="rtn")
        return replace(self._storage, decoder=self._plan.decoder_of(variant), quantization=quantization)

    def _own_matrices(self, variant: Variant) -> list[str]:
        return self._plan.find_own_matrices(variant)

    def _has_own_head(self, variant: Variant) -> bool:
        return self._plan.decoder_of(variant).head_product in self._own_matrices(variant)

    def _store_own(self, variant: Variant, finished: JournalSection) -> StoredWeights:
        """Stores a variant's own vocabulary matrices and biases. An untied head that it leaves alone is the base's embedding."""
        assert self.shared is not None
        storage, own = self._storage_of(variant), self._own_matrices(variant)
        calibrated = self._has_own_head(variant) and _is_calibrated(variant)
        on_layer = self._progress.start_pass(f"{variant.name}, head") if calibrated else lambda index: None
        weights = store_own_matrices(storage, own, variant.merge, finished, on_layer)
        if storage.decoder.untied and "head" not in own:
            weights.update(self.shared.rename("embedding", "head"))
        weights.update(store_biases(storage, variant.change))
        return weights

    def _cost_of(self, variant: Variant) -> int:
        return 1 if variant.keeps_codes else self._cost(variant.calibration)

    def _cost(self, calibration: Calibration) -> int:
        return GPTQ_COST if compensates(self._plan.quantization, calibration) else 1


def _is_merged(variant: Variant) -> bool:
    """True if a variant has its own weights."""
    return variant.live is None and variant.delta is not None


def _is_calibrated(variant: Variant) -> bool:
    """True if the variant's calibration helps to quantize its own products, or the head that all share."""
    return variant.delta is not None and not variant.keeps_codes
