"""Turns values into text: bytes, shares, names and JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any


def format_bytes(size: float) -> str:
    """Bytes in the unit that reads best: 512 B, 3.4 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def format_share(share: float | None) -> str:
    """Formats a share as a percentage with one decimal, and None as a dash."""
    return "–" if share is None else f"{100 * share:.1f}"


def name_path(path: Path) -> str:
    """Makes a short name of a path's last part, without a file's suffix: "sql" of adapters/sql and of data/sql.jsonl.

    Characters that a variant's name cannot have become dashes. Returns "" if nothing is left.
    """
    last = path.name if path.name not in ("", "..") else path.resolve().name
    last = last if path.is_dir() or not path.suffix[1:].isalpha() else path.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")[:64]


def to_json(value: object) -> str:
    r"""Formats a value as JSON on one line.

    Dataclasses become objects and paths become strings. Characters that a terminal obeys are escaped, as \u009b.
    """
    text = json.dumps(_to_plain(value), ensure_ascii=False)
    return text if text.isprintable() else "".join(map(_escape, text))


def _escape(character: str) -> str:
    return character if character.isprintable() else json.dumps(character)[1:-1]


def _to_plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
