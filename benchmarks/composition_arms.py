"""The arms of composition.py: mixes by every method, by PEFT and on data, and controls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.composition_data import ALL, FEW, name_file
from edgelora.adapters.folder import Adapter
from edgelora.cli.terminal import print_note
from edgelora.composing.compose import write_composed
from edgelora.data.rows import read_rows
from edgelora.learn.learn import LearnConfig, learn
from edgelora.mix.mix import Mix

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from benchmarks.composition_data import Prepared
    from edgelora.in_torch.mixed_model import MixedModel

WEIGHTS = (0.25, 0.4, 0.6, 1.0)  # tried for each method with one weight for all adapters
DATA_FREE = (
    "linear",
    "ties",
    "ties_weighted",
    "dare_linear",
    "dare_ties",
    "magnitude",
    "knots",
    "core_ties",
    "core_tsv",
    "core_iso",
)
PEFT_KINDS = {
    "linear": {},
    "cat": {},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.7},
    "magnitude_prune": {"density": 0.5},
}


@dataclass(frozen=True)
class Arm:
    """One way to serve all tasks.

    mixes: the mix for each task, None for the base. tried: number of configurations tried.
    """

    name: str
    mixes: Mapping[str, Mix | None]
    tried: int = 1


def list_arms(prepared: Prepared, tasks: Sequence[str], model: MixedModel, store: Path) -> Iterator[Arm]:
    """Yields the arms for a set of tasks.

    Slow results are kept in the seed's folder.
    """
    plain = {task: prepared.plain[task] for task in tasks}
    alone = {task: _only(adapter) for task, adapter in plain.items()}
    yield Arm("base", dict.fromkeys(tasks))
    yield Arm("own adapter", alone)
    if prepared.composable:
        made = prepared.composable
        yield Arm("composable: own adapter", {task: _only(adapter) for task, adapter in made.items()})
        candidates = [_everywhere(Mix(made, dict.fromkeys(made, weight)), tasks) for weight in WEIGHTS]
        yield choose("composable: linear", candidates, prepared, tasks, model, store)
        yield _learned(prepared, made, tasks, "composable: regmean", rows=0)
        yield _learned(prepared, made, tasks, "composable: regmean + core", rows=100, grain="core")
        yield _learned(prepared, made, tasks, "composable: regmean + factors", rows=100, grain="factors")
        yield _learned(prepared, made, tasks, "composable: regmean + factors + written", rows=100, grain="factors", written=400)
        return
    singles = {task: _everywhere(mix, tasks) for task, mix in alone.items()}
    yield choose("best single everywhere", list(singles.values()), prepared, tasks, model, store)
    for method in DATA_FREE:
        candidates = [_everywhere(Mix(plain, dict.fromkeys(plain, weight), method), tasks) for weight in WEIGHTS]
        chosen = choose(method, candidates, prepared, tasks, model, store)
        yield chosen
        if method == "linear":
            mix = next(iter(chosen.mixes.values()))
            assert mix is not None
            yield Arm("linear, own adapter and random ones", dict(_with_random(prepared, plain, mix.weights)))
    for kind, options in PEFT_KINDS.items():
        folders = [_compose_with_peft(prepared, plain, kind, options, weight) for weight in WEIGHTS]
        candidates = [_everywhere(_only(Adapter.open(folder)), tasks) for folder in folders]
        yield choose(f"PEFT {kind}", candidates, prepared, tasks, model, store)
    yield _learned(prepared, plain, tasks, "regmean", rows=0)
    yield _learned(prepared, plain, tasks, "regmean + core", rows=100, grain="core")
    yield _learned(prepared, plain, tasks, "regmean + factors", rows=100, grain="factors")
    yield _learned(prepared, plain, tasks, "regmean + factors + written", rows=100, grain="factors", written=400)
    for name, control in ((FEW, "one adapter on the labelled rows"), (ALL, "one adapter on all rows")):
        if name in prepared.controls:
            yield Arm(control, _everywhere(_only(prepared.controls[name]), tasks))


def choose(
    name: str,
    candidates: Sequence[Mapping[str, Mix | None]],
    prepared: Prepared,
    tasks: Sequence[str],
    model: MixedModel,
    store: Path,
) -> Arm:
    """Chooses the candidate with the least loss on the labelled rows.

    Losses are relative to each task's own adapter. The choice is kept in a file.
    """
    chosen = store / f"{name_file(name)}.choice"
    if chosen.exists():
        return Arm(name, candidates[int(chosen.read_text())], len(candidates))

    rows = {task: read_rows(prepared.labelled[task]) for task in tasks}

    def task_loss(mix: Mix | None, task: str) -> float:
        model.set_mix(mix)
        return model.loss(rows[task])

    own = {task: task_loss(_only(prepared.plain[task]), task) for task in tasks}

    def loss(mixes: Mapping[str, Mix | None]) -> float:
        return sum(task_loss(mixes[task], task) / own[task] for task in tasks)

    losses = [loss(mixes) for mixes in candidates]
    chosen.write_text(str(int(np.argmin(losses))))
    return Arm(name, candidates[int(np.argmin(losses))], len(candidates))


def _only(adapter: Adapter) -> Mix:
    return Mix({"only": adapter}, {"only": 1.0})


def _everywhere(mix: Mix, tasks: Sequence[str]) -> dict[str, Mix | None]:
    return dict.fromkeys(tasks, mix)


def _learned(
    prepared: Prepared,
    adapters: Mapping[str, Adapter],
    tasks: Sequence[str],
    name: str,
    *,
    rows: int,
    grain: str = "core",
    written: int = 0,
) -> Arm:
    """Learns a mix on data, and keeps it in the seed's folder.

    written: prompts that adapters complete. They double the steps.
    """
    folder = prepared.mix(adapters, name.removeprefix("composable: "))
    if not folder.exists():
        print_note(f"learning {folder.name}")
        labelled = {task: prepared.labelled[task] for task in tasks} if rows else {}
        folders = {task: adapter.folder for task, adapter in adapters.items()}
        steps = (2 if written else 1) * LearnConfig.steps
        learn(LearnConfig(prepared.base, folders, folder, labelled, grain=grain, written=written, steps=steps))
    return Arm(name, _everywhere(_only(Adapter.open(folder)), tasks))


def _compose_with_peft(
    prepared: Prepared, adapters: Mapping[str, Adapter], kind: str, options: Mapping[str, float], weight: float
) -> Path:
    """A mix by PEFT's add_weighted_adapter, in the seed's folder."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = prepared.folder / "peft" / f"{'-'.join(adapters)}-{kind}-{weight}"
    if not folder.exists():
        model = AutoModelForCausalLM.from_pretrained(prepared.base, dtype=torch.float32)
        combine_with_peft(model, [*adapters.values()], kind, options, weight, folder)
    return folder


def combine_with_peft(
    model: Any, adapters: Sequence[Adapter], kind: str, options: Mapping[str, float], weight: float, folder: Path
) -> None:
    """Mixes adapters by PEFT's add_weighted_adapter on a loaded base, all with one weight, and lets PEFT save the mix."""
    import torch
    from peft import PeftModel

    torch.manual_seed(0)
    names = [f"adapter{place}" for place in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        if name == names[0]:
            model = PeftModel.from_pretrained(model, adapter.folder, adapter_name=name)
        else:
            model.load_adapter(adapter.folder, adapter_name=name)
    model.add_weighted_adapter(names, [weight] * len(names), "mix", combination_type=kind, **options)
    model.save_pretrained(folder.with_suffix(".saved"), selected_adapters=["mix"])
    (folder.with_suffix(".saved") / "mix").rename(folder)


def _with_random(prepared: Prepared, adapters: Mapping[str, Adapter], weights: Mapping[str, Any]) -> Iterator[tuple[str, Mix]]:
    """Yields per task the linear mix of its own adapter with random ones.

    The random ones have the other adapters' norms in every module.
    """
    for task, own in adapters.items():
        mixed = {task: own}
        for place, (name, adapter) in enumerate(adapters.items()):
            if name == task:
                continue
            folder = prepared.folder / "random" / name
            if not folder.exists():
                write_composed(folder, draw_random(adapter, place), adapter, adapter.provenance)
            mixed[name] = Adapter.open(folder, name)
        yield task, Mix(mixed, weights)


def draw_random(adapter: Adapter, seed: int) -> dict[str, tuple[Any, Any]]:
    generator = np.random.default_rng(seed)
    factors = {}
    for module in sorted(adapter.modules):
        a, b = (generator.standard_normal(factor.shape).astype(np.float32) for factor in adapter.factors(module))
        size = np.float32(np.linalg.norm(adapter.dense(module)) / np.linalg.norm(b @ a))
        factors[module] = a, b * size
    return factors
