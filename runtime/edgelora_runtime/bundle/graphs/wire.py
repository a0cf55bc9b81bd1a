"""Protobuf messages, read field by field against a schema, with a bound on the number of fields.

Our own reader, since no dependency of the runtime reads protobuf as strictly: it knows the few messages of ONNX that a bundle
needs, refuses every field that it does not know, stops at a bound, and copies nothing large. The onnx package would have to be
imported, parses a whole graph first, and skips what it does not know, which onnxruntime may then read.
Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

VARINT, BYTES, FIXED32 = 0, 2, 5  # wire types; the others are in no message that a bundle needs
_LONGEST = 10  # bytes of a varint
_MOST_FIELDS = 1 << 18  # of one message; a graph of 80 layers has some ten thousand
_MORE = 0x80  # of a byte of a varint: another follows
_SIGN = 1 << 63


class GraphError(ValueError):
    """A graph that a bundle may not hold. The message is the rest of a sentence that starts with the file's name."""


class Field(NamedTuple):
    """A field of a message. wire: one of the wire types. many: whether it may repeat."""

    name: str
    wire: int
    many: bool = False


class Message:
    """A kind of message: its name with an article, for errors, and its fields by number.

    tags: the fields by what stands before them, which is the number and the wire type in one.
    """

    def __init__(self, name: str, fields: Mapping[int, Field]) -> None:
        self.name = name
        self.fields = fields
        self.tags = {number << 3 | field.wire: field for number, field in fields.items()}


class Budget:
    """The number of fields that may still be read."""

    def __init__(self, fields: int) -> None:
        self._left = fields

    def spend(self, fields: int) -> None:
        self._left -= fields
        if self._left < 0:
            raise GraphError("has more parts than a decoder's graphs need")


def read_message(raw: bytes, kind: Message, budget: Budget) -> dict[str, Any]:
    """Reads one message, but not the messages in it.

    Returns values by the names of fields: an int of a varint, bytes of all else, a list where the field may repeat. Fields that
    are absent are absent. Raises GraphError for bytes that are no such message, for a field that the kind lacks, for one of
    another wire type, and for a single field that is there twice, which parsers would merge.
    """
    tags = kind.tags
    found: dict[str, Any] = {}
    at, end, count = 0, len(raw), 0
    while at < end:
        count += 1
        if count > _MOST_FIELDS:
            raise GraphError(f"has {kind.name} of more than {_MOST_FIELDS} fields")
        tag = raw[at]
        at += 1
        if tag & _MORE:
            tag, at = _read_varint(raw, at - 1, kind)
        field = tags.get(tag)
        if field is None:
            raise _refuse_tag(tag, kind)
        name, wire, many = field
        value: int | bytes
        if wire == FIXED32:
            value = raw[at : at + 4]
            at += 4
        else:
            if at >= end:
                raise GraphError(f"ends inside {kind.name}")
            value = raw[at]
            at += 1
            if value & _MORE:
                value, at = _read_varint(raw, at - 1, kind)
            if wire == BYTES:
                start = at
                at += value
                value = raw[start:at]
        if at > end:
            raise GraphError(f"ends inside {kind.name}")
        if not many:
            if name in found:
                raise GraphError(f"has {kind.name} with two of the field {name}")
            found[name] = value
        elif name in found:
            found[name].append(value)
        else:
            found[name] = [value]
    budget.spend(count)
    return found


def read_text(raw: bytes, what: str, longest: int) -> str:
    """Decodes a text field. Raises GraphError if it is longer than `longest` bytes or not UTF-8."""
    if len(raw) > longest:
        raise GraphError(f"has {what} of {len(raw)} bytes; {longest} is the most")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise GraphError(f"has {what} that is not UTF-8") from None


def show_name(name: bytes) -> str:
    """Returns the start of a name, quoted, for an error."""
    return repr(name[:80].decode(errors="replace"))


def read_signed(value: int) -> int:
    """Returns the int64 that a varint stands for."""
    return value - 2 * _SIGN if value >= _SIGN else value


def _refuse_tag(tag: int, kind: Message) -> GraphError:
    known = kind.fields.get(tag >> 3)
    if known is None:
        return GraphError(f"has {kind.name} with field {tag >> 3}, which no graph of a bundle has")
    return GraphError(f"has {kind.name} whose {known.name} is of wire type {tag & 7}, not {known.wire}")


def _read_varint(raw: bytes, at: int, kind: Message) -> tuple[int, int]:
    """Returns the varint that starts at a place, and the place after it."""
    first, second = raw[at], raw[at + 1 : at + 2]
    if second and second[0] < _MORE:  # nearly always
        return first & 0x7F | second[0] << 7, at + 2
    value = 0
    for place, byte in enumerate(raw[at : at + _LONGEST]):
        value |= (byte & 0x7F) << 7 * place
        if not byte & _MORE:
            if value >= 2 * _SIGN:
                break
            return value, at + place + 1
    raise GraphError(f"has {kind.name} with a number that does not end")
