"""Runs a decoder layer by layer in float32 while it holds the weights of one layer at a time."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from edgelora_export.graph.nodes import pack_graph
from edgelora_export.stream.layer_graph import HIDDEN, HIDDEN_OUT, LOGITS, build_head_graph, build_layer_graph
from edgelora_export.weights.merged import embed_tokens, iterate_vocab_rows, read_bias, read_linear, read_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from edgelora_export.base.base import Base
    from edgelora_export.decoder.description import Decoder
    from edgelora_export.plan.calibration import Sample
    from edgelora_export.plan.variants import Delta
    from edgelora_export.stream.layer_graph import WeightlessGraph

    Floats = NDArray[np.float32]
    OnInput = Callable[[Floats], object]

_HEAD_ROWS = 16384  # of the vocabulary at once, at most


def embed(base: Base, decoder: Decoder, samples: Sequence[Sample], delta: Delta | None = None) -> list[Floats]:
    """Embeds each sample: the hidden states (T, H) that enter the first layer of the float base with a delta added."""
    tokens = np.unique(np.concatenate([np.array(sample.tokens) for sample in samples]))
    rows = embed_tokens(base, decoder, tokens, delta) * np.float32(decoder.embedding_multiplier)
    return [rows[np.searchsorted(tokens, sample.tokens)] for sample in samples]


def read_layer(base: Base, decoder: Decoder, index: int, delta: Delta | None) -> dict[str, Floats]:
    """Reads one layer's weights in float32, by their names in the whole graph.

    The delta is added to the products and biases that it changes.
    """
    layer = decoder.layers[index]
    weights = {**decoder.rotary_tables, **{norm.name: read_norm(base, norm) for norm in layer.norms}}
    for linear in layer.linears:
        weights[linear.name] = read_linear(base, linear, delta)
        if linear.bias:
            weights[f"{linear.name}.bias"] = read_bias(base, linear, delta)
    return weights


class LayerStream:
    """The sessions that run layers, one for each kind of layer.

    decoder: adapted to the deltas that its methods are given.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._sessions: dict[bytes, ort.InferenceSession] = {}

    def run(
        self,
        index: int,
        weights: Mapping[str, Floats],
        hidden: Sequence[Floats],
        on_input: Mapping[str, OnInput] = MappingProxyType({}),
    ) -> list[Floats]:
        """Runs one layer on hidden states (T, H), one array per sequence.

        weights: as read_layer returns them. on_input: by product, a function to call with the product's inputs (T, K) for each
        sequence.
        """
        return self._run(build_layer_graph(self._decoder, index, on_input), weights, hidden, on_input)

    def observe(
        self, index: int, weights: Mapping[str, Floats], hidden: Sequence[Floats], on_input: Mapping[str, OnInput]
    ) -> None:
        """Calls `on_input` as run() does, and computes nothing behind the observed products."""
        self._run(build_layer_graph(self._decoder, index, on_input, whole=False), weights, hidden, on_input)

    def _run(
        self, graph: WeightlessGraph, weights: Mapping[str, Floats], hidden: Sequence[Floats], on_input: Mapping[str, OnInput]
    ) -> list[Floats]:
        """Runs a graph on each sequence. Returns the hidden states after it, or [] if the graph does not compute them."""
        session = self._session(graph.model)
        fixed = {short: weights[name] for name, short in graph.weights.items()}
        outputs = [str(value.name) for value in graph.model.graph.outputs]
        after: list[Floats] = []
        for states in hidden:
            found = dict(zip(outputs, session.run(outputs, fixed | {HIDDEN: states[None]}), strict=True))
            for product, callback in on_input.items():
                callback(found[graph.taps[product]][0])
            if HIDDEN_OUT in found:
                after.append(found[HIDDEN_OUT][0])
        return after

    def final_states(
        self, base: Base, samples: Sequence[Sample], delta: Delta | None, on_layer: Callable[[int], None] = lambda index: None
    ) -> list[Floats]:
        """Runs samples through all layers of the float base with a delta added.

        Returns final hidden states (T, H), one array per sample.
        """
        hidden = embed(base, self._decoder, samples, delta)
        for index in range(len(self._decoder.layers)):
            on_layer(index)
            hidden = self.run(index, read_layer(base, self._decoder, index, delta), hidden)
        return hidden

    def apply_final_norm(self, base: Base, hidden: Floats) -> Floats:
        """Applies the final norm to hidden states (T, H)."""
        mean = np.square(hidden).mean(axis=1, keepdims=True)
        normed: Floats = hidden / np.sqrt(mean + np.float32(self._decoder.norm_epsilon))
        return normed * read_norm(base, self._decoder.final_norm)

    def logits(self, base: Base, hidden: Floats, delta: Delta | None = None) -> Floats:
        """Computes logits, float32 (T, V), from final hidden states (T, H).

        The head is that of the float base with a delta added.
        """
        decoder = self._decoder
        graph = build_head_graph(decoder)
        session = self._session(graph.model)
        head = decoder.head_product
        norm = read_norm(base, decoder.final_norm)
        logits = np.empty((len(hidden), decoder.vocab_size), np.float32)
        done = 0
        for rows in iterate_vocab_rows(base, decoder, head, delta):
            for start in range(0, len(rows), _HEAD_ROWS):
                weights = {head: rows[start : start + _HEAD_ROWS], decoder.final_norm.name: norm}
                feeds = {short: weights[name] for name, short in graph.weights.items()}
                (part,) = session.run([LOGITS], feeds | {HIDDEN: hidden[None]})
                logits[:, done : done + part.shape[2]] = part[0]
                done += part.shape[2]
        return logits

    def _session(self, model: ir.Model) -> ort.InferenceSession:
        raw = pack_graph(model)
        if raw not in self._sessions:
            options = ort.SessionOptions()
            options.enable_cpu_mem_arena = False  # frees memory after each call, so the peak is what one layer needs
            options.log_severity_level = 3
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # numpy needs the cores between calls
            self._sessions[raw] = ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
        return self._sessions[raw]
