"""Checkpoints: a run that was cut short goes on exactly, a full disk leaves the last one, and other settings are refused."""

from __future__ import annotations

import errno
import json
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from edgelora.in_torch.run import checkpoints
from edgelora.in_torch.run.checkpoints import find_last, locate_checkpoints, read_step
from edgelora.in_torch.train import TrainingStoppedError, train
from edgelora.in_torch.train_config import TrainConfig
from edgelora_runtime.errors import InputError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WORDS = ("cat", "day", "sun", "moon", "mat", "cafe", "one", "two", "three", "four", "naïve")
STEPS = 12


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path) -> TrainConfig:
    rows = [{"prompt": f"the {word}\n", "completion": f"{word} sat" * (1 + place % 3)} for place, word in enumerate(WORDS)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TrainConfig(
        str(tiny_base), data, tmp_path / "a", quant="none", rank=2, lr=1e-2, max_steps=STEPS, batch_size=2, dropout=0.1
    )


class Stop:
    """Asks a run to end after a step, as a signal does."""

    def __init__(self, step: int) -> None:
        self.step, self.done = step, 0

    def count(self, done: int, total: int, what: str) -> None:
        self.done = done

    @contextmanager
    def watch(self) -> Iterator[Callable[[], bool]]:
        yield lambda: self.done >= self.step - 1  # asked before the step is reported


def stop_after(config: TrainConfig, step: int) -> None:
    stop = Stop(step)
    with pytest.raises(TrainingStoppedError, match=rf"step {step} is saved in .*step-{step}; go on with --resume"):
        train(config, on_progress=stop.count, watch_for_stop=stop.watch)


def read_losses(folder: Path) -> dict[int, float]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The tokens of each batch that was trained on."""
    seen: list[list[list[int]]] = []
    inner: Any = transformers.Trainer.training_step

    def record(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        seen.append(inputs["input_ids"].tolist())
        return inner(self, model, inputs, *rest)

    monkeypatch.setattr(transformers.Trainer, "training_step", record)
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="plain"),
        pytest.param(
            {"accumulation": 2, "neftune": 5.0, "schedule": "cosine", "lora_plus": 4.0}, id="accumulation", marks=pytest.mark.slow
        ),
        pytest.param({"start": "pissa", "optimizer": "adamw_8bit"}, id="pissa", marks=pytest.mark.slow),
        pytest.param({"validation": 0.3, "validate_every": 3, "composable": 1, "dropout": 0.0}, id="validation"),
        pytest.param({"start": "eva", "optimizer": "adafactor", "rslora": True}, id="eva", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_has_the_losses_and_the_rows_of_one_that_went_through(
    config: TrainConfig, batches: list[list[list[int]]], settings: dict[str, Any]
) -> None:
    """Twice cut short, in the first and a later epoch."""
    config = replace(config, **settings)
    train(replace(config, output=config.output.with_name("whole")))
    whole = batches.copy()
    batches.clear()
    stop_after(config, 3)
    stop_after(replace(config, resume=True), 8)
    report = train(replace(config, resume=True))
    assert read_losses(config.output) == read_losses(config.output.with_name("whole"))
    assert batches == whole
    assert report.steps == STEPS
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (config.output / name).read_bytes() == (config.output.with_name("whole") / name).read_bytes()
    assert not locate_checkpoints(config.output).exists()


def test_checkpoints_come_by_steps_and_the_last_one_is_kept(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    inner = checkpoints.save_model_weights

    def save(model: Any, folder: Path) -> None:
        last = find_last(locate_checkpoints(config.output))
        seen.append(0 if last is None else read_step(last))
        inner(model, folder)

    monkeypatch.setattr(checkpoints, "save_model_weights", save)
    train(replace(config, checkpoint_every=4))
    assert seen == [0, 4]  # none after the last step, whose adapter is written as a whole
    assert sorted(path.name for path in config.output.parent.iterdir()) == ["a", "rows.jsonl"]


def test_checkpoints_come_by_minutes(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Path] = []
    monkeypatch.setattr(checkpoints, "save_model_weights", lambda model, folder: saved.append(folder))
    train(replace(config, checkpoint_minutes=1e-9))
    assert len(saved) == STEPS - 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        pytest.param(RuntimeError("PytorchStreamWriter failed"), marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    train(replace(config, output=config.output.with_name("whole")))
    inner: Any = torch.save

    def save(value: Any, file: Any, *rest: Any, **settings: Any) -> None:
        if find_last(locate_checkpoints(config.output)) is not None:
            raise error
        inner(value, file, *rest, **settings)

    monkeypatch.setattr(torch, "save", save)
    message = r"checkpoint of step 8 could not be written in .*; free some space; that of step 4 is whole, so --resume goes on"
    with pytest.raises(ResourceError, match=message):
        train(replace(config, checkpoint_every=4))
    assert sorted(path.name for path in locate_checkpoints(config.output).iterdir()) == ["step-4"]
    assert not config.output.exists()
    monkeypatch.undo()
    train(replace(config, resume=True))
    assert read_losses(config.output) == read_losses(config.output.with_name("whole"))


def test_a_half_written_checkpoint_is_none(config: TrainConfig) -> None:
    """As a process leaves it that is killed while it writes."""
    half = locate_checkpoints(config.output) / ".saving"
    half.mkdir(parents=True)
    (half / "optimizer.pt").write_bytes(b"half")
    with pytest.raises(InputError, match="holds no checkpoint; leave --resume out"):
        train(replace(config, resume=True))
    train(config)
    assert not locate_checkpoints(config.output).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 5e-3, "rank": 4}, r"rank is 4, was 2; lr is 0\.005, was 0\.01"),
        pytest.param({"max_steps": STEPS + 1}, "max_steps is 13, was 12", marks=pytest.mark.slow),
        pytest.param({"batch_size": 4}, "batch_size is 4, was 2", marks=pytest.mark.slow),
    ],
)
def test_a_resume_with_other_settings_is_refused(config: TrainConfig, change: dict[str, Any], message: str) -> None:
    stop_after(config, 2)
    with pytest.raises(InputError, match=rf"checkpoint .*step-2 is of another run: {message}; give the same"):
        train(replace(config, resume=True, **change))
    assert find_last(locate_checkpoints(config.output)) is not None


def test_a_resume_with_other_rows_is_refused(config: TrainConfig) -> None:
    stop_after(config, 2)
    config.data.write_text(config.data.read_text(encoding="utf-8").replace("sat", "ran"), encoding="utf-8")
    with pytest.raises(InputError, match=r"data_sha256 is \w{12}, was \w{12}"):
        train(replace(config, resume=True))


def test_what_decides_nothing_may_change(config: TrainConfig) -> None:
    stop_after(config, 2)
    train(replace(config, resume=True, log_every=3, checkpoint_every=5, checkpoint_minutes=None))
    assert len(read_losses(config.output)) == STEPS


def test_a_new_run_beside_a_checkpoint_is_refused(config: TrainConfig) -> None:
    stop_after(config, 2)
    with pytest.raises(InputError, match=r"holds a checkpoint of step 2; add --resume to go on, or remove that folder"):
        train(config)


def test_a_stop_after_the_last_step_changes_nothing(config: TrainConfig) -> None:
    stop = Stop(STEPS)
    assert train(config, on_progress=stop.count, watch_for_stop=stop.watch).steps == STEPS
