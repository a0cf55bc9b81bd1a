"""The embedding and the head: stored once for all variants, with codes that serve the final states of every variant."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from edgelora_export.calibration import Moments
from edgelora_export.gptq import DAMPING, output_error, quantize_gptq
from edgelora_export.int4 import quantize_rtn
from edgelora_export.layer_stream import LayerStream, embed, read_layer
from edgelora_export.store import Weights, store_matrix, store_rounded

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
    them together, by GPTQ if the method says so.
    """
    grid = quantization.grid("embedding")
    weights = Weights()
    if not decoder.tied:
        weights.take(store_rounded(folder, "embedding", base.tensor(decoder.embedding), grid))
        grid = quantization.grid("head")
    name, matrix = "embedding" if decoder.tied else "head", base.tensor(decoder.head)
    lanes = [lane for lane in lanes if lane[1].fit]
    if grid is None or quantization.method != "gptq" or not lanes:
        return weights | store_rounded(folder, name, matrix, grid)
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
    best = quantize_gptq(matrix, moments.total(), **asdict(grid), damping=TIED_DAMPING if decoder.tied else DAMPING)
    if held_out:
        inputs = np.concatenate(held_out)
        rounded = quantize_rtn(matrix, **asdict(grid))
        best = min((best, rounded), key=lambda candidate: output_error(candidate.dequantize() - matrix, inputs))
    return weights | store_matrix(folder, name, best)
