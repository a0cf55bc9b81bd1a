"""Joins products with what computes their activations: the norm of a sum, or a gated activation.

Both are then one function, for which edgelora's kernels have an operator, so that a step has half the nodes. Without those
kernels, onnxruntime puts the function's nodes in its place, and they are the same as before.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from edgelora_export.graph.nodes import CONTRIB, FUNCTION_DOMAIN, OPSET

_NBITS_INPUTS = 4  # of a MatMulNBits without g_idx and bias
_ACTIVATIONS = {"SwiGlu": ("Sigmoid", "Mul"), "GeGlu": ("Gelu",)}  # the nodes of an activation function, by the prologue's name


@dataclass(frozen=True)
class _Prologue:
    """The nodes that compute a product's activations.

    first: the value that takes the activations' place among the function's inputs. extra: the inputs that follow the product's.
    extra_outputs: the outputs that follow the product's.
    """

    name: str
    nodes: list[ir.Node]
    first: ir.Value
    extra: list[ir.Value] = field(default_factory=list)
    extra_outputs: list[ir.Value] = field(default_factory=list)


def join_prologues(model: ir.Model) -> None:
    """Replaces each product of a graph and its prologue with a call of a function of both, which the model then has.

    Ensures: the graph computes the same values, and those that remain keep their names.
    """
    for product in list(model.graph):
        prologue = _find_prologue(product) if _is_product(product) else None
        if prologue is not None:
            function = _make_function(prologue, product)
            model.functions.setdefault(function.identifier(), function)
            _replace(model.graph, prologue, product, function)
    if model.functions:
        model.graph.opset_imports[FUNCTION_DOMAIN] = 1


def _is_product(node: ir.Node) -> bool:
    return (node.op_type == "MatMulNBits" and len(node.inputs) == _NBITS_INPUTS) or node.domain == FUNCTION_DOMAIN


def _find_prologue(product: ir.Node) -> _Prologue | None:
    node = _find_only(product.inputs[0])
    if node is None:
        return None
    if node.op_type == "SkipSimplifiedLayerNormalization" and product.inputs[0] is node.outputs[0]:
        first, *extra = (value for value in node.inputs if value is not None)
        return _Prologue("SkipNorm", [node], first, extra, [node.outputs[3]])
    return _find_glu(node) if node.op_type == "Mul" else None


def _find_glu(multiply: ir.Node) -> _Prologue | None:
    """Finds the prologue that ends with the product of an activated half and the other half of a value."""
    activated, up = multiply.inputs
    split = up.producer() if up is not None else None
    if split is None or split.op_type != "Split" or len(split.outputs) != 2 or up is not split.outputs[1]:
        return None
    gate, packed = split.outputs[0], split.inputs[0]
    nodes = [use.node for use in gate.uses()]
    for name, types in _ACTIVATIONS.items():
        same = sorted(node.op_type for node in nodes) == sorted(types)
        if same and packed is not None and activated is not None and activated.producer() in nodes:
            return _Prologue(name, [split, *nodes, multiply], packed)
    return None


def _find_only(value: ir.Value | None) -> ir.Node | None:
    """Finds the node that computes a value which a single node reads."""
    if value is None or value.is_graph_output() or len(value.uses()) != 1:
        return None
    return value.producer()


def _make_function(prologue: _Prologue, product: ir.Node) -> ir.Function:
    """Makes a function of copies of the nodes. Its inputs are the product's, then the prologue's."""
    inputs = [ir.Value(name=f"input_{index}") for index in range(len(product.inputs) + len(prologue.extra))]
    copies: dict[ir.Value, ir.Value] = {prologue.first: inputs[0]}
    copies.update(zip(prologue.extra, inputs[len(product.inputs) :], strict=True))
    attributes = _list_attributes(prologue, product)
    nodes = []
    for node in (*prologue.nodes, product):
        given = [copies.setdefault(value, ir.Value()) if value is not None else None for value in node.inputs]
        if node is product:
            given[1:] = inputs[1 : len(product.inputs)]
        referred = {name: ir.RefAttr(name, name, value.type) for name, value in attributes.items() if name in node.attributes}
        outputs = [copies.setdefault(value, ir.Value()) for value in node.outputs]
        nodes.append(ir.Node(node.domain, node.op_type, given, {**node.attributes, **referred}.values(), outputs=outputs))
    outputs = [copies[value] for value in (*product.outputs, *prologue.extra_outputs)]
    opsets = {"": OPSET, CONTRIB: 1, FUNCTION_DOMAIN: 1}
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports=opsets)
    graph.sort()
    declared = [ir.Attr(name, value.type, None) for name, value in attributes.items()]
    return ir.Function(FUNCTION_DOMAIN, prologue.name + product.op_type, graph=graph, attributes=declared)


def _list_attributes(prologue: _Prologue, product: ir.Node) -> dict[str, ir.Attr]:
    """Lists the attributes in which calls of one function may differ: the product's, and a norm's epsilon."""
    own = [attribute for node in prologue.nodes for attribute in node.attributes.values() if attribute.name == "epsilon"]
    return {**product.attributes, **{attribute.name: attribute for attribute in own}}


def _replace(graph: ir.Graph, prologue: _Prologue, product: ir.Node, function: ir.Function) -> None:
    """Puts a call of the function in the nodes' place."""
    replaced = (*product.outputs, *prologue.extra_outputs)
    outputs = [ir.Value(name=value.name, shape=value.shape, type=value.type) for value in replaced]
    inputs = (prologue.first, *product.inputs[1:], *prologue.extra)
    attributes = _list_attributes(prologue, product).values()
    call = ir.Node(function.domain, function.name, inputs, attributes, outputs=outputs)
    ir.convenience.replace_nodes_and_values(graph, product, [*prologue.nodes, product], [call], replaced, outputs)
