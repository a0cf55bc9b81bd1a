"""The records of a run in its adapter's folder: metrics by step, a picture of the losses, and a model card."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from edgelora.in_torch.run.loss_chart import draw_losses
from edgelora.in_torch.run.model_card import write_model_card
from edgelora.in_torch.run.processes import count_processes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgelora.adapters.folder import Provenance
    from edgelora.in_torch.train_config import TrainConfig

METRICS, CHART = "metrics.jsonl", "loss.png"


def write_records(
    folder: Path, config: TrainConfig, provenance: Provenance, history: Sequence[Mapping[str, Any]], kept_step: int
) -> None:
    """Writes metrics.jsonl, loss.png and README.md. history: what the trainer logged, in its order."""
    steps = [entry for entry in history if "loss" in entry or "eval_loss" in entry]
    (folder / METRICS).write_text("".join(json.dumps(entry) + "\n" for entry in steps), encoding="utf-8")
    training = [(entry["step"], entry["loss"]) for entry in steps if "loss" in entry]
    validation = [(entry["step"], entry["eval_loss"]) for entry in steps if "eval_loss" in entry]
    (folder / CHART).write_bytes(draw_losses(training, validation))
    scores = {"training loss of the last step": training[-1][1]}
    scores |= {f"validation loss after step {step}": loss for step, loss in validation if step in (0, kept_step)}
    write_model_card(folder, config, provenance, scores, processes=count_processes())
