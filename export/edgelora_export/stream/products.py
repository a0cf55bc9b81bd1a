"""Quantizes the products of one variant: by rounding to nearest, by GPTQ layer after layer, or by auto-round all at once."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np

from edgelora_export.plan.calibration import Moments, take_share
from edgelora_export.quantize.gptq import output_error, quantize_gptq, shorten_inputs
from edgelora_export.quantize.int4 import BlockQuantized, quantize_rtn
from edgelora_export.stream.auto_round import tune_products
from edgelora_export.stream.layer_stream import LayerStream, embed, read_layer
from edgelora_export.weights.merged import changes_linear, read_linear
from edgelora_export.weights.stored import StoredWeights, load_matrix, store_matrix, store_rounded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from edgelora_export.decoder.description import Linear
    from edgelora_export.plan.calibration import Calibration, Sample
    from edgelora_export.plan.variants import Delta, Merge, Quantization
    from edgelora_export.quantize.int4 import Grid
    from edgelora_export.weights.journal import JournalSection
    from edgelora_export.weights.stored import Storage

    Floats = NDArray[np.float32]

_UNSEEN_STATES = 2048  # that decide between GPTQ and rounding. The outputs of a whole product differ, so that few suffice


def store_products(
    storage: Storage,
    merge: Merge,
    shared: StoredWeights,
    finished: JournalSection,
    *,
    bare: StoredWeights | None = None,
    on_layer: Callable[[int], None] = lambda index: None,
) -> StoredWeights:
    """Stores every product of a merge. Returns them together with the `shared` weights.

    Requires: `shared` holds norms, rotary tables and the embedding, all in storage.folder.
    Ensures: the result has a weight for each product of the decoder, and `finished` lists each one that was stored.

    finished: products that an earlier run stored, which are not stored again. bare: the bare base's weights, which are reused for
    products that the delta does not change. on_layer: called with each layer's index before its products are stored.
    GPTQ and auto-round see the merge's calibration. Without samples, and for method rtn, weights are rounded to nearest.
    """
    quantization, decoder, delta = storage.quantization, storage.decoder, merge.delta
    calibrated = compensates(quantization, merge.calibration)
    weights = StoredWeights() | shared
    stream = _QuantizedStream(storage, merge.calibration, weights) if calibrated and quantization.method == "gptq" else None
    tuned: Mapping[str, BlockQuantized] = {}
    if calibrated and stream is None:
        changed = [linear for linear in decoder.linears if bare is None or changes_linear(delta, linear)]
        if any(finished.find(linear.name) is None for linear in changed):
            tuned = tune_products(storage, delta, changed, merge.calibration.fit, on_layer)
    for index, layer in enumerate(decoder.layers):
        if not tuned:  # auto-round has reported its own progress
            on_layer(index)
        own = [linear for linear in layer.linears if bare is None or changes_linear(delta, linear)]
        for linear in layer.linears:
            if bare is not None and linear not in own:
                weights.update(bare.select(linear.name))
        if stream is not None:
            stream.quantize_layer(index, delta, own, finished)
            continue
        for linear in own:
            stored = finished.find(linear.name)
            if stored is None and linear.name in tuned:
                stored = finished.note(linear.name, store_matrix(storage.folder, linear.name, tuned[linear.name]))
            if stored is None:
                weight, grid = read_linear(storage.base, linear, delta), quantization.grid(linear.name)
                stored = finished.note(linear.name, store_rounded(storage.folder, linear.name, weight, grid))
            weights.update(stored)
    return weights


def raise_to_int8(storage: Storage, delta: Delta | None, linears: Sequence[Linear]) -> StoredWeights:
    """Stores products again with the delta added, rounded to nearest in 8 bits."""
    stored = StoredWeights()
    for linear in linears:
        grid = storage.quantization.grid(linear.name)
        assert grid is not None  # the gate raises quantized products only
        weight = read_linear(storage.base, linear, delta)
        stored.update(store_rounded(storage.folder, linear.name, weight, replace(grid, bits=8)))
    return stored


def compensates(quantization: Quantization, calibration: Calibration) -> bool:
    """True if codes compensate for each other's errors: the method is calibrated and has samples."""
    return bool(calibration.fit) and quantization.calibrated


class _QuantizedStream:
    """Calibration sequences on their way through the layers. Each layer is quantized before they pass through it."""

    def __init__(self, storage: Storage, calibration: Calibration, weights: StoredWeights) -> None:
        self._storage, self._weights = storage, weights
        self._stream = LayerStream(storage.decoder)
        self._fit = self._embed(calibration.fit)
        read = sum(len(sample.tokens) for sample in calibration.unseen)
        self._unseen = self._embed(take_share(calibration.unseen, max(1.0, read / _UNSEEN_STATES)))

    def quantize_layer(self, index: int, delta: Delta | None, own: Sequence[Linear], finished: JournalSection) -> None:
        """Stores the products `own` of a layer, and runs the sequences through the layer as stored."""
        base, decoder, folder = self._storage.base, self._storage.decoder, self._storage.folder
        running = read_layer(base, decoder, index, delta)
        missing = [linear for linear in own if finished.find(linear.name) is None]
        moments = {linear.name: Moments(linear.columns) for linear in missing}
        unseen: dict[str, list[Floats]] = {linear.name: [] for linear in missing}
        if missing:
            self._stream.observe(index, running, self._fit, {name: sums.add for name, sums in moments.items()})
            self._stream.observe(index, running, self._unseen, {name: inputs.append for name, inputs in unseen.items()})
        for linear in missing:
            grid = self._storage.quantization.grid(linear.name)
            assert grid is not None  # gptq quantizes every product
            seen, others = moments.pop(linear.name).total(), unseen.pop(linear.name)
            matrix = _quantize(running[linear.name], grid, seen, np.concatenate(others) if others else None)
            finished.note(linear.name, store_matrix(folder, linear.name, matrix))
        for linear in own:
            done = finished.find(linear.name)
            assert done is not None
            self._weights.update(done)
        if index + 1 == len(decoder.layers):
            return
        for linear in decoder.layers[index].linears:
            stored = load_matrix(folder, linear.name, self._weights, linear.columns)
            running[linear.name] = stored.dequantize() if isinstance(stored, BlockQuantized) else stored
        self._fit = self._stream.run(index, running, self._fit)
        self._unseen = self._stream.run(index, running, self._unseen)

    def _embed(self, samples: Sequence[Sample]) -> list[Floats]:
        """Embeds each sample with the stored embedding: the hidden states (T, H) that enter the first layer."""
        decoder = self._storage.decoder
        stored = load_matrix(self._storage.folder, "embedding", self._weights, decoder.hidden_size)
        if not isinstance(stored, BlockQuantized):
            return embed(self._storage.base, decoder, samples)
        scale = np.float32(decoder.embedding_multiplier)
        return [stored.rows(np.array(sample.tokens)).dequantize() * scale for sample in samples]


def _quantize(weight: Floats, grid: Grid, moments: Floats, unseen: Floats | None) -> BlockQuantized:
    """Quantizes by GPTQ, or by rounding to nearest if that has the smaller error on inputs (T, K) that GPTQ has not seen."""
    compensated = quantize_gptq(weight, moments, **asdict(grid))
    if unseen is None:
        return compensated
    rounded = quantize_rtn(weight, **asdict(grid))
    inputs = shorten_inputs(unseen, len(weight))
    return min((compensated, rounded), key=lambda matrix: output_error(matrix.dequantize() - weight, inputs))
