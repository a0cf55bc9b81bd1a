"""python -m edgelora: the command line."""

from edgelora.cli import main

main()
