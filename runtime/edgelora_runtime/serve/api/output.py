"""The output of /v1/responses: items of thought, text and calls, and the events that tell of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora_runtime.serve.api.answers import make_id
from edgelora_runtime.tools.answer import CallDelta, TextDelta

if TYPE_CHECKING:
    from edgelora_runtime.tools.answer import Delta

    Event = dict[str, Any]


class Output:
    """The items of an answer as they grow. items: in the order in which the model wrote them; never empty after finish()."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._call = -1  # index of the call that is the last item

    def push(self, delta: Delta) -> list[Event]:
        """Takes a piece of the answer. Returns the events that tell of it."""
        if isinstance(delta, CallDelta):
            events = [] if delta.index == self._call else self._open_call(delta)
            self.items[-1]["arguments"] += delta.arguments
            name = "response.function_call_arguments.delta"
            return [*events, {"type": name, **self._place, "delta": delta.arguments}] if delta.arguments else events
        kind = "message" if isinstance(delta, TextDelta) else "reasoning"
        events = [] if self.items and self.items[-1]["type"] == kind else self._open(kind)
        self.items[-1]["content"][0]["text"] += delta.text
        name, more = _name_part(kind)
        return [*events, {"type": f"response.{name}.delta", **self._place, "content_index": 0, "delta": delta.text, **more}]

    def finish(self, *, is_whole: bool) -> list[Event]:
        """Ends the last item. An answer without any gets an empty message."""
        events = self._open("message") if not self.items else []
        return [*events, *self._close("completed" if is_whole else "incomplete")]

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _open(self, kind: str) -> list[Event]:
        item: dict[str, Any] = {"id": make_id("msg" if kind == "message" else "rs"), "type": kind, "status": "in_progress"}
        part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        if kind == "message":
            item["role"] = "assistant"
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item["summary"] = []
        events = [*self._add(item), {"type": "response.content_part.added", **self._place, "content_index": 0, "part": part}]
        item["content"] = [dict(part)]
        return events

    def _open_call(self, delta: CallDelta) -> list[Event]:
        self._call = delta.index
        item = {"id": make_id("fc"), "type": "function_call", "status": "in_progress", "call_id": delta.id, "name": delta.name}
        return self._add({**item, "arguments": ""})

    def _add(self, item: dict[str, Any]) -> list[Event]:
        events = self._close("completed") if self.items else []
        self.items.append(item)
        shown = {**item, "content": []} if item["type"] != "function_call" else dict(item)
        return [*events, {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": shown}]

    def _close(self, status: str) -> list[Event]:
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            named = {"name": item["name"], "arguments": item["arguments"]}
            events = [{"type": "response.function_call_arguments.done", **self._place, **named}]
        else:
            (part,) = item["content"]
            name, more = _name_part(item["type"])
            place = {**self._place, "content_index": 0}
            events = [
                {"type": f"response.{name}.done", **place, "text": part["text"], **more},
                {"type": "response.content_part.done", **place, "part": part},
            ]
        return [*events, {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}]


def _name_part(kind: str) -> tuple[str, dict[str, Any]]:
    """Returns how events name the part of an item, and what else they carry."""
    return ("output_text", {"logprobs": []}) if kind == "message" else ("reasoning_text", {})
