"""What a search found, as figures, as a table, and as lines for a recipe."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgelora.search.space import Point

_BARE = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class MixFigures:
    """A mix that was tried. searched: what it keeps (see Objective) on the rows searched on.

    kept, figures: the same, and the loss or score of each task, on the rows kept out of the search. What the adapters change
    counts in both as it does on the rows searched on.
    """

    trial: int
    mix: Point
    searched: float
    kept: float
    figures: Mapping[str, float]


@dataclass(frozen=True)
class SearchReport:
    """What a search came to.

    configurations: tried in all, those of earlier runs included; resumed: how many were such. rows: per task those searched
    on and those kept out; without the latter, everything is measured on the former. base, adapters: figures per task on the
    rows kept out, of the bare base, and of each adapter alone. difference: what the best mix keeps more than equal weights,
    with its 95% interval. rank, largest_error: of the adapter that was written, see ComposeReport; written_kept: what that
    adapter keeps, where it is not exactly the mix.
    """

    output: Path
    adapter: Path
    objective: str
    configurations: int
    resumed: int
    rows: Mapping[str, tuple[int, int]]
    base: Mapping[str, float]
    adapters: Mapping[str, Mapping[str, float]]
    equal: MixFigures
    best: MixFigures
    difference: float
    interval: tuple[float, float]
    rank: int
    largest_error: float
    written_kept: float | None
    recipe: str


def write_recipe(adapters: Mapping[str, Path], mix: Point) -> str:
    """The lines of a recipe that make a mix a variant."""
    weights = ", ".join(f"{_key(name)} = {weight:g}" for name, weight in mix.weights.items())
    lines = ["[adapters]", *(f"{_key(name)} = {_text(folder.as_posix())}" for name, folder in adapters.items()), ""]
    lines += ["[variants.mix]", f"mix = {{ {weights} }}", f"method = {_text(mix.method)}"]
    return "\n".join([*lines, *(f"{name} = {value:g}" for name, value in mix.settings.items())])


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _text(name)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)  # a JSON string of these is a TOML string, too
