"""Stores the embedding and the head once for all variants, with codes that suit the final states of every variant."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from edgelora_export.plan.calibration import Moments, take_share
from edgelora_export.quantize.gptq import DAMPING, Compensator, output_error
from edgelora_export.quantize.int4 import quantize_rtn, stack_rows
from edgelora_export.stream.layer_stream import LayerStream
from edgelora_export.stream.products import compensates
from edgelora_export.weights.merged import iterate_vocab_rows, vocab_modules
from edgelora_export.weights.stored import StoredWeights, store_matrix, store_vocab_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from edgelora_export.plan.variants import Merge
    from edgelora_export.quantize.int4 import BlockQuantized, Grid
    from edgelora_export.weights.journal import JournalSection
    from edgelora_export.weights.stored import Storage

    Floats = NDArray[np.float32]

# A tied matrix has two uses: the head, whose outputs GPTQ preserves, and the embedding, whose rows are best rounded to nearest.
# Damping moves GPTQ towards rounding. docs/log.md has the figures.
TIED_DAMPING = 1.0
# Numbers in the final states that the head is quantized on. For a small model this covers the calibration sets of all variants.
# For a large one it is about four states per column, however many variants there are.
_HEAD_INPUTS = 1 << 25


def store_embeddings(
    storage: Storage,
    merges: Sequence[Merge],
    finished: JournalSection,
    on_layer: Callable[[int], None] = lambda index: None,
) -> StoredWeights:
    """Stores the embedding, and the head if it is not tied, for all variants whose deltas leave them unchanged.

    Ensures: the result has a weight for each of them, and `finished` lists it.

    merges: one per variant. The head is quantized on the final states of all of them together, by GPTQ if the method is
    calibrated. finished: products that an earlier run stored.
    """
    weights, decoder = StoredWeights(), storage.decoder
    for name in vocab_modules(decoder):
        stored = finished.find(name)
        if stored is None:
            grid = storage.quantization.grid(name)
            calibrated = [merge for merge in merges if compensates(storage.quantization, merge.calibration)]
            if grid is not None and calibrated and name == decoder.head_product:
                stored = finished.note(name, store_matrix(storage.folder, name, _compensate(storage, grid, calibrated, on_layer)))
            else:
                stored = finished.note(name, store_vocab_matrix(storage, name, None, grid))
        weights.update(stored)
    return weights


def _compensate(storage: Storage, grid: Grid, merges: Sequence[Merge], on_layer: Callable[[int], None]) -> BlockQuantized:
    """Quantizes the head on the final states of each merge in float32, over an equal share of its calibration tokens."""
    base, decoder = storage.base, storage.decoder
    moments, unseen = Moments(decoder.hidden_size), []
    stream = LayerStream(decoder)
    parts = max(1.0, sum(merge.calibration.fit_tokens for merge in merges) * decoder.hidden_size / _HEAD_INPUTS)
    for merge in merges:
        fit, others = (take_share(samples, parts) for samples in (merge.calibration.fit, merge.calibration.unseen))
        states = stream.final_states(base, (*fit, *others), merge.delta, on_layer)
        for item in states[: len(fit)]:
            moments.add(stream.apply_final_norm(base, item))
        unseen += [stream.apply_final_norm(base, item) for item in states[len(fit) :]]
    compensator = Compensator(moments.total(), TIED_DAMPING if decoder.tied else DAMPING)
    inputs = np.concatenate(unseen) if unseen else np.zeros((0, decoder.hidden_size), np.float32)
    matrices = []
    for rows in iterate_vocab_rows(base, decoder, decoder.head_product, None):
        candidates = compensator.quantize(rows, **asdict(grid)), quantize_rtn(rows, **asdict(grid))
        errors = [output_error(candidate.dequantize() - rows, inputs) for candidate in candidates]
        matrices.append(candidates[int(np.argmin(errors))])
    return stack_rows(matrices)
