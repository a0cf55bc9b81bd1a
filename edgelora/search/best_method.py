"""`compose --method best`: chooses how to mix adapters by the loss of a few mixes on a handful of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from edgelora.adapters.checks import check_same_base, check_shapes
from edgelora.adapters.folder import find_template_options, open_adapters
from edgelora.mix.methods import MIX_METHODS
from edgelora.mix.mix import Mix
from edgelora.search.held_out import read_held_out
from edgelora.search.objective import Objective
from edgelora_export.architectures import native_types, read_decoder
from edgelora_export.base.base import Base
from edgelora_runtime.errors import MissingExtraError, UsageError, suggest_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from edgelora.adapters.folder import Adapter
    from edgelora.mix.weights import Weight

ROWS = 16  # of each file
# Methods to try: the one ahead on a real model (docs/results.md), the plain sum, and one that trims. compose search tries all.
METHODS = ("core_tsv", "linear", "ties")


@dataclass(frozen=True)
class TriedMix:
    """A mix that was tried.

    factor: on the weights of all adapters. kept: by task, (base - mix) / (base - adapter alone) in loss.
    """

    method: str
    factor: float
    kept: Mapping[str, float]

    @property
    def mean(self) -> float:
        """The share kept, averaged over tasks."""
        return sum(self.kept.values()) / len(self.kept)


@dataclass(frozen=True)
class BestMix:
    """The mix that keeps most, of all that were tried. weights: with its factor. rows: per task."""

    method: str
    weights: Mapping[str, Weight]
    tried: tuple[TriedMix, ...]
    rows: Mapping[str, int]


def choose_best_mix(
    base: str,
    adapters: Mapping[str, tuple[Path | str, Weight]],
    data: Mapping[str, Path],
    *,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> BestMix:
    """Tries METHODS on adapters, given as name → (folder or GGUF file, weight), and chooses by what they keep on average.

    Each method is tried with the weights as given, over the square root of the number of adapters, and over that number.
    base: folder, GGUF file or hub id. data: held-out rows by adapter, of which the first ROWS by a hash of their content count.
    Raises UsageError for data and adapters that do not match, InputError for adapters that do not fit, for a test split, and for
    an adapter that is no better than the base on its rows, MissingExtraError without torch and transformers.
    """
    if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
        raise MissingExtraError(", ".join(missing), "export")
    _check_names(adapters, data)
    from edgelora.in_torch.mixed_model import MixedModel

    found = Base.find(base)
    opened = open_adapters({name: folder for name, (folder, _) in adapters.items()}, base=found.config, on_note=on_note)
    check_same_base(opened, found.sha256)
    if found.config.get("model_type") in native_types():
        check_shapes(opened, read_decoder(found.config))
    rows = {task: held.searched[:ROWS] for task, held in read_held_out(data, opened, 0.0, on_note).items()}
    factors = dict.fromkeys((1.0, round(1 / math.sqrt(len(opened)), 3), round(1 / len(opened), 3)))
    mixes = [(method, factor) for method in _usable_methods(opened) for factor in factors]
    total = 1 + len(opened) + len(mixes)
    model = MixedModel.open(base, find_template_options(opened))

    on_progress(0, total, "base")
    bare = {task: model.loss(some) for task, some in rows.items()}
    alone = {}
    for done, name in enumerate(opened, start=1):
        on_progress(done, total, name)
        model.set_mix(Mix({name: opened[name]}, {name: 1.0}))
        alone[name] = {task: model.loss(some) if task == name else bare[task] for task, some in rows.items()}
    objective = Objective.read(bare, alone, higher_is_better=False)

    tried = []
    for done, (method, factor) in enumerate(mixes, start=1 + len(opened)):
        on_progress(done, total, f"{method}, weights × {factor:g}")
        model.set_mix(Mix(opened, _scale_weights(adapters, factor), method))
        tried.append(TriedMix(method, factor, objective.shares({task: model.loss(some) for task, some in rows.items()})))
    on_progress(total, total, "done")
    best = max(tried, key=lambda mix: mix.mean)
    counts = {task: len(some) for task, some in rows.items()}
    return BestMix(best.method, _scale_weights(adapters, best.factor), tuple(tried), counts)


def _check_names(adapters: Mapping[str, object], data: Mapping[str, object]) -> None:
    wrong = [] if len(adapters) > 1 else ["--method best chooses how to mix adapters: give at least two"]
    wrong += [f"adapter {name} has no --data {name}=ROWS.jsonl" for name in adapters if name not in data]
    wrong += [f"--data {name}=… belongs to no adapter{suggest_name([name], adapters)}" for name in data if name not in adapters]
    if wrong:
        raise UsageError("; ".join(wrong))


def _usable_methods(adapters: Mapping[str, Adapter]) -> list[str]:
    """Lists the methods that these adapters allow: sums alone for biases, no method on factors for other kinds than LoRA."""
    if any(adapter.biased for adapter in adapters.values()):
        return ["linear"]
    factored = not any(adapter.why_not_low_rank(module) for adapter in adapters.values() for module in adapter.modules)
    return [name for name in METHODS if factored or MIX_METHODS[name].dense is not None]


def _scale_weights(adapters: Mapping[str, tuple[object, Weight]], factor: float) -> dict[str, Weight]:
    """Multiplies each adapter's weight, or each of its weights by pattern, to three decimals, as a recipe has them."""
    return {
        name: round(factor * weight, 3)
        if isinstance(weight, int | float)
        else {pattern: round(factor * value, 3) for pattern, value in weight.items()}
        for name, (_, weight) in adapters.items()
    }
