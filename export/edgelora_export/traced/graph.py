"""Rewrites a traced graph for a bundle: with quantized products, weights in blobs, and the inputs that the runtime feeds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)

from edgelora_export.graph.decoder_graph import gather_rows
from edgelora_export.graph.nodes import BlobWeights, GraphBuilder
from edgelora_export.graph.products import multiply_matrix
from edgelora_export.weights.blobs import write_blob
from edgelora_export.weights.stored import StoredWeights
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_INLINE_LIMIT = 256  # bytes. Smaller tensors, such as shapes and scalars, stay in the graph
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Matrix:
    """A constant matrix of the graph: an initializer (N, K), or (K, N) if transposed."""

    initializer: ir.Value
    transposed: bool

    def read(self) -> Floats:
        """Returns the values, float32 (N, K)."""
        assert self.initializer.const_value is not None
        values: Floats = self.initializer.const_value.numpy()
        return values.T if self.transposed else values


@dataclass(frozen=True)
class BufferSizes:
    """The sizes by which the runtime makes its buffers."""

    layers: int
    kv_heads: int
    head_size: int
    vocab_size: int


def prepare_traced(model: ir.Model) -> ir.Model:
    """Prepares a traced model for rewrite_graph, in place.

    Requires: a model as Optimum writes it.
    Ensures: it computes the same. Constants are initializers, and Identity nodes, metadata and doc strings are removed.
    """
    IdentityEliminationPass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ClearMetadataAndDocStringPass()(model)
    return model


def read_sizes(graph: ir.Graph, architecture: str) -> BufferSizes:
    """Reads the sizes of inputs and outputs. Raises InputError for a graph that the runtime cannot feed."""
    names = {str(value.name) for value in graph.inputs}
    pasts = {name for name in names if _PAST.fullmatch(name)}
    layers = len(pasts) // 2
    wanted = {f"past_key_values.{index}.{kind}" for index in range(layers) for kind in ("key", "value")}
    odd = (names - {"position_ids"}) ^ {"input_ids", "attention_mask", *wanted}
    if odd or not layers:
        shown = ", ".join(sorted(odd)[:4]) or "no KV cache"
        raise InputError(f"Optimum's graph of model_type {architecture!r} has other inputs than the runtime feeds: {shown}")
    shapes = {value.name: value.shape for value in (*graph.inputs, *graph.outputs)}
    sizes = {tuple(size for size in shapes[name] or () if isinstance(size, int)) for name in pasts}
    logits = tuple(size for size in shapes.get("logits") or () if isinstance(size, int))
    if len(sizes) != 1 or len(cache := next(iter(sizes))) != 2 or len(logits) != 1:
        raise InputError(
            f"the layers of model_type {architecture!r} have caches of different shapes, which a bundle cannot describe"
        )
    return BufferSizes(layers, cache[0], cache[1], logits[0])


def find_products(graph: ir.Graph) -> Iterator[tuple[ir.Node, Matrix]]:
    """Finds the nodes that multiply by a constant matrix, with or without a bias."""
    for node in graph:
        if node.op_type == "MatMul" and node.domain == "":
            matrix = _find_matrix(node.inputs[1])
        elif node.op_type == "Gemm" and node.domain == "":
            plain = all(_attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta")) and not _attribute(node, "transA", 0)
            matrix = _find_matrix(node.inputs[1]) if plain else None
            if matrix is not None and _attribute(node, "transB", 0):
                matrix = Matrix(matrix.initializer, not matrix.transposed)
        else:
            continue
        if matrix is not None:  # an operand is (K, N), a product's weight (N, K)
            yield node, Matrix(matrix.initializer, not matrix.transposed)


def find_lookups(graph: ir.Graph) -> Iterator[tuple[ir.Node, Matrix]]:
    """Finds the nodes that look up rows of a constant matrix."""
    for node in graph:
        if node.op_type == "Gather" and node.domain == "" and _attribute(node, "axis", 0) == 0:
            matrix = _find_matrix(node.inputs[0])
            if matrix is not None:
                yield node, matrix


def rewrite_graph(
    traced: ir.Model, products: Mapping[str, str], embedding: str | None, weights: StoredWeights, folder: Path, sizes: BufferSizes
) -> ir.Model:
    """Rewrites a traced graph into the graph of one variant.

    Requires: prepare_traced has prepared `traced`, and `weights` lie in `folder`.
    Ensures: `traced` is unchanged. In the result every known product multiplies by its matrix in `weights`, the input
    logits_to_keep is added, position_ids is no input, and each large tensor lies in a blob of `folder`.

    products: the name in `weights` of each product's matrix, by the initializer that holds it. embedding: the initializer in
    which tokens are looked up, a key of products. None leaves lookups unchanged. sizes: as read_sizes returns them.
    """
    model = traced.clone()
    graph = model.graph
    b = GraphBuilder(BlobWeights(weights, folder))
    replaced: list[ir.Node] = []
    for node, matrix in find_lookups(graph):
        ids = node.inputs[1]
        if embedding is not None and matrix.initializer.name == embedding and not matrix.transposed and ids is not None:
            rows, columns = matrix.read().shape
            _replace(node, gather_rows(b, ids, rows, columns, name=products[embedding]))
            replaced.append(node)
    _keep_last_positions(graph, b)
    for node, matrix in find_products(graph):
        name = products.get(matrix.initializer.name or "")
        x = node.inputs[0]
        if name is None or x is None:
            continue
        rows, columns = matrix.read().shape
        product = multiply_matrix(b, name, x, columns, rows)
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            product = b.op("Add", product, node.inputs[2])
        _replace(node, product)
        replaced.append(node)
    _derive_positions(graph, b)
    b.splice(graph)
    graph.remove(replaced, safe=True)
    RemoveUnusedNodesPass()(model)
    _store_rest(graph, folder)
    _annotate_shapes(graph, sizes)
    model.producer_name = "edgelora"
    model.opset_imports["com.microsoft"] = 1
    return model


def _find_matrix(value: ir.Value | None) -> Matrix | None:
    """Returns the float matrix that a value is, or is the transpose of."""
    if value is None:
        return None
    node = value.producer()
    if node is not None:
        if node.op_type != "Transpose" or node.domain:
            return None
        inner = _find_matrix(node.inputs[0])
        return None if inner is None else Matrix(inner.initializer, not inner.transposed)
    tensor = value.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2:
        return None
    return Matrix(value, transposed=False)


def _attribute(node: ir.Node, name: str, default: float) -> float:
    found = node.attributes.get(name)
    return default if found is None else float(found.value)


def _replace(node: ir.Node, value: ir.Value) -> None:
    """Lets every reader of a node's output read the value instead, which takes over the name of a graph output."""
    old = node.outputs[0]
    if old.is_graph_output():
        value.name, old.name = old.name, None
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)


def _keep_last_positions(graph: ir.Graph, b: GraphBuilder) -> None:
    """Adds the input logits_to_keep.

    The head reads only the positions to keep. If the head is not the last node, they are sliced out of the logits instead.
    """
    keep = ir.Value(
        name="logits_to_keep",
        shape=ir.Shape([1]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(np.zeros(1, np.int64), name="logits_to_keep"),
    )
    index, logits = next((i, value) for i, value in enumerate(graph.outputs) if value.name == "logits")
    head = logits.producer()
    assert head is not None
    ends, axis = b.constant("edgelora.end", [_END]), b.constant("edgelora.axis_1", [1])
    if head.op_type == "MatMul" and _find_matrix(head.inputs[1]) is not None:
        head.replace_input_with(0, b.op("Slice", head.inputs[0], b.op("Neg", keep), ends, axis))
    else:
        logits.name = None
        graph.outputs[index] = b.op("Slice", logits, b.op("Neg", keep), ends, axis)
        graph.outputs[index].name = "logits"
    graph.inputs.append(keep)
    graph.register_initializer(keep)


def _derive_positions(graph: ir.Graph, b: GraphBuilder) -> None:
    """Computes position_ids from the lengths of mask and input, since a bundle's prompts have no padding."""
    inputs = {value.name: value for value in graph.inputs}
    if (positions := inputs.get("position_ids")) is None:
        return
    one, axis = b.constant("edgelora.one", 1), b.constant("edgelora.axis_0", [0])
    total, count = (b.op("Gather", b.op("Shape", inputs[name]), one, axis=0) for name in ("attention_mask", "input_ids"))
    derived = b.op("Unsqueeze", b.op("Range", b.op("Sub", total, count), total, one), axis)
    ir.convenience.replace_all_uses_with(positions, derived)
    graph.inputs.remove(positions)


def _store_rest(graph: ir.Graph, folder: Path) -> None:
    """Stores the remaining large tensors (norms, biases, position tables) in one blob, which variants share."""
    rest = {
        name: value.const_value
        for name, value in graph.initializers.items()
        if value.const_value is not None
        and value.const_value.nbytes > _INLINE_LIMIT
        and _lies_elsewhere(value.const_value, folder)
    }
    stored = write_blob(folder, {name: tensor.numpy() for name, tensor in rest.items()}) if rest else {}
    source = BlobWeights(StoredWeights(stored), folder)
    for name in stored:
        graph.initializers[name].const_value = source.value(name, None, None).const_value
    for name, value in graph.initializers.items():  # small ones may still lie in the traced graph's folder
        if isinstance(value.const_value, ir.ExternalTensor) and _lies_elsewhere(value.const_value, folder):
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=name)


def _lies_elsewhere(tensor: ir.TensorProtocol, folder: Path) -> bool:
    return not isinstance(tensor, ir.ExternalTensor) or str(tensor.base_dir) != str(folder)


def _annotate_shapes(graph: ir.Graph, sizes: BufferSizes) -> None:
    """Sets the shapes of inputs and outputs for one sequence, and clears the inner ones, which are no longer true."""
    shapes: dict[str, tuple[int | str, ...]] = {
        "input_ids": (1, "S"),
        "attention_mask": (1, "T"),
        "logits": (1, "kept", sizes.vocab_size),
    }
    for index in range(sizes.layers):
        for kind in ("key", "value"):
            shapes[f"past_key_values.{index}.{kind}"] = (1, sizes.kv_heads, "P", sizes.head_size)
            shapes[f"present.{index}.{kind}"] = (1, sizes.kv_heads, "T", sizes.head_size)
    for node in graph:
        node.name = None
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape, value.type = None, None
    for value in (*graph.inputs, *graph.outputs):
        if value.name in shapes:
            value.shape, value.type = ir.Shape(shapes[value.name]), value.type or ir.TensorType(ir.DataType.FLOAT)
