"""The messages of ONNX that a bundle's graphs consist of, with the fields that export writes.

What is left out is refused: graphs as attributes, sparse and quantized tensors, training, devices, types other than tensors.
Source: https://github.com/onnx/onnx/blob/v1.23.2/onnx/onnx.in.proto
"""

from __future__ import annotations

from edgelora_runtime.bundle.graphs.wire import BYTES, FIXED32, VARINT, Field, Message

ATTRIBUTE_KINDS = {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints"}  # the field of each kind's value; 5 is a graph
PACKED = {"float_data": 4, "int32_data": 0, "int64_data": 0}  # a tensor's own values: bytes of each, 0 for varints

OPSET = Message("an operator set", {1: Field("domain", BYTES), 2: Field("version", VARINT)})
ENTRY = Message("an external data entry", {1: Field("key", BYTES), 2: Field("value", BYTES)})
TENSOR = Message(
    "a tensor",
    {
        1: Field("dims", VARINT, many=True),
        2: Field("data_type", VARINT),
        4: Field("float_data", BYTES, many=True),
        5: Field("int32_data", BYTES, many=True),
        7: Field("int64_data", BYTES, many=True),
        8: Field("name", BYTES),
        9: Field("raw_data", BYTES),
        13: Field("external_data", BYTES, many=True),
        14: Field("data_location", VARINT),
    },
)
ATTRIBUTE = Message(
    "an attribute",
    {
        1: Field("name", BYTES),
        2: Field("f", FIXED32),
        3: Field("i", VARINT),
        4: Field("s", BYTES),
        5: Field("t", BYTES),
        7: Field("floats", FIXED32, many=True),
        8: Field("ints", VARINT, many=True),
        20: Field("type", VARINT),
        21: Field("ref_attr_name", BYTES),
    },
)
NODE = Message(
    "a node",
    {
        1: Field("input", BYTES, many=True),
        2: Field("output", BYTES, many=True),
        3: Field("name", BYTES),
        4: Field("op_type", BYTES),
        5: Field("attribute", BYTES, many=True),
        7: Field("domain", BYTES),
    },
)
DIMENSION = Message("a dimension", {1: Field("size", VARINT), 2: Field("symbol", BYTES)})
SHAPE = Message("a shape", {1: Field("dim", BYTES, many=True)})
TENSOR_TYPE = Message("a tensor type", {1: Field("elem_type", VARINT), 2: Field("shape", BYTES)})
TYPE = Message("a type", {1: Field("tensor_type", BYTES)})
VALUE = Message("a value", {1: Field("name", BYTES), 2: Field("type", BYTES)})
GRAPH = Message(
    "a graph",
    {
        1: Field("node", BYTES, many=True),
        2: Field("name", BYTES),
        5: Field("initializer", BYTES, many=True),
        11: Field("input", BYTES, many=True),
        12: Field("output", BYTES, many=True),
        13: Field("value_info", BYTES, many=True),
    },
)
FUNCTION = Message(
    "a function",
    {
        1: Field("name", BYTES),
        4: Field("input", BYTES, many=True),
        5: Field("output", BYTES, many=True),
        6: Field("attribute", BYTES, many=True),
        7: Field("node", BYTES, many=True),
        9: Field("opset_import", BYTES, many=True),
        10: Field("domain", BYTES),
    },
)
MODEL = Message(
    "a model",
    {
        1: Field("ir_version", VARINT),
        2: Field("producer_name", BYTES),
        3: Field("producer_version", BYTES),
        7: Field("graph", BYTES),
        8: Field("opset_import", BYTES, many=True),
        25: Field("functions", BYTES, many=True),
    },
)
