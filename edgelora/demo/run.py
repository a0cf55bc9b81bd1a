"""The demo's pipeline: train adapters, mix them, export, evaluate, switch."""

from __future__ import annotations

import json
import random
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.data.rows import Row, read_rows
from edgelora.data.scores import main_score, slot_f1
from edgelora.demo.base import make_base
from edgelora.demo.report import DemoReport, Switch
from edgelora.demo.settings import DemoSettings, MixSettings
from edgelora.demo.tasks import Task, make_tasks
from edgelora.evaluation import score_variant
from edgelora.exporting.export import export
from edgelora.in_torch.reference import write_with_torch
from edgelora.in_torch.train import train
from edgelora.in_torch.train_config import TrainConfig
from edgelora.learn.learn import LearnConfig, learn
from edgelora_export.weights.publish import write_file
from edgelora_runtime import Runtime
from edgelora_runtime.bundle.manifest import check_variant_name
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    OnProgress = Callable[[int, int, str], None]
    OnNote = Callable[[str], None]

MAX_TOKENS = 64
RESERVED_VARIANTS = BASE, NAIVE_SUM, MIX, MIX_LIVE = "base", "naive-sum", "mix", "mix-live"  # beside one per task


class Stopwatch:
    """A stopwatch for the stages of a run.

    seconds: per stage, in order. on_note is told when a stage begins.
    """

    def __init__(self, on_note: OnNote = lambda note: None) -> None:
        self.seconds: dict[str, float] = {}
        self._on_note = on_note

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._on_note(f"· {name} …")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def run_built_in_demo(
    output: Path,
    seed: int,
    settings: DemoSettings | None = None,
    *,
    on_progress: OnProgress = lambda done, total, what: None,
    on_note: OnNote = lambda note: None,
) -> DemoReport:
    """Runs the pipeline on the built-in base and tasks."""
    settings = settings or DemoSettings()
    watch = Stopwatch(on_note)
    with watch.stage("pretrain a small base"):
        make_base(output / "base", settings.base, seed=seed, on_progress=on_progress)
    tasks = make_tasks(settings.sizes, seed=seed)
    configs = {
        task.name: settings.train_config(
            output / "base",
            write_demo_rows(output / "data" / f"{task.name}.train.jsonl", task.train),
            output / "adapters" / task.name,
            seed=seed,
        )
        for task in tasks
    }
    return run_pipeline(
        str(output / "base"),
        tasks,
        configs,
        settings.mix,
        output,
        seed=seed,
        max_tokens=settings.max_tokens,
        watch=watch,
        on_progress=on_progress,
    )


def run_user_demo(
    output: Path,
    seed: int,
    base: str,
    data: Mapping[str, str],
    *,
    on_progress: OnProgress = lambda done, total, what: None,
    on_note: OnNote = lambda note: None,
) -> DemoReport:
    """Runs the pipeline on the user's base and rows.

    A fifth of each file is held out for testing.
    """
    for name in data:  # before minutes of training
        if reason := "the demo's own variant has that name" if name in RESERVED_VARIANTS else check_variant_name(name):
            raise InputError(f"--data {name}=…: {reason}; choose another name")
    tasks = [split_rows(name, read_rows(path), seed) for name, path in data.items()]
    configs = {
        task.name: TrainConfig(
            base=base,
            data=write_demo_rows(output / "data" / f"{task.name}.train.jsonl", task.train),
            output=output / "adapters" / task.name,
            seed=seed,
        )
        for task in tasks
    }
    return run_pipeline(
        base,
        tasks,
        configs,
        MixSettings(),
        output,
        seed=seed,
        max_tokens=MAX_TOKENS,
        watch=Stopwatch(on_note),
        on_progress=on_progress,
    )


def split_rows(name: str, rows: Sequence[Row], seed: int) -> Task:
    """Makes a task from shuffled rows, with at most 200 test rows.

    No prompt is in both splits.
    """
    distinct = list({row.prompt: row for row in rows}.values())
    if len(distinct) < 10:
        raise InputError(f"{name} has {len(distinct)} distinct prompts; give at least 10 rows")
    random.Random(seed).shuffle(distinct)  # noqa: S311  (data, not secrets)
    test = min(200, len(distinct) // 5)
    return Task(name, train=tuple(distinct[test:]), test=tuple(distinct[:test]))


def write_demo_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Writes rows as JSON lines, in a folder that it makes. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, [f"{row.to_json()}\n".encode() for row in rows])
    return path


def run_pipeline(
    base: str,
    tasks: Sequence[Task],
    configs: Mapping[str, TrainConfig],
    mix: MixSettings,
    output: Path,
    *,
    seed: int,
    max_tokens: int,
    watch: Stopwatch,
    on_progress: OnProgress,
) -> DemoReport:
    """Runs everything after the base.

    Trains the adapters, mixes them, exports a bundle, scores and switches its variants.
    configs: how to train each task's adapter, by task name. mix, seed: how to mix them.
    """
    in_torch = {}
    for task in tasks:
        config = configs[task.name]
        with watch.stage(f"train {task.name}"):
            train(config, on_progress=on_progress)
        with watch.stage(f"evaluate {task.name} in torch"):
            written = write_with_torch(base, config.output, task.test, quant=config.quant, max_tokens=max_tokens)
            in_torch[task.name] = main_score(written, _completions(task.test))
    with watch.stage("mix the adapters by what they write themselves"):
        adapters = {task.name: configs[task.name].output for task in tasks}
        mixed = output / "adapters" / MIX
        learn(LearnConfig(base, adapters, mixed, seed=seed, **vars(mix)), on_progress=on_progress)
    with watch.stage("export the bundle"):
        write_recipe(output / "recipe.toml", base, {**adapters, MIX: mixed}, _list_variants([*adapters]))
        export(output / "recipe.toml", output / "bundle", on_progress=on_progress)
    with watch.stage("evaluate the variants"), Runtime(output / "bundle") as runtime:
        first = [runtime.switch(name) for name in runtime.variants]
        back = [runtime.switch(name) for name in runtime.variants]
        scores = {
            name: {task.name: score_variant(runtime, task.test, variant=name, max_tokens=max_tokens) for task in tasks}
            for name in runtime.variants
        }
    return DemoReport(
        bundle=output / "bundle",
        test_rows={task.name: len(task.test) for task in tasks},
        metrics={
            task.name: "slot F1" if slot_f1(_completions(task.test), _completions(task.test)) is not None else "exact match"
            for task in tasks
        },
        torch=in_torch,
        scores=scores,
        written=mix.written,
        kept={task.name: scores[MIX][task.name] / max(scores[task.name][task.name], 1e-9) for task in tasks},
        switches=tuple(Switch(one.variant, one.milliseconds, again.milliseconds) for one, again in zip(first, back, strict=True)),
        seconds=watch.seconds,
    )


def _list_variants(adapters: Sequence[str]) -> dict[str, str]:
    """Lists the TOML of each variant.

    These are the base, each single adapter, their plain sum, and the mix both merged and live.
    """
    return {
        BASE: "mix = {}",
        **{name: f"mix = {format_mix({name: 1.0})}" for name in adapters},
        NAIVE_SUM: f"mix = {format_mix(dict.fromkeys(adapters, 1.0))}",
        MIX: f"mix = {format_mix({MIX: 1.0})}",
        MIX_LIVE: f"mix = {format_mix({MIX: 1.0})}\nkind = 'live'",
    }


def format_mix(weights: Mapping[str, float]) -> str:
    """Formats weights by adapter as TOML."""
    return "{ " + ", ".join(f"{_quote(name)} = {weight}" for name, weight in weights.items()) + " }"


def write_recipe(
    path: Path,
    base: str,
    adapters: Mapping[str, Path],
    variants: Mapping[str, str],
    *,
    default: str | None = None,
    context_length: int | None = None,
) -> None:
    """Writes a recipe as a user would.

    Paths are absolute, so that the recipe works from any folder. variants: the TOML of each. default, context_length: as in the
    recipe, which names neither if they are None.
    """
    found = str(Path(base).resolve()) if Path(base).exists() else base
    lines = [f"base = {_quote(found)}"]
    if default is not None:
        lines.append(f"default = {_quote(default)}")
    if context_length is not None:
        lines.append(f"context_length = {context_length}")
    lines += ["", "[adapters]"]
    lines += [f"{_quote(name)} = {_quote(str(folder.resolve()))}" for name, folder in adapters.items()]
    for name, body in variants.items():
        lines += ["", f"[variants.{_quote(name)}]", body]
    write_file(path, [("\n".join(lines) + "\n").encode()])


def _quote(text: str) -> str:
    """A TOML basic string: a JSON string is one."""
    return json.dumps(text, ensure_ascii=False)


def _completions(rows: Sequence[Row]) -> list[str]:
    return [row.completion for row in rows]
