"""Appends nodes to one ONNX graph, and finds the graph's weights in blobs on disk or among its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnx_ir as ir

from edgelora_export.plan.targets import CPU

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgelora_export.plan.targets import Target
    from edgelora_export.quantize.int4 import Grid
    from edgelora_export.weights.stored import StoredWeights

OPSET = 21
CONTRIB = "com.microsoft"
FUNCTION_DOMAIN = "edgelora"  # of functions that edgelora's kernels replace with operators
_OPSETS = {"": OPSET, CONTRIB: 1}


class WeightSource(Protocol):
    """The source of a graph's weights."""

    def value(self, name: str, tensor: str | None, shape: tuple[int, ...] | None) -> ir.Value:
        """Returns the weight `name`. With `tensor` and `shape`, two weights can share the same bytes in two shapes."""

    def has(self, tensor: str) -> bool:
        """True if the source has the tensor."""

    def grid(self, product: str) -> Grid | None:
        """Returns the grid of a product's codes, or None for float32."""


class BlobWeights:
    """Stored weights in blobs beside the graph, as initializers with external data."""

    def __init__(self, weights: StoredWeights, folder: Path) -> None:
        self._weights = weights
        self._folder = folder

    def value(self, name: str, tensor: str | None, shape: tuple[int, ...] | None) -> ir.Value:
        stored = self._weights.tensors[tensor or name]
        external = ir.ExternalTensor(
            stored.location,
            stored.offset,
            stored.length,
            ir.DataType.from_numpy(stored.dtype),
            shape=ir.Shape(stored.shape if shape is None else shape),
            name=name,
            base_dir=self._folder,
        )
        return ir.Value(name=name, shape=external.shape, type=ir.TensorType(external.dtype), const_value=external)

    def has(self, tensor: str) -> bool:
        return tensor in self._weights.tensors

    def grid(self, product: str) -> Grid | None:
        return self._weights.grids.get(product)


class InputWeights:
    """Float32 weights that the caller feeds, so that one session runs every layer of a kind.

    prefix: of the layer's names. An input's name is the rest.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.inputs: dict[str, ir.Value] = {}  # by the weight's full name

    def value(self, name: str, tensor: str | None, shape: tuple[int, ...] | None) -> ir.Value:  # noqa: ARG002
        value = ir.Value(name=name.removeprefix(self._prefix), type=ir.TensorType(ir.DataType.FLOAT))
        self.inputs[name] = value
        return value

    def has(self, tensor: str) -> bool:  # noqa: ARG002
        return False

    def grid(self, product: str) -> None:  # noqa: ARG002
        return None


class GraphBuilder:
    """One graph in the making. Its weights come from `source` by name, and each name enters the graph once."""

    def __init__(self, source: WeightSource, target: Target = CPU) -> None:
        self.source = source
        self.target = target
        self._tape = ir.tape.Tape()
        self._loaded: dict[str, ir.Value] = {}
        self._functions: dict[str, ir.Function] = {}

    @property
    def float_type(self) -> ir.DataType:
        """The type of activations."""
        return self.target.float_type

    def widen(self, activation: ir.Value) -> ir.Value:
        """Casts an activation to float32."""
        return activation if self.float_type == ir.DataType.FLOAT else self.op("Cast", activation, to=ir.DataType.FLOAT)

    def narrow(self, wide: ir.Value) -> ir.Value:
        """Casts float32 to the type of activations."""
        return wide if self.float_type == ir.DataType.FLOAT else self.op("Cast", wide, to=self.float_type)

    def op(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: int | float | str | Sequence[int] | ir.Attr
    ) -> ir.Value:
        """Appends a node with one output."""
        return self._tape.op(op_type, inputs, attributes, domain=domain)

    def ops(
        self, op_type: str, *inputs: ir.Value | None, count: int, domain: str = "", **attributes: int | float
    ) -> Sequence[ir.Value]:
        """Appends a node with `count` outputs."""
        return self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=count, domain=domain)

    def call(self, function: ir.Function, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
        """Calls a function with one output. The graph holds each function once, by its name."""
        self._functions.setdefault(function.name, function)
        return self.op(function.name, *inputs, domain=function.domain, **attributes)

    def multiply_transposed(self, x: ir.Value, matrix: ir.Value) -> ir.Value:
        """Multiplies x (B, S, K) by the transpose of a float matrix (N, K)."""
        if self.target.fused_matmul:
            return self.op("FusedMatMul", x, matrix, domain=CONTRIB, transB=1)
        return self.op("MatMul", x, self.op("Transpose", matrix, perm=(1, 0)))

    def constant(self, name: str, values: int | list[int]) -> ir.Value:
        """Adds an int64 initializer that is stored in the graph."""
        if name not in self._loaded:
            self._loaded[name] = self._tape.initializer(ir.tensor(np.array(values, np.int64), name=name))
        return self._loaded[name]

    def scalar(self, value: float, dtype: ir.DataType | None = None) -> ir.Value:
        """Adds a scalar initializer that is stored in the graph. dtype: by default the type of activations."""
        dtype = dtype or self.float_type
        name = f"scalar.{value!r}.{dtype.name}"
        if name not in self._loaded:
            self._loaded[name] = self._tape.initializer(ir.tensor(np.array(value, dtype.numpy()), name=name))
        return self._loaded[name]

    def weight(self, name: str, *, tensor: str | None = None, shape: tuple[int, ...] | None = None) -> ir.Value:
        """Adds a weight of the source. See WeightSource.value."""
        if name not in self._loaded:
            self._loaded[name] = self.source.value(name, tensor, shape)
        return self._loaded[name]

    def splice(self, graph: ir.Graph) -> None:
        """Moves the new nodes into an existing graph.

        Requires: they read only values of that graph, or of each other.
        Ensures: the graph's nodes are sorted, so that each comes after those it reads.
        """
        graph.extend(self._tape.nodes)
        for value in (*self._tape.initializers, *self._loaded.values()):
            graph.register_initializer(value)
        graph.sort()

    def finish(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
        """Makes a model of the new nodes, with the weights that they read as initializers."""
        initializers = [value for value in (*self._tape.initializers, *self._loaded.values()) if value.const_value is not None]
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self._tape.nodes,
            initializers=list(dict.fromkeys(initializers)),
            opset_imports=_OPSETS | ({FUNCTION_DOMAIN: 1} if self._functions else {}),
            name="decoder",
        )
        return ir.Model(graph, ir_version=10, producer_name="edgelora", functions=list(self._functions.values()))

    def finish_function(self, name: str, inputs: Sequence[ir.Value], output: ir.Value, attributes: Sequence[str]) -> ir.Function:
        """Makes a function of the new nodes. attributes: names of the integer attributes that the nodes refer to."""
        graph = ir.Graph(inputs, [output], nodes=self._tape.nodes, opset_imports=_OPSETS)
        declared = [ir.Attr(each, ir.AttributeType.INT, None) for each in attributes]
        return ir.Function(FUNCTION_DOMAIN, name, graph=graph, attributes=declared)


def graph_input(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """Makes an input of a graph. shape: a string names a symbolic axis."""
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def annotate_value(value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
    """Sets a value's name, type and shape."""
    value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)


def list_blobs(model: ir.Model) -> tuple[str, ...]:
    """Names the blobs that hold a graph's initializers, in sorted order."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return tuple(sorted({str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}))


def pack_graph(model: ir.Model) -> bytes:
    """Serializes a graph to the bytes of its file."""
    return bytes(ir.serde.serialize_model(model).SerializeToString())
