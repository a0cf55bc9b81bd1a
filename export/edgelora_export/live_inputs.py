"""The graph inputs of live adapters, and the nodes that add B·A·x to a product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgelora_export.graph_builder import GraphBuilder, InputWeights, graph_input
from edgelora_export.live import live_slots

if TYPE_CHECKING:
    from edgelora_export.decoder import Decoder, Linear
    from edgelora_export.targets import Target


class LiveInputs:
    """The A and B inputs of the products that take live adapters; rank 0, and so no effect, where none is bound.

    live: names of those products. float_type: of the inputs.
    """

    def __init__(self, decoder: Decoder, live: frozenset[str], float_type: ir.DataType) -> None:
        self._a: dict[str, ir.Value] = {}
        self._b: dict[str, list[ir.Value]] = {}
        for linear in decoder.linears:
            if linear.name in live:
                slots = live_slots(linear)
                count = len(linear.parts)
                # Each product has a rank of its own: onnxruntime lets tensors whose symbolic shapes agree share a buffer.
                rank = f"{linear.name}.R"
                self._a[linear.name] = _input_of_rank_0(
                    slots.a, (f"{count} {rank}" if count > 1 else rank, linear.columns), float_type
                )
                self._b[linear.name] = [
                    _input_of_rank_0(name, (rank, part.graph_rows), float_type)
                    for name, part in zip(slots.b, linear.parts, strict=True)
                ]

    def __contains__(self, name: str) -> bool:
        return name in self._a

    @property
    def inputs(self) -> list[ir.Value]:
        return [value for name, a in self._a.items() for value in (a, *self._b[name])]

    def add(self, b: GraphBuilder, linear: Linear, x: ir.Value, y: ir.Value) -> ir.Value:
        """Y + B·A·x, one A for all the parts, one B for each: a function, for which edgelora's kernels have an operator."""
        factors = (self._a[linear.name], *self._b[linear.name])
        return b.call(_make_function(len(linear.parts), b.target), y, x, *factors)


def _make_function(count: int, target: Target) -> ir.Function:
    """AddLowRank{count} of a product's parts, in operators that every onnxruntime has."""
    b = GraphBuilder(InputWeights(""), target)
    y, x, a, *ups = inputs = [ir.Value(name=name) for name in ("y", "x", "a", *(f"b{index}" for index in range(count)))]
    # A lies as it is stored: threads then read whole rows. With (K, r) one token took 0.4 ms longer at 1.2B.
    down = b.multiply_transposed(x, a)
    downs = b.ops("Split", down, count=count, axis=-1, num_outputs=count) if count > 1 else [down]
    products = [b.op("MatMul", part, up) for part, up in zip(downs, ups, strict=True)]
    added = b.op("Add", y, b.op("Concat", *products, axis=-1) if count > 1 else products[0])
    return b.finish_function(f"AddLowRank{count}", inputs, added)


def _input_of_rank_0(name: str, shape: tuple[int | str, int | str], float_type: ir.DataType) -> ir.Value:
    """A matrix input whose symbolic axis, the rank, is 0 long by default."""
    empty = np.zeros([size if isinstance(size, int) else 0 for size in shape], float_type.numpy())
    value = graph_input(name, float_type, shape)
    value.const_value = ir.tensor(empty, name=name)
    return value
