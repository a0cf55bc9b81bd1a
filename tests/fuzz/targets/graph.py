"""A bundle's graph, merged or live, with its size and hash in the manifest as they should be."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import onnx

from edgelora_runtime import Bundle
from edgelora_runtime.bundle.graphs.operators import NATIVE
from edgelora_runtime.bundle.manifest import MANIFEST
from tests.attacks.attack import Copy
from tests.fuzz.harness import Harness
from tests.fuzz.mutations import FLOATS, NUMBERS, TEXTS, mutate_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

KINDS = ("merged", "live")  # the first byte of an input is 0 or 1
NAMES = (
    "",
    "com.microsoft",
    "edgelora",
    "LiveMatMulNBits1",
    "Loop",
    "If",
    "Shape",
    "Gather",
    "Range",
    "Transpose",
    "location",
    "offset",
)


def build(bundle: Path, folder: Path) -> Harness:
    opens = [open_alone(bundle, folder / kind, kind) for kind in KINDS]
    seeds = [bytes([number]) + raw for number, (raw, _) in enumerate(opens)]

    def use(raw: bytes) -> None:
        opens[raw[0] % 2 if raw else 0][1](raw[1:])

    return Harness(seeds, mutate, use, limit=1 << 15)


def open_alone(bundle: Path, folder: Path, kind: str) -> tuple[bytes, Callable[[bytes], None]]:
    """Makes a bundle of one variant of a kind. Returns its graph, and what opens the bundle with another."""
    copy = Copy(bundle, folder)
    manifest = copy.read_manifest()
    name = next(name for name, entry in manifest["variants"].items() if entry["kind"] == kind)
    file = manifest["variants"][name]["graphs"]["cpu"]["file"]
    others = {entry["graphs"]["cpu"]["file"] for entry in manifest["variants"].values()} - {file}
    for other in others:
        (folder / other).unlink()
        del manifest["files"][other]
    manifest["variants"] = {name: manifest["variants"][name]}
    manifest["default_variant"] = name
    copy.write_manifest(manifest)
    good = (folder / file).read_bytes()
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    entry = '{{"size": {}, "sha256": "{}"}}'
    old = entry.format(len(good), hashlib.sha256(good).hexdigest())
    assert text.count(old) == 1
    blobs = set(manifest["variants"][name]["graphs"]["cpu"]["blobs"])

    def use(raw: bytes) -> None:
        copy.write_raw(file, raw)
        copy.write_raw(MANIFEST, text.replace(old, entry.format(len(raw), hashlib.sha256(raw).hexdigest())).encode())
        Bundle.open(folder)
        check_taken(raw, blobs)

    return good, use


def check_taken(raw: bytes, blobs: set[str]) -> None:
    """Holds a graph that was taken against what the onnx package reads in it."""
    model = onnx.ModelProto.FromString(raw)
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    for node in nodes:
        assert (node.domain, node.op_type) in NATIVE, f"calls {node.domain}.{node.op_type}"
        for attribute in node.attribute:
            assert not (attribute.HasField("g") or attribute.graphs), "holds a graph"
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            assert entry.key in ("location", "offset", "length"), f"says {entry.key}"
            assert entry.key != "location" or entry.value in blobs, f"maps {entry.value}"
        assert len(tensor.raw_data) < 1 << 17, "holds a large constant"
    assert not model.graph.sparse_initializer, "has sparse tensors"


def mutate(raw: bytes, chance: Random) -> bytes:
    """Changes fields of messages, which keeps all lengths right, or seldom bytes."""
    try:
        model = onnx.ModelProto.FromString(raw[1:])
    except Exception:  # protobuf's DecodeError, which has no types
        return mutate_bytes(raw, chance)
    if chance.randrange(6) == 0:
        return mutate_bytes(raw, chance)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        change_field(choose_message(model, chance), model, chance)
    kind = raw[:1] if chance.randrange(20) else bytes([raw[0] ^ 1])
    return kind + bytes(model.SerializePartialToString())


def choose_message(message: Any, chance: Random) -> Any:
    """Goes down from a message to one in it, and stops somewhere."""
    while True:
        inner: list[Any] = []
        for field, value in message.ListFields():
            if field.message_type is not None:
                inner.append(chance.choice(value) if field.is_repeated else value)
        if not inner or chance.randrange(5) == 0:
            return message
        message = chance.choice(inner)


def change_field(message: Any, model: Any, chance: Random) -> None:
    """Sets, repeats, moves or removes one field. Values that do not fit its type leave it as it is."""
    present = message.ListFields()
    field = (
        chance.choice([field for field, _ in present])
        if present and chance.randrange(3)
        else chance.choice(message.DESCRIPTOR.fields)
    )
    held = getattr(message, field.name)
    try:
        if chance.randrange(5) == 0:
            message.ClearField(field.name)
        elif field.message_type is not None:
            change_messages(held, field, choose_message(model, chance), chance)
        elif field.is_repeated:
            if held and chance.randrange(2):
                held[chance.randrange(len(held))] = choose_scalar(field, model, chance)
            else:
                held.extend([choose_scalar(field, model, chance)] * chance.choice((1, 1, 2, 9)))
        else:
            setattr(message, field.name, choose_scalar(field, model, chance))
    except (ValueError, TypeError):
        pass


def change_messages(held: Any, field: Any, other: Any, chance: Random) -> None:
    if not field.is_repeated:
        held.MergeFrom(other) if other.DESCRIPTOR is held.DESCRIPTOR else held.SetInParent()
    elif not held or chance.randrange(4) == 0:
        added = held.add()
        if other.DESCRIPTOR is added.DESCRIPTOR:
            added.CopyFrom(other)
    elif chance.randrange(2):
        held.add().CopyFrom(chance.choice(held))
    else:
        first, second = chance.choice(held), chance.choice(held)
        kept = type(first).FromString(first.SerializePartialToString())
        first.CopyFrom(second)
        second.CopyFrom(kept)


def choose_scalar(field: Any, model: Any, chance: Random) -> Any:
    """Chooses a value for a field: a hard one, or a name that the graph uses."""
    if field.cpp_type in (field.CPPTYPE_STRING,):
        node = chance.choice(model.graph.node) if model.graph.node else None
        used = [*node.input, *node.output, node.op_type] if node else []
        text = chance.choice((*NAMES, *TEXTS, *(str(number) for number in NUMBERS), *used))
        return text.encode(errors="surrogatepass") if field.type == field.TYPE_BYTES else text
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return chance.choice(FLOATS)
    return chance.choice((*NUMBERS[:-1], *range(24)))
