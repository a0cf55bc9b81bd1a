"""POST /v1/completions, as OpenAI's API has it: plain text or token ids, without a chat template."""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

from edgelora_runtime.serve.api.answers import (
    count_usage,
    describe_cost,
    find_finish_reason,
    list_completion_logprobs,
    make_id,
    write_event,
)
from edgelora_runtime.serve.api.chat import DONE
from edgelora_runtime.serve.api.fields import check_fields
from edgelora_runtime.serve.api.options import UNSUPPORTED, check_streaming, find_model, read_options, repeat_options
from edgelora_runtime.serve.api.schemas import COMPLETION
from edgelora_runtime.serve.api.streams import EVENTS, stream_response
from edgelora_runtime.serve.api.turns import find_tokenizer
from edgelora_runtime.serve.service import Ended, Piece, wait_for_client

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from starlette.requests import Request
    from starlette.responses import Response

    from edgelora_runtime.answers.generation import Generation, TokenLogprob
    from edgelora_runtime.bundle.prompt import Prompt
    from edgelora_runtime.bundle.tokenizer import Tokenizer
    from edgelora_runtime.serve.names import ModelChoice
    from edgelora_runtime.serve.service import Service

_DEFAULT_TOKENS = 16  # https://platform.openai.com/docs/api-reference/completions/create#max_tokens


async def complete(request: Request) -> Response:
    """Continues prompts, at once or as a stream of events."""
    service: Service = request.app.state.service
    given = check_fields(await service.read(request), COMPLETION, UNSUPPORTED)
    completion = _Completion(service, given)
    if completion.streams:
        return await stream_response(request, completion.stream(), EVENTS, lambda failed: write_event(failed.to_openai()))
    return JSONResponse(await wait_for_client(request, completion.answer()))


def list_prompts(value: str | list[Any]) -> list[Prompt]:
    """Returns the prompts of a field that holds one or several, as text or as token ids."""
    return list(value) if isinstance(value, list) and isinstance(value[0], str | list) else [value]


class _Completion:
    """One request: its model, its prompts and options, and the form of its answers."""

    def __init__(self, service: Service, given: Mapping[str, Any]) -> None:
        self.streams, self._with_usage = check_streaming(given)
        self._service = service
        self._choice: ModelChoice = find_model(given, service.names)
        self._answers = given.get("n", 1)
        self._top = given.get("logprobs")
        prompts = list_prompts(given["prompt"])
        options = read_options({name: value for name, value in given.items() if name != "logprobs"}, _DEFAULT_TOKENS)
        options["logprobs"] = 0 if self._top is None else max(self._top, 1)
        self._options = repeat_options(options, len(prompts), self._answers)
        self._prompts = [prompt for prompt in prompts for _ in range(self._answers)]
        self._sent = [_Sent() for _ in self._prompts]
        self._tokenizers: list[Tokenizer] = []
        self._head = {"id": make_id("cmpl"), "object": "text_completion", "created": int(time.time())}

    async def answer(self) -> dict[str, Any]:
        """Returns the whole answer."""
        texts = [""] * len(self._prompts)
        ended: list[Generation] = []
        async with aclosing(self._generate()) as events:
            async for event in events:
                if isinstance(event, Piece):
                    texts[event.index] += event.text
                else:
                    ended.append(event.generation)
        return {
            **self._head,
            "model": self._service.name_model(self._choice, ended[0]),
            "system_fingerprint": self._service.fingerprints[self._choice.bundle],
            "choices": [
                self._describe(index, texts[index], generation.logprobs, find_finish_reason(generation))
                for index, generation in enumerate(ended)
            ],
            "usage": count_usage(ended, answers_per_prompt=self._answers),
            **describe_cost(ended[0]),
        }

    async def stream(self) -> AsyncGenerator[bytes]:
        """Yields the events of a stream: pieces of text, the end of each answer, and the usage if asked for."""
        ended: list[Generation] = []
        async with aclosing(self._generate()) as events:
            async for event in events:
                if isinstance(event, Piece):
                    yield self._write([self._describe(event.index, event.text, event.text.logprobs)])
                else:
                    ended.append(event.generation)
                    last = self._describe(event.index, "", (), find_finish_reason(event.generation))
                    yield self._write([last], **describe_cost(event.generation))
        if self._with_usage:
            yield self._write([], usage=count_usage(ended, answers_per_prompt=self._answers))
        yield DONE

    def _generate(self) -> AsyncGenerator[Piece | Ended]:
        return self._service.generate(self._choice, self._prompts, self._options, self._fit)

    def _fit(
        self, prompts: Sequence[Prompt], options: Sequence[Mapping[str, Any]]
    ) -> tuple[Sequence[Prompt], Sequence[Mapping[str, Any]]]:
        """Finds the tokenizers that log probabilities are named with. Changes nothing."""
        if self._top is not None:
            runtime = self._service.bundles[self._choice.bundle]
            self._tokenizers = [find_tokenizer(runtime, self._choice, prompt) for prompt in prompts]
        return prompts, options

    def _describe(self, index: int, text: str, rated: Sequence[TokenLogprob], reason: str | None = None) -> dict[str, Any]:
        """Describes a piece of an answer, or the whole. rated: its tokens, which name those that come after them."""
        logprobs = None
        if self._top is not None and rated:
            sent = self._sent[index]
            logprobs = list_completion_logprobs(rated, self._tokenizers[index], self._top, sent.last_token, sent.characters)
            sent.last_token = rated[-1].token
            sent.characters += sum(map(len, logprobs["tokens"]))
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _write(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> bytes:
        chunk = {
            **self._head,
            "model": self._choice.name,
            "system_fingerprint": self._service.fingerprints[self._choice.bundle],
            "choices": choices,
        }
        return write_event({**chunk, **({"usage": None} if self._with_usage else {}), **more})


@dataclass
class _Sent:
    """How far the log probabilities of an answer have been sent."""

    last_token: int | None = None
    characters: int = 0
