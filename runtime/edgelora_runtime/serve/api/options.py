"""From a request's fields to the runtime's options, and to the model that they name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora_runtime.decode.options import resolve_options
from edgelora_runtime.errors import UsageError
from edgelora_runtime.serve.api.schemas import CHAT_OPTION_SCHEMAS, MOST_ANSWERS, OPTION_SCHEMAS
from edgelora_runtime.serve.failures import RequestFailed
from edgelora_runtime.tools.declarations import read_response_format

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelora_runtime.serve.names import ModelChoice, ModelNames

NO_LIMIT = (1 << 31) - 1  # tokens: the context ends the answer before
_NOT_HERE = "this runtime reads and writes text alone"
UNSUPPORTED: Mapping[str, str] = {
    "functions": "give tools",
    "function_call": "give tool_choice",
    "reasoning_effort": "give chat_template_kwargs, as the model's template reads them",
    "verbosity": "no model here reads it",
    "audio": _NOT_HERE,
    "modalities": _NOT_HERE,
    "prediction": "give speculation, which needs no predicted text",
    "web_search_options": "this server makes no requests",
    "suffix": "no model here fills in a middle",
    "echo": "the answer holds the new text alone",
    "best_of": "give n, which returns all answers",
    "mix": "name the mix in model, such as sql:0.7+medical:0.3, or give lora",
    "variant": "name the variant in model",
    "template_options": "give chat_template_kwargs",
    "json_schema": "give response_format",
    "overflow": "shorten the conversation; the answer ends with the context",
}


def find_model(given: Mapping[str, Any], names: ModelNames) -> ModelChoice:
    """Returns what `model` and `lora` stand for. Raises RequestFailed, with 404 for an unknown model."""
    lora = given.get("lora")
    return names.find(given["model"], None if lora is None else [(each["id"], each["scale"]) for each in lora])


def read_options(given: Mapping[str, Any], default_max_tokens: int) -> dict[str, Any]:
    """Returns the runtime's options of a request, whose fields were checked by their schemas.

    Raises RequestFailed with 400, which names the field.
    """
    options = {name: given[name] for name in (*OPTION_SCHEMAS, *CHAT_OPTION_SCHEMAS) if name in given}
    options["max_tokens"] = _read_max_tokens(given, default_max_tokens)
    if "logit_bias" in options:  # the keys of a JSON object are text, and mean token ids
        options["logit_bias"] = {_read_token(key): value for key, value in options["logit_bias"].items()}
    if isinstance(options.get("stop"), str):
        options["stop"] = [options["stop"]]
    if "response_format" in given and (schema := read_response_format(given["response_format"])) is not None:
        options["json_schema"] = schema
    if "chat_template_kwargs" in given:
        options["template_options"] = given["chat_template_kwargs"]
    for name, value in options.items():
        try:
            resolve_options({name: value})
        except UsageError as error:
            raise RequestFailed(400, str(error), param=name, code="invalid_value") from None
    resolve_options(options)  # what is wrong with them together
    return options


def repeat_options(options: Mapping[str, Any], prompts: int, answers: int) -> list[dict[str, Any]]:
    """Returns the options of each answer: `answers` for each prompt, in the prompts' order. Seeds count up within a prompt.

    Raises RequestFailed for more answers than one request may have.
    """
    if prompts * answers > MOST_ANSWERS:
        raise RequestFailed(400, f"{prompts} prompts with n = {answers}: at most {MOST_ANSWERS} answers a request", param="n")
    seed = options.get("seed")
    return [{**options, **({} if seed is None else {"seed": seed + number})} for _ in range(prompts) for number in range(answers)]


def check_streaming(given: Mapping[str, Any]) -> tuple[bool, bool]:
    """Returns whether to stream, and whether the usage follows the stream. Raises RequestFailed for options without a stream."""
    stream = given.get("stream", False)
    if "stream_options" in given and not stream:
        raise RequestFailed(400, "stream_options: only allowed with stream = true", param="stream_options", code="invalid_value")
    return stream, given.get("stream_options", {}).get("include_usage", False)


def _read_token(key: str) -> int:
    try:
        return int(key)
    except ValueError:
        raise RequestFailed(400, f"logit_bias: {key[:40]!r} is no token id", param="logit_bias") from None


def _read_max_tokens(given: Mapping[str, Any], default: int) -> int:
    both = {given[name] for name in ("max_tokens", "max_completion_tokens") if name in given}
    if len(both) > 1:
        raise RequestFailed(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    found: int = both.pop() if both else default
    return found
