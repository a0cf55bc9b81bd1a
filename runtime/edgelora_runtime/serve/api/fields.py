"""The check of a request's fields by their schemas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora_runtime.errors import suggest_name
from edgelora_runtime.serve.failures import RequestFailed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelora_runtime.serve.api.schemas import Schema

# Values of a field that ask for nothing, which clients send for fields that they do not use.
_ASKS_FOR_NOTHING: tuple[object, ...] = (None, False, 0, "", [], {}, "none", ["text"])


def check_fields(body: Mapping[str, Any], schema: Schema, unsupported: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields of a request that are not null. A whole number that was written as 2.0 becomes 2.

    unsupported: fields of the API that this server does not have, with the reason. Raises RequestFailed with 400, which names the
    field.
    """
    known = schema["properties"]
    for name, reason in unsupported.items():
        if name in body and name not in known and body[name] not in _ASKS_FOR_NOTHING:
            raise RequestFailed(400, f"{name} is not supported: {reason}", param=name, code="unsupported_parameter")
    for name in body:
        if name not in known and name not in unsupported:
            said = suggest_name([name[:100]], known) or "; leave it out"
            raise RequestFailed(400, f"no parameter {name[:100]!r}{said}", param=name[:100], code="unknown_parameter")
    given = {name: value for name, value in body.items() if name in known and value is not None}
    for name in schema["required"]:
        if name not in given:
            raise RequestFailed(400, f"{name} is missing; give it", param=name, code="missing_required_parameter")
    for name, value in given.items():
        _check_value(name, value, known[name])
    return {name: _make_whole(value, known[name]) for name, value in given.items()}


def _check_value(name: str, value: object, schema: Schema) -> None:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    wrong = best_match(Draft202012Validator(schema).iter_errors(value))
    if wrong is not None:
        where = name + "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in wrong.absolute_path)
        raise RequestFailed(400, f"{where}: {wrong.message}", param=name, code="invalid_value")


def _make_whole(value: Any, schema: Schema) -> Any:
    inner = schema.get("anyOf", [schema])[0]
    if isinstance(value, float) and inner.get("type") == "integer":
        return int(value)
    if isinstance(value, dict) and "properties" in inner:
        return {key: _make_whole(item, inner["properties"].get(key, {})) for key, item in value.items()}
    if isinstance(value, list):
        return [int(item) if isinstance(item, float) else item for item in value]
    return value
