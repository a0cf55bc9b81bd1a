"""Layers run one by one, with weights as inputs, give what transformers gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from edgelora_export.architectures import read_decoder
from edgelora_export.base import Base
from edgelora_export.layer_graph import HIDDEN, LOGITS, build_head_graph, build_layer_graph
from edgelora_export.store import read_linear, read_norm
from tests.tiny import load_base, random_tokens

if TYPE_CHECKING:
    from pathlib import Path


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
        graph, names, taps = build_layer_graph(decoder, index)
        session = ort.InferenceSession(ir.serde.serialize_model(graph).SerializeToString())
        feeds = {HIDDEN: hidden} | {name: weights[full] for full, name in names.items()}
        hidden, *tapped = session.run(None, feeds)
        assert len(taps) == len(tapped)
        assert [tap.shape[-1] for tap in tapped] == [linear.columns for linear in layer.linears]
    graph, names = build_head_graph(decoder)
    session = ort.InferenceSession(ir.serde.serialize_model(graph).SerializeToString())
    (logits,) = session.run([LOGITS], {HIDDEN: hidden} | {name: weights[full] for full, name in names.items()})
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-3)


def test_one_graph_serves_all_layers_of_a_kind(tiny_base: Path) -> None:
    decoder = read_decoder(Base.open(tiny_base).config)
    graphs = {ir.serde.serialize_model(build_layer_graph(decoder, index)[0]).SerializeToString() for index in range(2)}
    assert len(graphs) == 1
