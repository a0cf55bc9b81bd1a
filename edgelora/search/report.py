"""The result of a search: its figures, and lines for a recipe."""

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
    """A tried mix.

    searched: the share that it keeps (see Objective) on the search's rows. kept, figures: the same share, and each task's loss or
    score, on the rows kept out of the search. Both shares are relative to the adapters' changes on the search's rows.
    """

    trial: int
    mix: Point
    searched: float
    kept: float
    figures: Mapping[str, float]


@dataclass(frozen=True)
class SearchReport:
    """The result of a search.

    configurations: how many were tried, including earlier runs. resumed: how many of them come from earlier runs. rows: per task
    the number of rows searched on and kept out. If none are kept out, everything is measured on the search's rows. base,
    adapters: figures per task on the rows kept out, of the bare base and of each single adapter. difference: how much more the
    best mix keeps than equal weights, with its 95% interval. rank, largest_error: of the written adapter, see ComposeReport.
    written_kept: the share that the written adapter keeps, if it is not exactly the mix.
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


def render_recipe(adapters: Mapping[str, Path], mix: Point) -> str:
    """The lines that add a mix to a recipe as a variant."""
    weights = ", ".join(f"{_key(name)} = {weight:g}" for name, weight in mix.weights.items())
    lines = ["[adapters]", *(f"{_key(name)} = {_text(folder.as_posix())}" for name, folder in adapters.items()), ""]
    lines += ["[variants.mix]", f"mix = {{ {weights} }}", f"method = {_text(mix.method)}"]
    return "\n".join([*lines, *(f"{name} = {value:g}" for name, value in mix.settings.items())])


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _text(name)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)  # a JSON string is a valid TOML string
