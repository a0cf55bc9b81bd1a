"""Plans which mixes to merge into variants, and which adapters to keep live.

The plan keeps to a budget of bytes, and becomes a recipe.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora_export.decoder.description import HEAD_MODULE
from edgelora_export.quantize.int4 import Grid

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from edgelora.adapters.folder import Adapter
    from edgelora_export.decoder.description import Decoder

LEAST_GAIN = 0.05  # in kept shares: a variant that adds less is not worth its bytes
GRID = Grid(bits=4, block_size=32)  # a recipe's default
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Candidate:
    """A variant that could be compiled.

    kept: by task, the share of its adapter's effect that the variant keeps, 0 to 1. bytes: of the weights that it does not share
    with the base. method: of the mix, a name in MIX_METHODS.
    """

    name: str
    mix: Mapping[str, float]
    kept: Mapping[str, float]
    bytes: int
    method: str = "linear"


@dataclass(frozen=True)
class ChosenVariant:
    """A candidate worth its bytes.

    gain: what it added to the tasks' kept shares when it was chosen. method: of the mix.
    """

    name: str
    mix: Mapping[str, float]
    bytes: int
    gain: float
    method: str = "linear"


@dataclass(frozen=True)
class Plan:
    """A plan of what to compile.

    merged: best gain per byte first. live: adapters whose tasks no merged variant serves. bytes: of everything. base_bytes: the
    base's part of them, or None if no base was given, which then does not count. live_bytes: of all adapters' factors, which the
    bundle holds if any adapter is live. budget: in bytes, None for no limit. fits: whether everything is within the budget.
    """

    merged: tuple[ChosenVariant, ...]
    live: tuple[str, ...]
    bytes: int
    base_bytes: int | None
    live_bytes: int
    budget: int | None
    fits: bool


def plan_variants(
    candidates: Sequence[Candidate], tasks: Sequence[str], live_bytes: int, base_bytes: int | None, budget: int | None
) -> Plan:
    """Takes the candidates with the largest gain per byte, one after another.

    It stops when nothing fits or is worth its bytes. A candidate's gain is what it adds to each task's best kept share, summed
    over the tasks. So a mix that keeps two tasks comes before a single adapter of the same size, and after it the single adapters
    gain only what the mix lost. Tasks that are left without a variant are served live. Room is set aside for that if not
    everything fits merged.
    """
    fixed = base_bytes or 0
    room = math.inf if budget is None else budget - fixed
    chosen, served = _choose(candidates, tasks, room)
    if len(served) < len(tasks):
        chosen, served = _choose(candidates, tasks, room - live_bytes)
    live = tuple(task for task in tasks if task not in served)
    used = sum(variant.bytes for variant in chosen) + (live_bytes if live else 0)
    return Plan(tuple(chosen), live, fixed + used, base_bytes, live_bytes, budget, used <= room)


def _choose(candidates: Sequence[Candidate], tasks: Sequence[str], room: float) -> tuple[list[ChosenVariant], set[str]]:
    """The chosen candidates, and the tasks that they serve."""
    best = dict.fromkeys(tasks, 0.0)
    left, chosen = list(candidates), []

    def gain(candidate: Candidate) -> float:
        return sum(max(0.0, share - best[task]) for task, share in candidate.kept.items())

    while fitting := [one for one in left if one.bytes <= room and gain(one) >= LEAST_GAIN]:
        # A tie goes to the candidate that serves more tasks, then to the first.
        taken = max(fitting, key=lambda one: (gain(one) / max(one.bytes, 1), len(one.kept)))
        chosen.append(ChosenVariant(taken.name, taken.mix, taken.bytes, gain(taken), taken.method))
        best |= {task: max(best[task], share) for task, share in taken.kept.items()}
        room -= taken.bytes
        left.remove(taken)
    return chosen, {task for task, share in best.items() if share > 0}


def count_merged_bytes(adapters: Iterable[Adapter], decoder: Decoder | None) -> int:
    """Counts the bytes that a merged variant of some adapters adds to a bundle.

    They are codes and scales of the products that the adapters change.
    decoder: the base's, which tells which modules are stored as one product. Without it, each module counts as one.
    """
    shapes = {module: (rows, columns) for adapter in adapters for module, (rows, columns, _) in adapter.shapes.items()}
    if decoder is None:
        return sum(_matrix_bytes(rows, columns) for rows, columns in shapes.values())
    linears = [linear for linear in decoder.linears if not shapes.keys().isdisjoint(linear.modules)]
    ends = [shapes[module] for module in (decoder.embedding.removesuffix(".weight"), HEAD_MODULE) if module in shapes]
    return sum(_matrix_bytes(linear.rows, linear.columns) for linear in linears) + sum(
        _matrix_bytes(rows or decoder.vocab_size, decoder.hidden_size) for rows, _ in ends
    )


def count_base_bytes(decoder: Decoder) -> int:
    """Counts the bytes of the int4 base in a bundle.

    Norms and graph, a thousandth of it, do not count.
    """
    linears = sum(_matrix_bytes(linear.rows, linear.columns) for linear in decoder.linears)
    return linears + len(decoder.vocab_modules) * _matrix_bytes(decoder.vocab_size, decoder.hidden_size)


def count_live_bytes(adapters: Iterable[Adapter]) -> int:
    """Bytes of the adapters' factors in fp16."""
    return sum(2 * rank * (rows + columns) for adapter in adapters for rows, columns, rank in adapter.shapes.values())


def _matrix_bytes(rows: int, columns: int) -> int:
    return rows * (GRID.row_bytes(columns) + _SCALE_BYTES * -(-columns // GRID.block_size))


def render_recipe(plan: Plan, base: str | None, adapters: Mapping[str, Path], folder: Path) -> str:
    """Renders the plan as the text of a recipe.toml in a folder.

    Without a base, its line is a comment to fill in.
    """
    lines = [f"base = {_quote(_seen_from(folder, base))}" if base else '# base = "path or hub id"', "", "[adapters]"]
    lines += [f"{_quote(name)} = {_quote(_seen_from(folder, os.fspath(path)))}" for name, path in adapters.items()]
    lines += ["", "[variants.base]", "mix = {}"]
    for variant in plan.merged:
        lines += ["", f"[variants.{_quote(variant.name)}]", f"mix = {_inline(variant.mix)}"]
        lines += [f"method = {_quote(variant.method)}"] if variant.method != "linear" else []
    for name in plan.live:
        lines += ["", f"[variants.{_quote(name)}]", f"mix = {_inline({name: 1.0})}", 'kind = "live"']
    if len(plan.merged) + len(plan.live) > 1:
        lines += ["", '# [router]  # uncomment for a variant "auto" that picks one of these for each request']
    return "\n".join(lines) + "\n"


def _inline(mix: Mapping[str, float]) -> str:
    return "{ " + ", ".join(f"{_quote(name)} = {float(weight)}" for name, weight in mix.items()) + " }"


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _seen_from(folder: Path, path: str) -> str:
    """Returns a local path relative to a folder, or a hub id unchanged."""
    return os.path.relpath(path, folder).replace(os.sep, "/") if os.path.exists(path) else path  # noqa: PTH110  (may be a hub id)
