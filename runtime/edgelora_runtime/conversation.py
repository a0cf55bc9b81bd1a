"""A conversation: its messages so far, and the variant or mix that answers next."""

from __future__ import annotations

import json
import threading
import weakref
from typing import TYPE_CHECKING, Any, Protocol

from edgelora_runtime.answers.text_stream import TextStream
from edgelora_runtime.arguments import check_kind, check_path, show
from edgelora_runtime.bundle.messages import check_chat
from edgelora_runtime.bundle.strict_json import read_strictly
from edgelora_runtime.decode.options import resolve_options
from edgelora_runtime.errors import EdgeloraError, InputError, UsageError
from edgelora_runtime.residency.whole_file import write_whole
from edgelora_runtime.session.process import leave_in_child

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from os import PathLike
    from pathlib import Path
    from typing import Self, Unpack

    from edgelora_runtime.answers.generation import Generation
    from edgelora_runtime.answers.text_stream import Piece
    from edgelora_runtime.bundle.messages import Message
    from edgelora_runtime.decode.options import GenerateOptions

_FORMAT = "edgelora chat 1"
_LIMIT = 64 << 20  # bytes of a saved conversation
_WRITER = "variant"  # the key of an answer's message that names who wrote it; templates do not see it


class Answering(Protocol):
    """What a conversation needs of a runtime."""

    def check_speaker(self, variant: str | None, mix: Mapping[str, float] | None) -> None:
        """Raises UsageError for a variant or mix that the bundle lacks, or that has no chat template."""

    def stream(self, prompt: list[Message], **options: Unpack[GenerateOptions]) -> TextStream:
        """Answers messages piece by piece."""


class Conversation:
    """A conversation with a bundle, made by Runtime.chat() and Runtime.load_chat().

    The KV cache keeps what was read, so each turn reads only what is new. A turn enters the history when its answer is complete.
    An answer that was cancelled, or ran out of time, is kept as far as it came. An answer that failed or was closed before its
    end leaves the history as it was. system: the text of the system message, or None; it can be set. options: those of every
    turn, as Runtime.generate() takes them; variant or mix is who answers first.

    Safe to call from several threads, but one answer at a time is written. Others run beside it in other conversations.
    """

    def __init__(self, runtime: Answering, system: str | None, options: GenerateOptions) -> None:
        check_kind("chat", "system", system, str, "a text, or None")
        resolve_options(options, "chat")
        self.system = system
        self._runtime = runtime
        self._options = options
        self._history: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        leave_in_child("Conversation", self, "_lock", "_runtime")
        self._answer: weakref.ref[TextStream] | None = None
        self.switch(options.get("variant"), mix=options.get("mix"))

    def __repr__(self) -> str:
        return f"<Conversation with {self._mix or self._variant or 'the current variant'}: {len(self._history)} messages>"

    @property
    def history(self) -> tuple[Message, ...]:
        """The messages without the system message, oldest first. Those of answers name the `variant` that wrote them."""
        return tuple(dict(message) for message in self._history)

    @property
    def messages(self) -> list[Message]:
        """The messages as the chat template gets them, with the system message."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        spoken = [{key: value for key, value in message.items() if key != _WRITER} for message in self._history]
        return [*system, *spoken]

    @property
    def variant(self) -> str | None:
        """The variant that answers next, or None for a mix or the runtime's current variant."""
        return self._variant

    @property
    def mix(self) -> Mapping[str, float] | None:
        """The mix that answers next, or None for a variant."""
        return self._mix

    def switch(self, variant: str | None = None, *, mix: Mapping[str, float] | None = None) -> None:
        """Lets another variant or mix answer from the next turn on. Without either, the runtime's current one.

        Raises UsageError for one that the bundle lacks. It is loaded when it first answers. Runtime.prefetch() loads it earlier.
        """
        self._runtime.check_speaker(variant, mix)
        self._variant, self._mix = variant, mix

    def send(self, text: str | None = None, **options: Unpack[GenerateOptions]) -> Generation:
        """Says something as the user and returns the whole answer. Takes what stream() takes."""
        return self.stream(text, **options).read()

    async def send_async(self, text: str | None = None, **options: Unpack[GenerateOptions]) -> Generation:
        """Runs send() in threads, for asyncio. Cancelling the task ends the answer before its next step."""
        import asyncio

        stream = await asyncio.to_thread(self.stream, text, **options)
        return await stream.read_async()

    def stream(self, text: str | None = None, **options: Unpack[GenerateOptions]) -> TextStream:
        """Says something as the user and streams the answer.

        text: None to have the messages answered that add() has added. options: of this turn, before those of the conversation. Of
        several answers (n), the first is kept. Raises UsageError while an earlier answer is not complete, and what
        Runtime.stream() raises.
        """
        check_kind("Conversation.stream", "text", text, str, "a text, or None to have added messages answered")
        with self._lock:
            self._refuse_while_answering()
            said = [] if text is None else [{"role": "user", "content": text}]
            speaker: GenerateOptions = {"variant": self._variant, "mix": self._mix}
            if options.get("variant") is not None or options.get("mix") is not None:
                speaker = {"variant": None, "mix": None}
            chosen: GenerateOptions = {**self._options, **speaker, **options}
            inner = self._runtime.stream([*self.messages, *said], **chosen)
            stream = TextStream(self._keep(said, inner), inner.cancel)
            self._answer = weakref.ref(stream)
            return stream

    def add(self, message: Message) -> None:
        """Adds a message as it is, such as a tool's result. Raises InputError for one that no template can take."""
        if not isinstance(message, dict):
            raise InputError(f"Conversation.add: {show(message)} is no message; write {{'role': …, 'content': …}}")
        (checked,) = check_chat([message], {}).messages
        with self._lock:
            self._refuse_while_answering()
            self._history.append(checked)

    def undo(self) -> str:
        """Takes back the user's last message and all that followed. Returns its text.

        Raises UsageError if the user has said nothing.
        """
        with self._lock:
            self._refuse_while_answering()
            said = [at for at, message in enumerate(self._history) if message["role"] == "user"]
            if not said:
                raise UsageError("Conversation.undo: the user has said nothing that could be taken back")
            content = self._history[said[-1]].get("content")
            del self._history[said[-1] :]
            return content if isinstance(content, str) else ""

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the conversation as JSON: its messages, its system message, and who answers next.

        Options are not written, as functions are among them. Raises ResourceError if the file cannot be written. An earlier file
        is then unchanged.
        """
        target = check_path("Conversation.save", "path", path)
        mix = None if self._mix is None else {name: float(weight) for name, weight in self._mix.items()}
        content = {
            "format": _FORMAT,
            "variant": self._variant,
            "mix": mix,
            "system": self.system,
            "messages": list(self._history),
        }
        write_whole(target, json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n")

    @classmethod
    def load(cls, runtime: Answering, path: Path, options: GenerateOptions) -> Self:
        """Reads a conversation that save() wrote. Raises InputError for another kind of file."""
        content = read_conversation(path)
        try:
            speaker: GenerateOptions = {"variant": content["variant"], "mix": content["mix"]}
            found = cls(runtime, content["system"], {**speaker, **options})
            found._history = check_chat(content["messages"], {}).messages if content["messages"] else []
        except EdgeloraError as error:
            raise InputError(f"{path}: {error}") from error
        return found

    def _keep(self, said: list[dict[str, Any]], inner: TextStream) -> Generator[Piece, None, Generation]:
        """Yields the pieces of an answer, and enters the turn into the history behind the last."""
        yield from inner
        generation = inner.read()
        if generation.tokens or generation.finish_reason not in ("cancelled", "timeout"):
            answer = {"role": "assistant", "content": generation.text, _WRITER: generation.variant}
            self._history += [*said, answer]
        return generation

    def _refuse_while_answering(self) -> None:
        stream = None if self._answer is None else self._answer()
        if stream is not None and stream.is_open:
            raise UsageError("Conversation: the last answer is not complete; read its stream to the end, or close() it")


def read_conversation(path: Path) -> dict[str, Any]:
    """Reads the JSON of a saved conversation: variant, mix, system and messages, with their types checked.

    Raises InputError for another kind of file.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_LIMIT + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    if len(raw) > _LIMIT:
        raise InputError(f"{path} is larger than {_LIMIT} bytes, the limit for a conversation")
    try:
        content = read_strictly(raw, str(path))
    except EdgeloraError as error:  # an IntegrityError, as for a bundle's files
        raise InputError(str(error)) from error
    kinds = {"format": str, "variant": str | None, "mix": dict | None, "system": str | None, "messages": list}
    if not isinstance(content, dict) or content.get("format") != _FORMAT or content.keys() != kinds.keys():
        raise InputError(f"{path} holds no conversation of this version; make it with /save or Conversation.save()")
    if wrong := [name for name, kind in kinds.items() if not isinstance(content[name], kind)]:
        raise InputError(f"{path}: {wrong[0]} is {type(content[wrong[0]]).__name__}; save the conversation again")
    return content
