"""One graph's file, walked part by part: what each part is checked for by itself, and the facts that remain.

Parts repeat: layers have equal attributes and types, and variants share nodes and weights. So each distinct part is read once,
however many graphs hold it.
"""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from edgelora_runtime.bundle.graphs import messages
from edgelora_runtime.bundle.graphs.operators import (
    FUNCTION_NAMES,
    FUNCTIONS,
    JOINED_BODY,
    LIVE_BODY,
    LIVE_PRODUCTS,
    ONNX,
    OPSETS,
)
from edgelora_runtime.bundle.graphs.wire import Budget, GraphError, read_message, read_signed, read_text, show_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from edgelora_runtime.bundle.graphs.operators import Operators
    from edgelora_runtime.bundle.graphs.wire import Message

_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2}  # by ONNX's number: float32, uint8, int8, int32, int64, bool, float16
_INT64 = 7  # ONNX's number
_EXTERNAL = 1  # TensorProto.data_location
_INLINE_LIMIT = 1 << 16  # bytes of a tensor in the graph's own file, such as shapes and scalars
_SIZE_LIMIT = 1 << 40  # of one dimension, and of the bytes of one tensor
_NAME_LIMIT = 512  # bytes
_TEXT_LIMIT = 128  # bytes of an attribute's text
_RANK_LIMIT = 8  # dimensions
_NODE_LIMIT = 1 << 16
_IR_VERSIONS = range(8, 14)

Part = TypeVar("Part")


class Value(NamedTuple):
    """An input or output of a graph. sizes: None for a symbolic axis."""

    name: bytes
    elem_type: int
    sizes: tuple[int | None, ...]


class Initializer(NamedTuple):
    """A constant.

    location: the name of its blob, and the place in it in bytes. None for one in the graph's own file. values: of a few int64 in
    the graph's own file.
    """

    name: bytes
    dims: tuple[int, ...]
    nbytes: int
    location: str | None = None
    offset: int = 0
    values: tuple[int, ...] | None = None


class Node(NamedTuple):
    """A call of an operator or of a function."""

    operator: tuple[str, str]
    inputs: tuple[bytes, ...]
    outputs: tuple[bytes, ...]


@dataclass(frozen=True)
class Graph:
    """The facts of a graph's file that its bundle must agree with."""

    nodes: tuple[Node, ...]
    initializers: tuple[Initializer, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    functions: frozenset[str]


@dataclass
class GraphReader:
    """A reader of a bundle's graphs. Raises GraphError for what no graph of a bundle has.

    operators: those that nodes may call. budget: the parts that all graphs may have together.
    """

    operators: Operators
    budget: Budget
    _seen: defaultdict[str, dict[bytes, Any]] = field(default_factory=lambda: defaultdict(dict))
    _operators_read: dict[tuple[bytes, bytes], tuple[str, str]] = field(default_factory=dict)

    def read(self, raw: bytes) -> Graph:
        """Walks the bytes of one graph's file."""
        model = self._message(raw, messages.MODEL)
        if model.get("ir_version") not in _IR_VERSIONS:
            raise GraphError(f"has version {model.get('ir_version')} of ONNX's format")
        self._check_opsets(model.get("opset_import", ()))
        bodies = [self._read_once("function", each, self._read_function) for each in model.get("functions", ())]
        functions = {name for name, _ in bodies}
        if len(functions) < len(bodies):
            raise GraphError("defines a function twice")
        graph = self._message(model.get("graph", b""), messages.GRAPH)
        nodes = self._read_nodes(graph.get("node", ()), self.operators)
        if missing := _find_calls(nodes).union(*(called for _, called in bodies)) - functions:
            raise GraphError(f"calls functions that it does not define: {', '.join(sorted(missing))}")
        values = {
            kind: tuple(self._read_once("value", each, self._read_value) for each in graph.get(kind, ()))
            for kind in ("input", "output", "value_info")
        }
        held = graph.get("initializer", ())
        initializers = tuple(self._read_once("initializer", each, self._read_initializer) for each in held)
        for what, names in (
            ("initializers", [each.name for each in initializers]),
            ("inputs", [each.name for each in values["input"]]),
            ("outputs", [each.name for each in values["output"]]),
        ):
            if len(set(names)) < len(names):
                raise GraphError(f"has two {what} of one name")
        return Graph(nodes, initializers, values["input"], values["output"], frozenset(functions))

    def _read_nodes(self, raw: Iterable[bytes], operators: Operators) -> tuple[Node, ...]:
        nodes = tuple(self._read_once("node", each, self._read_node) for each in raw)
        if len(nodes) > _NODE_LIMIT:
            raise GraphError(f"has {len(nodes)} nodes; {_NODE_LIMIT} is the most")
        for node in nodes:
            if node.operator not in operators:
                domain, name = node.operator
                raise GraphError(f"uses the operator {f'{domain}.' * bool(domain)}{name}, which graphs of its kind do not use")
        return nodes

    def _read_node(self, raw: bytes) -> Node:
        node = self._message(raw, messages.NODE)
        inputs, outputs = tuple(node.get("input", ())), tuple(node.get("output", ()))
        if (longest := max(map(len, (node.get("name", b""), *inputs, *outputs)))) > _NAME_LIMIT:
            raise GraphError(f"has a name of {longest} bytes; {_NAME_LIMIT} is the most")
        names = (node.get("domain", b""), node.get("op_type", b""))
        operator = self._operators_read.get(names)
        if operator is None:
            operator = (read_text(names[0], "a domain", _TEXT_LIMIT), read_text(names[1], "an operator's name", _TEXT_LIMIT))
            self._operators_read[names] = operator
        attributes = [self._read_once("attribute", each, self._read_attribute) for each in node.get("attribute", ())]
        if len(set(attributes)) < len(attributes):
            raise GraphError(f"has a node {operator[1]} with two attributes of one name")
        return Node(operator, inputs, outputs)

    def _read_attribute(self, raw: bytes) -> bytes:
        """Returns an attribute's name."""
        attribute = self._message(raw, messages.ATTRIBUTE)
        kind = messages.ATTRIBUTE_KINDS.get(attribute.get("type", 0))
        if kind is None:
            raise GraphError(f"has an attribute of type {attribute.get('type', 0)}, which no operator of a bundle takes")
        if len(attribute.get("s", b"")) > _TEXT_LIMIT:
            raise GraphError(f"has an attribute of {len(attribute['s'])} bytes; {_TEXT_LIMIT} is the most for a text")
        if foreign := attribute.keys() - {"name", "type", "ref_attr_name", kind}:
            raise GraphError(f"has an attribute of type {attribute['type']} with a value of another: {sorted(foreign)[0]}")
        if "ref_attr_name" in attribute and kind in attribute:
            raise GraphError("has an attribute with a value and a reference")
        if kind == "t":
            self._read_inline(self._message(attribute.get("t", b""), messages.TENSOR))
        name: bytes = attribute.get("name", b"")
        return name

    def _read_initializer(self, raw: bytes) -> Initializer:
        tensor = self._message(raw, messages.TENSOR)
        if tensor.get("data_location", 0) != _EXTERNAL and "external_data" not in tensor:
            return self._read_inline(tensor)
        name, dims, nbytes = self._measure(tensor)
        entries = [self._read_once("entry", each, self._read_entry) for each in tensor.get("external_data", ())]
        named = dict(entries)
        if tensor.get("data_location") != _EXTERNAL or _count_held(tensor) or len(named) < len(entries):
            raise GraphError(f"says twice where the values of {show_name(name)} are")
        if named.keys() != {b"location", b"offset", b"length"}:
            keys = b", ".join(sorted(named)).decode(errors="replace")[:_NAME_LIMIT]
            raise GraphError(f"says with {keys} where the values of {show_name(name)} are; use location, offset and length")
        offset, length = (_read_count(named[key], name) for key in (b"offset", b"length"))
        if length != nbytes:
            raise GraphError(f"takes {length} bytes for {show_name(name)}, whose shape has {nbytes}")
        return Initializer(name, dims, nbytes, read_text(named[b"location"], "a location", _NAME_LIMIT), offset)

    def _read_entry(self, raw: bytes) -> tuple[bytes, bytes]:
        entry = self._message(raw, messages.ENTRY)
        return entry.get("key", b""), entry.get("value", b"")

    def _read_inline(self, tensor: dict[str, Any]) -> Initializer:
        name, dims, nbytes = self._measure(tensor)
        held = _count_held(tensor)
        if held != nbytes or "external_data" in tensor or tensor.get("data_location", 0):
            raise GraphError(f"holds {held} bytes for {show_name(name)}, whose shape has {nbytes}")
        if held > _INLINE_LIMIT:
            raise GraphError(f"holds {held} bytes of {show_name(name)}; {_INLINE_LIMIT} is the most for a constant")
        raw = tensor.get("raw_data")
        if raw is None or tensor["data_type"] != _INT64 or len(raw) > _RANK_LIMIT * 8:
            return Initializer(name, dims, nbytes)
        return Initializer(name, dims, nbytes, values=struct.unpack(f"<{len(raw) // 8}q", raw))

    def _measure(self, tensor: dict[str, Any]) -> tuple[bytes, tuple[int, ...], int]:
        """Returns a tensor's name, its dimensions and the bytes of its values."""
        name = bytes(tensor.get("name", b""))
        item = _ITEM_BYTES.get(tensor.get("data_type", 0))
        if item is None:
            raise GraphError(f"has a tensor of type {tensor.get('data_type', 0)}, which no graph of a bundle has")
        dims = tuple(map(read_signed, tensor.get("dims", ())))
        _check_sizes(dims)
        if len(name) > _NAME_LIMIT or (nbytes := item * math.prod(dims)) > _SIZE_LIMIT:
            raise GraphError("has a tensor whose name or shape is too large")
        return name, dims, nbytes

    def _read_value(self, raw: bytes) -> Value:
        value = self._message(raw, messages.VALUE)
        name: bytes = value.get("name", b"")
        if len(name) > _NAME_LIMIT:
            raise GraphError(f"has a name of {len(name)} bytes; {_NAME_LIMIT} is the most")
        elem_type, sizes = self._read_once("type", value.get("type", b""), self._read_type)
        return Value(name, elem_type, sizes)

    def _read_type(self, raw: bytes) -> tuple[int, tuple[int | None, ...]]:
        if not raw:
            return 0, ()
        tensor = self._message(self._message(raw, messages.TYPE).get("tensor_type", b""), messages.TENSOR_TYPE)
        elem_type = tensor.get("elem_type", 0)
        if elem_type not in _ITEM_BYTES:
            raise GraphError(f"has a value of type {elem_type}, which no graph of a bundle has")
        dims = self._message(tensor.get("shape", b""), messages.SHAPE).get("dim", ())
        sizes = tuple(self._read_once("dimension", each, self._read_dimension) for each in dims)
        _check_sizes(sizes)
        return elem_type, sizes

    def _read_dimension(self, raw: bytes) -> int | None:
        dimension = self._message(raw, messages.DIMENSION)
        if len(dimension.get("symbol", b"")) > _NAME_LIMIT:
            raise GraphError("has a dimension with an endless name")
        return read_signed(dimension["size"]) if "size" in dimension else None

    def _read_function(self, raw: bytes) -> tuple[str, set[str]]:
        """Returns a function's name, and the names of those that it calls."""
        function = self._message(raw, messages.FUNCTION)
        name = read_text(function.get("name", b""), "a function's name", _TEXT_LIMIT)
        if function.get("domain") != FUNCTIONS.encode() or name not in FUNCTION_NAMES:
            raise GraphError(f"defines the function {name}, which is none of edgelora's")
        self._check_opsets(function.get("opset_import", ()))
        nodes = self._read_nodes(function.get("node", ()), LIVE_BODY if name in LIVE_PRODUCTS else JOINED_BODY)
        return name, _find_calls(nodes)

    def _check_opsets(self, entries: Iterable[bytes]) -> None:
        found: dict[str, int] = {}
        for raw in entries:
            entry = self._message(raw, messages.OPSET)
            domain = read_text(entry.get("domain", b""), "a domain", _TEXT_LIMIT)
            version = entry.get("version", 0)
            if domain in found or version not in OPSETS.get(domain, ()):
                raise GraphError(f"imports version {version} of the operators {domain!r}")
            found[domain] = version
        if ONNX not in found:
            raise GraphError("imports no operators of ONNX")

    def _read_once(self, kind: str, raw: bytes, read: Callable[[bytes], Part]) -> Part:
        """Returns what a part was read as, if an equal one was."""
        seen: dict[bytes, Part] = self._seen[kind]
        found = seen.get(raw)
        if found is None:
            found = seen[raw] = read(raw)
        return found

    def _message(self, raw: bytes, kind: Message) -> dict[str, Any]:
        return read_message(raw, kind, self.budget)


def _find_calls(nodes: Iterable[Node]) -> set[str]:
    return {name for domain, name in (node.operator for node in nodes) if domain == FUNCTIONS}


def _check_sizes(sizes: Sequence[int | None]) -> None:
    if len(sizes) > _RANK_LIMIT:
        raise GraphError(f"has a tensor of {len(sizes)} dimensions; {_RANK_LIMIT} is the most")
    for size in sizes:
        if size is not None and not 0 <= size <= _SIZE_LIMIT:
            raise GraphError(f"has a dimension of {size}")


def _count_held(tensor: dict[str, Any]) -> int:
    """Returns the bytes that the values in a tensor's own fields take, of which one may be used."""
    item = _ITEM_BYTES[tensor["data_type"]]
    held = [len(tensor.get("raw_data", b""))]
    for name, width in messages.PACKED.items():
        raw = b"".join(tensor.get(name, ()))
        held.append(item * (len(raw) // width if width else sum(byte < 0x80 for byte in raw)))
    if sum(map(bool, held)) > 1:
        raise GraphError("has a tensor that holds its values twice")
    return sum(held)


def _read_count(raw: bytes, name: bytes) -> int:
    """Reads an offset or a length."""
    if not raw.isdigit() or len(raw) > 15:
        raise GraphError(f"says {raw[:40].decode(errors='replace')} where {show_name(name)} has an offset or a length")
    return int(raw)
