"""The course of a training run between its steps: when to save, when to stop, and which adapter is the best so far."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgelora.in_torch.run.checkpoints import locate_checkpoints, take_weights
from edgelora.in_torch.run.processes import count_processes, uses_fsdp

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from edgelora.in_torch.train_config import TrainConfig


@dataclass
class Course:
    """The state of a run that outlasts a step.

    work: an empty folder. description: what the parts of a run must share. resume: the checkpoint to go on from, if any.
    on_progress(done, total, what) is called after each step, and should_stop() is asked. stopped: True once it ended the run with
    a checkpoint. best: of the best validation so far, the tensors that training changes, by name.
    """

    config: TrainConfig
    work: Path
    description: Mapping[str, Any]
    resume: Path | None
    on_progress: Callable[[int, int, str], None]
    should_stop: Callable[[], bool] = lambda: False
    stopped: bool = False
    best: dict[str, Any] | None = None
    _saved: float = field(default_factory=time.monotonic)

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return locate_checkpoints(self.config.output)

    def end_step(self, step: int) -> tuple[bool, bool]:
        """Decides after a step whether to save a checkpoint, and whether to stop. All processes decide the same."""
        config, now = self.config, time.monotonic()
        stop = self.should_stop()
        minutes = config.checkpoint_minutes
        save = stop or (minutes is not None and now - self._saved >= 60 * minutes)
        if count_processes() > 1:
            save, stop = _agree(save, stop)
        save = save or (config.checkpoint_every is not None and step % config.checkpoint_every == 0)
        if save:
            self._saved = now
        self.stopped = self.stopped or stop
        return save and not uses_fsdp(), stop

    def judge(self, history: Sequence[Mapping[str, Any]], model: Any) -> bool:
        """Keeps a model's tensors after a validation if it is the best so far. Returns True if patience has run out."""
        losses = [loss for _, loss in list_validations(history)]
        if not losses:
            return False
        best = losses.index(min(losses))
        if best == len(losses) - 1 and self.config.keep == "best":
            self.best = take_weights(model)
        return self.config.patience is not None and len(losses) - 1 - best >= self.config.patience


def list_validations(history: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Lists the steps and losses of the validations in a run's history, without that before the first step."""
    return [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry and entry["step"] > 0]


def _agree(*flags: bool) -> list[bool]:
    """Returns each flag as True if it is in one of the processes."""
    import torch
    from torch import distributed

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shared = torch.tensor([int(flag) for flag in flags], device=device)
    distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
    return [bool(flag) for flag in shared.tolist()]
