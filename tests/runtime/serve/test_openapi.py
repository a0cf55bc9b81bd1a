"""schemathesis over the OpenAPI description: what fits it is answered, what does not is refused, and nothing is a 5xx."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

if TYPE_CHECKING:
    from tests.runtime.serve.servers import Server

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 100
OPERATIONS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/api/chat",
    "/api/generate",
    "/api/embed",
    "/v1/models/{model}",
)


def read_description(server: Server) -> dict[str, Any]:
    """The server's description, with its models in place of any name, so that examples reach the model, and short answers."""
    description: dict[str, Any] = server.client.get("/openapi.json").json()
    for path, operations in description["paths"].items():
        if "post" in operations:
            properties = operations["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
            properties["model"] = {"enum": ["base", "plain", "plain-live", "auto", "plain:0.5+rslora:-0.5", "nobody"]}
            limit = properties["options"]["anyOf"][0]["properties"]["num_predict"] if "/api/" in path and "options" in properties else None
            for bound in (limit, *(properties.get(name, {}).get("anyOf", [None])[0] for name in ("max_tokens", "max_completion_tokens"))):
                if bound is not None:
                    bound["maximum"] = 8
    return description


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", OPERATIONS)
def test_every_operation(server: Server, path: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_dict(read_description(server))
    schema.config.update(base_url=server.url)
    operation = schema[path]["GET" if "{" in path else "POST"]
    checks = [*CHECKS, negative_data_rejection] if mode is GenerationMode.NEGATIVE else CHECKS
    statuses = set()

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @schemathesis.hypothesis.given(case=operation.as_strategy(generation_mode=mode)) if False else _given(operation, mode)
    def call(case: Any) -> None:
        response = case.call_and_validate(checks=checks)
        statuses.add(response.status_code)

    call()
    assert statuses & ({200} if mode is GenerationMode.POSITIVE else {400, 404})


def _given(operation: Any, mode: GenerationMode) -> Any:
    from hypothesis import given

    return given(case=operation.as_strategy(generation_mode=mode))
