"""A conversation of `edgelora chat`: its messages, who answers, its request options, and its file."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, cast

from edgelora_runtime.bundle.messages import check_chat
from edgelora_runtime.bundle.router import AUTO
from edgelora_runtime.decode.options import resolve_options
from edgelora_runtime.errors import EdgeloraError, InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgelora_runtime import GenerateOptions, Generation, Receipt, Runtime
    from edgelora_runtime.answers.text_stream import TextStream

FORMAT, VERSION = "edgelora-chat", 1
_LIMIT = 64 << 20  # bytes of a file to load

Message = dict[str, str]


class Conversation:
    """The messages so far, and what the next request will say.

    A bundle with a chat template gets all messages. One without gets each prompt by itself.
    variant, mix: who answers; at most one of them is set. options: the other request options. turns: every finished turn as
    {"variant", "prompt", "answer"}, also those that a reset has taken out of the messages. last: the latest answer with its cost.
    """

    def __init__(self, runtime: Runtime, options: GenerateOptions) -> None:
        self.runtime = runtime
        self.variant: str | None = options.get("variant")
        self.mix: Mapping[str, float] | None = None
        self.options = cast("GenerateOptions", {name: value for name, value in options.items() if name != "variant"})
        self.system = ""
        self.messages: list[Message] = []
        self.turns: list[dict[str, str]] = []
        self.last: Generation | None = None

    @property
    def label(self) -> str:
        """The variant or mix that answers next, for people."""
        return AUTO if self.variant == AUTO else self.runtime.current

    @property
    def max_tokens(self) -> int:
        """The limit of an answer's tokens."""
        return resolve_options(self.options)["max_tokens"]

    def switch(self, variant: str | None) -> str:
        """Makes a variant ready, or the router. Returns a line about the cost.

        Raises UsageError for a variant that the bundle does not have, and for "auto" without a router. The one before then stays.
        """
        if variant == AUTO:
            self.runtime.route("")  # loads the router, or says that there is none
            self.variant, self.mix = AUTO, None
            return "each turn goes to the variant that the router picks for it"
        receipt = self.runtime.switch(variant)
        self.variant, self.mix = receipt.variant, None
        return describe_receipt(receipt)

    def switch_to_mix(self, mix: Mapping[str, float]) -> str:
        """Makes a mix of live adapters ready. Returns a line about the cost. Raises UsageError as Runtime.switch() does."""
        receipt = self.runtime.switch(mix=mix)
        self.variant, self.mix = None, dict(mix)
        return describe_receipt(receipt)

    def set_option(self, name: str, value: object) -> None:
        """Sets a request option. Raises UsageError for a value that it does not take."""
        options = {**self.options, name: value}
        resolve_options(options)
        self.options = cast("GenerateOptions", options)

    def ask(self, prompt: str) -> TextStream:
        """Starts the answer to a prompt. finish() must follow once the stream has ended."""
        messages = [*self._system_message, *self.messages, {"role": "user", "content": prompt}]
        request = cast("GenerateOptions", {**self.options, "variant": self.variant, "mix": self.mix})
        return self.runtime.stream(messages if self.runtime.tokenizer.has_chat_template else prompt, **request)

    def finish(self, prompt: str, stream: TextStream) -> Generation:
        """Takes a prompt and its answer into the messages."""
        generation = stream.generation
        assert generation is not None
        self.messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": generation.text}]
        self.turns.append({"variant": generation.variant, "prompt": prompt, "answer": generation.text})
        self.last = generation
        return generation

    def drop_last_turn(self) -> str:
        """Takes the last turn out of the messages. Returns its prompt. Raises UsageError if there is none."""
        if not self.messages:
            raise UsageError("nothing was asked yet")
        prompt = self.messages[-2]["content"]
        del self.messages[-2:]
        return prompt

    def save(self, path: Path) -> None:
        """Writes the conversation to a file, which is then whole or as it was.

        Raises InputError for a file that holds anything but a conversation.
        """
        if path.exists():
            try:
                _read_file(path)
            except InputError as error:
                raise InputError(f"{error}; it is left as it is, save to another file") from None
        kept = {"variant": self.variant, "mix": self.mix, "system": self.system, "messages": self.messages}
        text = json.dumps({"format": FORMAT, "version": VERSION, **kept}, ensure_ascii=False, indent=1) + "\n"
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def load(self, path: Path) -> str:
        """Reads a conversation from a file in place of this one. Returns a line about it.

        Raises InputError for a file that is no conversation. This one then stays. A variant or mix that this bundle lacks is left
        as it was.
        """
        value = _read_file(path)
        self.messages, self.system = value["messages"], value["system"]
        said = f"{count_turns(self.messages)} loaded"
        try:
            if value["mix"] is not None:
                return f"{said}; {self.switch_to_mix(value['mix'])}"
            return f"{said}; {self.switch(value['variant'])}"
        except EdgeloraError as error:
            return f"{said}, but {self.label} stays: {error}"

    @property
    def _system_message(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []


def count_turns(messages: Sequence[Message]) -> str:
    """Counts the turns of messages, in words."""
    count = len(messages) // 2
    return "1 turn" if count == 1 else f"{count} turns"


def describe_receipt(receipt: Receipt) -> str:
    """Describes what a switch cost, in a line."""
    return f"{receipt.variant} in {receipt.milliseconds:.1f} ms ({'cold' if receipt.cold else 'warm'})"


def _read_file(path: Path) -> dict[str, Any]:
    """Reads and checks a conversation's file. Raises InputError for anything else."""
    try:
        with path.open("rb") as file:
            raw = file.read(_LIMIT + 1)
        if len(raw) > _LIMIT:
            raise InputError(f"{path} has more than {_LIMIT >> 20} MiB, too much for a conversation")
        value = json.loads(raw)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no conversation that /save wrote: it is no JSON") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise InputError(f"{path} is no conversation that /save wrote")
    if value.get("version") != VERSION:
        raise InputError(f"{path} has version {value.get('version')!r}; this edgelora reads {VERSION}")
    variant, mix, system, messages = (value.get(key) for key in ("variant", "mix", "system", "messages"))
    roles = ["user", "assistant"]
    holds = (
        isinstance(variant, str | None)
        and (mix is None or _is_mix(mix))
        and isinstance(system, str)
        and isinstance(messages, list)
        and len(messages) % 2 == 0
        and all(_is_message(message, roles[at % 2]) for at, message in enumerate(messages))
    )
    if not holds:
        raise InputError(f"{path} is no whole conversation: variant, mix, system or messages are not as /save writes them")
    if messages:
        check_chat(messages, {})
    return {"variant": variant, "mix": mix, "system": system, "messages": messages}


def _is_mix(value: object) -> bool:
    return isinstance(value, dict) and all(type(weight) in (int, float) for weight in value.values())


def _is_message(value: object, role: str) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and value["role"] == role
        and isinstance(value["content"], str)
    )
