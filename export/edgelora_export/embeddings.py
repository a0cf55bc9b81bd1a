"""The embedding and the head: stored once for all variants, with codes that serve the final states of every variant."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from edgelora_export.calibration import Moments
from edgelora_export.gptq import DAMPING, Compensator, output_error
from edgelora_export.int4 import quantize_rtn, stack_rows
from edgelora_export.layer_stream import LayerStream, embed, read_layer
from edgelora_export.store import Weights, read_end_rows, store_end, store_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgelora_export.base import Base
    from edgelora_export.calibration import Calibration
    from edgelora_export.decoder import Decoder
    from edgelora_export.variants import Delta, Quantization

    Floats = NDArray[np.float32]

# A tied matrix is read both ways: as the head, whose outputs GPTQ keeps, and row by row as the embedding, which plain rounding
# serves best. Damping goes from the one to the other; figures are in docs/log.md.
TIED_DAMPING = 1.0


def store_embeddings(
    base: Base,
    decoder: Decoder,
    folder: Path,
    quantization: Quantization,
    lanes: Sequence[tuple[Delta | None, Calibration]],
    on_layer: Callable[[int], None] = lambda index: None,
) -> Weights:
    """The embedding, and the head where it is not the embedding's own.

    lanes: the deltas of all variants with what each is calibrated on; the head is quantized for the final states of all of
    them together, by GPTQ if the method is a calibrated one.
    """
    name = "embedding" if decoder.tied else "head"
    grid = quantization.grid(name)
    weights = Weights()
    if not decoder.tied:
        weights.take(store_end(base, decoder, "embedding", None, folder, quantization.grid("embedding")))
    lanes = [lane for lane in lanes if lane[1].fit]
    if grid is None or not quantization.calibrated or not lanes:
        return weights | store_end(base, decoder, name, None, folder, grid)
    moments, held_out = Moments(decoder.hidden_size), []
    stream = LayerStream(decoder)
    for delta, calibration in lanes:
        fit, unseen = (embed(base, decoder, samples, delta) for samples in (calibration.fit, calibration.held_out))
        for index in range(len(decoder.layers)):
            on_layer(index)
            layer = read_layer(base, decoder, index, delta)
            fit, unseen = stream.run(index, layer, fit), stream.run(index, layer, unseen)
        for states in fit:
            moments.add(stream.normed(base, states))
        held_out += [stream.normed(base, states) for states in unseen]
    compensator = Compensator(moments.total(), TIED_DAMPING if decoder.tied else DAMPING)
    inputs = np.concatenate(held_out) if held_out else np.zeros((0, decoder.hidden_size), np.float32)
    parts = []
    for rows in read_end_rows(base, decoder, name, None):
        candidates = compensator.quantize(rows, **asdict(grid)), quantize_rtn(rows, **asdict(grid))
        errors = [output_error(candidate.dequantize() - rows, inputs) for candidate in candidates]
        parts.append(candidates[int(np.argmin(errors))])
    return weights | store_matrix(folder, name, stack_rows(parts))
