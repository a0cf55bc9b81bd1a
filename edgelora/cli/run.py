"""`edgelora run`: continues one prompt with one variant."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

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
from edgelora.cli.chat import describe_route
from edgelora.cli.request_options import takes_request_options
from edgelora.cli.terminal import print_json, print_note
from edgelora_runtime.decode.options import OPTIONS

# One is for measurements, one needs an assistant's message, and one takes functions.
_NOT_HERE = ("ignore_eos", "continue_final_message", "logits_processors")


@takes_request_options(*(name for name in OPTIONS if name not in _NOT_HERE))
def run(
    bundle: BundleArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads standard input.")],
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's message through the chat template.")] = False,
    threads: ThreadsOption = None,
    provider: ProviderOption = "auto",
    packed_cache: PackedCacheOption = False,
    whole_graphs: WholeGraphsOption = False,
    kernels: KernelsOption = "auto",
    json: JsonOption = False,
    **options: Any,
) -> None:
    """Continue a prompt with one variant."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with open_runtime(bundle, threads, provider, packed_cache, whole_graphs, kernels) as runtime:
        stream = runtime.stream([{"role": "user", "content": text}] if chat else text, **options)
        answer = 0
        for piece in stream:
            if not json:
                print("\n" if piece.answer > answer else "", piece, sep="", end="", flush=True)
            answer = piece.answer
        assert stream.generation is not None
        if json:
            print_json(stream.generation)
            return
        print()
        if stream.generation.route is not None:
            print_note(describe_route(stream.generation.route))
