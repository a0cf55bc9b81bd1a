"""The arms of composition_real.py: for a set of adapters, mixes by every method, by PEFT and on data, and controls.

An arm's name holds its method and its one weight of all adapters. Nothing is chosen on test rows: each weight is an arm.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.composition_arms import PEFT_KINDS, combine_with_peft
from benchmarks.composition_real_data import ALL, TASKS, random_adapters, rows_file, train_one
from benchmarks.pocket import SLOTS
from edgelora.adapters.folder import Adapter
from edgelora.cli.terminal import print_note
from edgelora.learn.learn import LearnConfig, learn
from edgelora.mix.mix import Mix
from edgelora.search.best_method import choose_best_mix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from benchmarks.composition_real_data import Plan

BASE, ALONE = "base", "alone"
DATA_FREE = (
    "core_tsv",
    "linear",
    "ties",
    "core_iso",
    "magnitude",
    "core_ties",
    "knots",
    "dare_linear",
    "dare_ties",
    "ties_weighted",
)
FIRST = DATA_FREE[:2]  # measured on every pair
LEARNED_STEPS, LEARNED_BATCH = 60, 4
_TRIPLES = 6  # drawn from the 56


@dataclass(frozen=True)
class Arm:
    """One mix for a set of tasks. make: the mix, None for the bare base."""

    name: str
    tasks: tuple[str, ...]
    make: Callable[[], Mix | None]


def list_sets(plan: Plan, stage: str) -> list[tuple[str, ...]]:
    """Lists the sets of the plan's tasks that a stage measures, the telling ones first."""
    if stage == "pairs":
        return [*itertools.combinations(plan.tasks, 2)]
    if stage == "sets":
        triples = [*itertools.combinations(plan.tasks, 3)]
        drawn = np.random.default_rng(0).permutation(len(triples))[:_TRIPLES]
        sets = [SLOTS, plan.tasks, (*SLOTS[:2], *TASKS[4:]), *(triples[place] for place in sorted(drawn))]
    else:
        sets = [(SLOTS[0], "sql"), SLOTS[:2], SLOTS, plan.tasks, ("sql", "medical"), ("math", "style"), (SLOTS[1], "math")]
    return [tasks for tasks in dict.fromkeys(sets) if set(tasks) <= set(plan.tasks)]


def list_arms(plan: Plan, adapters: Mapping[str, Adapter], stage: str) -> Iterator[Arm]:
    """Yields the arms of a stage, in the order in which they are measured."""
    if stage == "alone":
        for task in plan.tasks:
            yield Arm(BASE, (task,), lambda: None)
            yield Arm(ALONE, (task,), _only(adapters[task]))
    elif stage == "pairs":
        for tasks, method, weight in itertools.product(list_sets(plan, stage), FIRST, (1.0, 1 / math.sqrt(2))):
            yield _data_free(adapters, tasks, method, weight)
    elif stage == "sets":
        for tasks in list_sets(plan, stage):
            for method, weight in itertools.product(FIRST, dict.fromkeys((1.0, 1 / math.sqrt(len(tasks)), 1 / len(tasks)))):
                yield _data_free(adapters, tasks, method, weight)
            yield _data_free(adapters, tasks, "ties", 1.0)
    elif stage == "methods":
        for tasks, method in itertools.product(list_sets(plan, stage), DATA_FREE):
            for weight in (1.0, 0.6, 1 / math.sqrt(len(tasks)), 1.5 if len(tasks) == 2 else 1 / len(tasks)):
                yield _data_free(adapters, tasks, method, weight)
    elif stage == "chosen":
        for tasks in list_sets(plan, stage):
            yield Arm("compose --method best", tasks, _chosen(plan, adapters, tasks))
    elif stage == "controls":
        yield from _controls(plan, adapters)
    elif stage == "learned":
        for tasks in list_sets(plan, stage)[:4]:
            for labelled in (False, True):
                yield _learned(plan, adapters, tasks, labelled=labelled)


def _controls(plan: Plan, adapters: Mapping[str, Adapter]) -> Iterator[Arm]:
    """Yields what a mix must beat or cannot: random adapters beside the own one, PEFT's mixes, one single, one for all rows."""
    random = random_adapters(plan, adapters)
    for tasks, method in itertools.product(list_sets(plan, "methods")[:4], FIRST):
        for own in tasks:
            others = {task: random[task] for task in tasks if task != own}
            mix = Mix({own: adapters[own], **others}, dict.fromkeys(tasks, 1.0), method)
            yield Arm(f"{method} 1, own and random ones, of {len(tasks)}: {'+'.join(tasks)}", (own,), lambda mix=mix: mix)  # type: ignore[misc]
    for tasks in list_sets(plan, "methods")[:4]:
        for kind, options in PEFT_KINDS.items():
            yield Arm(f"PEFT {kind} 1", tasks, _by_peft(plan, adapters, tasks, kind, options))
    for task in plan.tasks:
        yield Arm(f"{task} everywhere", plan.tasks, _only(adapters[task]))
    yield Arm("one adapter on all rows", plan.tasks, lambda: _only(Adapter.open(train_one(plan, ALL)))())


def _data_free(adapters: Mapping[str, Adapter], tasks: Sequence[str], method: str, weight: float) -> Arm:
    made = Mix({task: adapters[task] for task in tasks}, dict.fromkeys(tasks, weight), method)
    return Arm(f"{method} {weight:.3g}", tuple(tasks), lambda: made)


def _chosen(plan: Plan, adapters: Mapping[str, Adapter], tasks: Sequence[str]) -> Callable[[], Mix]:
    """The mix that `compose --method best` chooses on labelled rows."""

    def make() -> Mix:
        folders = {task: (adapters[task].folder, 1.0) for task in tasks}
        best = choose_best_mix(plan.base, folders, {task: rows_file(plan, task, "labelled") for task in tasks})
        print_note(f"chosen: {best.method}, {', '.join(f'{weight} {task}' for task, weight in best.weights.items())}")
        return Mix({task: adapters[task] for task in tasks}, best.weights, best.method)

    return make


def _only(adapter: Adapter) -> Callable[[], Mix]:
    return lambda: Mix({"only": adapter}, {"only": 1.0})


def _by_peft(
    plan: Plan, adapters: Mapping[str, Adapter], tasks: Sequence[str], kind: str, options: Mapping[str, Any]
) -> Callable[[], Mix]:
    """A mix by PEFT's add_weighted_adapter with weights 1."""

    def make() -> Mix:
        from edgelora.in_torch.train import load_base
        from edgelora_export.base.base import Base

        folder = plan.folder / "peft" / f"{'-'.join(tasks)}-{kind}"
        if not folder.exists():
            model, _ = load_base(Base.find(plan.base), "none")
            combine_with_peft(model, [adapters[task] for task in tasks], kind, options, 1.0, folder)
        return _only(Adapter.open(folder))()

    return make


def _learned(plan: Plan, adapters: Mapping[str, Adapter], tasks: Sequence[str], *, labelled: bool) -> Arm:
    """RegMean on the adapters' own rows, and with `labelled` the factors learned on 100 rows of each task."""

    def make() -> Mix:
        folder = plan.folder / "mixes" / f"{'-'.join(tasks)}-{'learned' if labelled else 'regmean'}"
        if not folder.exists():
            print_note(f"learning {folder}")
            rows = {task: rows_file(plan, task, "labelled") for task in tasks} if labelled else {}
            folders = {task: adapters[task].folder for task in tasks}
            learn(LearnConfig(plan.base, folders, folder, rows, steps=LEARNED_STEPS, batch_size=LEARNED_BATCH))
        return _only(Adapter.open(folder))()

    return Arm("regmean, learned on 100 rows" if labelled else "regmean", tuple(tasks), make)
