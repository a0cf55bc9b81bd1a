"""The command line: assembles the verbs, and reports every failure as one line and an exit code."""

from __future__ import annotations

import os
import sys
from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from edgelora.cli import compose
from edgelora.cli.arguments import (
    BundleArgument,
    JsonOption,
    KernelsOption,
    MaxTokensOption,
    MixOption,
    PackedCacheOption,
    ProviderOption,
    ThreadsOption,
    VariantOption,
    WholeGraphsOption,
    parse_mix,
    read_option_file,
)
from edgelora.cli.arguments import open_runtime as _open_runtime
from edgelora.cli.bench import bench
from edgelora.cli.demo import demo
from edgelora.cli.doctor import doctor
from edgelora.cli.evaluate import evaluate
from edgelora.cli.export import export
from edgelora.cli.inspect import inspect, verify
from edgelora.cli.terminal import print_json, print_note
from edgelora.cli.train import train
from edgelora_runtime import __version__
from edgelora_runtime.errors import EdgeloraError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Some versions of Typer bundle click and others depend on it. Typer's public error class leads to click's in both.
_USAGE_ERROR: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="edgelora",
    help="Mix LoRA adapters on one 4-bit base, compile the mixes into int4 ONNX variants, switch between them offline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line. Every failure is one line on standard error and an exit code.

    arguments: without the program's name; None for those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    as_json = "--json" in arguments
    try:
        app(arguments, standalone_mode=False)
        code = 0
    except typer.Exit as exit_:
        code = exit_.exit_code
    except _USAGE_ERROR as error:
        code = _report(error.format_message(), 2, as_json)
    except EdgeloraError as error:
        code = _report(str(error), error.exit_code, as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except ModuleNotFoundError as error:
        if os.environ.get("EDGELORA_DEBUG"):
            raise
        code = _report(f"{error.name} is not installed; run: pip install 'edgelora[train]'", 2, as_json)
    except OSError as error:
        if os.environ.get("EDGELORA_DEBUG"):
            raise
        code = _report(f"{error.filename or 'a file'}: {error.strerror or error}; check the path and its permissions", 3, as_json)
    except MemoryError:
        code = _report("out of memory; close other programs, or use a smaller model or context", 5, as_json)
    except Exception as error:
        if os.environ.get("EDGELORA_DEBUG"):
            raise
        code = _report(
            f"internal error: {type(error).__name__}: {error} (EDGELORA_DEBUG=1 shows where; please report it)",
            1,
            as_json,
        )
    sys.exit(code)


def _report(message: str, code: int, as_json: bool) -> int:
    line = " ".join(message.split())
    print_note(f"edgelora: {line}")
    if as_json:
        print_json({"error": line, "exit_code": code})
    return code


def _show_version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


app.command()(train)
app.add_typer(compose.app, name="compose")
app.command()(export)
app.command()(inspect)
app.command()(verify)


@app.command()
def run(
    bundle: BundleArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads standard input.")],
    variant: VariantOption = None,
    mix: MixOption = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's message through the chat template.")] = False,
    max_tokens: MaxTokensOption = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that together reach this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens that were seen less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling; a random one without it.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeat for each.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which what was written so far is the answer.")] = None,
    overflow: Annotated[
        str, typer.Option(help="Over the context's end: error, or slide, which drops the text's middle.")
    ] = "error",
    logprobs: Annotated[int, typer.Option(help="With --json: log probabilities of so many likeliest tokens; 0 for none.")] = 0,
    json_schema: Annotated[Path | None, typer.Option(metavar="FILE", help="A JSON schema that the answer is to fit.")] = None,
    regex: Annotated[str | None, typer.Option(help="A regular expression that the whole answer is to match.")] = None,
    grammar: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A grammar in Lark's notation that the answer is to fit.")
    ] = None,
    speculation: Annotated[str, typer.Option(help="Guess tokens ahead: on, auto (where it pays), or off.")] = "off",
    threads: ThreadsOption = None,
    provider: ProviderOption = "auto",
    packed_cache: PackedCacheOption = False,
    whole_graphs: WholeGraphsOption = False,
    kernels: KernelsOption = "auto",
    json: JsonOption = False,
) -> None:
    """Continue a prompt with one variant."""
    from edgelora.cli.chat import describe_route

    text = sys.stdin.read() if prompt == "-" else prompt
    with _open_runtime(bundle, threads, provider, packed_cache, whole_graphs, kernels) as runtime:
        stream = runtime.stream(
            [{"role": "user", "content": text}] if chat else text,
            variant=variant,
            mix=parse_mix(mix),
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop or (),
            timeout=timeout,
            overflow=overflow,
            logprobs=logprobs,
            json_schema=read_option_file(json_schema, "--json-schema"),
            regex=regex,
            grammar=read_option_file(grammar, "--grammar"),
            speculation=speculation,
        )
        for piece in stream:
            if not json:
                print(piece, end="", flush=True)
        assert stream.generation is not None
        if json:
            print_json(stream.generation)
            return
        print()
        if stream.generation.route is not None:
            print_note(describe_route(stream.generation.route))


@app.command()
def chat(
    bundle: BundleArgument,
    variant: VariantOption = None,
    max_tokens: MaxTokensOption = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling.")] = None,
    threads: ThreadsOption = None,
    provider: ProviderOption = "auto",
    packed_cache: PackedCacheOption = False,
    whole_graphs: WholeGraphsOption = False,
    kernels: KernelsOption = "auto",
    json: JsonOption = False,
) -> None:
    """Talk to a bundle; /switch NAME changes the variant between two turns."""
    from edgelora.cli.chat import run_chat

    with _open_runtime(bundle, threads, provider, packed_cache, whole_graphs, kernels) as runtime:
        turns = run_chat(runtime, variant=variant, max_tokens=max_tokens, temperature=temperature, seed=seed, quiet=json)
    if json:
        print_json({"turns": turns})


app.command("eval")(evaluate)
app.command()(bench)
app.command()(doctor)
app.command()(demo)
