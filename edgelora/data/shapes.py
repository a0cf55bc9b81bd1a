"""The shapes of training data: recognizes each by its keys, and brings it into texts or messages."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from edgelora.data.chats import ASSISTANT
from edgelora_runtime.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SHAPES = {
    "messages": '{"messages": [{"role": …, "content": …}, …]}',
    "prompt-completion": '{"prompt": …, "completion": …}, both text or both lists of messages',
    "alpaca": '{"instruction": …, "input": …, "output": …}',
    "sharegpt": '{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}',
    "text": '{"text": …}',
}
FORMATS = ("auto", *SHAPES)
KEYS = (
    "messages", "prompt", "completion", "instruction", "input", "output", "history", "conversations", "system", "tools", "text",
)  # fmt: skip

# Names of the speakers in files of ShareGPT's shape, as LLaMA-Factory and FastChat write them.
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": ASSISTANT, "assistant": ASSISTANT, "chatgpt": ASSISTANT, "bing": ASSISTANT,
    "bard": ASSISTANT, "model": ASSISTANT, "system": "system", "function_call": ASSISTANT, "observation": "tool", "tool": "tool",
    "function_response": "tool",
}  # fmt: skip


def check_format(name: str) -> None:
    """Raises UsageError for a name that is no format."""
    if name not in FORMATS:
        raise UsageError(f"format {name!r} is not known; use one of {', '.join(FORMATS)}")


def find_shape(value: Mapping[str, Any], where: str) -> str:
    """Recognizes the shape of a record by its keys. Keys without a value don't count.

    Raises InputError, with the keys and the known shapes, if it has none. where: names the record.
    """
    keys = {key for key in value if value[key] is not None}
    if {"prompt", "completion"} <= keys:
        return "prompt-completion"
    for shape, key in (("messages", "messages"), ("sharegpt", "conversations"), ("alpaca", "instruction"), ("text", "text")):
        if key in keys:
            return shape
    if keys & {"prompt", "completion"}:
        return "prompt-completion"
    if "output" in keys:
        return "alpaca"
    known = " or ".join(SHAPES.values())
    found = ", ".join(str(key)[:40] for key in list(value)[:8]) or "no keys"
    raise InputError(f"{where} has {found}, which is no known shape; expected {known}")


def convert(value: Mapping[str, Any], shape: str, where: str) -> dict[str, Any]:
    """Brings a record of any shape into {"messages"}, {"prompt", "completion"} or {"text"}, with "tools" where it has them.

    An instruction of Alpaca's shape and its input become the user's message, two lines, as LLaMA-Factory joins them
    (https://llamafactory.readthedocs.io/en/latest/getting_started/data_preparation.html), and "history" the turns before it.
    """
    return _CONVERTERS[shape](value, where)


def _convert_messages(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"messages": parse_list(value.get("messages"), f"{where}: messages"), "tools": value.get("tools")}


def _convert_pair(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in ("prompt", "completion"):
        if value.get(key) is None:
            raise InputError(f"{where} has no {key}")
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        one, other = ("prompt", "completion") if isinstance(prompt, list) else ("completion", "prompt")
        raise InputError(f"{where}: {one} is a list of messages, and {other} is {type(value[other]).__name__}")
    return {"prompt": prompt, "completion": completion, "tools": value.get("tools")}


def _convert_alpaca(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    texts = {}
    for key, required in (("instruction", True), ("input", False), ("output", True), ("system", False)):
        text = value.get(key)
        if text is None and not required:
            text = ""
        if not isinstance(text, str):
            raise InputError(f"{where}: {key} is {'absent' if text is None else type(text).__name__}, not text")
        texts[key] = text
    asked = "\n".join(filter(None, (texts["instruction"], texts["input"])))
    for key, text in (("instruction", asked), ("output", texts["output"])):
        if not text.strip():
            raise InputError(f"{where}: {key} is empty")
    messages = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
    for number, turn in enumerate(parse_list(value.get("history") or [], f"{where}: history"), 1):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise InputError(f"{where}: turn {number} of history is not [question, answer]")
        messages += [{"role": "user", "content": turn[0]}, {"role": ASSISTANT, "content": turn[1]}]
    messages += [{"role": "user", "content": asked}, {"role": ASSISTANT, "content": texts["output"]}]
    return {"messages": messages, "tools": value.get("tools")}


def _convert_sharegpt(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    turns = parse_list(value.get("conversations"), f"{where}: conversations")
    if turns and all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return {"messages": turns, "tools": value.get("tools")}
    system = value.get("system")
    if not isinstance(system, str | None):
        raise InputError(f"{where}: system is {type(system).__name__}, not text")
    messages = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(turns, 1):
        at = f"{where}: turn {number}"
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
            raise InputError(f"{at} has no from and value as text")
        speaker = turn["from"]
        if speaker not in _SPEAKERS:
            raise InputError(f"{at} is from {speaker!r}; known are {', '.join(_SPEAKERS)}")
        if speaker == "function_call":
            messages.append(_read_call(turn["value"], at))
        else:
            messages.append({"role": _SPEAKERS[speaker], "content": turn["value"]})
    return {"messages": messages, "tools": _wrap_tools(value.get("tools"), where)}


def _convert_text(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    text = value.get("text")
    if not isinstance(text, str) or not text.strip():
        kind = "absent" if text is None else "empty" if isinstance(text, str) else f"{type(text).__name__}, not text"
        raise InputError(f"{where}: text is {kind}")
    return {"text": text}


def _read_call(text: str, where: str) -> dict[str, Any]:
    """Reads the calls of a function_call turn: {"name": …, "arguments": …} as JSON text, or a list of these."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}, a function_call, is not JSON ({error})") from error
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise InputError(f'{where}, a function_call, is not {{"name": …, "arguments": …}}')
    made = [{"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}} for call in calls]
    return {"role": ASSISTANT, "tool_calls": made}


def _wrap_tools(tools: object, where: str) -> object:
    """Puts plain descriptions of functions, as ShareGPT's files have them, into the form of requests."""
    if isinstance(tools, str):
        if not tools.strip():
            return None
        tools = parse_list(tools, f"{where}: tools")
    if not isinstance(tools, list):
        return tools  # read_tools checks it
    plain = [isinstance(tool, dict) and "name" in tool and "function" not in tool for tool in tools]
    return [{"type": "function", "function": tool} if bare else tool for tool, bare in zip(tools, plain, strict=True)]


def parse_list(value: object, where: str) -> list[Any]:
    """Returns a list, also one that a table holds as JSON text. Raises InputError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is text, and no JSON of a list ({error})") from error
    if not isinstance(value, list):
        raise InputError(f"{where} is {'absent' if value is None else type(value).__name__}, not a list")
    return value


_CONVERTERS: Mapping[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "messages": _convert_messages,
    "prompt-completion": _convert_pair,
    "alpaca": _convert_alpaca,
    "sharegpt": _convert_sharegpt,
    "text": _convert_text,
}
