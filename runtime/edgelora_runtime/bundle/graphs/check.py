"""The check of a bundle's graphs before any session exists: what they may call, which bytes they map, and how much they ask for.

onnxruntime trusts a graph. It computes constant parts while a session opens, and follows any location that a graph names. So
each graph is read here first, whole, with every size bounded by the manifest, the blobs' sizes and the model's shapes.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from edgelora_runtime.bundle.graphs.operators import NATIVE, ONNX, PRODUCTS, TRACED
from edgelora_runtime.bundle.graphs.reading import GraphReader
from edgelora_runtime.bundle.graphs.wire import Budget, GraphError, show_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgelora_runtime.bundle.graphs.reading import Graph, Initializer, Node
    from edgelora_runtime.bundle.manifest import Manifest, ModelEntry, StageEntry

GRAPH_LIMIT = 1 << 23  # bytes; a graph of 80 layers with live inputs takes about a megabyte
_PARTS = 4_000_000  # fields of protobuf in all graphs of a bundle, equal parts counted once: about two seconds
_SHARED = 2  # times that a graph may read its blobs: once, and a tied embedding in the head too
_MADE_LIMIT = 1 << 20  # values of a tensor that a traced graph makes of one
_NUMBER_BYTES = 8  # of an int64
_CODES_PER_BYTE = 2  # of 4 bits, the fewest


def check_graphs(manifest: Manifest, read: Callable[[str, int], bytes]) -> None:
    """Walks every graph that the manifest lists.

    read: reads a file of the bundle, of at most so many bytes, and checks its hash. Raises GraphError for the first graph that
    export would not have written.
    """
    reader = GraphReader(NATIVE if manifest.model.cache == "in_place" else TRACED, Budget(_PARTS))
    live = {entry.graphs[target].file for entry in manifest.variants.values() if entry.kind == "live" for target in entry.graphs}
    wholes = {graph.file for entry in manifest.variants.values() for graph in entry.graphs.values()}
    checked: dict[str, StageEntry] = {}
    for variant in manifest.variants.values():
        for whole in variant.graphs.values():
            for entry in (whole, *whole.stages):
                if checked.setdefault(entry.file, entry).blobs != entry.blobs:
                    raise GraphError(f"{entry.file} maps different blobs for different variants; export the bundle again")
    for file, entry in checked.items():
        raw = read(file, GRAPH_LIMIT)
        try:
            graph = reader.read(raw)
            _check_blobs(graph, manifest.blob_bytes(entry))
            _check_order(graph, traced=manifest.model.cache == "growing")
            _check_defaults(graph)
            if file in wholes:
                _check_sizes(graph, manifest.find_model(file))
            if file in live:
                _check_live(graph, manifest, entry)
        except GraphError as error:
            raise GraphError(f"{file} {error}; export the bundle again") from None


def _check_blobs(graph: Graph, blobs: Mapping[str, int]) -> None:
    """Refuses values outside the blobs that the manifest gives the graph, and more of them than the blobs hold."""
    mapped = [each for each in graph.initializers if each.location is not None]
    for each in mapped:
        if each.location is None or each.location not in blobs:
            raise GraphError(f"maps {each.location!r}, which the manifest does not list among its blobs")
        if each.offset + each.nbytes > blobs[each.location]:
            raise GraphError(
                f"maps {each.nbytes} bytes from {each.offset} of {each.location}, which has {blobs[each.location]} bytes"
            )
    if unread := blobs.keys() - {each.location for each in mapped}:
        raise GraphError(f"does not map {', '.join(sorted(unread)[:4])}, which the manifest lists among its blobs")
    sizes = {each.name: each.nbytes for each in mapped}
    readers = Counter(name for node in graph.nodes if node.operator[1] in PRODUCTS for name in node.inputs if name in sizes)
    for what, count in (
        ("maps", sum(sizes.values())),
        ("multiplies by", sum(sizes[name] * times for name, times in readers.items())),
    ):
        if count > _SHARED * sum(blobs.values()):
            raise GraphError(f"{what} {count} bytes of blobs that have {sum(blobs.values())}")


def _check_order(graph: Graph, *, traced: bool) -> None:
    """Refuses what onnxruntime would compute while it opens the graph, and counting that does not follow the input's length.

    Every node reads values that earlier nodes made. traced: the graph is one of Optimum's, which counts more than positions.
    """
    optional = {each.name for each in graph.inputs}
    constants: dict[bytes, Initializer | None] = {each.name: each for each in graph.initializers if each.name not in optional}
    makers: dict[bytes, Node | None] = dict.fromkeys([*constants, *optional])
    for node in graph.nodes:
        given = [name for name in node.inputs if name]
        if unmade := [name for name in given if name not in makers]:
            raise GraphError(f"has a node {node.operator[1]} that reads {show_name(unmade[0])}, which no node before it makes")
        if node.operator == (ONNX, "Range") and not traced and not _counts_positions(given, makers, constants):
            raise GraphError("has a node Range that counts something else than positions")
        if all(name in constants for name in given):
            if not _may_fold(node, constants[given[0]] if given else None, traced=traced):
                raise GraphError(f"has a node {node.operator[1]} that computes constants alone")
            constants |= dict.fromkeys(node.outputs)
        for name in filter(None, node.outputs):
            if name in makers:
                raise GraphError(f"makes the value {show_name(name)} twice")
            makers[name] = node


def _counts_positions(given: list[bytes], makers: Mapping[bytes, Node | None], constants: Mapping[bytes, object]) -> bool:
    """True if a Range starts and steps by constants, and ends at one axis of a value's shape."""
    stop = makers[given[1]] if len(given) == 3 else None
    counted = makers[stop.inputs[0]] if stop is not None and stop.operator == (ONNX, "Gather") else None
    return counted is not None and counted.operator == (ONNX, "Shape") and {given[0], given[2]} <= constants.keys()


def _may_fold(node: Node, given: Initializer | None, *, traced: bool) -> bool:
    """True for a node that turns a weight, as gpu graphs in floats do, or makes a small tensor of one value in a traced graph."""
    if node.operator == (ONNX, "Transpose"):
        return given is not None
    return traced and node.operator == (ONNX, "ConstantOfShape") and _is_small(given)


def _is_small(shape: Initializer | None) -> bool:
    return (
        shape is not None
        and shape.values is not None
        and min(shape.values, default=0) >= 0
        and math.prod(shape.values) <= _MADE_LIMIT
    )


def _check_defaults(graph: Graph) -> None:
    """Refuses optional inputs whose default is more than empty factors or one number, which is what logits_to_keep has."""
    inputs = {each.name for each in graph.inputs}
    for each in graph.initializers:
        if each.name in inputs and each.nbytes > _NUMBER_BYTES:
            raise GraphError(f"has a default of {each.nbytes} bytes for its input {show_name(each.name)}")


def _check_sizes(graph: Graph, model: ModelEntry) -> None:
    """Refuses caches and logits of other sizes than the manifest's, by which their buffers are made."""
    pairs = {"past_key_values": graph.inputs, "present": graph.outputs}
    for stem, values in pairs.items():
        found = {each.name: each.sizes for each in values if each.name.startswith(f"{stem}.".encode())}
        if len(found) != 2 * model.layers:
            raise GraphError(f"has {len(found)} values {stem} for {model.layers} layers")
        for name, sizes in found.items():
            if len(sizes) != 4 or (sizes[1], sizes[3]) != (model.kv_heads, model.head_size):
                shape = f"(B, {model.kv_heads}, M, {model.head_size})"
                raise GraphError(f"has a value {show_name(name)} of another shape than {shape}, which the manifest says")
    logits = [each.sizes for each in graph.outputs if each.name == b"logits"]
    if len(logits) != 1 or len(logits[0]) != 3 or logits[0][2] != model.vocab_size:
        raise GraphError(f"has no output logits for {model.vocab_size} tokens, which the manifest says")


def _check_live(graph: Graph, manifest: Manifest, entry: StageEntry) -> None:
    """Refuses live slots that the graph lacks, or that its weights do not fit."""
    inputs = {each.name: each.sizes for each in graph.inputs}
    weights = 0
    for slots in manifest.live_slots:
        weights += slots.columns * sum(slots.rows)
        for name, size in ((slots.a, slots.columns), *zip(slots.b, slots.rows, strict=True)):
            sizes = inputs.get(name.encode())
            if sizes is None or len(sizes) != 2 or sizes[0] is not None or sizes[1] != size:
                raise GraphError(f"has no input {name!r} of shape (R, {size}), as live_slots say")
    bound = _CODES_PER_BYTE * sum(manifest.blob_bytes(entry).values())
    if weights > bound:
        raise GraphError(f"has live slots for {weights} weights, and blobs that hold at most {bound}")
