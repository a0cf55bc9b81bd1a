"""Ollama's API, as far as its clients need it: /api/chat, /api/generate, /api/embed, /api/tags and /api/version."""

from __future__ import annotations

from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

from edgelora_runtime._version import __version__
from edgelora_runtime.serve.api.answers import describe_cost, find_finish_reason, write_line
from edgelora_runtime.serve.api.chat import read_messages
from edgelora_runtime.serve.api.embeddings import embed_prompts
from edgelora_runtime.serve.api.fields import check_fields
from edgelora_runtime.serve.api.options import NO_LIMIT, read_options
from edgelora_runtime.serve.api.schemas import OLLAMA_CHAT, OLLAMA_EMBED, OLLAMA_GENERATE
from edgelora_runtime.serve.api.streams import LINES, stream_response
from edgelora_runtime.serve.api.turns import Turn
from edgelora_runtime.serve.failures import RequestFailed
from edgelora_runtime.serve.service import Piece, wait_for_client
from edgelora_runtime.tools.answer import CallDelta, join_deltas
from edgelora_runtime.tools.layout import load_arguments

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from starlette.requests import Request
    from starlette.responses import Response

    from edgelora_runtime.answers.generation import Generation
    from edgelora_runtime.bundle.prompt import Prompt
    from edgelora_runtime.serve.names import ModelChoice
    from edgelora_runtime.serve.service import Ended, Fit, Service
    from edgelora_runtime.tools.answer import Delta

_LATEST = ":latest"  # the tag that Ollama's clients add to a name without one
_NANOSECONDS = 1e6  # in a millisecond
_UNSUPPORTED: Mapping[str, str] = {
    "tools": "ask /api/chat",
    "images": "this runtime reads and writes text alone",
    "template": "the bundle's own template is used; raw = true uses none",
    "context": "send the conversation to /api/chat",
    "suffix": "no model here fills in a middle",
    "logprobs": "ask /v1/chat/completions",
    "top_logprobs": "ask /v1/chat/completions",
    "dimensions": "every vector has the model's hidden size",
    "options": "an embedding has none",
}


async def chat(request: Request) -> Response:
    """Answers a conversation. Streams unless told otherwise, as Ollama does."""
    service: Service = request.app.state.service
    given = check_fields(await service.read(request), OLLAMA_CHAT, _UNSUPPORTED)
    choice = _find_model(service, given)
    turn = Turn(request.app.state.formats, service.bundles[choice.bundle], choice, given.get("tools"), think=given.get("think"))
    return await _respond(request, service, given, read_messages(given["messages"]), ChatAnswer(turn))


async def generate(request: Request) -> Response:
    """Answers a prompt: as a user's message where the model has a chat template, else, or with raw = true, as plain text."""
    service: Service = request.app.state.service
    given = check_fields(await service.read(request), OLLAMA_GENERATE, _UNSUPPORTED)
    choice = _find_model(service, given)
    system, think = given.get("system"), given.get("think")
    runtime = service.bundles[choice.bundle]
    variant = None if choice.variant == "auto" else choice.variant
    if not given.get("raw", False) and runtime.find_tokenizer(variant, choice.mix).has_chat_template:
        instructed = [{"role": "system", "content": system}] if system else []
        turn = Turn(request.app.state.formats, runtime, choice, think=think)
        messages = [*instructed, {"role": "user", "content": given["prompt"]}]
        return await _respond(request, service, given, messages, TurnAnswer(turn))
    for name, value in {"system": system, "think": think}.items():
        if value:
            raise RequestFailed(400, f"{name}: a raw prompt, or a model without a chat template, has no place for it", param=name)
    return await _respond(request, service, given, given["prompt"], PlainAnswer())


async def embed(request: Request) -> Response:
    """Embeds texts as vectors of length 1."""
    service: Service = request.app.state.service
    given = check_fields(await service.read(request), OLLAMA_EMBED, _UNSUPPORTED)
    choice = _find_model(service, given)
    texts = [given["input"]] if isinstance(given["input"], str) else given["input"]
    embedded = await wait_for_client(request, embed_prompts(service, choice, texts))
    return JSONResponse(
        {
            "model": choice.name,
            "embeddings": [vector.tolist() for vector, _ in embedded],
            "prompt_eval_count": sum(tokens for _, tokens in embedded),
        }
    )


async def list_tags(request: Request) -> Response:
    """Lists the models. size: bytes of the files that a variant needs."""
    service: Service = request.app.state.service
    return JSONResponse({"models": [_describe_tag(service, choice) for choice in service.names.listed]})


async def show_version(request: Request) -> Response:  # noqa: ARG001  (a route's signature)
    """Returns this package's version."""
    return JSONResponse({"version": __version__})


def _describe_tag(service: Service, choice: ModelChoice) -> dict[str, Any]:
    manifest = service.bundles[choice.bundle].bundle.manifest
    variant = manifest.variants.get(choice.variant or "", manifest.variants[manifest.default_variant])
    graph = variant.graphs["cpu"]
    return {
        "name": choice.name,
        "model": choice.name,
        "modified_at": _write_time(service.opened),
        "size": sum(manifest.files[file].size for file in graph.files),
        "digest": manifest.files[graph.file].sha256,
        "details": {
            "parent_model": manifest.base.name,
            "format": "onnx",
            "family": manifest.model.architecture,
            "families": [manifest.model.architecture],
            "parameter_size": "",
            "quantization_level": f"int{manifest.quantization.bits}" if manifest.quantization.bits < 32 else "float32",
        },
    }


class PlainAnswer:
    """The answer of /api/generate to a raw prompt: text as the model writes it."""

    fit: Fit | None = None

    def push(self, text: str) -> dict[str, Any]:
        """Returns a piece in the form of this route."""
        return {"response": text}

    def finish(self) -> dict[str, Any]:
        """Returns what was held back."""
        return {"response": ""}

    def parse(self, text: str) -> dict[str, Any]:
        """Returns a whole answer in the form of this route."""
        return self.push(text)


class TurnAnswer:
    """The answer of /api/generate to a user's message: text, and thinking apart from it."""

    def __init__(self, turn: Turn) -> None:
        self.fit: Fit | None = turn.fit
        self._turn = turn

    def push(self, text: str) -> dict[str, Any]:
        """Returns a piece in the form of this route."""
        return self._write(self._turn.push(0, text))

    def finish(self) -> dict[str, Any]:
        """Returns what was held back."""
        return self._write(self._turn.finish(0), is_end=True)

    def parse(self, text: str) -> dict[str, Any]:
        """Returns a whole answer in the form of this route."""
        return self._write([*self._turn.push(0, text), *self._turn.finish(0)], is_end=True)

    def _write(self, deltas: list[Delta], *, is_end: bool = False) -> dict[str, Any]:  # noqa: ARG002  (a chat's answer has a use)
        answer = join_deltas(deltas)
        return {"response": answer.text, **({"thinking": answer.thought} if answer.thought else {})}


class ChatAnswer(TurnAnswer):
    """The answer of /api/chat: a message with text, thinking and calls.

    Ollama sends each call whole, so one is held back until the next one starts, or the answer ends. The arguments of a call that
    was cut off are no object, so it is left out, and done_reason says length.
    """

    def __init__(self, turn: Turn) -> None:
        super().__init__(turn)
        self._open: list[Delta] = []  # of the call that is being written

    def _write(self, deltas: list[Delta], *, is_end: bool = False) -> dict[str, Any]:
        ready: list[Delta] = []
        for delta in deltas:
            if not isinstance(delta, CallDelta) or delta.name is not None:
                ready, self._open = [*ready, *self._open], []
            (self._open if isinstance(delta, CallDelta) else ready).append(delta)
        if is_end:
            ready, self._open = [*ready, *self._open], []
        answer = join_deltas(ready)
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if answer.thought:
            message["thinking"] = answer.thought
        calls = [{"function": {"name": call.name, "arguments": load_arguments(call.arguments)}} for call in answer.calls]
        if whole := [call for call in calls if isinstance(call["function"]["arguments"], dict)]:
            message["tool_calls"] = whole
        return {"message": message}


async def _respond(
    request: Request, service: Service, given: Mapping[str, Any], prompt: Prompt, written: PlainAnswer | TurnAnswer
) -> Response:
    choice = _find_model(service, given)
    options = _read_options(given, service.bundles[choice.bundle].bundle.manifest.model.context_length)

    def generate() -> AsyncGenerator[Piece | Ended]:
        return service.generate(choice, [prompt], [options], written.fit)

    async def answer() -> dict[str, Any]:
        text, end = "", {}
        async with aclosing(generate()) as events:
            async for event in events:
                if isinstance(event, Piece):
                    text += event.text
                else:
                    end = _describe_end(event.generation)
        return {**_head(choice), **written.parse(text), **end}

    async def stream() -> AsyncGenerator[bytes]:
        async with aclosing(generate()) as events:
            async for event in events:
                if isinstance(event, Piece):
                    yield write_line({**_head(choice), **written.push(event.text), "done": False})
                else:
                    yield write_line({**_head(choice), **written.finish(), **_describe_end(event.generation)})

    if given.get("stream", True):
        return await stream_response(request, stream(), LINES, lambda failed: write_line(failed.to_ollama()))
    return JSONResponse(await wait_for_client(request, answer()))


def _find_model(service: Service, given: Mapping[str, Any]) -> ModelChoice:
    return service.names.find(given["model"].removesuffix(_LATEST))


def _read_options(given: Mapping[str, Any], context: int) -> dict[str, Any]:
    asked = dict(given.get("options", {}))
    if asked.pop("num_ctx", 1) > context:
        raise RequestFailed(400, f"num_ctx: the context of this bundle holds {context} tokens", param="options")
    count = asked.pop("num_predict", -1)
    if count == 0:
        raise RequestFailed(400, "num_predict = 0: use 1 or more, or -1 for no limit", param="options")
    if "repeat_penalty" in asked:
        asked["repetition_penalty"] = asked.pop("repeat_penalty")
    options = read_options(asked, count if count > 0 else NO_LIMIT)
    form = given.get("format")
    if form:
        options["json_schema"] = {"type": "object"} if form == "json" else form
    return options


def _head(choice: ModelChoice) -> dict[str, Any]:
    return {"model": choice.name, "created_at": _write_time(datetime.now(UTC).timestamp())}


def _describe_end(generation: Generation) -> dict[str, Any]:
    receipt = generation.receipt
    return {
        "done": True,
        "done_reason": find_finish_reason(generation),
        "total_duration": round((receipt.milliseconds + generation.prefill_ms + generation.decode_ms) * _NANOSECONDS),
        "load_duration": round(receipt.milliseconds * _NANOSECONDS),
        "prompt_eval_count": generation.prompt_tokens,
        "prompt_eval_duration": round(generation.prefill_ms * _NANOSECONDS),
        "eval_count": len(generation.tokens),
        "eval_duration": round(generation.decode_ms * _NANOSECONDS),
        "receipt": describe_cost(generation)["receipt"],
    }


def _write_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
