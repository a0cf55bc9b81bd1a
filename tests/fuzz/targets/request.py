"""The body of a request to each route of the server, which runs in this process, without a socket."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from edgelora_runtime import Bundle
from edgelora_runtime.errors import LONGEST_MESSAGE
from tests.attacks.bodies import BODIES, CHAT, EMBED, HELLO, PLAIN, ask
from tests.fuzz.harness import Harness
from tests.fuzz.mutations import mutate_json

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

    import httpx

PATHS = (CHAT, PLAIN, EMBED, "/v1/responses", "/api/chat", "/api/generate", "/api/embed")  # by the first byte of an input
LONGEST = 1 << 13  # bytes
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}
FULL: dict[str, Any] = {
    "messages": [*HELLO, {"role": "assistant", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}],
    "max_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 1,
    "stop": ["x"],
    "n": 2,
    "logprobs": True,
    "top_logprobs": 2,
    "logit_bias": {"5": 1},
    "presence_penalty": 0.1,
    "stream": True,
    "stream_options": {"include_usage": True},
}
GOOD: tuple[tuple[str, dict[str, Any]], ...] = (
    (CHAT, FULL),
    (CHAT, {"messages": HELLO, "max_tokens": 3, "tools": [TOOL], "tool_choice": "auto"}),
    (
        CHAT,
        {
            "messages": HELLO,
            "max_tokens": 3,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        },
    ),
    (PLAIN, {"prompt": ["the cat", "a"], "max_tokens": 2, "echo": True, "suffix": None, "best_of": 1}),
    (PLAIN, {"prompt": [5, 6], "max_tokens": 2, "stream": True}),
    (EMBED, {"input": ["the cat", "a"], "encoding_format": "base64"}),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 2, "instructions": "x"}),
    (
        "/v1/responses",
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}], "max_output_tokens": 2, "stream": True},
    ),
    ("/api/chat", {"messages": HELLO, "stream": False, "options": {"num_predict": 2, "temperature": 0.1, "stop": ["x"]}}),
    ("/api/chat", {"messages": HELLO, "options": {"num_predict": 2}, "tools": [TOOL], "format": SCHEMA}),
    ("/api/generate", {"prompt": "hi", "stream": False, "options": {"num_predict": 2}, "system": "s", "raw": False}),
    ("/api/embed", {"input": "hi", "truncate": True}),
)
WORDS = (
    *(
        "user",
        "assistant",
        "system",
        "tool",
        "text",
        "input_text",
        "json_object",
        "json_schema",
        "auto",
        "required",
        "none",
        "float",
        "base64",
    ),
    *(
        "base",
        "tuned",
        "live",
        "base+a:1",
        "base+a:nan",
        "a",
        "tool_calls",
        "logprobs",
        "response_format",
        "regex",
        "grammar",
        "template_options",
    ),
    *(
        "min_p",
        "top_k",
        "repetition_penalty",
        "ignore_eos",
        "timeout",
        "overflow",
        "slide",
        "date",
        "2025-01-31",
        "chat_template",
    ),
    *(
        TOOL,
        SCHEMA,
        {"type": "array", "items": SCHEMA},
        {"pattern": "(a+)+$", "type": "string"},
        {"$ref": "#"},
        {"type": "image_url"},
    ),
)


def build(bundle: Path, folder: Path) -> Harness:
    logging.getLogger("edgelora.serve").setLevel(logging.CRITICAL)  # a failure of the server's is judged by its status
    variant = Bundle.open(bundle).manifest.default_variant
    seeds = [bytes([PATHS.index(path)]) + json.dumps({"model": variant, **body}).encode() for path, body in GOOD]
    seeds += [
        bytes([PATHS.index(path)]) + body.replace(b'"base"', json.dumps(variant).encode())
        for path, body in BODIES.values()
        if len(body) < LONGEST
    ]

    def use(raw: bytes) -> None:
        check(ask(bundle, PATHS[raw[0] % len(PATHS)] if raw else CHAT, raw[1:]))

    return Harness(seeds, mutate, use, limit=LONGEST)


def check(response: httpx.Response) -> None:
    """Refuses an answer that is the server's own failure, and a message that is not one clean line."""
    text = response.text
    assert response.status_code < 500, f"status {response.status_code}: {text[:200]}"
    assert "server_error" not in text, f"a stream that fails: {text[-200:]}"
    if response.status_code >= 400:
        error = response.json()["error"]
        said = error if isinstance(error, str) else error["message"]
        assert said, "a refusal without words"
        assert said.isprintable(), f"control characters: {said[:200]!a}"
        assert len(said) <= LONGEST_MESSAGE + 1, f"a message of {len(said)} characters"


def mutate(raw: bytes, chance: Random) -> bytes:
    path = raw[:1] if chance.randrange(10) else bytes([chance.randrange(len(PATHS))])
    return path + mutate_json(raw[1:], chance, WORDS)
