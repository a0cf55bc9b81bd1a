"""Stores the weights of a bundle's variants: those that all share, the bare base's products, and each merged variant's own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgelora_export.bundle.progress import GPTQ_COST
from edgelora_export.plan.variants import Merge
from edgelora_export.stream.embeddings import store_embeddings
from edgelora_export.stream.products import compensates, raise_to_int8, store_products
from edgelora_export.weights.journal import Journal
from edgelora_export.weights.merged import changes_linear, changes_vocab, vocab_modules
from edgelora_export.weights.publish import locate_journal
from edgelora_export.weights.stored import Storage, StoredWeights, store_norms, store_vocab_matrix

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from edgelora_export.bundle.plan import BundlePlan
    from edgelora_export.bundle.progress import Progress
    from edgelora_export.plan.calibration import Calibration
    from edgelora_export.plan.variants import Variant


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
        seen = [self._plan.base_calibration, *(each.calibration for each in variants.values() if each.delta is not None)]
        self._progress.expect(sum(compensates(self._plan.quantization, calibration) for calibration in seen))
        if self._needs_bare(variants):
            self._progress.expect(1, self._cost(self._plan.base_calibration))
        for variant in variants.values():
            if _is_merged(variant):
                self._progress.expect(1, self._cost(variant.calibration))

    def store(self, variants: Mapping[str, Variant]) -> None:
        """Stores the weights that the variants need and that are not stored yet.

        Requires: the merge base of each variant is chosen.
        Ensures: get() finds the weights of each variant. Weights that were stored before do not change.
        """
        if self.shared is None:
            merges = [self._bare_merge, *(variant.merge for variant in variants.values() if variant.change)]
            finished, on_layer = self._journal.section(""), self._progress.start_pass("embedding")
            self.shared = store_norms(self._storage) | store_embeddings(self._storage, merges, finished, on_layer)
        if self.bare is None and self._needs_bare(variants):
            finished = self._journal.section("")
            on_layer = self._progress.start_pass("base", self._cost(self._plan.base_calibration))
            self.bare = store_products(self._storage, self._bare_merge, self.shared, finished, on_layer=on_layer)
        for name, variant in variants.items():
            if name not in self._merged and _is_merged(variant):
                self._merged[name] = store_products(
                    self._storage,
                    variant.merge,
                    self.shared | self._store_changed_vocab(variant),
                    self._journal.section(f"{name}, {variant.merge_base} base"),  # the gate may change the base
                    bare=self.bare,
                    on_layer=self._progress.start_pass(name, self._cost(variant.calibration)),
                )

    def drop(self, name: str) -> None:
        """Drops a merged variant's weights, so that store() stores them again."""
        del self._merged[name]

    def raise_to_int8(self, variant: Variant, products: Collection[str]) -> None:
        """Stores some products of a merged variant again, in 8 bits. Other variants keep theirs."""
        linears = [linear for linear in self._plan.decoder.linears if linear.name in products]
        stored = raise_to_int8(self._storage, variant.change, linears)
        for name in vocab_modules(self._plan.decoder).keys() & set(products):
            grid = self._plan.quantization.grid(name)
            assert grid is not None
            stored.update(store_vocab_matrix(self._storage, name, variant.change, replace(grid, bits=8)))
        self._merged[variant.name].update(stored)

    def _needs_bare(self, variants: Mapping[str, Variant]) -> bool:
        """True if some variant runs products of the bare base. All do, except merged ones that change every product."""
        return not all(
            variant.live is None and changes_linear(variant.delta, linear)
            for variant in variants.values()
            for linear in self._plan.decoder.linears
        )

    def _store_changed_vocab(self, variant: Variant) -> StoredWeights:
        """Stores the vocabulary matrices of a variant that changes one of them, rounded to nearest."""
        weights = StoredWeights()
        if changes_vocab(variant.change, self._plan.decoder):
            for name in vocab_modules(self._plan.decoder):
                weights.update(store_vocab_matrix(self._storage, name, variant.change, self._plan.quantization.grid(name)))
        return weights

    def _cost(self, calibration: Calibration) -> int:
        return GPTQ_COST if compensates(self._plan.quantization, calibration) else 1


def _is_merged(variant: Variant) -> bool:
    """True if a variant has its own weights."""
    return variant.live is None and variant.delta is not None
