"""Attacks by a bundle's graphs: what they call, where their weights are, how large they say they are, and their bytes."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

import onnx
from onnx import AttributeProto, ModelProto, TensorProto, helper

from edgelora_runtime import Bundle
from tests.attacks.attack import Attack, Copy, make_copy, open_bundle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Change = Callable[[Any], object]

HUGE = 1 << 62


def find_graph(copy: Copy, kind: str) -> str:
    """The file of the first graph of a kind."""
    variants = copy.read_manifest()["variants"].values()
    return next(str(entry["graphs"]["cpu"]["file"]) for entry in variants if entry["kind"] == kind)


def edit(change: Change, kind: str = "merged") -> Callable[[Copy], None]:
    """A change of one graph, as the onnx package reads it."""

    def apply(copy: Copy) -> None:
        file = find_graph(copy, kind)
        model = onnx.load(str(copy.folder / file), load_external_data=False)
        change(model)
        copy.replace(file, model.SerializeToString())

    return apply


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[Copy], None]:
    """A change of one graph's bytes."""

    def apply(copy: Copy) -> None:
        file = find_graph(copy, "merged")
        copy.replace(file, change((copy.folder / file).read_bytes()))

    return apply


def add_node(op_type: str, inputs: list[str] | None = None, domain: str = "", **attributes: Any) -> Change:
    def change(model: ModelProto) -> None:
        given = ["input_ids"] if inputs is None else inputs
        model.graph.node.append(helper.make_node(op_type, given, [f"out.{len(model.graph.node)}"], domain=domain, **attributes))

    return change


def endless_loop(model: ModelProto) -> None:
    """A loop of 2^62 turns, which no timeout reaches."""
    turn = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    again = helper.make_tensor_value_info("again", TensorProto.BOOL, [])
    body = helper.make_graph([helper.make_node("Identity", ["c"], ["again"])], "body", [turn, again], [again])
    add_inline(model, "turns", [HUGE])
    model.graph.node.append(helper.make_node("Loop", ["turns", ""], [], body=body))


def branch(model: ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("If", ["input_ids"], [], then_branch=body, else_branch=body))


def scan(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Scan", ["input_ids"], [], body=helper.make_graph([], "b", [], [])))


def graph_in_a_known_operator(model: ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("body", helper.make_graph([], "b", [], [])))


def add_attribute(**fields: Any) -> Change:
    return lambda model: model.graph.node[0].attribute.append(AttributeProto(name="x", **fields))


def add_inline(model: ModelProto, name: str, values: list[int]) -> None:
    raw = b"".join(value.to_bytes(8, "little", signed=True) for value in values)
    model.graph.initializer.append(TensorProto(name=name, data_type=TensorProto.INT64, dims=[len(values)], raw_data=raw))


def constant_fold(model: ModelProto) -> None:
    """Shapes that onnxruntime would compute while it opens the graph: a terabyte."""
    add_inline(model, "a", [1 << 20])
    model.graph.node.insert(0, helper.make_node("Mul", ["a", "a"], ["b"]))
    model.graph.node.insert(1, helper.make_node("Range", ["a", "b", "a"], ["c"]))


def count_inputs(model: ModelProto) -> None:
    """A Range whose end is the value of a token."""
    add_inline(model, "a", [1])
    model.graph.node.append(helper.make_node("Range", ["a", "input_ids", "a"], ["c"]))


def add_function(domain: str, name: str, *nodes: Any, versions: tuple[tuple[str, int], ...] = (("", 21),)) -> Change:
    def change(model: ModelProto) -> None:
        opsets = [helper.make_opsetid(each, version) for each, version in versions]
        function = helper.make_function(domain, name, ["x"], ["y"], list(nodes), opsets, [])
        model.functions.append(function)

    return change


def nested_functions(model: ModelProto) -> None:
    """Thirty functions that each call the one before twice: two to the thirtieth nodes when they are inlined."""
    for depth in range(30):
        calls = [helper.make_node(f"F{depth - 1}", ["x"], [f"y{i}"], domain="edgelora") for i in range(2)] if depth else []
        add_function("edgelora", f"F{depth}", *calls)(model)


def external(**entries: str | None) -> Change:
    """Changes where the first external initializer's values are. None leaves a key out, and names may end in _ to repeat."""

    def change(model: ModelProto) -> None:
        tensor = next(each for each in model.graph.initializer if each.external_data)
        found = {entry.key: entry.value for entry in tensor.external_data}
        found |= {key: value for key, value in entries.items() if value is not None}
        del tensor.external_data[:]
        for key, value in found.items():
            if entries.get(key, "") is not None:
                tensor.external_data.add(key=key.rstrip("_"), value=value)

    return change


def tensor(**fields: Any) -> Change:
    """Changes fields of the first external initializer. A list replaces a list."""

    def change(model: ModelProto) -> None:
        found = next(each for each in model.graph.initializer if each.external_data)
        for name, value in fields.items():
            if isinstance(value, list):
                del getattr(found, name)[:]
                getattr(found, name).extend(value)
            else:
                setattr(found, name, value)

    return change


def not_external(model: ModelProto) -> None:
    found = next(each for each in model.graph.initializer if each.external_data)
    del found.external_data[:]


def inline(size: int) -> Change:
    def change(model: ModelProto) -> None:
        model.graph.initializer.append(TensorProto(name="x", data_type=TensorProto.UINT8, dims=[size], raw_data=bytes(size)))

    return change


def map_again(times: int) -> Change:
    """Maps the largest blob as many tensors, each of which onnxruntime would pack for itself."""

    def change(model: ModelProto) -> None:
        tensors = [each for each in model.graph.initializer if each.external_data]
        largest = max(tensors, key=lambda each: int(next(e.value for e in each.external_data if e.key == "length")))
        for number in range(times):
            copy = model.graph.initializer.add()
            copy.CopyFrom(largest)
            copy.name = f"again.{number}"

    return change


def multiply_again(times: int) -> Change:
    def change(model: ModelProto) -> None:
        node = next(each for each in model.graph.node if each.op_type in ("MatMulNBits", "FusedMatMul", "MatMul"))
        for number in range(times):
            copy = model.graph.node.add()
            copy.CopyFrom(node)
            copy.output[0] = f"again.{number}"
            copy.name = ""

    return change


def value(name: str, elem_type: int, shape: list[Any]) -> Change:
    return lambda model: model.graph.value_info.append(helper.make_tensor_value_info(name, elem_type, shape))


def other_type(kind: str) -> Change:
    def change(model: ModelProto) -> None:
        info = model.graph.value_info.add(name="x")
        if kind == "sequence":
            info.type.sequence_type.elem_type.tensor_type.elem_type = 1
        elif kind == "map":
            info.type.map_type.key_type = 7
        else:
            info.type.optional_type.elem_type.tensor_type.elem_type = 1

    return change


def opset(domain: str, version: int) -> Change:
    return lambda model: model.opset_import.append(helper.make_opsetid(domain, version))


def no_opset(model: ModelProto) -> None:
    del model.opset_import[:]


def twice(field: str) -> Change:
    return lambda model: getattr(model.graph, field).append(getattr(model.graph, field)[0])


def cycle(model: ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def many_nodes(model: ModelProto) -> None:
    nodes = [helper.make_node("Neg", ["input_ids" if i == 0 else f"n{i - 1}"], [f"n{i}"]) for i in range(70_000)]
    model.graph.node.extend(nodes)


def long_name(model: ModelProto) -> None:
    model.graph.node[0].name = "x" * 100_000


def set_default(model: ModelProto, name: str, dims: list[int]) -> None:
    found = next(each for each in model.graph.initializer if each.name == name)
    size = 4
    for dim in dims:
        size *= dim
    found.data_type = TensorProto.FLOAT
    del found.dims[:]
    found.dims.extend(dims)
    found.raw_data = bytes(size)


def filled_factors(model: ModelProto) -> None:
    """A live base that carries an adapter by default, which would answer in the bare base's place."""
    overridable = {each.name for each in model.graph.input}
    name = next(each.name for each in model.graph.initializer if each.name in overridable and each.name.endswith("lora_A"))
    columns = next(each for each in model.graph.initializer if each.name == name).dims[1]
    set_default(model, name, [1, columns])


def shape_of(name: str, sizes: list[int]) -> Change:
    """Gives an input or output other fixed sizes, from the last axis backwards."""

    def change(model: ModelProto) -> None:
        found = next(each for each in (*model.graph.input, *model.graph.output) if each.name == name)
        dims = found.type.tensor_type.shape.dim
        for dim, size in zip(reversed(dims), reversed(sizes), strict=False):
            dim.dim_value = size

    return change


def slots(change: Callable[[dict[str, Any]], None]) -> Callable[[Copy], None]:
    """A change of the first live slot in the manifest."""

    def apply(copy: Copy) -> None:
        manifest = copy.read_manifest()
        change(manifest["live_slots"][0])
        copy.write_manifest(manifest)

    return apply


def claim_large_slots(copy: Copy) -> None:
    """Slots that graph and manifest agree on, for factors of terabytes, beside weights of kilobytes."""
    manifest = copy.read_manifest()
    size = 1 << 20
    names = set()
    for slot in manifest["live_slots"]:
        names |= {slot["a"], *slot["b"]}
        slot.update(columns=size, rows=[size] * len(slot["rows"]))
    copy.write_manifest(manifest)

    def widen(model: ModelProto) -> None:
        for each in (*model.graph.input, *model.graph.value_info):
            if each.name in names:
                each.type.tensor_type.shape.dim[1].dim_value = size

    edit(widen, "live")(copy)


def add_blob(copy: Copy) -> None:
    """A blob that the manifest gives to a graph, and the graph does not map."""
    copy.replace("extra.bin", bytes(64))
    manifest = copy.read_manifest()
    next(iter(manifest["variants"].values()))["graphs"]["cpu"]["blobs"].append("extra.bin")
    copy.write_manifest(manifest)


def varint(number: int) -> bytes:
    raw = b""
    while number > 0x7F:
        raw += bytes([number & 0x7F | 0x80])
        number >>= 7
    return raw + bytes([number])


def field_bytes(number: int, wire: int, rest: bytes) -> bytes:
    """A field of a message, as protobuf writes it."""
    return varint(number << 3 | wire) + rest


def message_bytes(number: int, content: bytes) -> bytes:
    """A field that holds a message."""
    return field_bytes(number, 2, varint(len(content)) + content)


EDITS: dict[str, Change] = {
    "a loop of 2^62 turns": endless_loop,
    "a branch": branch,
    "a scan": scan,
    "a graph inside a known operator": graph_in_a_known_operator,
    "an operator of another domain": add_node("Evil", domain="evil.example"),
    "an operator of onnx.ml": add_node("TreeEnsemble", domain="ai.onnx.ml"),
    "an operator in Python": add_node("PyOp", domain="com.microsoft"),
    "a trained operator of com.microsoft": add_node("QMoE", domain="com.microsoft"),
    "a random number": add_node("RandomNormal", [], shape=[1 << 40]),
    "a decoder of images": add_node("ImageDecoder"),
    "an operator on text": add_node("StringSplit"),
    "a sequence": add_node("SequenceEmpty", []),
    "a constant as a node": add_node("Constant", [], value_ints=[1]),
    "a tensor made of a shape": add_node("ConstantOfShape", ["attention_mask"]),
    "a resize": add_node("Resize"),
    "an operator with a control character": add_node("Evil\x1b[2J\n"),
    "a name of an operator without end": add_node("E" * 100_000),
    "an attribute of type graph": add_attribute(type=AttributeProto.GRAPH),
    "an attribute of graphs": add_attribute(type=AttributeProto.GRAPHS),
    "an attribute of a sparse tensor": add_attribute(type=AttributeProto.SPARSE_TENSOR),
    "an attribute of a type": add_attribute(type=AttributeProto.TYPE_PROTO),
    "an attribute of no type": add_attribute(),
    "an attribute with a value of another type": add_attribute(type=AttributeProto.INT, f=1.0),
    "an attribute of a long text": add_attribute(type=AttributeProto.STRING, s=b"x" * 10_000),
    "an attribute with a large tensor": add_attribute(
        type=AttributeProto.TENSOR, t=TensorProto(data_type=2, dims=[100_000], raw_data=bytes(100_000))
    ),
    "two attributes of one name": lambda model: [add_attribute(type=2, i=n)(model) for n in (1, 2)],
    "constants to fold into a terabyte": constant_fold,
    "a count of a token's value": count_inputs,
    "a function of another domain": add_function("evil", "F"),
    "a function of another name": add_function("edgelora", "F"),
    "a function with a loop": add_function("edgelora", "LiveMatMulNBits1", helper.make_node("Loop", ["x"], ["y"])),
    "a function that calls itself": add_function(
        "edgelora", "LiveMatMulNBits1", helper.make_node("LiveMatMulNBits1", ["x"], ["y"], domain="edgelora")
    ),
    "a function with operators of another domain": add_function("edgelora", "LiveMatMulNBits1", versions=(("evil", 1),)),
    "a function twice": lambda model: [add_function("edgelora", "LiveMatMulNBits1")(model) for _ in "ab"],
    "nested functions": nested_functions,
    "a call of a function that is absent": add_node("LiveMatMulNBits2", domain="edgelora"),
    "weights in a parent folder": external(location="../secret.bin"),
    "weights in /etc/passwd": external(location="/etc/passwd"),
    "weights on a drive": external(location="C:\\secret.bin"),
    "weights in memory": external(location="*/_ORT_MEM_ADDR_/*"),
    "weights behind a zero byte": external(location="a\0b"),
    "weights at an empty name": external(location=""),
    "weights in the folder itself": external(location="."),
    "weights in the manifest": external(location="bundle.json"),
    "weights in the tokenizer": external(location="tokenizer.json"),
    "weights at a name of 100 kB": external(location="x" * 100_000),
    "an offset below zero": external(offset="-1"),
    "an offset past the file": external(offset=str(1 << 40)),
    "an offset past 64 bits": external(offset=str(1 << 70)),
    "an offset in words": external(offset="1e3"),
    "an offset with a space": external(offset=" 5"),
    "no offset": external(offset=None),
    "no length": external(length=None),
    "no location": external(location=None),
    "another length": external(length="4"),
    "a checksum": external(checksum="0" * 40),
    "prepacked weights": external(prepacked_0="x|0|64|0"),
    "a location twice": external(location_="../x"),
    "a dimension below zero": tensor(dims=[-1, 4]),
    "dimensions of 2^62": tensor(dims=[HUGE, HUGE]),
    "a dimension of zero and one of 2^62": tensor(dims=[0, HUGE]),
    "a hundred dimensions": tensor(dims=[1] * 100),
    "text as weights": tensor(data_type=TensorProto.STRING),
    "complex weights": tensor(data_type=TensorProto.COMPLEX128),
    "weights of an unknown type": tensor(data_type=99),
    "weights inside and outside": tensor(raw_data=b"1234"),
    "weights in parts": lambda model: setattr(model.graph.initializer[0].segment, "begin", 0),
    "external weights that are nowhere": not_external,
    "external data of an inline tensor": tensor(data_location=TensorProto.DEFAULT),
    "a large constant": inline(100_000),
    "a blob mapped a thousand times": map_again(1000),
    "a product a thousand times": multiply_again(1000),
    "a value of 2^62": value("x", 1, [HUGE]),
    "a value of text": value("x", 8, [1]),
    "a value of a hundred dimensions": value("x", 1, [1] * 100),
    "a sequence as a value": other_type("sequence"),
    "a map as a value": other_type("map"),
    "an optional value": other_type("optional"),
    "operators of another domain": opset("evil", 1),
    "operators of version 999": lambda model: setattr(model.opset_import[0], "version", 999),
    "operators twice": opset("", 20),
    "no operators": no_opset,
    "a format of version 99": lambda model: setattr(model, "ir_version", 99),
    "two inputs of one name": twice("input"),
    "two outputs of one name": twice("output"),
    "two initializers of one name": twice("initializer"),
    "two nodes that make one value": twice("node"),
    "a circle of nodes": cycle,
    "a value that nobody makes": add_node("Neg", ["nowhere"]),
    "70,000 nodes": many_nodes,
    "a name of 100 kB": long_name,
    "a sparse initializer": lambda model: model.graph.sparse_initializer.add().dims.append(1),
    "a quantization annotation": lambda model: setattr(model.graph.quantization_annotation.add(), "tensor_name", "x"),
    "training": lambda model: setattr(model.training_info.add().algorithm, "name", "x"),
    "metadata": lambda model: setattr(model.metadata_props.add(), "key", "x"),
    "documentation": lambda model: setattr(model, "doc_string", "x" * 1000),
    "logits of another vocabulary": shape_of("logits", [1 << 30]),
    "caches of other sizes": shape_of("past_key_values.0.key", [1 << 20]),
    "no logits": lambda model: model.graph.output.remove(next(o for o in model.graph.output if o.name == "logits")),
}
LIVE_EDITS: dict[str, Change] = {
    "factors by default": filled_factors,
    "a function without a body's operators": lambda model: model.functions[0].node.append(helper.make_node("Loop", ["x"], ["q"])),
    "a function that is missing": lambda model: model.functions.pop(),
}
LIVE_SLOTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "slots of 2^31 columns": lambda slot: slot.update(columns=(1 << 31) - 1),
    "slots of 2^31 rows": lambda slot: slot.update(rows=[(1 << 31) - 1] * len(slot["rows"])),
    "slots of other columns": lambda slot: slot.update(columns=slot["columns"] + 1),
    "slots of other rows": lambda slot: slot.update(rows=[rows + 1 for rows in slot["rows"]]),
    "slots of another input": lambda slot: slot.update(a="input_ids"),
    "slots of a thousand parts": lambda slot: slot.update({key: slot[key][:1] * 1000 for key in ("b", "modules", "rows")}),
}
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "zeros": lambda raw: bytes(len(raw)),
    "a script": lambda raw: b"#!/bin/sh\nrm -rf /\n",
    "half of it": lambda raw: raw[: len(raw) // 2],
    "without its last byte": lambda raw: raw[:-1],
    "16 MiB of nothing": lambda raw: raw + bytes(16 << 20),
    "7 MiB of empty nodes": lambda raw: b"\x08\x0a" + message_bytes(8, b"\x10\x15") + message_bytes(7, b"\x0a\x00" * (7 << 19)),
    "two graphs, which parsers merge": lambda raw: raw + message_bytes(7, b""),
    "an unknown field": lambda raw: raw + field_bytes(99, 0, b"\x01"),
    "a field of number zero": lambda raw: raw + b"\x00\x01",
    "a group": lambda raw: raw + field_bytes(7, 3, b"") + field_bytes(7, 4, b""),
    "a field of a wrong wire type": lambda raw: raw + field_bytes(1, 1, bytes(8)),
    "a length past the end": lambda raw: raw + field_bytes(8, 2, b"\xff\xff\xff\xff\x0f"),
    "a length of 2^63": lambda raw: raw + field_bytes(8, 2, b"\xff" * 9 + b"\x01"),
    "a number without end": lambda raw: raw + field_bytes(8, 2, b"\xff" * 20),
    "graphs a thousand deep": lambda raw: reduce(lambda inner, _: message_bytes(7, inner), range(1000), b""),
}


def list_attacks(bundle: Path) -> Iterator[Attack]:
    manifest = Bundle.open(bundle).manifest
    for name, change in EDITS.items():
        yield Attack("graph", name, make_copy(bundle, edit(change)), open_bundle)
    for name, rewrite in BYTES.items():
        yield Attack("graph", name, make_copy(bundle, edit_bytes(rewrite)), open_bundle)
    yield Attack("graph", "a blob that it does not map", make_copy(bundle, add_blob), open_bundle)
    if manifest.live_graph("cpu") is None:
        return
    for name, change in LIVE_EDITS.items():
        yield Attack("live graph", name, make_copy(bundle, edit(change, "live")), open_bundle)
    yield Attack("live graph", "slots larger than the weights", make_copy(bundle, claim_large_slots), open_bundle)
    for name, resize in LIVE_SLOTS.items():
        yield Attack("live graph", name, make_copy(bundle, slots(resize)), open_bundle)
