"""An estimate of a run before its first step: parameters, tokens, steps, minutes and memory on this machine."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

from edgelora.formatting import format_bytes
from edgelora.in_torch.run.processes import count_processes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora.in_torch.train_config import TrainConfig

_TRIAL_ROWS = 4
_WORTH = 50  # a trial is made if the run computes at least this many times its rows
_OPTIMIZER_BYTES = {"adamw_8bit": 2, "paged_adamw_8bit": 2, "paged_lion_8bit": 1, "lion": 4, "sgd": 0, "adafactor": 0}


@dataclass(frozen=True)
class _Trial:
    """A measured forward and backward pass. tokens: in it. seconds: for it. activation_bytes: kept between the two passes."""

    tokens: int
    seconds: float
    activation_bytes: int


def estimate_run(trainer: Any, config: TrainConfig, examples: Any) -> list[str]:
    """Describes a run that is about to begin, in lines for the user.

    Minutes and memory come from a pass over a few rows, without a step. Short runs do without.
    """
    lengths = [len(row.tokens) for row in examples.learn]
    steps = count_steps(config, len(lengths))
    rows = math.ceil(config.epochs * len(lengths)) if config.max_steps is None else steps * config.batch_size
    tokens = round(rows * mean(lengths))
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    line = f"to train: {_count(trainable)} parameters in {steps} steps of {config.batch_size} rows, {_count(tokens)} tokens"
    if rows >= _WORTH * _TRIAL_ROWS:
        trial = _try(trainer, _choose_rows(lengths))
        minutes = trial.seconds / trial.tokens * tokens / count_processes() / 60
        memory = _measure_memory() + (4 + _OPTIMIZER_BYTES.get(config.optimizer, 8)) * trainable
        micro = trainer.args.per_device_train_batch_size
        memory += round(trial.activation_bytes / trial.tokens * micro * sorted(lengths)[-max(1, len(lengths) // 50)])
        line += f"; about {_show_minutes(minutes)} and {format_bytes(memory)} of memory on this machine"
    return [describe_settings(config), line]


def describe_settings(config: TrainConfig) -> str:
    """Describes the settings that a first run rests on, in one line."""
    layers = "all linear layers" if config.target_modules is None else ", ".join(config.target_modules)
    if config.from_adapter is not None:
        layers = f"the layers of {config.from_adapter}"
    return (
        f"settings: {config.quant} base; rank {config.rank}, alpha {config.alpha:g} on {layers}; "
        f"{config.optimizer}, lr {config.lr:g}, {config.schedule} after {config.warmup:.0%} warmup; seed {config.seed}"
    )


def count_steps(config: TrainConfig, rows: int) -> int:
    """Counts the optimizer steps of a run on this many rows, as transformers' trainer does."""
    if config.max_steps is not None:
        return config.max_steps
    batches = math.ceil(rows / (config.batch_size // config.accumulation))
    return math.ceil(config.epochs * max(1, math.ceil(batches / config.accumulation)))


def _choose_rows(lengths: Sequence[int]) -> list[int]:
    """Chooses rows of about the mean length."""
    average = mean(lengths)
    return sorted(range(len(lengths)), key=lambda place: abs(lengths[place] - average))[:_TRIAL_ROWS]


def _try(trainer: Any, places: Sequence[int]) -> _Trial:
    """Computes a loss and its gradients on a few rows, and leaves the model and the random generators as they were."""
    import torch

    model, kept = trainer.model, {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = trainer.data_collator([trainer.train_dataset[place] for place in places])
    tokens = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        model.train()
        inputs = trainer._prepare_inputs(inputs)
        started = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs)
        loss.backward()
        seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    return _Trial(tokens, seconds, sum(kept.values()))


def _measure_memory() -> int:
    """Measures what the run holds now, in bytes: on the GPU if there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    import psutil

    return int(psutil.Process().memory_info().rss)


def _count(number: int) -> str:
    """Shows a number in the thousands or millions."""
    if number >= 1_000_000:
        return f"{number / 1_000_000:.1f} million"
    return f"{number:,}"


def _show_minutes(minutes: float) -> str:
    if minutes < 1:
        return "a minute"
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
