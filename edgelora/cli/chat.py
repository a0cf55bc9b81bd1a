"""`edgelora chat`: a conversation in the terminal that changes variants between turns."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

from edgelora.cli.arguments import (
    BundleArgument,
    JsonOption,
    KernelsOption,
    PackedCacheOption,
    ProviderOption,
    ThreadsOption,
    WholeGraphsOption,
    open_runtime,
)
from edgelora.cli.request_options import takes_request_options
from edgelora.cli.terminal import print_json, print_note
from edgelora_runtime.bundle.router import AUTO
from edgelora_runtime.errors import EdgeloraError

if TYPE_CHECKING:
    from edgelora_runtime import GenerateOptions, Route, Runtime

HELP = "/switch NAME changes the variant, /switch auto picks one per turn, /variants lists them, /reset forgets all, /quit ends"


@takes_request_options(
    "variant", "max_tokens", "temperature", "seed", "tools", "documents", "template_options", "date", max_tokens=256
)
def chat(
    bundle: BundleArgument,
    threads: ThreadsOption = None,
    provider: ProviderOption = "auto",
    packed_cache: PackedCacheOption = False,
    whole_graphs: WholeGraphsOption = False,
    kernels: KernelsOption = "auto",
    json: JsonOption = False,
    **options: Any,
) -> None:
    """Talk to a bundle; /switch NAME changes the variant between two turns."""
    with open_runtime(bundle, threads, provider, packed_cache, whole_graphs, kernels) as runtime:
        turns = run_chat(runtime, cast("GenerateOptions", options), quiet=json)
    if json:
        print_json({"turns": turns})


def run_chat(runtime: Runtime, options: GenerateOptions, *, quiet: bool) -> list[dict[str, str]]:
    """Reads lines until /quit or the end of input.

    Returns the turns as {"variant", "prompt", "answer"}. A bundle with a chat template gets the conversation so far. One without
    gets each line as a separate prompt.
    options: of each request. With variant "auto" the bundle's router picks one for each line, from that line only.
    quiet: answers are not printed.
    """
    current = _switch(runtime, options.get("variant"))
    print_note(HELP)
    messages: list[dict[str, str]] = []
    turns: list[dict[str, str]] = []
    while (line := _read_line(f"{current}> ")) is not None:
        if line.startswith("/"):
            if line == "/quit":
                break
            current = _obey(runtime, line, messages, current)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        prompt = messages if runtime.tokenizer.has_chat_template else line
        try:
            request: GenerateOptions = {**options, "variant": current}
            stream = runtime.stream(prompt, **request)
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
        assert stream.generation is not None
        if stream.generation.route is not None:
            print_note(describe_route(stream.generation.route))
        messages.append({"role": "assistant", "content": answer})
        turns.append({"variant": stream.generation.variant, "prompt": line, "answer": answer})
    return turns


def describe_route(route: Route) -> str:
    """Names the variant that a router chose, and how sure it was."""
    return f"routed to {route.variant} ({'fallback, ' if route.fallback else ''}confidence {route.confidence:.2f})"


def _switch(runtime: Runtime, variant: str | None) -> str:
    """Makes a variant ready, or the router. Returns what the next turns ask for."""
    if variant == AUTO:
        runtime.route("")  # loads the router, or says that there is none
        print_note("each turn goes to the variant that the router picks for it")
        return AUTO
    receipt = runtime.switch(variant)
    print_note(f"{receipt.variant} in {receipt.milliseconds:.1f} ms ({'cold' if receipt.cold else 'warm'})")
    return receipt.variant


def _read_line(prompt: str) -> str | None:
    """Reads a line without its end, or None at the end of input.

    The prompt goes to standard error.
    """
    if sys.stdin.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def _obey(runtime: Runtime, line: str, messages: list[dict[str, str]], current: str) -> str:
    """Obeys a line with a slash. Returns what the next turns ask for."""
    verb, _, name = line.partition(" ")
    if verb == "/switch":
        try:
            return _switch(runtime, name.strip())
        except EdgeloraError as error:
            print_note(f"edgelora: {error}")
    elif verb == "/variants":
        print_note(", ".join(runtime.variants))
    elif verb == "/reset":
        messages.clear()
    else:
        print_note(HELP)
    return current
