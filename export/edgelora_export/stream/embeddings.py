"""Stores the embedding and the head once for all variants, with codes that suit them all, and again for one that changes them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from edgelora_export.plan.adapted_decoder import adapt_decoder
from edgelora_export.plan.calibration import Moments, take_share
from edgelora_export.quantize.gptq import DAMPING, Compensator, output_error, shorten_inputs
from edgelora_export.quantize.int4 import quantize_rtn, stack_rows
from edgelora_export.stream.layer_stream import LayerStream
from edgelora_export.stream.products import compensates
from edgelora_export.weights.merged import iterate_vocab_rows
from edgelora_export.weights.stored import StoredWeights, store_matrix, store_vocab_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from edgelora_export.plan.variants import Delta, Merge
    from edgelora_export.quantize.int4 import BlockQuantized, Grid
    from edgelora_export.weights.journal import JournalSection
    from edgelora_export.weights.stored import Storage

    Floats = NDArray[np.float32]

# A tied matrix has two uses: the head, whose outputs GPTQ preserves, and the embedding, whose rows are best rounded to nearest.
# Damping moves GPTQ towards rounding. docs/log.md has the figures.
TIED_DAMPING = 1.0
# What the head is quantized on, however many variants there are: so many final states, and so many numbers in them, which for a
# wide model is about four states per column.
_HEAD_STATES = 1 << 14
_HEAD_INPUTS = 1 << 25


def store_embeddings(
    storage: Storage,
    merges: Sequence[Merge],
    finished: JournalSection,
    on_layer: Callable[[int], None] = lambda index: None,
) -> StoredWeights:
    """Stores the embedding, and the head if it is not tied, for all variants whose deltas leave them unchanged.

    Ensures: the result has a weight for each of them, and `finished` lists it.

    merges: one per variant that uses this head. The head is quantized on the final states of all of them together, by GPTQ if the
    method is calibrated. finished: products that an earlier run stored.
    """
    weights = StoredWeights()
    for product in storage.decoder.vocab_modules:
        grid = storage.quantization.grid(product)
        weights.update(_store_matrix(storage, product, grid, merges, None, finished, on_layer))
    return weights


def store_own_matrices(
    storage: Storage,
    products: Sequence[str],
    merge: Merge,
    finished: JournalSection,
    on_layer: Callable[[int], None] = lambda index: None,
) -> StoredWeights:
    """Stores the vocabulary matrices that one variant has for itself.

    Requires: storage.decoder is adapted to the merge's delta.
    Ensures: the result has a weight for each of `products`, and `finished` lists it.

    products: `embedding`, `head` or both. The head is quantized on the final states of this variant alone.
    """
    weights = StoredWeights()
    for product in products:
        grid = find_vocab_grid(storage, product)
        weights.update(_store_matrix(storage, product, grid, [merge], merge.delta, finished, on_layer))
    return weights


def find_vocab_grid(storage: Storage, product: str) -> Grid | None:
    """Finds the grid of a vocabulary matrix, or None for float32.

    An untied head comes out of the embedding, and has 8 bits where either of them should.
    """
    names = ("embedding", "head") if storage.decoder.untied and product == "head" else (product,)
    grids = [grid for name in names if (grid := storage.quantization.grid(name)) is not None]
    return max(grids, key=lambda grid: grid.bits, default=None)


def _store_matrix(
    storage: Storage,
    product: str,
    grid: Grid | None,
    merges: Sequence[Merge],
    delta: Delta | None,
    finished: JournalSection,
    on_layer: Callable[[int], None],
) -> StoredWeights:
    """Stores a vocabulary matrix with a delta added, unless it is finished. The head is quantized on the merges' final states."""
    stored = finished.find(product)
    if stored is not None:
        return stored
    calibrated = [merge for merge in merges if compensates(storage.quantization, merge.calibration)]
    if grid is not None and calibrated and product == storage.decoder.head_product:
        matrix = _compensate(storage, grid, calibrated, delta, on_layer)
        return finished.note(product, store_matrix(storage.folder, product, matrix))
    return finished.note(product, store_vocab_matrix(storage, product, delta, grid))


def _compensate(
    storage: Storage, grid: Grid, merges: Sequence[Merge], delta: Delta | None, on_layer: Callable[[int], None]
) -> BlockQuantized:
    """Quantizes the head with a delta added, on the final states of each merge in float32.

    Each merge has an equal share of its calibration tokens.
    """
    base, decoder = storage.base, storage.decoder
    moments, unseen = Moments(decoder.hidden_size), []
    most = min(_HEAD_STATES, _HEAD_INPUTS / decoder.hidden_size)
    parts = max(1.0, sum(merge.calibration.fit_tokens for merge in merges) / most)
    for merge in merges:
        stream = LayerStream(adapt_decoder(decoder, merge.delta))
        fit, others = (take_share(samples, parts) for samples in (merge.calibration.fit, merge.calibration.unseen))
        states = stream.final_states(base, (*fit, *others), merge.delta, on_layer)
        for item in states[: len(fit)]:
            moments.add(stream.apply_final_norm(base, item))
        unseen += [stream.apply_final_norm(base, item) for item in states[len(fit) :]]
    compensator = Compensator(moments.total(), TIED_DAMPING if decoder.tied else DAMPING)
    inputs = np.concatenate(unseen) if unseen else np.zeros((0, decoder.hidden_size), np.float32)
    inputs = shorten_inputs(inputs, decoder.vocab_size)

    def quantize(rows: Floats) -> BlockQuantized:
        candidates = compensator.quantize(rows, **asdict(grid)), quantize_rtn(rows, **asdict(grid))
        errors = [output_error(candidate.dequantize() - rows, inputs) for candidate in candidates]
        return candidates[int(np.argmin(errors))]

    quantized = map(quantize, iterate_vocab_rows(base, decoder, decoder.head_product, delta))
    return stack_rows(quantized, decoder.vocab_size)
