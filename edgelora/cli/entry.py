"""The start of the process: loads the command line, so that Ctrl-C while it loads ends as Ctrl-C does later."""

from __future__ import annotations

import sys
from typing import NoReturn

from edgelora.cli.interruption import describe_interruption, exit_at_once, ignore_at_the_end, raise_when_interrupted


def main() -> NoReturn:
    """Runs the command line. Ctrl-C and SIGTERM are one line on standard error and an exit code, from the first import on."""
    exit_at_once()
    ignore_at_the_end()
    try:
        from edgelora.cli.app import main as run

        raise_when_interrupted()
        run()
    except KeyboardInterrupt:
        word, code = describe_interruption()
        print(f"edgelora: {word}", file=sys.stderr)
        sys.exit(code)
    finally:
        exit_at_once()  # while Python shuts down
