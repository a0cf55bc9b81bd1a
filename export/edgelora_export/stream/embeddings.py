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
from edgelora_export.weights.store import Weights, end_modules, read_end_rows, store_end, store_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgelora_export.decoder.description import Decoder
    from edgelora_export.plan.calibration import Calibration
    from edgelora_export.plan.variants import Delta, Quantization
    from edgelora_export.quantize.int4 import BlockQuantized, Grid
    from edgelora_export.weights.base import Base
    from edgelora_export.weights.journal import Lane

    Floats = NDArray[np.float32]

# A tied matrix is read both ways: as the head, whose outputs GPTQ keeps, and row by row as the embedding, which plain rounding
# serves best. Damping goes from the one to the other; figures are in docs/log.md.
TIED_DAMPING = 1.0
# Numbers in the final states that the head is quantized on: every variant's whole calibration set in a small model, and in a
# large one about four states for each column, however many variants there are.
_STATES = 1 << 25


def store_embeddings(
    base: Base,
    decoder: Decoder,
    folder: Path,
    quantization: Quantization,
    lanes: Sequence[tuple[Delta | None, Calibration]],
    finished: Lane,
    on_layer: Callable[[int], None] = lambda index: None,
) -> Weights:
    """The embedding, and the head where it is not the embedding's own.

    lanes: the deltas of all variants with what each is calibrated on; the head is quantized for the final states of all of
    them together, by GPTQ if the method is a calibrated one.
    finished: what an earlier run has stored of it.
    """
    weights = Weights()
    for name in end_modules(decoder):
        stored = finished.find(name)
        if stored is None:
            grid, seen = quantization.grid(name), [lane for lane in lanes if compensates(quantization, lane[1])]
            if grid is not None and seen and name == decoder.head_product:
                matrix = _compensate(base, decoder, grid, seen, on_layer)
                stored = finished.note(name, store_matrix(folder, name, matrix))
            else:
                stored = finished.note(name, store_end(base, decoder, name, None, folder, grid))
        weights.take(stored)
    return weights


def _compensate(
    base: Base,
    decoder: Decoder,
    grid: Grid,
    lanes: Sequence[tuple[Delta | None, Calibration]],
    on_layer: Callable[[int], None],
) -> BlockQuantized:
    """The head, quantized on the final states that each lane's float model has on its share of its calibration tokens."""
    moments, unseen = Moments(decoder.hidden_size), []
    stream = LayerStream(decoder)
    parts = max(1.0, sum(calibration.fit_tokens for _, calibration in lanes) * decoder.hidden_size / _STATES)
    for delta, calibration in lanes:
        fit, others = (take_share(samples, parts) for samples in (calibration.fit, calibration.unseen))
        states = stream.final_states(base, (*fit, *others), delta, on_layer)
        for item in states[: len(fit)]:
            moments.add(stream.normed(base, item))
        unseen += [stream.normed(base, item) for item in states[len(fit) :]]
    compensator = Compensator(moments.total(), TIED_DAMPING if decoder.tied else DAMPING)
    inputs = np.concatenate(unseen) if unseen else np.zeros((0, decoder.hidden_size), np.float32)
    matrices = []
    for rows in read_end_rows(base, decoder, decoder.head_product, None):
        candidates = compensator.quantize(rows, **asdict(grid)), quantize_rtn(rows, **asdict(grid))
        errors = [output_error(candidate.dequantize() - rows, inputs) for candidate in candidates]
        matrices.append(candidates[int(np.argmin(errors))])
    return stack_rows(matrices)
