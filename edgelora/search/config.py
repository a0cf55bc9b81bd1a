"""The settings of a search: adapters, rows, ranges and budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgelora.mix.methods import MIX_METHODS
from edgelora_runtime.bundle.manifest import check_variant_name
from edgelora_runtime.errors import InputError, list_wrong

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

OBJECTIVES = ("loss", "score")
SAMPLERS = ("auto", "gp", "tpe")
_EQUIVALENT = {"svd", "tsv", "iso_c"}  # they compute the same as linear, core_tsv and core_iso
DISTINCT_METHODS = tuple(name for name in MIX_METHODS if name not in _EQUIVALENT)


@dataclass(frozen=True)
class SearchConfig:
    """The settings of a search.

    base: folder or hub id. adapters: folders by name. data: held-out JSONL rows by task. A task is measured against the adapter
    of the same name, or else against the adapter that does best on it. output: folder for trials, report and adapter.
    budget: configurations to try, including the base, each single adapter and equal weights.
    methods: names in MIX_METHODS. weights, density: lowest and highest. scale: range of a factor on all weights, or None for 1.
    objective: loss, in nats per token, or score (slot F1 or exact match of written completions), which takes much longer.
    sampler: Optuna's gp (a Gaussian process, which needs scipy) or tpe, or auto, which is gp if scipy is installed.
    confirm: the share of each task's rows to keep out of the search. The report is measured on them.
    parallel: trials to propose at a time. With Ray they also run in parallel. address: Ray's, or None to run in this process.
    max_tokens: maximum number of tokens to write, with objective score. template_options: what the chat template gets beside
    the messages of rows, in addition to what the adapters were trained with.
    """

    base: str
    adapters: Mapping[str, Path]
    data: Mapping[str, Path]
    output: Path
    budget: int
    methods: tuple[str, ...] = ("linear",)
    weights: tuple[float, float] = (0.0, 1.5)
    density: tuple[float, float] = (0.1, 0.9)
    scale: tuple[float, float] | None = None
    objective: str = "loss"
    sampler: str = "auto"
    confirm: float = 0.5
    parallel: int = 1
    seed: int = 0
    max_tokens: int = 64
    address: str | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = len(self.adapters) + 2
        wrong = list_wrong(
            (
                ("adapters", _show(sorted(self.adapters)), len(self.adapters) >= 2, "two or more"),
                ("data", _show(sorted(self.data)), len(self.data) >= 1, "one file or more"),
                (
                    "budget",
                    self.budget,
                    self.budget > least,
                    f"more than {least}, as the base, each adapter alone and equal weights come first",
                ),
                ("methods", _show(self.methods), _are_methods(self.methods), f"some of {', '.join(MIX_METHODS)}, each once"),
                ("weights", _show(self.weights), _is_range(self.weights), "two finite numbers, the lower one first"),
                (
                    "density",
                    _show(self.density),
                    _is_range(self.density) and self.density[0] > 0 and self.density[1] <= 1,
                    "two shares, more than 0 and at most 1, the lower one first",
                ),
                (
                    "scale",
                    _show(self.scale or ()),
                    self.scale is None or (_is_range(self.scale) and self.scale[0] > 0),
                    "two finite numbers above 0, the lower one first",
                ),
                ("objective", self.objective, self.objective in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}"),
                ("sampler", self.sampler, self.sampler in SAMPLERS, f"one of {', '.join(SAMPLERS)}"),
                ("confirm", self.confirm, 0 <= self.confirm <= 0.9, "a share, 0 to 0.9"),
                ("parallel", self.parallel, self.parallel >= 1, "1 or more"),
                ("seed", self.seed, 0 <= self.seed < 1 << 32, "0 to 2^32 - 1"),
                ("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more"),
            )
        )
        wrong += [f"adapters = {name}: {reason}" for name in self.adapters if (reason := check_variant_name(name))]
        if wrong:
            raise InputError("; ".join(wrong))


def _are_methods(names: tuple[str, ...]) -> bool:
    return bool(names) and set(names) <= set(MIX_METHODS) and len(set(names)) == len(names)


def _is_range(pair: tuple[float, float]) -> bool:
    return all(map(math.isfinite, pair)) and pair[0] < pair[1]


def _show(values: Sequence[object]) -> str:
    return ", ".join(map(str, values)) or "none"
