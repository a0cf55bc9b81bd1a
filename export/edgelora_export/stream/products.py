"""Quantizes the products of one variant: rounded to nearest, by GPTQ layer after layer, or by auto-round all at once."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from edgelora_export.plan.calibration import Moments
from edgelora_export.quantize.gptq import output_error, quantize_gptq
from edgelora_export.quantize.int4 import BlockQuantized, quantize_rtn
from edgelora_export.stream.auto_round import tune_products
from edgelora_export.stream.layer_stream import LayerStream, embed, read_layer
from edgelora_export.weights.store import Weights, load_matrix, read_linear, store_matrix, store_rounded, touches

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgelora_export.decoder.description import Decoder, Linear
    from edgelora_export.plan.calibration import Calibration, Sample
    from edgelora_export.plan.variants import Delta, Quantization
    from edgelora_export.quantize.int4 import Grid
    from edgelora_export.weights.base import Base
    from edgelora_export.weights.journal import Lane

    Floats = NDArray[np.float32]


def store_products(
    base: Base,
    decoder: Decoder,
    delta: Delta | None,
    shared: Weights,
    folder: Path,
    quantization: Quantization,
    finished: Lane,
    *,
    bare: Weights | None = None,
    calibration: Calibration | None = None,
    on_layer: Callable[[int], None] = lambda index: None,
) -> Weights:
    """The weights of a variant: `shared` and every product of the base with the delta added.

    finished: the products that an earlier run has stored, to which this one adds. bare: the bare base's weights, whose
    products are taken over where the delta touches nothing. calibration: what GPTQ or auto-round is given to see; without
    it, and for method rtn, weights are rounded to nearest.
    """
    weights = Weights() | shared
    stream = None
    tuned: Mapping[str, BlockQuantized] = {}
    if calibration is not None and compensates(quantization, calibration) and quantization.method == "gptq":
        stream = _QuantizedStream(base, decoder, calibration, weights, folder)
    elif calibration is not None and compensates(quantization, calibration):
        changed = [linear for linear in decoder.linears if bare is None or touches(delta, linear)]
        if any(finished.find(linear.name) is None for linear in changed):
            tuned = tune_products(base, decoder, delta, changed, quantization, calibration.fit, on_layer)
    for index, layer in enumerate(decoder.layers):
        if not tuned:  # else each layer has been a step of progress already
            on_layer(index)
        own = [linear for linear in layer.linears if bare is None or touches(delta, linear)]
        for linear in layer.linears:
            if bare is not None and linear not in own:
                weights.take(bare.only(linear.name))
        if stream is not None:
            stream.quantize_layer(index, delta, own, quantization, finished)
            continue
        for linear in own:
            stored = finished.find(linear.name)
            if stored is None and linear.name in tuned:
                stored = finished.note(linear.name, store_matrix(folder, linear.name, tuned[linear.name]))
            if stored is None:
                weight = read_linear(base, linear, delta)
                stored = finished.note(linear.name, store_rounded(folder, linear.name, weight, quantization.grid(linear.name)))
            weights.take(stored)
    return weights


def compensates(quantization: Quantization, calibration: Calibration) -> bool:
    """Whether codes are to make up for errors, by a method that has something to see them on."""
    return bool(calibration.fit) and quantization.calibrated


class _QuantizedStream:
    """Calibration sequences on their way through the layers, each of which is quantized before they pass it."""

    def __init__(self, base: Base, decoder: Decoder, calibration: Calibration, weights: Weights, folder: Path) -> None:
        self._base, self._decoder, self._weights, self._folder = base, decoder, weights, folder
        self._stream = LayerStream(decoder)
        self._fit = self._embed(calibration.fit)
        self._unseen = self._embed(calibration.unseen)

    def quantize_layer(
        self, index: int, delta: Delta | None, own: Sequence[Linear], quantization: Quantization, finished: Lane
    ) -> None:
        """Stores the products `own` of a layer, and takes the sequences through the layer as it is stored."""
        layer = self._decoder.layers[index]
        running = read_layer(self._base, self._decoder, index, delta)
        missing = [linear for linear in own if finished.find(linear.name) is None]
        moments = {linear.name: Moments(linear.columns) for linear in missing}
        unseen: dict[str, list[Floats]] = {linear.name: [] for linear in missing}
        if missing:
            self._stream.observe(index, running, self._fit, {name: sums.add for name, sums in moments.items()})
            self._stream.observe(index, running, self._unseen, {name: others.append for name, others in unseen.items()})
        for linear in missing:
            grid = quantization.grid(linear.name)
            assert grid is not None  # gptq goes with quantized products alone
            seen, others = moments.pop(linear.name).total(), unseen.pop(linear.name)
            matrix = _quantize(running[linear.name], grid, seen, np.concatenate(others) if others else None)
            finished.note(linear.name, store_matrix(self._folder, linear.name, matrix))
        for linear in own:
            done = finished.find(linear.name)
            assert done is not None
            self._weights.take(done)
        if index + 1 == len(self._decoder.layers):
            return
        for linear in layer.linears:
            stored = load_matrix(self._folder, linear.name, self._weights, linear.columns)
            running[linear.name] = stored.dequantize() if isinstance(stored, BlockQuantized) else stored
        self._fit = self._stream.run(index, running, self._fit)
        self._unseen = self._stream.run(index, running, self._unseen)

    def _embed(self, samples: Sequence[Sample]) -> list[Floats]:
        """The hidden states (T, H) that enter the first layer, from the embedding as it is stored."""
        stored = load_matrix(self._folder, "embedding", self._weights, self._decoder.hidden_size)
        if not isinstance(stored, BlockQuantized):
            return embed(self._base, self._decoder, samples)
        scale = np.float32(self._decoder.embedding_multiplier)
        return [stored.rows(np.array(sample.tokens)).dequantize() * scale for sample in samples]


def _quantize(weight: Floats, grid: Grid, moments: Floats, unseen: Floats | None) -> BlockQuantized:
    """GPTQ, or rounding to nearest where that serves inputs (T, K) better that GPTQ has not seen."""
    compensated = quantize_gptq(weight, moments, **asdict(grid))
    if unseen is None:
        return compensated
    rounded = quantize_rtn(weight, **asdict(grid))
    return min((compensated, rounded), key=lambda matrix: output_error(matrix.dequantize() - weight, unseen))
