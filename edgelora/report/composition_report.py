"""`edgelora compose report`: compares adapters, and decides for each pair to merge or route."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from edgelora.adapters.checks import check_factors, check_same_base, check_shapes
from edgelora.adapters.folder import open_adapters
from edgelora.data.rows import read_rows
from edgelora.report.interference import Interference, ModuleFigures, Stack, compare_deltas, summarize
from edgelora.report.output_interference import (
    choose_weights,
    likely_moments,
    observe_moments,
    output_products,
    relate_outputs,
    worst_error,
)
from edgelora.report.pair_scores import KEPT, PairScore, PairScorer, TaskScore
from edgelora.report.precompiling import Candidate, Plan, count_base_bytes, count_live_bytes, count_merged_bytes, plan_variants
from edgelora_export.architectures import native_types, read_decoder
from edgelora_export.base.base import Base
from edgelora_runtime.bundle.manifest import check_variant_name
from edgelora_runtime.errors import MissingExtraError, UsageError, suggest_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence, Set
    from pathlib import Path

    from numpy.typing import NDArray

    from edgelora.adapters.folder import Adapter
    from edgelora.data.rows import Row
    from edgelora.mix.methods.deltas import Factors
    from edgelora.report.output_interference import OutputInterference
    from edgelora_export.decoder.description import Decoder

    Doubles = NDArray[np.float64]

EQUAL_WEIGHTS = (0.5, 0.7, 1.0)  # of both adapters: measured for each pair, besides the predicted best weights
TSV = "core_tsv"  # on a real model ahead of sums, docs/results.md
TSV_WEIGHTS = (0.7, 1.0)  # of both adapters: 1/√n for two is ahead there
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class AdapterFigures:
    """One adapter.

    rank: its largest. modules: how many it changes. norm: ‖ΔW‖ over all of them.
    """

    folder: Path
    sha256: str
    rank: int
    modules: int
    norm: float


@dataclass(frozen=True)
class Prediction:
    """A prediction of what a linear mix of two adapters keeps of each.

    inputs: "data" if they are those of the tasks' rows on the base, "adapters" if there are no rows. Energies are then for the
    inputs that each ΔW was likely built from, and kept is the lower of two figures: for these inputs, and for inputs that point
    in all directions equally.
    weights: of the best mix, by adapter. kept: by task, 1 - E‖(mix - adapter)·x‖² / E‖adapter·x‖² at these weights.
    energy: by task, how loud the other adapter is at weight 1, E‖Δ_other·x‖² / E‖Δ·x‖². layer_energy: the same by layer.
    """

    inputs: str
    weights: Mapping[str, float]
    kept: Mapping[str, float]
    energy: Mapping[str, float]
    layer_energy: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Verdict:
    """The decision for a pair.

    choice: merge or route. basis: measured or predicted. reason: the figure that decided.
    """

    choice: str
    basis: str
    reason: str


@dataclass(frozen=True)
class PairReport:
    """Two adapters compared: overall, by layer and by module. score: None without data."""

    pair: tuple[str, str]
    overall: Interference
    layers: Mapping[str, Interference]
    modules: Mapping[str, Interference]
    prediction: Prediction
    score: PairScore | None
    verdict: Verdict

    @property
    def name(self) -> str:
        return " + ".join(self.pair)

    def other(self, name: str) -> str:
        """The name of the other adapter."""
        return self.pair[1] if name == self.pair[0] else self.pair[0]


@dataclass(frozen=True)
class CompositionReport:
    """All adapters and pairs.

    base: as given. layers: their names, in order. rows: how many each task was measured on. base_scores: by task. scores: by
    adapter and task. Both are empty without data. mixes_tried: how many were measured.
    """

    base: str | None
    adapters: Mapping[str, AdapterFigures]
    layers: tuple[str, ...]
    pairs: tuple[PairReport, ...]
    rows: Mapping[str, int]
    base_scores: Mapping[str, TaskScore]
    scores: Mapping[str, Mapping[str, TaskScore]]
    mixes_tried: int
    plan: Plan


def report_composition(
    adapters: Mapping[str, Path | str],
    *,
    base: str | None = None,
    data: Mapping[str, Path | str] | None = None,
    budget: int | None = None,
    limit: int = 100,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> CompositionReport:
    """Compares adapters, given as name → folder, and plans which mixes to compile.

    base: folder or hub id. data: for each adapter, rows that it was not trained on. The first `limit` of them are used, and every
    pair is measured in torch, which needs a base. budget: bytes of the bundle, or without a base of what variants add to it.
    Raises UsageError for arguments that do not fit together, InputError for adapters that cannot be mixed or are not products of
    two factors, MissingExtraError for data without torch and transformers.
    """
    tasks = _read_tasks(adapters, base, data or {}, limit)
    if tasks and (missing := [name for name in ("torch", "transformers") if find_spec(name) is None]):
        raise MissingExtraError(", ".join(missing), "export")
    found_base = Base.find(base) if base else None
    opened = open_adapters(adapters, base=found_base.config if found_base else None, on_note=on_note)
    check_same_base(opened, found_base.sha256 if found_base else None)
    check_factors(opened, "the report compares factors; leave it out", embeddings=True)
    native = found_base is not None and found_base.config.get("model_type") in native_types()
    decoder = read_decoder(found_base.config) if found_base is not None and native else None
    if decoder is not None:
        check_shapes(opened, decoder)
    pairs = [*itertools.combinations(opened, 2)]
    modules = sorted({module for adapter in opened.values() for module in adapter.modules})
    mixes = len(EQUAL_WEIGHTS) + 1 + len(TSV_WEIGHTS)  # of each pair, at most: the predicted weights may be equal ones
    total = len(modules) + (2 * len(opened) + 1 + len(pairs) * mixes if tasks else 0)
    steps = itertools.count()

    def on_step(what: str) -> None:
        on_progress(next(steps), total, what)

    scorer, moments = None, None
    if tasks:
        assert base is not None
        scorer = PairScorer.open(base, opened, tasks, on_step)
        moments = _observe(scorer, modules, on_step)
    figures, views = _compare(opened, modules, moments, on_step)
    reports = [_report_pair([*opened], pair, figures, views, scorer, on_step) for pair in pairs]
    on_progress(total, total, "done")
    return CompositionReport(
        base=base,
        adapters={
            name: AdapterFigures(
                adapter.folder, adapter.sha256, adapter.rank, len(adapter.modules), summarize([*figures.values()], i, i).norms[0]
            )
            for i, (name, adapter) in enumerate(opened.items())
        },
        layers=tuple(_by_layer(figures)),
        pairs=tuple(reports),
        rows={name: len(rows) for name, rows in tasks.items()},
        base_scores=scorer.base if scorer else {},
        scores=scorer.alone if scorer else {},
        mixes_tried=sum(pair.score.tried for pair in reports if pair.score),
        plan=_plan(opened, reports, decoder, budget),
    )


def decide_merge_or_route(prediction: Prediction, score: PairScore | None) -> Verdict:
    """Decides to merge if both tasks keep enough, and to route otherwise.

    Measured figures decide. Without them, the prediction does.
    """
    if score is not None:
        worst, found = min(score.tasks.items(), key=lambda item: (item[1].holds, -item[1].excess))
        reason = (
            f"{worst} keeps {found.kept_score:.2f} of its slot F1"
            if found.kept_score is not None
            else (f"{worst} is {found.excess:.2f} nats per token above its adapter's loss")
        )
        return Verdict("merge" if found.holds else "route", "measured", f"{reason} at {name_mix(score.weights, score.method)}")
    worst, kept = min(prediction.kept.items(), key=lambda item: item[1])
    reason = f"{worst} should keep {kept:.2f} of its effect at {name_mix(prediction.weights)}"
    return Verdict("merge" if kept >= KEPT else "route", "predicted", reason)


def _read_tasks(
    adapters: Mapping[str, Path | str], base: str | None, data: Mapping[str, Path | str], limit: int
) -> dict[str, list[Row]]:
    """Reads the rows of each adapter's task.

    One UsageError names everything that is wrong with the arguments.
    """
    wrong = []
    if len(adapters) < 2:
        wrong.append("compose report compares adapters: give at least two as NAME=FOLDER")
    wrong += [f"adapter {name}: {reason}" for name in adapters if (reason := check_variant_name(name))]
    if data and base is None:
        wrong.append("--data needs the --base that the adapters run on")
    if data:
        wrong += [f"adapter {name} has no --data {name}=ROWS.jsonl" for name in adapters if name not in data]
        wrong += [
            f"--data {name}=… belongs to no adapter{suggest_name([name], adapters)}" for name in data if name not in adapters
        ]
    if limit < 1:
        wrong.append(f"limit = {limit}: use 1 or more rows")
    if wrong:
        raise UsageError("; ".join(wrong))
    return {name: read_rows(data[name])[:limit] for name in adapters} if data else {}


def _factors(adapters: Mapping[str, Adapter], module: str) -> list[Factors | None]:
    return [adapter.factors(module) if module in adapter.modules else None for adapter in adapters.values()]


def _observe(scorer: PairScorer, modules: Sequence[str], on_step: Callable[[str], None]) -> list[dict[str, Doubles]]:
    """Observes, for each task, the moments of its inputs on the bare base.

    See observe_moments.
    """
    readers = {
        module: np.concatenate([pair[0] for pair in _factors(scorer.adapters, module) if pair is not None])
        for module in modules
        if not _is_embedding(scorer.adapters, module)
    }
    moments = []
    for name, rows in scorer.tasks.items():
        on_step(f"inputs of {name}")
        moments.append(observe_moments(scorer.model, rows, readers))
    return moments


def _compare(
    adapters: Mapping[str, Adapter],
    modules: Sequence[str],
    moments: Sequence[Mapping[str, Doubles]] | None,
    on_step: Callable[[str], None],
) -> tuple[dict[str, ModuleFigures], list[OutputInterference]]:
    """Computes the figures of each module, and views of the outputs.

    See Prediction.inputs. Loads one module's factors at a time.
    """
    figures: dict[str, ModuleFigures] = {}
    products: dict[str, Doubles] = {}
    even: dict[str, Doubles] = {}
    for module in modules:
        on_step(module)
        stack = Stack.of(_factors(adapters, module))
        figures[module] = compare_deltas(stack)
        if _is_embedding(adapters, module):
            continue  # its inputs are tokens, which A does not multiply
        seen = [likely_moments(stack, i) if moments is None else moments[i][module] for i in range(len(adapters))]
        product = np.stack([output_products(stack, one) for one in seen])
        layer = _layer(module)
        products[layer] = products.get(layer, 0) + product
        # With E xxᵀ = 1, E⟨Δp·x, Δq·x⟩ = ⟨Δp, Δq⟩ for each task.
        even[layer] = even.get(layer, 0) + np.stack([figures[module].inner] * len(adapters))
    views = [relate_outputs(products)]
    return figures, views if moments is not None else [*views, relate_outputs(even)]


def _report_pair(
    names: Sequence[str],
    pair: tuple[str, str],
    figures: Mapping[str, ModuleFigures],
    views: Sequence[OutputInterference],
    scorer: PairScorer | None,
    on_step: Callable[[str], None],
) -> PairReport:
    i, j = names.index(pair[0]), names.index(pair[1])
    sides = {pair[0]: (i, j), pair[1]: (j, i)}
    outputs, weights = views[0], choose_weights(views, i, j)
    prediction = Prediction(
        "adapters" if scorer is None else "data",
        dict(zip(pair, weights, strict=True)),
        {name: 1 - worst_error(views, own, {i: weights[0], j: weights[1]}) for name, (own, _) in sides.items()},
        {name: outputs.energy(*side) for name, side in sides.items()},
        {name: {layer: outputs.energy(*side, layer) for layer in outputs.layers} for name, side in sides.items()},
    )
    sums = dict.fromkeys([*((weight, weight) for weight in EQUAL_WEIGHTS), weights])
    tries = [*(("linear", each) for each in sums), *((TSV, (each, each)) for each in TSV_WEIGHTS)]
    score = None if scorer is None else scorer.score_pair(pair, tries, on_step)
    return PairReport(
        pair,
        summarize([*figures.values()], i, j),
        {layer: summarize(group, i, j) for layer, group in _by_layer(figures).items()},
        {module: summarize([one], i, j) for module, one in figures.items()},
        prediction,
        score,
        decide_merge_or_route(prediction, score),
    )


def _plan(adapters: Mapping[str, Adapter], pairs: Sequence[PairReport], decoder: Decoder | None, budget: int | None) -> Plan:
    """Plans the variants.

    The candidates are all single adapters, and the pairs with the verdict merge.
    """
    candidates = [
        Candidate(name, {name: 1.0}, {name: 1.0}, count_merged_bytes([adapter], decoder)) for name, adapter in adapters.items()
    ]
    for pair in pairs:
        if pair.verdict.choice != "merge":
            continue
        weights, method = (pair.prediction.weights, "linear") if pair.score is None else (pair.score.weights, pair.score.method)
        found = {name: task.kept for name, task in pair.score.tasks.items()} if pair.score else pair.prediction.kept
        kept = {name: 1.0 if share is None else min(1.0, share) for name, share in found.items()}
        size = count_merged_bytes([adapters[name] for name in pair.pair], decoder)
        candidates.append(Candidate(_name_variant(pair.pair, {one.name for one in candidates}), weights, kept, size, method))
    base_bytes = count_base_bytes(decoder) if decoder else None
    return plan_variants(candidates, [*adapters], count_live_bytes(adapters.values()), base_bytes, budget)


def _name_variant(pair: tuple[str, str], taken: Set[str]) -> str:
    """Finds a name for a pair's variant, not taken and not too long."""
    name = "-".join(pair)[:60]
    return next(one for one in (name, *(f"{name}-{place}" for place in range(2, 100))) if one not in taken)


def _by_layer(figures: Mapping[str, ModuleFigures]) -> dict[str, list[ModuleFigures]]:
    layers: dict[str, list[ModuleFigures]] = {}
    for module in sorted(figures, key=lambda name: (not (match := _LAYER.search(name)), int(match[1]) if match else 0)):
        layers.setdefault(_layer(module), []).append(figures[module])
    return layers


def _layer(module: str) -> str:
    """Names the layer of a module, or the module itself outside of layers."""
    match = _LAYER.search(module)
    return f"layer {match[1]}" if match else module


def _is_embedding(adapters: Mapping[str, Adapter], module: str) -> bool:
    return any(module in adapter.modules and adapter.is_embedding(module) for adapter in adapters.values())


def name_mix(weights: Mapping[str, float], method: str = "linear") -> str:
    """Names a mix: "1 sql + 1 law", or "1 sql + 1 law by core_tsv"."""
    named = " + ".join(f"{weight:g} {name}" for name, weight in weights.items())
    return named if method == "linear" else f"{named} by {method}"
