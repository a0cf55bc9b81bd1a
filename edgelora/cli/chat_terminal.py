"""The terminal side of `edgelora chat`: a prompt with history and completion, and answers that Ctrl-C stops."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from edgelora.cli.chat_commands import complete, is_command, tokens_per_second
from edgelora.cli.interruption import on_interrupt, was_interrupted
from edgelora.cli.markdown_stream import MarkdownStream, strip_controls
from edgelora.cli.terminal import print_note
from edgelora.cli.terminal_chat import describe_receipt
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from edgelora.cli.terminal_chat import TerminalChat
    from edgelora_runtime import Generation

_FILES = ("/save ", "/load ")


def open_prompt(conversation: TerminalChat, history: Path | None) -> Callable[[], str | None]:
    """Opens a prompt on standard error. Returns the function that reads one input, None for its end.

    Enter sends, Alt+Enter or Esc Enter starts a new line, Ctrl-C empties the input, Ctrl-D ends. history: a file that typed lines
    are kept in, or None to forget them at the end. Raises InputError for a history that cannot be written.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output

    if history is not None:
        try:
            history.touch(mode=0o600)
        except OSError as error:
            raise InputError(f"--history {history}: {error.strerror}") from None
    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(
        multiline=True,
        key_bindings=keys,
        history=InMemoryHistory() if history is None else FileHistory(str(history)),
        completer=_make_completer(conversation),
        complete_while_typing=Condition(lambda: is_command(session.default_buffer.text)),
        prompt_continuation=lambda width, line, wrapped: "." * (width - 1) + " ",
        output=create_output(sys.stderr),
    )

    def read() -> str | None:
        while True:
            try:
                return session.prompt(f"{conversation.label}> ")
            except KeyboardInterrupt:
                if was_interrupted():  # by a signal that is no key, such as SIGTERM
                    raise
            except EOFError:
                return None

    return read


def make_ask(*, quiet: bool, rendered: bool) -> Callable[[TerminalChat, str], Generation]:
    """Makes the function that asks a prompt and shows its answer. Ctrl-C stops the answer; its text so far is kept.

    quiet: answers are not shown. rendered: as Markdown, on a terminal. Otherwise as they are written, without control characters.
    """

    def ask(conversation: TerminalChat, prompt: str) -> Generation:
        stream = conversation.ask(prompt)
        with on_interrupt(stream.cancel):
            if quiet:
                for _ in stream:
                    pass
            elif rendered:
                with MarkdownStream() as screen:
                    for piece in stream:
                        screen.push(piece)
            else:
                for piece in stream:
                    print(strip_controls(piece), end="", flush=True)
                print()
        generation = conversation.finish(prompt, stream)
        _tell_cost(generation)
        return generation

    return ask


def _tell_cost(generation: Generation) -> None:
    speed = tokens_per_second(generation.tokens, generation.decode_ms)
    stopped = "stopped, " if generation.finish_reason == "cancelled" else ""
    count = len(generation.tokens)
    print_note(f"[{stopped}{count} {'token' if count == 1 else 'tokens'}, {speed}; {describe_receipt(generation.receipt)}]")


def _make_completer(conversation: TerminalChat) -> Any:
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class CommandCompleter(Completer):
        """Completes commands, names and options, and files after /save and /load."""

        def get_completions(self, document: Document, complete_event: Any) -> Iterable[Completion]:
            text = document.text_before_cursor
            if not is_command(text) or "\n" in text:
                return
            for command in _FILES:
                if text.startswith(command):
                    rest = text.removeprefix(command)
                    yield from PathCompleter(expanduser=True).get_completions(Document(rest, len(rest)), complete_event)
                    return
            word = text.rpartition(" ")[2]
            for found, hint in complete(conversation, text):
                yield Completion(found, start_position=-len(word), display_meta=hint)

    return CommandCompleter()
