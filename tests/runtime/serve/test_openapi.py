"""schemathesis over the OpenAPI description: what fits it is answered, what does not is refused, and nothing is a 5xx."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
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

CHECKS: list[Any] = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 100
MODELS = ["base", "plain", "plain-live", "auto", "plain:0.5+rslora:-0.5", "nobody"]
OPERATIONS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/models/{model}",
    "/api/chat",
    "/api/generate",
    "/api/embed",
)


def read_description(server: Server) -> dict[str, Any]:
    """The server's description, with names that reach a model in place of any text, and with short answers."""
    description: dict[str, Any] = server.client.get("/openapi.json").json()
    for operations in description["paths"].values():
        if "post" in operations:
            properties = operations["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
            properties["model"] = {"enum": MODELS}
            options = properties.get("options", {}).get("anyOf", [{}])[0].get("properties", {})
            for fields in (properties, options):
                for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "num_predict"):
                    if name in fields:
                        fields[name] = {"type": "integer", "minimum": 1, "maximum": 8}
    return description


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # schemathesis' own
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", OPERATIONS)
def test_every_operation(server: Server, path: str, mode: GenerationMode) -> None:
    if "{" in path and mode is GenerationMode.NEGATIVE:
        pytest.skip("every text is a name that a model could have")
    operation: Any = schemathesis.openapi.from_dict(read_description(server))[path]["GET" if "{" in path else "POST"]
    checks = [*CHECKS, negative_data_rejection] if mode is GenerationMode.NEGATIVE else CHECKS
    statuses: list[int] = []

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def call(case: Any) -> None:
        statuses.append(case.call_and_validate(base_url=server.url, checks=checks, timeout=600).status_code)

    call()
    assert len(statuses) >= EXAMPLES
    expected = 400 if mode is GenerationMode.NEGATIVE else 404 if "{" in path else 200
    assert expected in statuses
