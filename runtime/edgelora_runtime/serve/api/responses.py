"""POST /v1/responses, as far as it needs no state: OpenAI's newer form of a chat. The server keeps no answer."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

from edgelora_runtime.serve.api.answers import describe_cost, find_finish_reason, make_id, write_json
from edgelora_runtime.serve.api.chat import read_messages
from edgelora_runtime.serve.api.options import NO_LIMIT, UNSUPPORTED, find_model, read_options
from edgelora_runtime.serve.api.schemas import RESPONSE, check_fields
from edgelora_runtime.serve.api.streams import EVENTS, stream_response
from edgelora_runtime.serve.service import Piece, wait_for_client

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from starlette.requests import Request
    from starlette.responses import Response

    from edgelora_runtime.answers.generation import Generation
    from edgelora_runtime.serve.failures import RequestFailed
    from edgelora_runtime.serve.service import Service

_PARTS = ("input_text", "output_text")  # kinds of text parts, which chat templates know as text
_UNSUPPORTED: Mapping[str, str] = {
    **UNSUPPORTED,
    "previous_response_id": "the server keeps no answer; send the conversation in input",
    "conversation": "the server keeps no conversation; send it in input",
    "background": "the server keeps no answer",
    "reasoning": "give chat_template_kwargs, as the model's template reads them",
    "include": "the answer holds all there is",
    "truncation": "shorten the conversation",
    "prompt": "the server keeps no prompts; send instructions",
    "max_tool_calls": "this server does not call tools yet",
}


async def respond(request: Request) -> Response:
    """Answers a text or a conversation, at once or as a stream of events."""
    service: Service = request.app.state.service
    answer = _Answer(service, check_fields(await service.read(request), RESPONSE, _UNSUPPORTED))
    if answer.streams:
        return await stream_response(request, answer.stream(), EVENTS, answer.write_failure)
    return JSONResponse(await wait_for_client(request, answer.answer()))


def read_input(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the messages of a request: its instructions, and its input as a user's text or as a conversation."""
    found: list[dict[str, Any]] = []
    if given.get("instructions"):
        found.append({"role": "system", "content": given["instructions"]})
    if isinstance(given["input"], str):
        return [*found, {"role": "user", "content": given["input"]}]
    return [
        *found,
        *read_messages([{"role": item["role"], "content": _read_content(item["content"])} for item in given["input"]]),
    ]


def _read_content(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part["text"]} if part["type"] in _PARTS else part for part in content]


class _Answer:
    """One request: its model, its prompt and options, and the form of its answer."""

    def __init__(self, service: Service, given: Mapping[str, Any]) -> None:
        self.streams: bool = given.get("stream", False)
        self._service = service
        self._choice = find_model(given, service.names)
        self._options = read_options(_rename(given), NO_LIMIT)
        self._messages = read_input(given)
        self._item = make_id("msg")
        self._sequence = -1
        self._head = {
            "id": make_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "model": self._choice.name,
            "instructions": given.get("instructions"),
            "temperature": self._options.get("temperature", 0.0),
            "top_p": self._options.get("top_p", 1.0),
            "max_output_tokens": given.get("max_output_tokens"),
            "metadata": given.get("metadata", {}),
            "text": given.get("text", {"format": {"type": "text"}}),
            "tools": [],
            "tool_choice": "none",
            "parallel_tool_calls": False,
            "store": False,
            "error": None,
        }

    async def answer(self) -> dict[str, Any]:
        """Returns the whole answer."""
        text = ""
        async with aclosing(self._service.generate(self._choice, [self._messages], [self._options])) as events:
            async for event in events:
                if isinstance(event, Piece):
                    text += event.text
                else:
                    ended = event.generation
        return self._finish(text, ended)

    async def stream(self) -> AsyncGenerator[bytes]:
        """Yields the events of a stream, each with its type and number, in the order of OpenAI's API."""
        text = ""
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        async with aclosing(self._service.generate(self._choice, [self._messages], [self._options])) as events:
            async for event in events:
                if self._sequence < 0:
                    begun = {**self._head, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
                    yield self._write("response.created", response=begun)
                    yield self._write("response.in_progress", response=begun)
                    item = {"id": self._item, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
                    yield self._write("response.output_item.added", output_index=0, item=item)
                    yield self._write("response.content_part.added", **place, part=_make_part(""))
                if isinstance(event, Piece):
                    text += event.text
                    yield self._write("response.output_text.delta", **place, delta=event.text, logprobs=[])
                else:
                    ended = event.generation
        done = self._finish(text, ended)
        yield self._write("response.output_text.done", **place, text=text, logprobs=[])
        yield self._write("response.content_part.done", **place, part=_make_part(text))
        yield self._write("response.output_item.done", output_index=0, item=done["output"][0])
        yield self._write(f"response.{done['status']}", response=done)

    def write_failure(self, failed: RequestFailed) -> bytes:
        """Returns the last event of a stream that fails after it has begun."""
        return self._write("error", code=failed.code, message=failed.message, param=failed.param)

    def _write(self, kind: str, **fields: Any) -> bytes:
        self._sequence += 1
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        return b"event: " + kind.encode() + b"\ndata: " + write_json(event) + b"\n\n"

    def _finish(self, text: str, generation: Generation) -> dict[str, Any]:
        is_whole = find_finish_reason(generation) == "stop"
        status = "completed" if is_whole else "incomplete"
        message = {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": [_make_part(text)]}
        written = len(generation.tokens)
        return {
            **self._head,
            "model": self._service.name_model(self._choice, generation),
            "status": status,
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": [message],
            "usage": {
                "input_tokens": generation.prompt_tokens,
                "input_tokens_details": {"cached_tokens": generation.reused_tokens},
                "output_tokens": written,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": generation.prompt_tokens + written,
            },
            **describe_cost(generation),
        }


def _rename(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields under the names that they have in chats."""
    renamed = {name: value for name, value in given.items() if name not in ("max_output_tokens", "text")}
    if "max_output_tokens" in given:
        renamed["max_tokens"] = given["max_output_tokens"]
    form = given.get("text", {}).get("format")
    if form is not None and form["type"] == "json_schema":
        renamed["response_format"] = {"type": "json_schema", "json_schema": {"schema": form["schema"]}}
    elif form is not None:
        renamed["response_format"] = form
    return renamed


def _make_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
