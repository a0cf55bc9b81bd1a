"""The graph inputs of live adapters, and the products that add B·A·x."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgelora_export.graph.live_slots import live_slots
from edgelora_export.graph.nodes import CONTRIB, GraphBuilder, InputWeights, graph_input
from edgelora_export.graph.products import multiply_matrix, nbits_attributes, nbits_weights
from edgelora_export.plan.targets import CPU
from edgelora_runtime.session.factors import FACTORS, MAX_PARTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from edgelora_export.decoder.description import Decoder, Linear


class LiveInputs:
    """The inputs of the products that take live adapters; without effect where nothing is bound.

    Each product has an A and B's, of rank 0 by default. `factors`, empty by default, holds those of all products for edgelora's
    kernels: it is there where they serve all of these products, which are those of live.
    """

    def __init__(self, b: GraphBuilder, decoder: Decoder, live: frozenset[str]) -> None:
        self._a: dict[str, ir.Value] = {}
        self._b: dict[str, list[ir.Value]] = {}
        for linear in decoder.linears:
            if linear.name in live:
                slots = live_slots(linear)
                count = len(linear.parts)
                # Each product has a rank of its own: onnxruntime lets tensors whose symbolic shapes agree share a buffer.
                rank = f"{linear.name}.R"
                a_shape = (f"{count} {rank}" if count > 1 else rank, linear.columns)
                self._a[linear.name] = _empty_input(slots.a, a_shape, b.float_type)
                self._b[linear.name] = [
                    _empty_input(name, (rank, part.graph_rows), b.float_type)
                    for name, part in zip(slots.b, linear.parts, strict=True)
                ]
        served = b.target is CPU and all(b.source.grid(name) and len(ups) <= MAX_PARTS for name, ups in self._b.items())
        self._factors = _empty_input(FACTORS, ("bytes",), ir.DataType.UINT8) if self._a and served else None

    def __contains__(self, name: str) -> bool:
        return name in self._a

    @property
    def inputs(self) -> list[ir.Value]:
        slots = [value for name, a in self._a.items() for value in (a, *self._b[name])]
        return slots if self._factors is None else [*slots, self._factors]

    def multiply(self, b: GraphBuilder, linear: Linear, x: ir.Value) -> ir.Value:
        """The product and what its adapter adds: one function where kernels may run it, which know its factors by their slot."""
        a, ups = self._a[linear.name], self._b[linear.name]
        grid = b.source.grid(linear.name)
        if self._factors is None or grid is None:
            return _add_low_rank(b, multiply_matrix(b, linear.name, x, linear.columns, linear.rows), x, a, ups)
        attributes = nbits_attributes(b, grid, linear.columns, linear.rows)
        weights = nbits_weights(b, linear.name)
        slot = list(self._a).index(linear.name)
        return b.call(_make_function(len(ups), attributes), x, *weights, self._factors, a, *ups, slot=slot, **attributes)


def _make_function(parts: int, attributes: Iterable[str]) -> ir.Function:
    """LiveMatMulNBits{parts} in operators that every onnxruntime has, which have no use for `factors` and the slot."""
    b = GraphBuilder(InputWeights(""))
    x, *weights, factors, a = (ir.Value(name=name) for name in ("x", "codes", "scales", "zero_points", "factors", "a"))
    ups = [ir.Value(name=f"b{index}") for index in range(parts)]
    given = {name: ir.RefAttr(name, name, ir.AttributeType.INT) for name in attributes}
    y = b.op("MatMulNBits", x, *weights, domain=CONTRIB, **given)
    inputs = [x, *weights, factors, a, *ups]
    return b.finish_function(f"LiveMatMulNBits{parts}", inputs, _add_low_rank(b, y, x, a, ups), (*given, "slot"))


def _add_low_rank(b: GraphBuilder, y: ir.Value, x: ir.Value, a: ir.Value, ups: Sequence[ir.Value]) -> ir.Value:
    """Y + B·A·x, one A for all the parts of a product, one B for each."""
    # A lies as it is stored: threads then read whole rows. With (K, r) one token took 0.4 ms longer at 1.2B.
    down = b.multiply_transposed(x, a)
    downs = b.ops("Split", down, count=len(ups), axis=-1, num_outputs=len(ups)) if len(ups) > 1 else [down]
    products = [b.op("MatMul", part, up) for part, up in zip(downs, ups, strict=True)]
    return b.op("Add", y, b.op("Concat", *products, axis=-1) if len(ups) > 1 else products[0])


def _empty_input(name: str, shape: Sequence[int | str], kind: ir.DataType) -> ir.Value:
    """An input whose symbolic axis is 0 long by default."""
    empty = np.zeros([size if isinstance(size, int) else 0 for size in shape], kind.numpy())
    value = graph_input(name, kind, shape)
    value.const_value = ir.tensor(empty, name=name)
    return value
