"""POST /v1/responses, as far as it needs no state: OpenAI's newer form of a chat. The server keeps no answer."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

from edgelora_runtime.serve.api.answers import describe_cost, find_finish_reason, make_id, write_json
from edgelora_runtime.serve.api.chat import read_messages
from edgelora_runtime.serve.api.fields import check_fields
from edgelora_runtime.serve.api.options import NO_LIMIT, UNSUPPORTED, find_model, read_options
from edgelora_runtime.serve.api.output import Output
from edgelora_runtime.serve.api.schemas import RESPONSE
from edgelora_runtime.serve.api.streams import EVENTS, stream_response
from edgelora_runtime.serve.api.turns import Turn
from edgelora_runtime.serve.service import Ended, Piece, wait_for_client

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from starlette.requests import Request
    from starlette.responses import Response

    from edgelora_runtime.answers.generation import Generation
    from edgelora_runtime.serve.api.turns import Formats
    from edgelora_runtime.serve.failures import RequestFailed
    from edgelora_runtime.serve.service import Service

_ONLY_THOUGHT = {"role", "reasoning_content"}
_FUNCTION = ("name", "description", "parameters", "strict")  # keys that chats have under `function`
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
    "max_tool_calls": "the server runs no tool itself",
}


async def respond(request: Request) -> Response:
    """Answers a text or a conversation, at once or as a stream of events."""
    service: Service = request.app.state.service
    given = check_fields(await service.read(request), RESPONSE, _UNSUPPORTED)
    answer = _Answer(service, request.app.state.formats, given)
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
    for item in given["input"]:
        _add_item(found, item)
    return read_messages(found)


def _add_item(messages: list[dict[str, Any]], item: Mapping[str, Any]) -> None:
    """Adds an item of the input. A thought and the calls after it become parts of the assistant's message."""
    kind = item.get("type", "message")
    if kind == "message":
        before = messages.pop() if item["role"] == "assistant" and messages and messages[-1].keys() == _ONLY_THOUGHT else {}
        messages.append({**before, "role": item["role"], "content": _read_content(item["content"])})
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
    elif kind == "reasoning":
        text = "".join(part["text"] for part in item.get("content") or ())
        if text:
            messages.append({"role": "assistant", "reasoning_content": text})
    else:
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        messages[-1] = {**messages[-1], "tool_calls": [*messages[-1].get("tool_calls", []), call]}


def _read_content(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part["text"]} if part["type"] in _PARTS else part for part in content]


class _Answer:
    """One request: its model, its prompt and options, and the form of its answer."""

    def __init__(self, service: Service, formats: Formats, given: Mapping[str, Any]) -> None:
        self.streams: bool = given.get("stream", False)
        self._service = service
        self._choice = find_model(given, service.names)
        self._options = read_options(_rename(given), NO_LIMIT)
        self._messages = read_input(given)
        tools, tool_choice, parallel = given.get("tools", []), given.get("tool_choice"), given.get("parallel_tool_calls", True)
        shown = [{"type": "function", "function": {name: tool[name] for name in _FUNCTION if name in tool}} for tool in tools]
        runtime = service.bundles[self._choice.bundle]
        self._turn = Turn(formats, runtime, self._choice, shown, tool_choice, parallel=parallel)
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
            "tools": tools,
            "tool_choice": tool_choice or "auto",
            "parallel_tool_calls": parallel,
            "store": False,
            "error": None,
        }

    async def answer(self) -> dict[str, Any]:
        """Returns the whole answer."""
        output = Output()
        async with aclosing(self._generate()) as events:
            async for event in events:
                deltas = self._turn.push(0, event.text) if isinstance(event, Piece) else self._turn.finish(0)
                for delta in deltas:
                    output.push(delta)
                if isinstance(event, Ended):
                    ended = event.generation
        output.finish(is_whole=find_finish_reason(ended) == "stop")
        return self._finish(output, ended)

    async def stream(self) -> AsyncGenerator[bytes]:
        """Yields the events of a stream, each with its type and number, in the order of OpenAI's API."""
        output = Output()
        async with aclosing(self._generate()) as events:
            async for event in events:
                if self._sequence < 0:
                    begun = {**self._head, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
                    yield self._write({"type": "response.created", "response": begun})
                    yield self._write({"type": "response.in_progress", "response": begun})
                deltas = self._turn.push(0, event.text) if isinstance(event, Piece) else self._turn.finish(0)
                for delta in deltas:
                    for part in output.push(delta):
                        yield self._write(part)
                if isinstance(event, Ended):
                    ended = event.generation
        for part in output.finish(is_whole=find_finish_reason(ended) == "stop"):
            yield self._write(part)
        done = self._finish(output, ended)
        yield self._write({"type": f"response.{done['status']}", "response": done})

    def write_failure(self, failed: RequestFailed) -> bytes:
        """Returns the last event of a stream that fails after it has begun."""
        return self._write({"type": "error", "code": failed.code, "message": failed.message, "param": failed.param})

    def _generate(self) -> AsyncGenerator[Piece | Ended]:
        return self._service.generate(self._choice, [self._messages], [self._options], self._turn.fit)

    def _write(self, event: Mapping[str, Any]) -> bytes:
        self._sequence += 1
        numbered = {**event, "sequence_number": self._sequence}
        kind: str = event["type"]
        return b"event: " + kind.encode() + b"\ndata: " + write_json(numbered) + b"\n\n"

    def _finish(self, output: Output, generation: Generation) -> dict[str, Any]:
        is_whole = find_finish_reason(generation) == "stop"
        written = len(generation.tokens)
        return {
            **self._head,
            "model": self._service.name_model(self._choice, generation),
            "status": "completed" if is_whole else "incomplete",
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": output.items,
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
