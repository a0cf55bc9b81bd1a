"""Graph inputs for live adapters, and the products that add B·A·x."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgelora_export.graph.live_slots import name_live_slots
from edgelora_export.graph.nodes import CONTRIB, GraphBuilder, InputWeights, graph_input
from edgelora_export.graph.products import make_nbits_attributes, make_nbits_inputs, multiply_matrix
from edgelora_export.plan.targets import CPU
from edgelora_runtime.session.factors import FACTORS, MAX_PARTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from edgelora_export.decoder.description import Decoder, Linear


class LiveInputs:
    """The inputs of the products that take live adapters.

    Requires: `live` holds names of products of the decoder.
    Ensures: a graph to which nothing is bound computes the bare base.

    Each product has one A, and one B per part. Their default rank is 0. `factors`, empty by default, holds the factors of all
    products for edgelora's kernels. It exists only if the kernels support every product in `live`.
    """

    def __init__(self, b: GraphBuilder, decoder: Decoder, live: frozenset[str]) -> None:
        self._lora_a: dict[str, ir.Value] = {}
        self._lora_b: dict[str, list[ir.Value]] = {}
        for linear in decoder.linears:
            if linear.name in live:
                slots = name_live_slots(linear)
                count = len(linear.parts)
                # Each product has its own symbolic rank: onnxruntime shares buffers between tensors whose symbolic shapes agree.
                rank = f"{linear.name}.R"
                a_shape = (f"{count} {rank}" if count > 1 else rank, linear.columns)
                self._lora_a[linear.name] = _empty_input(slots.a, a_shape, b.float_type)
                self._lora_b[linear.name] = [
                    _empty_input(name, (rank, part.graph_rows), b.float_type)
                    for name, part in zip(slots.b, linear.parts, strict=True)
                ]
        supported = all(b.source.grid(name) and len(lora_b) <= MAX_PARTS for name, lora_b in self._lora_b.items())
        runs_kernels = bool(self._lora_a) and b.target is CPU and supported
        self._factors = _empty_input(FACTORS, ("bytes",), ir.DataType.UINT8) if runs_kernels else None

    def __contains__(self, name: str) -> bool:
        return name in self._lora_a

    @property
    def inputs(self) -> list[ir.Value]:
        """All inputs, in the order of the products. `factors` comes last."""
        slots = [value for name, lora_a in self._lora_a.items() for value in (lora_a, *self._lora_b[name])]
        return slots if self._factors is None else [*slots, self._factors]

    def multiply(self, b: GraphBuilder, linear: Linear, x: ir.Value) -> ir.Value:
        """Multiplies x by a product's weight and adds what the adapter adds.

        Where edgelora's kernels may run, both are one function. The kernels find the product's factors by its slot.
        """
        lora_a, lora_b = self._lora_a[linear.name], self._lora_b[linear.name]
        grid = b.source.grid(linear.name)
        if self._factors is None or grid is None:
            return _add_low_rank(b, multiply_matrix(b, linear.name, x, linear.columns, linear.rows), x, lora_a, lora_b)
        attributes = make_nbits_attributes(b, grid, linear.columns, linear.rows)
        weights = make_nbits_inputs(b, linear.name)
        slot = list(self._lora_a).index(linear.name)
        function = _make_function(len(lora_b), attributes)
        return b.call(function, x, *weights, self._factors, lora_a, *lora_b, slot=slot, **attributes)


def _make_function(parts: int, attributes: Iterable[str]) -> ir.Function:
    """Makes LiveMatMulNBits{parts} out of operators that every onnxruntime has. They ignore `factors` and the slot."""
    b = GraphBuilder(InputWeights(""))
    x, *weights, factors, lora_a = (ir.Value(name=name) for name in ("x", "codes", "scales", "zero_points", "factors", "a"))
    lora_b = [ir.Value(name=f"b{index}") for index in range(parts)]
    given = {name: ir.RefAttr(name, name, ir.AttributeType.INT) for name in attributes}
    y = b.op("MatMulNBits", x, *weights, domain=CONTRIB, **given)
    inputs = [x, *weights, factors, lora_a, *lora_b]
    return b.finish_function(f"LiveMatMulNBits{parts}", inputs, _add_low_rank(b, y, x, lora_a, lora_b), (*given, "slot"))


def _add_low_rank(b: GraphBuilder, y: ir.Value, x: ir.Value, lora_a: ir.Value, lora_b: Sequence[ir.Value]) -> ir.Value:
    """Adds B·A·x to y, with one A for all the parts of a product and one B for each."""
    # A stays (r, K), so that threads read whole rows. With (K, r) one token took 0.4 ms longer at 1.2B.
    reduced = b.multiply_transposed(x, lora_a)
    count = len(lora_b)
    pieces = b.ops("Split", reduced, count=count, axis=-1, num_outputs=count) if count > 1 else [reduced]
    products = [b.op("MatMul", piece, factor) for piece, factor in zip(pieces, lora_b, strict=True)]
    return b.op("Add", y, b.op("Concat", *products, axis=-1) if count > 1 else products[0])


def _empty_input(name: str, shape: Sequence[int | str], dtype: ir.DataType) -> ir.Value:
    """Makes an input whose symbolic axis has length 0 by default."""
    empty = np.zeros([size if isinstance(size, int) else 0 for size in shape], dtype.numpy())
    value = graph_input(name, dtype, shape)
    value.const_value = ir.tensor(empty, name=name)
    return value
