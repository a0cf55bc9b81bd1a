"""python -m edgelora: the command line."""

from edgelora.cli.app import main

main()
