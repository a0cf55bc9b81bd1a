"""Layers that run one by one, with weights as inputs, compute what transformers computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_export.stream.layer_graph import HIDDEN, LOGITS, build_head_graph, build_layer_graph
from edgelora_export.stream.layer_stream import LayerStream, read_layer
from edgelora_export.weights.merged import read_linear, read_norm
from tests.tiny import load_base, random_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


def test_layers_one_by_one_give_transformers_hidden_states(tiny_base: Path) -> None:
    base, tokens = Base.open(tiny_base), random_tokens(17)
    decoder = read_decoder(base.config)
    model = load_base(tiny_base)
    with torch.no_grad():
        expected = model(torch.tensor([tokens]), output_hidden_states=True)
    norms = {norm.name: read_norm(base, norm) for norm in decoder.norms}
    weights = {**decoder.rotary_tables, **norms}
    weights |= {linear.name: read_linear(base, linear, None) for linear in decoder.linears}
    weights["head"] = base.tensor(decoder.head)
    hidden = base.tensor(decoder.embedding)[tokens][None]
    for index, layer in enumerate(decoder.layers):
        np.testing.assert_allclose(hidden, expected.hidden_states[index].numpy(), atol=1e-4)
        graph = build_layer_graph(decoder, index, [linear.name for linear in layer.linears])
        session = ort.InferenceSession(ir.serde.serialize_model(graph.model).SerializeToString())
        feeds = {HIDDEN: hidden} | {name: weights[full] for full, name in graph.weights.items()}
        hidden, *tapped = session.run(None, feeds)
        assert len(graph.taps) == len(tapped)
        assert [tap.shape[-1] for tap in tapped] == [linear.columns for linear in layer.linears]
    graph = build_head_graph(decoder)
    session = ort.InferenceSession(ir.serde.serialize_model(graph.model).SerializeToString())
    (logits,) = session.run([LOGITS], {HIDDEN: hidden} | {name: weights[full] for full, name in graph.weights.items()})
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-3)


def test_one_graph_serves_all_layers_of_a_kind(tiny_base: Path) -> None:
    decoder = read_decoder(Base.open(tiny_base).config)
    graphs = {ir.serde.serialize_model(build_layer_graph(decoder, index).model).SerializeToString() for index in range(2)}
    assert len(graphs) == 1


def test_observing_gives_the_inputs_of_a_whole_run_and_skips_later_products(tiny_base: Path) -> None:
    base = Base.open(tiny_base)
    decoder = read_decoder(base.config)
    layer, stream = decoder.layers[0], LayerStream(decoder)
    weights = read_layer(base, decoder, 0, None)
    hidden = [base.tensor(decoder.embedding)[random_tokens(length)] for length in (5, 17)]
    seen: dict[str, list[Floats]] = {linear.name: [] for linear in layer.linears}
    stream.run(0, weights, hidden, {product: found.append for product, found in seen.items()})
    unfit = weights | {layer.down.name: np.zeros((3, 3), np.float32)}
    for linear in layer.linears:
        observed: list[Floats] = []
        stream.observe(0, unfit, hidden, {linear.name: observed.append})
        for expected, found in zip(seen[linear.name], observed, strict=True):
            np.testing.assert_array_equal(found, expected)
    with pytest.raises(Fail, match="mismatch"):
        stream.run(0, unfit, hidden)
