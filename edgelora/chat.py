"""`edgelora chat`: a conversation in the terminal that changes variants between turns."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from edgelora.terminal import print_note
from edgelora_runtime.errors import EdgeloraError

if TYPE_CHECKING:
    from edgelora_runtime import Runtime

HELP = "/switch NAME changes the variant, /variants lists them, /reset forgets the conversation, /quit ends"


def run_chat(
    runtime: Runtime, *, variant: str | None, max_tokens: int, temperature: float, seed: int | None, quiet: bool
) -> list[dict[str, str]]:
    """Reads lines until /quit or the end of input; returns the turns as {"variant", "prompt", "answer"}.

    A bundle with a chat template gets the conversation so far, one without gets each line as a prompt of its own.
    quiet: answers are not printed.
    """
    runtime.switch(variant)
    print_note(f"{runtime.current} is ready; {HELP}")
    messages: list[dict[str, str]] = []
    turns: list[dict[str, str]] = []
    while (line := _read_line(f"{runtime.current}> ")) is not None:
        if line.startswith("/"):
            if line == "/quit":
                break
            _obey(runtime, line, messages)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        prompt = messages if runtime.tokenizer.has_chat_template else line
        try:
            stream = runtime.stream(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)
            pieces = []
            for piece in stream:
                pieces.append(piece)
                if not quiet:
                    print(piece, end="", flush=True)
        except EdgeloraError as error:
            print_note(f"edgelora: {error}")
            messages.pop()
            continue
        answer = "".join(pieces)
        if not quiet:
            print()
        messages.append({"role": "assistant", "content": answer})
        turns.append({"variant": runtime.current, "prompt": line, "answer": answer})
    return turns


def _read_line(prompt: str) -> str | None:
    """A line without its end, None where the input ends. The prompt goes to standard error."""
    if sys.stdin.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def _obey(runtime: Runtime, line: str, messages: list[dict[str, str]]) -> None:
    verb, _, name = line.partition(" ")
    if verb == "/switch":
        try:
            receipt = runtime.switch(name.strip())
        except EdgeloraError as error:
            print_note(f"edgelora: {error}")
            return
        print_note(f"{receipt.variant} in {receipt.milliseconds:.1f} ms ({'cold' if receipt.cold else 'warm'})")
    elif verb == "/variants":
        print_note(", ".join(runtime.variants))
    elif verb == "/reset":
        messages.clear()
    else:
        print_note(HELP)
