"""What `edgelora chat` adds to a conversation: options that change, receipts of switches, turns for --json, and files by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from edgelora_runtime.bundle.router import AUTO
from edgelora_runtime.conversation import Conversation, read_conversation
from edgelora_runtime.decode.options import resolve_options
from edgelora_runtime.errors import EdgeloraError, InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Unpack

    from edgelora_runtime import GenerateOptions, Generation, Receipt, Runtime
    from edgelora_runtime.answers.text_stream import TextStream
    from edgelora_runtime.bundle.messages import Message


class TerminalChat:
    """A conversation in the terminal, and what the next request will say.

    A bundle with a chat template gets all messages. One without gets each prompt by itself.
    options: the request options, without the variant. turns: every finished turn as {"variant", "prompt", "answer"}, also those
    that a reset has taken out of the messages. last: the latest answer with its cost.
    """

    def __init__(self, runtime: Runtime, options: GenerateOptions) -> None:
        self.runtime = runtime
        self.first: str | None = options.get("variant")
        self.options = cast("GenerateOptions", {name: value for name, value in options.items() if name != "variant"})
        self.turns: list[dict[str, str]] = []
        self.last: Generation | None = None
        self._answering = runtime if runtime.tokenizer.has_chat_template else _PromptByPrompt(runtime)
        self._conversation = Conversation(self._answering, None, {})

    @property
    def label(self) -> str:
        """The variant or mix that answers next, for people."""
        return AUTO if self._conversation.variant == AUTO else self.runtime.current

    @property
    def messages(self) -> Sequence[Message]:
        """The turns so far, without the system message."""
        return self._conversation.history

    @property
    def system(self) -> str:
        """The text of the system message, empty for none."""
        return self._conversation.system or ""

    @system.setter
    def system(self, text: str) -> None:
        self._conversation.system = text or None

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
            self._conversation.switch(AUTO)
            return "each turn goes to the variant that the router picks for it"
        receipt = self.runtime.switch(variant)
        self._conversation.switch(receipt.variant)
        return describe_receipt(receipt)

    def switch_to_mix(self, mix: Mapping[str, float]) -> str:
        """Makes a mix of live adapters ready. Returns a line about the cost. Raises UsageError as Runtime.switch() does."""
        receipt = self.runtime.switch(mix=mix)
        self._conversation.switch(mix=dict(mix))
        return describe_receipt(receipt)

    def set_option(self, name: str, value: object) -> None:
        """Sets a request option. Raises UsageError for a value that it does not take."""
        options = {**self.options, name: value}
        resolve_options(options)
        self.options = cast("GenerateOptions", options)

    def ask(self, prompt: str) -> TextStream:
        """Starts the answer to a prompt. finish() must follow once the stream has ended."""
        return self._conversation.stream(prompt, **self.options)

    def finish(self, prompt: str, stream: TextStream) -> Generation:
        """Notes an answer that has ended. The conversation has it already."""
        generation = stream.read()
        self.turns.append({"variant": generation.variant, "prompt": prompt, "answer": generation.text})
        self.last = generation
        return generation

    def drop_last_turn(self) -> str:
        """Takes the last turn out of the messages. Returns its prompt. Raises UsageError if there is none."""
        if not self.messages:
            raise UsageError("nothing was asked yet")
        return self._conversation.undo()

    def restore(self, messages: Sequence[Message]) -> None:
        """Brings back the turns that were dropped since messages were these."""
        for message in messages[len(self.messages) :]:
            self._conversation.add(message)

    def reset(self) -> None:
        """Forgets all turns. The system message, the options and who answers stay."""
        before = self._conversation
        self._conversation = Conversation(self._answering, before.system, {"variant": before.variant, "mix": before.mix})

    def save(self, path: Path) -> None:
        """Writes the conversation to a file, which is then whole or as it was.

        Raises InputError for a file that holds anything but a conversation.
        """
        if path.exists():
            try:
                read_conversation(path)
            except InputError as error:
                raise InputError(f"{error}; it is left as it is, save to another file") from None
        self._conversation.save(path)

    def load(self, path: Path) -> str:
        """Reads a conversation from a file in place of this one. Returns a line about it.

        Raises InputError for a file that is no conversation. This one then stays. A variant or mix that this bundle lacks is left
        as it was.
        """
        saved, before = read_conversation(path), self._conversation
        speaker: GenerateOptions = {"variant": before.variant, "mix": before.mix}
        self._conversation = Conversation.load(self._answering, path, speaker)
        said = f"{count_turns(self.messages)} loaded"
        try:
            cost = self.switch(saved["variant"]) if saved["mix"] is None else self.switch_to_mix(saved["mix"])
        except EdgeloraError as error:
            return f"{said}, but {self.label} stays: {error}"
        return f"{said}; {cost}"


class _PromptByPrompt:
    """A runtime without a chat template, which gets the last message of a conversation as plain text."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def check_speaker(self, variant: str | None, mix: Mapping[str, float] | None) -> None:
        """Accepts all. TerminalChat switches the runtime first, which refuses what the bundle lacks."""

    def stream(self, prompt: list[Message], **options: Unpack[GenerateOptions]) -> TextStream:
        """Continues the last message's text."""
        return self._runtime.stream(prompt[-1]["content"], **options)


def count_turns(messages: Sequence[Message]) -> str:
    """Counts the turns of messages, in words."""
    count = sum(message["role"] == "user" for message in messages)
    return "1 turn" if count == 1 else f"{count} turns"


def describe_receipt(receipt: Receipt) -> str:
    """Describes what a switch cost, in a line."""
    return f"{receipt.variant} in {receipt.milliseconds:.1f} ms ({'cold' if receipt.cold else 'warm'})"
