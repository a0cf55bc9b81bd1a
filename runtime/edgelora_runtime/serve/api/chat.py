"""POST /v1/chat/completions, as OpenAI's API has it."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

from edgelora_runtime.serve.api.answers import count_usage, describe_cost, find_finish_reason, list_logprobs, make_id, write_event
from edgelora_runtime.serve.api.options import NO_LIMIT, UNSUPPORTED, check_streaming, find_model, read_options, repeat_options
from edgelora_runtime.serve.api.schemas import CHAT, check_fields
from edgelora_runtime.serve.api.streams import EVENTS, stream_response
from edgelora_runtime.serve.service import Ended, Piece, wait_for_client

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from starlette.requests import Request
    from starlette.responses import Response

    from edgelora_runtime.answers.generation import Generation
    from edgelora_runtime.serve.names import ModelChoice
    from edgelora_runtime.serve.service import Service

DONE = b"data: [DONE]\n\n"


async def complete_chat(request: Request) -> Response:
    """Answers a conversation, at once or as a stream of events."""
    service: Service = request.app.state.service
    given = check_fields(await service.read(request), CHAT, UNSUPPORTED)
    chat = _Chat(service, given)
    if chat.streams:
        return await stream_response(request, chat.stream(), EVENTS, lambda failed: write_event(failed.to_openai()))
    return JSONResponse(await wait_for_client(request, chat.answer()))


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns messages with the roles that chat templates know. OpenAI's developer is their system."""
    return [{**message, "role": "system"} if message["role"] == "developer" else dict(message) for message in messages]


class _Chat:
    """One request: its model, its prompt and options, and the form of its answers."""

    def __init__(self, service: Service, given: Mapping[str, Any]) -> None:
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
        self._head = {"id": make_id("chatcmpl"), "created": int(time.time())}

    async def answer(self) -> dict[str, Any]:
        """Returns the whole answer."""
        texts = [""] * self._answers
        ended: list[Generation] = []
        async with aclosing(self._generate()) as events:
            async for event in events:
                if isinstance(event, Piece):
                    texts[event.index] += event.text
                else:
                    ended.append(event.generation)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": texts[index], "refusal": None},
                "logprobs": self._list_logprobs(generation),
                "finish_reason": find_finish_reason(generation),
            }
            for index, generation in enumerate(ended)
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
        """Yields the events of a stream: the role, pieces of text, the end of each answer, and the usage if asked for."""
        ended: list[Generation] = []
        begun: set[int] = set()
        async with aclosing(self._generate()) as events:
            async for event in events:
                if event.index not in begun:
                    begun.add(event.index)
                    yield self._write_chunk(event.index, {"role": "assistant", "content": ""})
                if isinstance(event, Piece):
                    yield self._write_chunk(event.index, {"content": event.text})
                else:
                    ended.append(event.generation)
                    yield self._write_end(event)
        if self._with_usage:
            yield self._write([], usage=count_usage(ended, answers_per_prompt=self._answers))
        yield DONE

    def _generate(self) -> AsyncGenerator[Piece | Ended]:
        return self._service.generate(self._choice, [self._prompt] * self._answers, self._options)

    def _write_chunk(self, index: int, delta: Mapping[str, Any]) -> bytes:
        return self._write([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _write_end(self, event: Ended) -> bytes:
        """Returns the last chunk of an answer. The log probabilities of all its tokens come with it."""
        generation = event.generation
        last = {
            "index": event.index,
            "delta": {},
            "logprobs": self._list_logprobs(generation),
            "finish_reason": find_finish_reason(generation),
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

    def _list_logprobs(self, generation: Generation) -> dict[str, Any] | None:
        if not self._rates:
            return None
        tokenizer = self._service.find_tokenizer(self._choice, generation)
        return {"content": list_logprobs(generation.logprobs, tokenizer, self._top), "refusal": None}
