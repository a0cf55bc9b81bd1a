"""The command line: its verbs, and every failure as one line and an exit code."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from edgelora.cli import compose
from edgelora.cli.bench import bench
from edgelora.cli.chat import chat
from edgelora.cli.demo import demo
from edgelora.cli.doctor import doctor
from edgelora.cli.evaluate import evaluate
from edgelora.cli.examples import show_example
from edgelora.cli.export import export
from edgelora.cli.init import init
from edgelora.cli.inspect import inspect, verify
from edgelora.cli.interruption import describe_interruption, was_interrupted
from edgelora.cli.run import run
from edgelora.cli.serve import serve
from edgelora.cli.terminal import print_json, print_note
from edgelora.cli.train import train
from edgelora_runtime import __version__
from edgelora_runtime.errors import BROKEN_PIPE, INTERRUPTED, LONGEST_MESSAGE, TERMINATED, EdgeloraError, make_printable

if TYPE_CHECKING:
    from collections.abc import Sequence

# Some versions of Typer bundle click and others depend on it. Typer's public error class leads to click's in both.
_USAGE_ERROR: Any = typer.BadParameter.__base__

_NAME = "edgelora"  # also in shells' completion, however the process was started
_COMPLETION = "_EDGELORA_COMPLETE"  # set by shells that ask for completions
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(
    name=_NAME,
    help="Mix LoRA adapters on one 4-bit base, compile the mixes into int4 ONNX variants, switch between them offline.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Example: edgelora demo, then edgelora run edgelora-demo/bundle "…". Each verb shows one of its own with --help.',
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line.

    Every failure is one line on standard error and an exit code.
    arguments: without the program's name, or None for those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    as_json = "--json" in arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for consoles whose encoding lacks a character
    try:
        result = app(arguments, prog_name=_NAME, standalone_mode=False)
        code = _report(*describe_interruption(), as_json) if result == INTERRUPTED else 0  # typer's own way to say Ctrl-C
        if sys.stdout is not None:
            sys.stdout.flush()  # while a reader that is gone or a full disk can still be reported
    except typer.Exit as exit_:
        code = exit_.exit_code
    except _USAGE_ERROR as error:
        code = _report(error.format_message(), 2, as_json)
    except EdgeloraError as error:
        code = _report(str(error), error.exit_code, as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = _report(*describe_interruption(), as_json)
    except BrokenPipeError:
        code = _drop_output()
    except SystemExit as ended:  # from the shell's completion with its code, from typer and rich for a broken pipe
        code = int(ended.code or 0) if _COMPLETION in os.environ else _drop_output()
    except ModuleNotFoundError as error:
        if os.environ.get("EDGELORA_DEBUG"):
            raise
        code = _report(f"{error.name} is not installed; run: pip install 'edgelora[train]'", 2, as_json)
    except OSError as error:
        if os.environ.get("EDGELORA_DEBUG"):
            raise
        if error.errno in _FULL:
            where = f"{error.filename}: " if error.filename else ""
            code = _report(f"{where}{error.strerror}; free some space and run again", 5, as_json)
        else:
            code = _report(
                f"{error.filename or 'a file'}: {error.strerror or error}; check the path and its permissions", 3, as_json
            )
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
    if was_interrupted() and code not in (INTERRUPTED, TERMINATED):  # a failure after a signal comes from the signal
        message, code = describe_interruption()
    line = make_printable(message, LONGEST_MESSAGE)
    print_note(f"edgelora: {line}")
    if as_json:
        print_json({"error": line, "exit_code": code})
    return code


def _drop_output() -> int:
    """Ends quietly, as the reader of standard output has gone, such as `head`. Returns the exit code."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # so that Python's last flush does not fail
    return BROKEN_PIPE


def _show_version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


_MAKE, _BUNDLE, _USE, _HERE = "Make adapters", "Make bundles", "Use bundles", "This machine"
_VERBS = (
    ("train", train, _MAKE),
    ("init", init, _BUNDLE),
    ("export", export, _BUNDLE),
    ("inspect", inspect, _BUNDLE),
    ("verify", verify, _BUNDLE),
    ("run", run, _USE),
    ("chat", chat, _USE),
    ("serve", serve, _USE),
    ("eval", evaluate, _USE),
    ("bench", bench, _USE),
    ("doctor", doctor, _HERE),
    ("demo", demo, _HERE),
)
for _name, _verb, _panel in _VERBS:
    app.command(_name, rich_help_panel=_panel, epilog=show_example(_name))(_verb)
app.add_typer(compose.app, name="compose", rich_help_panel=_MAKE)
