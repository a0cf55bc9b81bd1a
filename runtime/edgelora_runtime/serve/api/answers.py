"""Parts of answers that several routes share: usage, timings, log probabilities, ids."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora_runtime.answers.generation import Generation, TokenLogprob
    from edgelora_runtime.bundle.tokenizer import Tokenizer

_FINISH = {"stop": "stop"}  # the others, "length" and "timeout", are cut-off answers


def make_id(prefix: str) -> str:
    """Returns a new id of an answer."""
    return f"{prefix}-{secrets.token_hex(12)}"


def find_finish_reason(generation: Generation, *, has_calls: bool = False) -> str:
    """Returns OpenAI's word for the end of an answer: stop, tool_calls or length. A call that was cut off is a length."""
    found = _FINISH.get(generation.finish_reason, "length")
    return "tool_calls" if has_calls and found == "stop" else found


def count_usage(generations: Sequence[Generation], *, answers_per_prompt: int = 1) -> dict[str, Any]:
    """Returns OpenAI's usage. A prompt with several answers counts once."""
    prompts = generations[::answers_per_prompt]
    prompt, written = sum(each.prompt_tokens for each in prompts), sum(len(each.tokens) for each in generations)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(each.reused_tokens for each in prompts)},
    }


def describe_cost(generation: Generation) -> dict[str, Any]:
    """Returns the extra fields of an answer: llama.cpp's timings, the switch's receipt, and the router's choice."""
    read = generation.prompt_tokens - generation.reused_tokens
    later = max(len(generation.tokens) - 1, 0)  # the first token is a part of the prefill
    found: dict[str, Any] = {
        "timings": {
            "cache_n": generation.reused_tokens,
            "prompt_n": read,
            "prompt_ms": generation.prefill_ms,
            "prompt_per_second": _per_second(read, generation.prefill_ms),
            "predicted_n": len(generation.tokens),
            "predicted_ms": generation.decode_ms,
            "predicted_per_second": _per_second(later, generation.decode_ms),
        },
        "receipt": asdict(generation.receipt),
    }
    return found if generation.route is None else {**found, "route": asdict(generation.route)}


def list_logprobs(
    rated: Sequence[TokenLogprob], tokenizer: Tokenizer, top: int, before: int | None = None
) -> list[dict[str, Any]]:
    """Returns log probabilities in the form of OpenAI's chats, with the `top` likeliest of each position.

    before: the token before the first one, if the answer has one.
    """
    found = []
    for each in rated:
        best = [_name_token(tokenizer, before, token, value) for token, value in each.top[:top]]
        found.append({**_name_token(tokenizer, before, each.token, each.logprob), "top_logprobs": best})
        before = each.token
    return found


def list_completion_logprobs(
    rated: Sequence[TokenLogprob], tokenizer: Tokenizer, top: int, before: int | None = None, at: int = 0
) -> dict[str, Any]:
    """Returns log probabilities in the form of OpenAI's completions.

    before: the token before the first one, if the answer has one. at: characters of the answer before it.
    """
    tokens = list_logprobs(rated, tokenizer, top, before)
    offsets = []
    for each in tokens:
        offsets.append(at)
        at += len(each["token"])
    return {
        "tokens": [each["token"] for each in tokens],
        "token_logprobs": [each["logprob"] for each in tokens],
        "top_logprobs": [{item["token"]: item["logprob"] for item in each["top_logprobs"]} for each in tokens],
        "text_offset": offsets,
    }


def write_event(value: object) -> bytes:
    """Returns a server-sent event that is data alone, as OpenAI's streams have them."""
    return b"data: " + write_json(value) + b"\n\n"


def write_line(value: object) -> bytes:
    """Returns a line of NDJSON, as Ollama's streams have them."""
    return write_json(value) + b"\n"


def write_json(value: object) -> bytes:
    """Returns compact JSON on one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _per_second(count: int, milliseconds: float) -> float:
    return count / milliseconds * 1e3 if milliseconds > 0 else 0.0


def _name_token(tokenizer: Tokenizer, before: int | None, token: int, logprob: float) -> dict[str, Any]:
    """Returns a token's text after the one before it, and its bytes. A part of a character has no bytes of its own in text."""
    if before is None:
        text = tokenizer.decode([token])
    else:
        start = tokenizer.decode([before])
        both = tokenizer.decode([before, token])
        text = both[len(start) :] if both.startswith(start) else tokenizer.decode([token])
    text = text or tokenizer.name_token(token)
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
