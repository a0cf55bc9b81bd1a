"""POST /v1/chat/completions, as OpenAI's API has it."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

from edgelora_runtime.serve.api.answers import count_usage, describe_cost, find_finish_reason, list_logprobs, make_id, write_event
from edgelora_runtime.serve.api.fields import check_fields
from edgelora_runtime.serve.api.options import NO_LIMIT, UNSUPPORTED, check_streaming, find_model, read_options, repeat_options
from edgelora_runtime.serve.api.schemas import CHAT
from edgelora_runtime.serve.api.streams import EVENTS, stream_response
from edgelora_runtime.serve.api.turns import Turn
from edgelora_runtime.serve.service import Ended, Piece, wait_for_client
from edgelora_runtime.tools.answer import CallDelta, TextDelta, join_deltas

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from starlette.requests import Request
    from starlette.responses import Response

    from edgelora_runtime.answers.generation import Generation, TokenLogprob
    from edgelora_runtime.serve.api.turns import Formats
    from edgelora_runtime.serve.names import ModelChoice
    from edgelora_runtime.serve.service import Service
    from edgelora_runtime.tools.answer import Delta
    from edgelora_runtime.tools.layout import ToolCall

DONE = b"data: [DONE]\n\n"


async def complete_chat(request: Request) -> Response:
    """Answers a conversation, at once or as a stream of events."""
    service: Service = request.app.state.service
    given = check_fields(await service.read(request), CHAT, UNSUPPORTED)
    chat = _Chat(service, request.app.state.formats, given)
    if chat.streams:
        return await stream_response(request, chat.stream(), EVENTS, lambda failed: write_event(failed.to_openai()))
    return JSONResponse(await wait_for_client(request, chat.answer()))


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns messages with the roles that chat templates know. OpenAI's developer is their system."""
    return [{**message, "role": "system"} if message["role"] == "developer" else dict(message) for message in messages]


def describe_call(call: ToolCall) -> dict[str, Any]:
    """Returns a call as a message holds it. Its arguments are the text of a JSON object."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


class _Chat:
    """One request: its model, its prompt and options, and the form of its answers."""

    def __init__(self, service: Service, formats: Formats, given: Mapping[str, Any]) -> None:
        self.streams, self._with_usage = check_streaming(given)
        self._service = service
        self._choice: ModelChoice = find_model(given, service.names)
        self._answers = given.get("n", 1)
        self._top = given.get("top_logprobs", 0)
        self._rates = given.get("logprobs", False) or self._top > 0
        options = read_options({name: value for name, value in given.items() if name != "logprobs"}, NO_LIMIT)
        options["logprobs"] = max(self._top, 1) if self._rates else 0
        self._options = repeat_options(options, 1, self._answers)
        self._prompt = read_messages(given["messages"])
        self._turn = Turn(
            formats,
            service.bundles[self._choice.bundle],
            self._choice,
            given.get("tools"),
            given.get("tool_choice"),
            parallel=given.get("parallel_tool_calls", True),
        )
        self._head = {"id": make_id("chatcmpl"), "created": int(time.time())}

    async def answer(self) -> dict[str, Any]:
        """Returns the whole answer."""
        deltas: list[list[Delta]] = [[] for _ in range(self._answers)]
        ended: list[Generation] = []
        async with aclosing(self._generate()) as events:
            async for event in events:
                if isinstance(event, Piece):
                    deltas[event.index] += self._turn.push(event.index, event.text)
                else:
                    deltas[event.index] += self._turn.finish(event.index)
                    ended.append(event.generation)
        choices = [
            self._describe_choice(index, each, generation)
            for index, (each, generation) in enumerate(zip(deltas, ended, strict=True))
        ]
        return {
            **self._head,
            "object": "chat.completion",
            "model": self._service.name_model(self._choice, ended[0]),
            "system_fingerprint": self._service.fingerprints[self._choice.bundle],
            "choices": choices,
            "usage": count_usage(ended, answers_per_prompt=self._answers),
            **describe_cost(ended[0]),
        }

    async def stream(self) -> AsyncGenerator[bytes]:
        """Yields the events of a stream: the role, pieces of each answer, its end, and the usage if asked for."""
        ended: list[Generation] = []
        answers = [_StreamedAnswer(index) for index in range(self._answers)]
        async with aclosing(self._generate()) as events:
            async for event in events:
                answer = answers[event.index]
                if not answer.begun:
                    answer.begun = True
                    yield self._write_chunk(event.index, {"role": "assistant", "content": ""})
                if isinstance(event, Piece):
                    answer.unsent += event.text.logprobs
                    deltas = self._turn.push(event.index, event.text)
                else:
                    deltas = self._turn.finish(event.index)
                for delta in deltas:
                    answer.has_calls |= isinstance(delta, CallDelta)
                    yield self._write_chunk(event.index, _write_delta(delta), self._take_logprobs(answer))
                if isinstance(event, Ended):
                    ended.append(event.generation)
                    yield self._write_end(answer, event.generation)
        if self._with_usage:
            yield self._write([], usage=count_usage(ended, answers_per_prompt=self._answers))
        yield DONE

    def _generate(self) -> AsyncGenerator[Piece | Ended]:
        return self._service.generate(self._choice, [self._prompt] * self._answers, self._options, self._turn.fit)

    def _describe_choice(self, index: int, deltas: list[Delta], generation: Generation) -> dict[str, Any]:
        answer = join_deltas(deltas)
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.thought:
            message["reasoning_content"] = answer.thought
        if answer.calls:
            message["tool_calls"] = [describe_call(call) for call in answer.calls]
            message["content"] = answer.text or None
        return {
            "index": index,
            "message": message,
            "logprobs": self._list_logprobs(generation.logprobs),
            "finish_reason": find_finish_reason(generation, has_calls=bool(answer.calls)),
        }

    def _write_chunk(self, index: int, delta: Mapping[str, Any], logprobs: Mapping[str, Any] | None = None) -> bytes:
        return self._write([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}])

    def _write_end(self, answer: _StreamedAnswer, generation: Generation) -> bytes:
        """Returns the last chunk of an answer, with the log probabilities of tokens that no chunk before had."""
        last = {
            "index": answer.index,
            "delta": {},
            "logprobs": self._take_logprobs(answer),
            "finish_reason": find_finish_reason(generation, has_calls=answer.has_calls),
        }
        return self._write([last], **describe_cost(generation))

    def _write(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> bytes:
        chunk = {
            **self._head,
            "object": "chat.completion.chunk",
            "model": self._choice.name,
            "system_fingerprint": self._service.fingerprints[self._choice.bundle],
            "choices": choices,
        }
        return write_event({**chunk, **({"usage": None} if self._with_usage else {}), **more})

    def _take_logprobs(self, answer: _StreamedAnswer) -> dict[str, Any] | None:
        """Returns what is known of the tokens since the chunk before."""
        rated, answer.unsent = answer.unsent, ()
        if not rated:
            return None
        before, answer.last_token = answer.last_token, rated[-1].token
        return self._list_logprobs(rated, before)

    def _list_logprobs(self, rated: Sequence[TokenLogprob], before: int | None = None) -> dict[str, Any] | None:
        if not self._rates:
            return None
        assert self._turn.tokenizer is not None
        return {"content": list_logprobs(rated, self._turn.tokenizer, self._top, before), "refusal": None}


class _StreamedAnswer:
    """What is known of an answer while it is streamed.

    unsent: tokens that no chunk has carried yet. last_token: the last one that a chunk has carried.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.begun = False
        self.has_calls = False
        self.unsent: tuple[TokenLogprob, ...] = ()
        self.last_token: int | None = None


def _write_delta(delta: Delta) -> dict[str, Any]:
    """Returns a piece of an answer as OpenAI's chunks have it."""
    if isinstance(delta, CallDelta):
        function: dict[str, Any] = {"arguments": delta.arguments}
        if delta.name is None:
            return {"tool_calls": [{"index": delta.index, "function": function}]}
        function = {"name": delta.name, **function}
        return {"tool_calls": [{"index": delta.index, "id": delta.id, "type": "function", "function": function}]}
    return {"content" if isinstance(delta, TextDelta) else "reasoning_content": delta.text}
