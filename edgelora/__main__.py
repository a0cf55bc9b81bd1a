"""Runs the command line: `python -m edgelora`."""

from edgelora.cli.app import main

main()
