"""Runs the command line: `python -m edgelora`."""

from edgelora.cli.entry import main

main()
