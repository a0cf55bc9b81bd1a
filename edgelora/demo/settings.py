"""The demo's settings, chosen in the trials in docs/log.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgelora.demo.base import BaseSettings
from edgelora.demo.tasks import TaskSizes
from edgelora.in_torch.train_config import TrainConfig

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class MixSettings:
    """The settings for mixing adapters on what they write, as in LearnConfig.

    The defaults are for a user's own base.
    """

    written: int = 200
    steps: int = 240
    lr: float | None = None


@dataclass(frozen=True)
class DemoSettings:
    """The base, rows and adapters of the built-in demo.

    Small adapters on the attention of the first two layers interfere less than larger ones: they recognize the task's command,
    and leave the base's knowledge intact. max_tokens: the longest answer, with some margin. mix: adapters this small need a large
    learning rate.
    """

    base: BaseSettings = field(default_factory=BaseSettings)
    sizes: TaskSizes = field(default_factory=TaskSizes)
    rank: int = 2
    alpha: float = 4.0
    lr: float = 4e-3
    steps: int = 500
    batch_size: int = 16
    target_modules: tuple[str, ...] = tuple(f"layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkvo")
    max_tokens: int = 48
    mix: MixSettings = field(default_factory=lambda: MixSettings(written=2000, steps=600, lr=5e-3))

    def train_config(self, base: Path, data: Path, output: Path, *, seed: int) -> TrainConfig:
        """The training settings of one task's adapter."""
        return TrainConfig(
            base=str(base),
            data=data,
            output=output,
            rank=self.rank,
            alpha=self.alpha,
            lr=self.lr,
            max_steps=self.steps,
            batch_size=self.batch_size,
            target_modules=self.target_modules,
            seed=seed,
        )
