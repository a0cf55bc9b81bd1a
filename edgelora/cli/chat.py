"""`edgelora chat`: a conversation in the terminal that changes variants between turns."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from edgelora.cli.arguments import BundleArgument, JsonOption  # noqa: TC001  (typer reads the annotations)
from edgelora.cli.chat_commands import WELCOME, ChatEnded, describe_route, is_command, obey
from edgelora.cli.markdown_stream import strip_controls
from edgelora.cli.request_options import takes_request_options
from edgelora.cli.runtime_options import RuntimeOptions, takes_runtime_options
from edgelora.cli.terminal import print_json, print_note
from edgelora.cli.terminal_chat import TerminalChat
from edgelora_runtime.errors import EdgeloraError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgelora_runtime import GenerateOptions, Generation, Runtime

PlainOption = Annotated[bool, typer.Option("--plain", help="Print answers as they are written, without rendering Markdown.")]
HistoryOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Keep typed lines in this file; by default they are forgotten at the end.")
]


@takes_runtime_options
@takes_request_options(
    "variant", "max_tokens", "temperature", "seed", "tools", "documents", "template_options", "date", max_tokens=256
)
def chat(
    bundle: BundleArgument,
    runtime_options: RuntimeOptions,
    plain: PlainOption = False,
    history: HistoryOption = None,
    json: JsonOption = False,
    **options: Any,
) -> None:
    """Talk to a bundle; /variant NAME and /mix change who answers between two turns, /help lists all commands."""
    with runtime_options.open(bundle) as runtime:
        conversation = talk(runtime, cast("GenerateOptions", options), plain=plain, history=history, quiet=json)
    if json:
        print_json({"turns": conversation.turns})


def talk(
    runtime: Runtime, options: GenerateOptions, *, plain: bool = False, history: Path | None = None, quiet: bool = False
) -> TerminalChat:
    """Holds a conversation until its end, at a prompt in a terminal, else on the lines of standard input. Returns it.

    options: of its requests, and the variant that answers first. plain, history: as `chat` takes them. quiet: shows no answer.
    """
    conversation = TerminalChat(runtime, options)
    if sys.stdin.isatty() and sys.stderr.isatty():
        from edgelora.cli.chat_terminal import make_ask, open_prompt

        read_line = open_prompt(conversation, history)
        print_note(conversation.switch(conversation.first))
        print_note(WELCOME)
        run_chat(conversation, read_line, make_ask(quiet=quiet, rendered=not plain and sys.stdout.isatty()))
    else:
        print_note(conversation.switch(conversation.first))
        run_chat(conversation, _read_line, _ask_quietly if quiet else _ask_plainly)
    return conversation


def run_chat(
    conversation: TerminalChat, read_line: Callable[[], str | None], ask: Callable[[TerminalChat, str], Generation]
) -> None:
    """Reads lines until /quit or the end of input, and obeys or asks each.

    read_line: returns None at the end of input. ask: asks one prompt, and shows its answer. A command or a prompt that fails is
    one line on standard error, and the chat goes on.
    """
    while (line := read_line()) is not None:
        if not line.strip():
            continue
        before = conversation.messages
        try:
            said, prompt = obey(conversation, line) if is_command(line) else ("", line.strip())
            for text in said.splitlines():
                print(strip_controls(text), file=sys.stderr, flush=True)  # as it is: tables keep their columns
            if prompt is not None:
                _tell_ending(conversation, ask(conversation, prompt))
        except ChatEnded:
            break
        except EdgeloraError as error:
            conversation.restore(before)
            print_note(f"edgelora: {error}")


def _tell_ending(conversation: TerminalChat, generation: Generation) -> None:
    """Tells what the answer's text does not show: the router's choice, and an end before the answer's own."""
    if generation.route is not None:
        print_note(describe_route(generation.route))
    if generation.finish_reason == "length":
        count = len(generation.tokens)
        written = "1 token" if count == 1 else f"{count} tokens"
        print_note(f"cut off after {written}; /set max_tokens {2 * conversation.max_tokens} allows more")
    elif generation.finish_reason == "timeout":
        print_note("cut off by the timeout")


def _read_line() -> str | None:
    """Reads a line without its end, or None at the end of input."""
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def _ask_plainly(conversation: TerminalChat, prompt: str) -> Generation:
    stream = conversation.ask(prompt)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    return conversation.finish(prompt, stream)


def _ask_quietly(conversation: TerminalChat, prompt: str) -> Generation:
    stream = conversation.ask(prompt)
    for _ in stream:
        pass
    return conversation.finish(prompt, stream)
