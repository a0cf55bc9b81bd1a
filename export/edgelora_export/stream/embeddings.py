"""The embedding and the head: stored once for all variants, with codes that serve the final states of every variant."""

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

    from edgelora_export.plan.calibration import Calibration
    from edgelora_export.plan.variants import Delta
    from edgelora_export.quantize.int4 import BlockQuantized, Grid
    from edgelora_export.weights.journal import JournalSection
    from edgelora_export.weights.stored import Storage

    Floats = NDArray[np.float32]

# A tied matrix serves twice: as the head, whose outputs GPTQ keeps, and row by row as the embedding, for which plain rounding is
# best. Damping moves GPTQ towards rounding; docs/log.md has the figures.
TIED_DAMPING = 1.0
# Numbers in the final states that the head is quantized on. For a small model this covers the calibration sets of all variants;
# for a large one it is about four states per column, however many variants there are.
_STATES = 1 << 25


def store_embeddings(
    storage: Storage,
    uses: Sequence[tuple[Delta | None, Calibration]],
    finished: JournalSection,
    on_layer: Callable[[int], None] = lambda index: None,
) -> StoredWeights:
    """Stores the embedding, and the head where it is a matrix of its own, for all variants whose deltas leave them alone.

    Ensures: the result has a weight for each of them, and `finished` knows it.

    uses: the delta and the calibration set of each variant. The head is quantized on the final states of all of them together,
    by GPTQ if the method is a calibrated one. finished: what an earlier run stored.
    """
    weights, decoder = StoredWeights(), storage.decoder
    for name in vocab_modules(decoder):
        stored = finished.find(name)
        if stored is None:
            grid = storage.quantization.grid(name)
            seen = [use for use in uses if compensates(storage.quantization, use[1])]
            if grid is not None and seen and name == decoder.head_product:
                stored = finished.note(name, store_matrix(storage.folder, name, _compensate(storage, grid, seen, on_layer)))
            else:
                stored = finished.note(name, store_vocab_matrix(storage, name, None, grid))
        weights.update(stored)
    return weights


def _compensate(
    storage: Storage, grid: Grid, uses: Sequence[tuple[Delta | None, Calibration]], on_layer: Callable[[int], None]
) -> BlockQuantized:
    """The head, quantized on the final states of each variant's float model over its share of its calibration tokens."""
    base, decoder = storage.base, storage.decoder
    moments, unseen = Moments(decoder.hidden_size), []
    stream = LayerStream(decoder)
    parts = max(1.0, sum(calibration.fit_tokens for _, calibration in uses) * decoder.hidden_size / _STATES)
    for delta, calibration in uses:
        fit, others = (take_share(samples, parts) for samples in (calibration.fit, calibration.unseen))
        states = stream.final_states(base, (*fit, *others), delta, on_layer)
        for item in states[: len(fit)]:
            moments.add(stream.normed(base, item))
        unseen += [stream.normed(base, item) for item in states[len(fit) :]]
    compensator = Compensator(moments.total(), TIED_DAMPING if decoder.tied else DAMPING)
    inputs = np.concatenate(unseen) if unseen else np.zeros((0, decoder.hidden_size), np.float32)
    matrices = []
    for rows in iterate_vocab_rows(base, decoder, decoder.head_product, None):
        candidates = compensator.quantize(rows, **asdict(grid)), quantize_rtn(rows, **asdict(grid))
        errors = [output_error(candidate.dequantize() - rows, inputs) for candidate in candidates]
        matrices.append(candidates[int(np.argmin(errors))])
    return stack_rows(matrices)
