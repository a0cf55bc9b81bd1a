"""The schemas of requests say what the runtime's own options say, and the description is made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelora_runtime.decode.options import OPTIONS, resolve_options
from edgelora_runtime.serve.api.fields import check_fields
from edgelora_runtime.serve.api.options import UNSUPPORTED, read_options
from edgelora_runtime.serve.api.schemas import CHAT, OPTION_SCHEMAS
from edgelora_runtime.serve.failures import RequestFailed
from edgelora_runtime.serve.openapi import describe_api

if TYPE_CHECKING:
    from collections.abc import Mapping

NUMERIC = {name: schema for name, schema in OPTION_SCHEMAS.items() if schema.get("type") in ("integer", "number")}


def draw_value(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema["maximum"]
    if schema["type"] == "integer":
        return st.integers(low, high)
    return st.floats(low, high, exclude_min="exclusiveMinimum" in schema)


@given(st.sampled_from(sorted(NUMERIC)).flatmap(lambda name: st.tuples(st.just(name), draw_value(NUMERIC[name]))))
def test_what_a_schema_takes_the_runtime_takes(drawn: tuple[str, Any]) -> None:
    name, value = drawn
    assert resolve_options({name: value})[name] == value  # type: ignore[literal-required]


@pytest.mark.parametrize("name", sorted(NUMERIC))
def test_what_is_outside_is_refused(name: str) -> None:
    schema = NUMERIC[name]
    low = schema["minimum"] - 1 if "minimum" in schema else schema["exclusiveMinimum"]
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    for value in (low, schema["maximum"] + 1, "1", True, [1]):
        with pytest.raises(RequestFailed) as caught:
            check_fields({**body, name: value}, CHAT, UNSUPPORTED)
        assert (caught.value.status, caught.value.param) == (400, name)


@given(
    st.dictionaries(
        st.sampled_from([*OPTION_SCHEMAS, *UNSUPPORTED, "n", "logprobs", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=5,
        ),
    )
)
def test_any_fields_become_options_or_a_400(fields: dict[str, Any]) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    try:
        given = check_fields(body, CHAT, UNSUPPORTED)
        options = read_options({name: value for name, value in given.items() if name != "logprobs"}, 5)
    except RequestFailed as failed:
        assert failed.status == 400
        assert failed.param is not None or failed.message
    except ValueError as error:  # options that do not go together, which explain() tells
        assert "together" in str(error) or "ignore_eos" in str(error)
    else:
        assert resolve_options(options)


def test_descriptions_are_those_of_the_options() -> None:
    content = describe_api()["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    properties = content["application/json"]["schema"]["properties"]
    assert properties["temperature"]["anyOf"][0]["description"] == OPTIONS["temperature"].help
