"""A trial of a tokenizer's regular expressions in a process of its own, on texts on which an engine may go back for long.

The check of a pattern by its form (edgelora_runtime.backtracking) lets through what takes the square of a text's length, as
published tokenizers do. Here a tokenizer shows that it does not, before it enters a bundle.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import edgelora_runtime
from edgelora_runtime.bundle.tokenizer import load_tokenizer
from edgelora_runtime.bundle.tokenizer_parts import list_patterns
from edgelora_runtime.errors import InputError

_SECONDS = 5  # of the processor, for all texts; a published tokenizer takes half of one
_PATIENCE = 600  # seconds by the clock, where a system counts no processor time
_LENGTH = 1 << 12  # characters of a text
_RUNS = ("a", "A", "aA", " ", "\n", " \n", "\t", "1", "'", ")", "-", "_", "é", "中", "ー", "\u0301", "🙂", "a ", "a1", "a'")
_MOST_LITERALS = 32  # characters of a pattern that are tried as well
_LAST = "\0"  # a character that few patterns match, so that a run before it is tried in every way


@lru_cache(maxsize=8)
def try_patterns(raw: bytes, owner: str) -> None:
    """Encodes long runs of characters with a tokenizer.json in another process.

    A tokenizer without expressions of its own is not tried. Raises InputError if that takes longer than a few seconds of the
    processor, or if the process ends.
    """
    if not list_patterns(load_tokenizer(raw)):
        return
    roots = [str(Path(edgelora_runtime.__file__).parents[1]), str(Path(__file__).parents[2])]
    roots += filter(None, [os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "RUST_BACKTRACE": "0"}
    command = [sys.executable, "-m", "edgelora_export.texts.trial"]
    try:
        done = subprocess.run(command, input=raw, capture_output=True, env=environment, timeout=_PATIENCE, check=False)  # noqa: S603
        told, failed = done.stdout, done.returncode != 0
    except subprocess.TimeoutExpired as error:
        told, failed = error.stdout or b"", True
    if failed:
        text = told.decode(errors="replace").splitlines()[-1:] or ["nothing"]
        raise InputError(
            f"the tokenizer of {owner} takes more than {_SECONDS} seconds for {_LENGTH} characters of {text[0]}, or fails there; "
            "its regular expressions go back too often: save the tokenizer of a published model in its place"
        )


def list_texts(patterns: list[str]) -> dict[str, str]:
    """Lists the texts of a trial by what they repeat: common characters, and those that stand in the patterns."""
    literal = dict.fromkeys(character for pattern in patterns for character in pattern)
    runs = dict.fromkeys((*_RUNS, *list(literal)[:_MOST_LITERALS]))
    return {ascii(run): (run * _LENGTH)[:_LENGTH] + _LAST for run in runs}


def main() -> None:
    """Encodes the texts with the tokenizer on standard input. Names each on standard output before it begins."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    except ImportError:  # on Windows, where the parent looks at the clock
        pass
    tokenizer = load_tokenizer(sys.stdin.buffer.read())
    for name, text in list_texts(list_patterns(tokenizer)).items():
        print(name, flush=True)
        tokenizer.encode(text)


if __name__ == "__main__":
    main()
