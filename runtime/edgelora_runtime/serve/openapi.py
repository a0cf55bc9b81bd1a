"""The OpenAPI description, made from the schemas that requests are checked by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora_runtime._version import __version__
from edgelora_runtime.serve.api.schemas import CHAT, COMPLETION, EMBEDDING, OLLAMA_CHAT, OLLAMA_EMBED, OLLAMA_GENERATE, RESPONSE

if TYPE_CHECKING:
    from collections.abc import Mapping

    Schema = Mapping[str, Any]

_JSON, _EVENTS, _LINES, _PLAIN = "application/json", "text/event-stream", "application/x-ndjson", "text/plain"
# OpenAPI 3.1 does not say what a schema of a stream describes: the text, or each event. So these name no type.
_STREAMED: Mapping[str, Schema] = {
    _EVENTS: {"description": "Server-sent events, each with a JSON object as its data; those of OpenAI's API end with [DONE]."},
    _LINES: {"description": "Lines, each a JSON object."},
}
_OPENAI_ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_OLLAMA_ERROR: Schema = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
_LIST: Schema = {
    "type": "object",
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": {"type": "object"}}},
    "required": ["object", "data"],
}
_ANSWER: Schema = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "object": {"enum": ["chat.completion", "text_completion"]},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["index", "finish_reason"]}},
        "usage": {"type": "object", "required": ["prompt_tokens", "completion_tokens", "total_tokens"]},
        "timings": {"type": "object"},
        "receipt": {"type": "object"},
    },
    "required": ["id", "object", "created", "model", "choices", "usage", "timings", "receipt"],
}
_OLLAMA_ANSWER: Schema = {"type": "object", "required": ["model", "created_at", "done"]}
_REASONS = {
    "400": "A field that is wrong, unknown or unsupported",
    "401": "No valid key",
    "403": "A wrong Host or Origin",
    "404": "No such model",
    "408": "The body came too slowly",
    "413": "The body is too large",
    "429": "The queue is full",
    "500": "An error of the server",
    "503": "The server is shutting down",
}

# Path: (schema of the request, of the answer, media type of the stream, sentence). Other paths are read with GET.
_POSTS: Mapping[str, tuple[Schema, Schema, str | None, str]] = {
    "/v1/chat/completions": (CHAT, _ANSWER, _EVENTS, "Answers a conversation."),
    "/v1/completions": (COMPLETION, _ANSWER, _EVENTS, "Continues prompts, without a chat template."),
    "/v1/responses": (
        RESPONSE,
        {"type": "object", "required": ["id", "object", "status", "output", "usage"]},
        _EVENTS,
        "Answers a text or a conversation, without keeping it.",
    ),
    "/v1/embeddings": (EMBEDDING, _LIST, None, "Embeds texts as vectors of length 1."),
    "/api/chat": (OLLAMA_CHAT, _OLLAMA_ANSWER, _LINES, "Answers a conversation, as Ollama does."),
    "/api/generate": (OLLAMA_GENERATE, _OLLAMA_ANSWER, _LINES, "Answers a prompt, as Ollama does."),
    "/api/embed": (OLLAMA_EMBED, {"type": "object", "required": ["embeddings"]}, None, "Embeds texts, as Ollama does."),
}
_GETS: Mapping[str, tuple[Schema, str, str]] = {
    "/v1/models": (_LIST, _JSON, "Lists the models."),
    "/v1/models/{model}": ({"type": "object", "required": ["id", "object", "kind"]}, _JSON, "Describes a model or a live mix."),
    "/lora-adapters": ({"type": "array"}, _JSON, "Lists live adapters with the ids that lora takes, as llama.cpp does."),
    "/api/tags": ({"type": "object", "required": ["models"]}, _JSON, "Lists the models, as Ollama does."),
    "/api/version": ({"type": "object", "required": ["version"]}, _JSON, "Tells the server's version."),
    "/metrics": ({"type": "string"}, _PLAIN, "The server's figures, for Prometheus."),
    "/openapi.json": ({"type": "object", "required": ["openapi"]}, _JSON, "This description."),
    "/health": ({"type": "object", "required": ["status"]}, _JSON, "Tells whether the server takes requests. Needs no key."),
}


def describe_api() -> dict[str, Any]:
    """Returns the description of all routes."""
    paths: dict[str, Any] = {}
    for path, (asked, answer, stream, sentence) in _POSTS.items():
        content = {_JSON: {"schema": answer}, **({} if stream is None else {stream: {"schema": _STREAMED[stream]}})}
        paths[path] = {
            "post": {
                "summary": sentence,
                "requestBody": {"required": True, "content": {_JSON: {"schema": asked}}},
                "responses": {"200": {"description": "The answer", "content": content}, **_describe_failures(path, _REASONS)},
            }
        }
    for path, (answer, media_type, sentence) in _GETS.items():
        reasons = {status: _REASONS[status] for status in ("400", "401", "403", "404", "503")}
        parameter = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        paths[path] = {
            "get": {
                "summary": sentence,
                **({"parameters": [parameter]} if "{" in path else {}),
                "responses": {
                    "200": {"description": "The answer", "content": {media_type: {"schema": answer}}},
                    **_describe_failures(path, reasons),
                },
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "edgelora serve", "version": __version__},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _describe_failures(path: str, reasons: Mapping[str, str]) -> dict[str, Any]:
    schema = _OLLAMA_ERROR if path.startswith("/api/") else _OPENAI_ERROR
    return {status: {"description": reason, "content": {_JSON: {"schema": schema}}} for status, reason in reasons.items()}
