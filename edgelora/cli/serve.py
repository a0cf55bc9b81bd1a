"""`edgelora serve`: a server for bundles that speaks the APIs of OpenAI and Ollama."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgelora.cli.arguments import JsonOption  # noqa: TC001  (typer reads the annotations)
from edgelora.cli.runtime_options import RuntimeOptions, takes_runtime_options
from edgelora.cli.terminal import print_json, print_note
from edgelora_runtime.errors import UsageError
from edgelora_runtime.residency.memory import share_freed_memory

if TYPE_CHECKING:
    from collections.abc import Sequence


@takes_runtime_options
def serve(
    bundles: Annotated[list[str], typer.Argument(metavar="[NAME=]BUNDLE…", help="Folders of bundles.", show_default=False)],
    runtime_options: RuntimeOptions,
    host: Annotated[str, typer.Option(help="The address to listen on; others than this machine's own need keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.")] = 8080,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file of API keys, one a line; requests then need one.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A name of this machine that clients use; repeat for each.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="A web page's origin that may call from a browser; repeat for each.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Requests of one bundle that run together; 1 runs one at a time.")] = 16,
    queue: Annotated[int, typer.Option(help="Requests of one bundle that may wait; more get 429.")] = 32,
    patience: Annotated[int, typer.Option(help="Later requests that may go before a waiting one, to save switches.")] = 8,
    max_body: Annotated[int, typer.Option(metavar="BYTES", help="The size of the largest request.")] = 1 << 20,
    body_timeout: Annotated[float, typer.Option(metavar="SECONDS", help="The time that a request's body may take.")] = 15.0,
    drain: Annotated[float, typer.Option(metavar="SECONDS", help="After Ctrl-C or SIGTERM, the time to finish requests.")] = 20.0,
    json: JsonOption = False,
) -> None:
    """Serve bundles over HTTP, for clients of OpenAI's and Ollama's APIs."""
    from edgelora_runtime.serve.server import serve as run_server
    from edgelora_runtime.serve.settings import ServeSettings, read_keys

    settings = ServeSettings(
        host=host,
        port=port,
        keys=frozenset() if api_key_file is None else read_keys(api_key_file),
        names=frozenset(allow_host or ()),
        origins=frozenset(allow_origin or ()),
        batch=batch,
        queue=queue,
        patience=patience,
        body_limit=max_body,
        body_timeout=body_timeout,
        drain=drain,
    )
    folders = name_bundles(bundles)
    share_freed_memory()  # a job runs in any of many threads
    with ExitStack() as stack:
        opened = {name: stack.enter_context(runtime_options.open(folder)) for name, folder in folders.items()}
        models = [
            variant if len(opened) == 1 else f"{name}/{variant}"
            for name, runtime in opened.items()
            for variant in runtime.variants
        ]

        def tell(url: str) -> None:
            if json:
                print_json({"url": url, "models": models})
            print_note(f"serving {', '.join(models)} at {url}/v1 and, for Ollama's clients, at {url}; Ctrl-C ends")

        received = run_server(opened, settings, tell)
    if received is not None:
        signal.raise_signal(received)  # ends as every verb does


def name_bundles(arguments: Sequence[str]) -> dict[str, Path]:
    """Folders by the name that models have before the slash: the one before "=", else the folder's own.

    Raises UsageError for a name that is given twice or holds a slash.
    """
    folders: dict[str, Path] = {}
    for argument in arguments:
        given, equals, path = argument.partition("=")
        folder = Path(path if equals and not Path(argument).exists() else argument)
        name = given if equals and not Path(argument).exists() else folder.resolve().name
        if not name or not name.isprintable() or "/" in name:
            raise UsageError(f"{argument!r}: {name!r} cannot be the name of a bundle; write NAME=BUNDLE")
        if name in folders:
            raise UsageError(f"two bundles are named {name}; write NAME=BUNDLE for one of them")
        folders[name] = folder
    return folders
