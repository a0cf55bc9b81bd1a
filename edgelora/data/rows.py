"""Reads rows of training and test data: JSON lines of {"prompt": …, "completion": …}."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from edgelora_runtime.errors import InputError


@dataclass(frozen=True)
class Row:
    """One example.

    completion: what the model should write after the prompt, including any leading space.
    """

    prompt: str
    completion: str


def read_rows(path: Path | str) -> list[Row]:
    """Reads a JSONL file, skipping blank lines.

    InputError names the file and the first line that is not a row.
    """
    text = read_text(Path(path), "data file")
    rows = [_read_row(line, f"{path} line {number}") for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not rows:
        raise InputError(f'data file {path} holds no rows; each line is {{"prompt": …, "completion": …}}')
    return rows


def read_text(path: Path, what: str) -> str:
    """Reads a file that the user named.

    Raises InputError if it cannot be read. what: names the file in that error.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{what} {path} does not exist; give an existing file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} {path} is not readable UTF-8 text ({error})") from error


def _read_row(line: str, where: str) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} is {type(value).__name__}, not an object with prompt and completion")
    for key in ("prompt", "completion"):
        if not isinstance(value.get(key), str) or not value[key]:
            raise InputError(f'{where} has no {key}, or it is not text; each line is {{"prompt": …, "completion": …}}')
    return Row(value["prompt"], value["completion"])
