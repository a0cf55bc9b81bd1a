"""Appends nodes to one ONNX graph, and says where the graph's weights come from: blobs on disk, or inputs."""

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
OWN = "edgelora"  # the domain of functions, which edgelora's kernels have operators for
_OPSETS = {"": OPSET, CONTRIB: 1}


class WeightSource(Protocol):
    """What a graph's weights are."""

    def value(self, name: str, tensor: str | None, shape: tuple[int, ...] | None) -> ir.Value:
        """The weight `name`. `tensor` and `shape` let two weights see the same bytes in two shapes."""

    def has(self, tensor: str) -> bool: ...

    def grid(self, product: str) -> Grid | None:
        """How the codes of a product lie; None where its weight is not quantized."""


class BlobWeights:
    """StoredWeights that lie in blobs beside the graph: initializers with external data."""

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
    """Float32 weights that the caller feeds, so that one session serves every layer of a kind.

    prefix: of the layer's names; the inputs are called what follows it.
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
    """One graph in the making. StoredWeights come from `source` by name, and each name enters the graph once."""

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
        """An activation in float32."""
        return activation if self.float_type == ir.DataType.FLOAT else self.op("Cast", activation, to=ir.DataType.FLOAT)

    def narrow(self, wide: ir.Value) -> ir.Value:
        """The inverse of widen."""
        return wide if self.float_type == ir.DataType.FLOAT else self.op("Cast", wide, to=self.float_type)

    def op(
        self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: int | float | str | Sequence[int] | ir.Attr
    ) -> ir.Value:
        return self._tape.op(kind, inputs, attributes, domain=domain)

    def ops(
        self, kind: str, *inputs: ir.Value | None, count: int, domain: str = "", **attributes: int | float
    ) -> Sequence[ir.Value]:
        return self._tape.op_multi_out(kind, inputs, attributes, num_outputs=count, domain=domain)

    def call(self, function: ir.Function, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
        """A function's one output; the graph has each function once, by its name."""
        self._functions.setdefault(function.name, function)
        return self.op(function.name, *inputs, domain=function.domain, **attributes)

    def multiply_transposed(self, x: ir.Value, matrix: ir.Value) -> ir.Value:
        """X (1, S, K) times a float matrix (N, K), transposed."""
        if self.target.fused_matmul:
            return self.op("FusedMatMul", x, matrix, domain=CONTRIB, transB=1)
        return self.op("MatMul", x, self.op("Transpose", matrix, perm=(1, 0)))

    def constant(self, name: str, values: int | list[int]) -> ir.Value:
        """An int64 initializer held in the graph."""
        if name not in self._loaded:
            self._loaded[name] = self._tape.initializer(ir.tensor(np.array(values, np.int64), name=name))
        return self._loaded[name]

    def scalar(self, value: float, kind: ir.DataType | None = None) -> ir.Value:
        """An initializer held in the graph, of the activations' type where none is given."""
        kind = kind or self.float_type
        name = f"scalar.{value!r}.{kind.name}"
        if name not in self._loaded:
            self._loaded[name] = self._tape.initializer(ir.tensor(np.array(value, kind.numpy()), name=name))
        return self._loaded[name]

    def weight(self, name: str, *, tensor: str | None = None, shape: tuple[int, ...] | None = None) -> ir.Value:
        """A weight of the source; see WeightSource.value."""
        if name not in self._loaded:
            self._loaded[name] = self.source.value(name, tensor, shape)
        return self._loaded[name]

    def splice(self, graph: ir.Graph) -> None:
        """Moves what was made into an existing graph whose values it reads, in an order in which it runs."""
        graph.extend(self._tape.nodes)
        for value in (*self._tape.initializers, *self._loaded.values()):
            graph.register_initializer(value)
        graph.sort()

    def finish(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
        initializers = [value for value in (*self._tape.initializers, *self._loaded.values()) if value.const_value is not None]
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self._tape.nodes,
            initializers=list(dict.fromkeys(initializers)),
            opset_imports=_OPSETS | ({OWN: 1} if self._functions else {}),
            name="decoder",
        )
        return ir.Model(graph, ir_version=10, producer_name="edgelora", functions=list(self._functions.values()))

    def finish_function(self, name: str, inputs: Sequence[ir.Value], output: ir.Value, attributes: Sequence[str]) -> ir.Function:
        """A function of what was made. attributes: names of those, integers, that its nodes refer to."""
        graph = ir.Graph(inputs, [output], nodes=self._tape.nodes, opset_imports=_OPSETS)
        return ir.Function(OWN, name, graph=graph, attributes=[ir.Attr(each, ir.AttributeType.INT, None) for each in attributes])


def graph_input(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def describe(value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
    """Gives an output its name, type and shape."""
    value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)


def mapped_blobs(model: ir.Model) -> tuple[str, ...]:
    """The files that a graph's initializers lie in."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return tuple(sorted({str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}))


def pack_graph(model: ir.Model) -> bytes:
    """The bytes of a graph's file."""
    return bytes(ir.serde.serialize_model(model).SerializeToString())
