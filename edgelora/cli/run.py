"""`edgelora run`: continues one prompt with one variant."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgelora.cli.arguments import BundleArgument, JsonOption  # noqa: TC001  (typer reads the annotations)
from edgelora.cli.chat_commands import describe_route
from edgelora.cli.request_options import takes_request_options
from edgelora.cli.runtime_options import RuntimeOptions, takes_runtime_options
from edgelora.cli.terminal import print_json, print_next, print_note, print_piece, quote_path
from edgelora_runtime.decode.options import CONSTRAINTS, OPTIONS
from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from edgelora_runtime import Generation

# One is for measurements, one needs an assistant's message, and one takes functions.
_NOT_HERE = ("ignore_eos", "continue_final_message", "logits_processors")


@takes_runtime_options
@takes_request_options(*(name for name in OPTIONS if name not in _NOT_HERE))
def run(
    bundle: BundleArgument,
    runtime_options: RuntimeOptions,
    text: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="Text to continue; - reads standard input.", show_default=False),
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The same as an option.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's message through the chat template.")] = False,
    json: JsonOption = False,
    **options: Any,
) -> None:
    """Continue a prompt with one variant."""
    given = _read_prompt(text, prompt)
    with runtime_options.open(bundle) as runtime:
        stream = runtime.stream([{"role": "user", "content": given}] if chat else given, **options)
        answer = 0
        for piece in stream:
            if not json:
                print_piece("\n" + piece if piece.answer > answer else piece)
            answer = piece.answer
        assert stream.generation is not None
        if json:
            print_json(stream.generation)
            return
        print()
        if stream.generation.route is not None:
            print_note(describe_route(stream.generation.route))
        has_template = runtime.tokenizer.has_chat_template
    if cut := describe_cut(stream.generation, options):
        print_note(cut)
    elif has_template and not chat:
        print_next(f'edgelora run {quote_path(bundle)} "…" --chat, for an answer through the chat template')
    else:
        print_next(f"edgelora chat {quote_path(bundle)}{_name_variant(stream.generation, options)}")


def describe_cut(generation: Generation, options: dict[str, Any]) -> str:
    """Says why an answer ends before its end, and what to do. Returns "" if it is whole."""
    count, reason = len(generation.tokens), generation.finish_reason
    limit = OPTIONS["max_tokens"].default if "max_tokens" not in options else options["max_tokens"]
    if reason == "length" and count >= limit:
        said = f"cut off after {count} tokens; --max-tokens {2 * limit} allows more"
    elif reason == "length":
        said = f"cut off after {count} tokens, where the context is full; --overflow slide goes on"
    elif reason == "timeout":
        said = f"cut off after {count} tokens, as --timeout was over; a longer one allows more"
    else:
        return ""
    constraint = next((name for name in CONSTRAINTS if name in options), None)
    if constraint is None:
        return f"the answer is {said}"
    return f"the answer does not fit --{constraint.replace('_', '-')} yet: it is {said}"


def _read_prompt(text: str | None, prompt: str | None) -> str:
    """Returns the prompt of the argument or the option, or standard input for a dash."""
    if text is not None and prompt is not None:
        raise UsageError("the prompt is given twice, as an argument and as --prompt; give it once")
    given = prompt if text is None else text
    if given is None:
        raise UsageError('run needs a prompt: edgelora run BUNDLE "TEXT", or --prompt TEXT, or - for standard input')
    return sys.stdin.read() if given == "-" else given


def _name_variant(generation: Generation, options: dict[str, Any]) -> str:
    if "mix" in options:
        return ""
    return f" --variant {options.get('variant', generation.variant)}"
