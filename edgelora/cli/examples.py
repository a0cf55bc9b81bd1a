"""One example per verb, the last line of its --help."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

EXAMPLES: Mapping[str, str] = MappingProxyType(
    {
        "train": "edgelora train --base models/smollm2 --data sql.jsonl --output adapters/sql",
        "compose": "edgelora compose --adapter adapters/sql:0.6 --adapter adapters/medical:0.6 --output adapters/both",
        "search": "edgelora compose search --base models/smollm2 --adapter adapters/sql --adapter adapters/medical "
        "--data sql.jsonl --data medical.jsonl --budget 30 --output search",
        "learn": "edgelora compose learn --base models/smollm2 --adapter adapters/sql --adapter adapters/medical "
        "--data sql.jsonl --data medical.jsonl --output adapters/learned",
        "report": "edgelora compose report --adapter adapters/sql --adapter adapters/medical --output report",
        "init": "edgelora init recipe.toml",
        "export": "edgelora export recipe.toml --output bundle",
        "inspect": "edgelora inspect bundle",
        "verify": "edgelora verify bundle",
        "run": 'edgelora run bundle "List all customers" --chat --variant sql',
        "chat": "edgelora chat bundle --variant sql",
        "serve": "edgelora serve bundle --port 8080",
        "eval": "edgelora eval bundle --variant sql --data test.jsonl",
        "bench": "edgelora bench bundle --variant sql --rounds 3",
        "doctor": "edgelora doctor",
        "demo": "edgelora demo --output edgelora-demo",
    }
)


def show_example(verb: str) -> str:
    """Returns the line of a verb's help that shows how it is called."""
    return f"Example: {EXAMPLES[verb]}"
