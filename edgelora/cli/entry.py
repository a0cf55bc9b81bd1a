"""The start of the process: loads the command line, so that Ctrl-C while it loads ends as Ctrl-C does later."""

from __future__ import annotations

import sys
from typing import NoReturn

from edgelora_runtime.errors import INTERRUPTED


def main() -> NoReturn:
    """Runs the command line. Ctrl-C is one line on standard error and exit code 130, from the first import on."""
    try:
        from edgelora.cli.app import main as run

        run()
    except KeyboardInterrupt:
        print("edgelora: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
