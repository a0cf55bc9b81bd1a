"""The settings of a training run, given in Python or in a TOML file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from edgelora_export.base.files import read_toml
from edgelora_runtime.errors import InputError, list_wrong, suggest_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

QUANTS = ("nf4", "int4", "none")
_TOML_TYPES: Mapping[str, Any] = {"str": str, "Path": str, "int": int, "float": (int, float), "Mapping[str, Any]": dict}


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run.

    base: folder or hub id. data: JSONL rows. The loss is on completions only, and on the assistant's messages in conversations.
    output: folder for the adapter.
    quant: how the base is held during training: nf4 (bitsandbytes, double-quantized, arXiv 2305.14314), int4 (the grid that
    export writes, so training sees the weights that ship) or none.
    merge_aware: with int4, compute with the weights of the merged variant, Q(W + s·B·A), whose codes export then keeps (see
    merge_aware.py).
    rank, alpha: LoRA's (arXiv 2106.09685). rslora scales by alpha / √rank. target_modules: None for each linear layer except the
    head. epochs: passes over the data. max_steps overrides it. batch_size: rows per optimizer step. lr: peak learning rate,
    reached after warmup (a share of all steps), then decaying linearly to 0. max_length: in tokens. Longer rows are cut at their
    end, and left out if nothing to learn is left.
    gradient_checkpointing: recompute activations to save memory. template_options: what the chat template gets beside the
    messages, such as enable_thinking.
    composable: for adapters to be mixed: the slot of the shared basis that A is frozen to, a different one for each adapter (see
    adapters/orthogonal_slots.py). None trains A as well.
    """

    base: str
    data: Path
    output: Path
    quant: str = "nf4"
    merge_aware: bool = False
    rank: int = 16
    alpha: float = 32.0
    epochs: float = 1.0
    lr: float = 2e-4
    max_steps: int | None = None
    seed: int = 0
    batch_size: int = 16
    warmup: float = 0.05
    dropout: float = 0.0
    rslora: bool = False
    target_modules: tuple[str, ...] | None = None
    max_length: int = 1024
    gradient_checkpointing: bool = False
    composable: int | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = list_wrong(
            (
                ("quant", self.quant, self.quant in QUANTS, f"one of {', '.join(QUANTS)}"),
                ("merge_aware", self.merge_aware, not self.merge_aware or self.quant == "int4", "used with quant = 'int4'"),
                ("rank", self.rank, self.rank >= 1, "1 or more"),
                ("alpha", self.alpha, 0 < self.alpha < math.inf, "more than 0"),
                ("epochs", self.epochs, 0 < self.epochs < math.inf, "more than 0"),
                ("lr", self.lr, 0 < self.lr < math.inf, "more than 0"),
                ("max_steps", self.max_steps, self.max_steps is None or self.max_steps >= 1, "1 or more"),
                ("seed", self.seed, 0 <= self.seed < 1 << 32, "0 to 2^32 - 1"),
                ("batch_size", self.batch_size, self.batch_size >= 1, "1 or more"),
                ("warmup", self.warmup, 0 <= self.warmup < 1, "a share, 0 or more and less than 1"),
                ("dropout", self.dropout, 0 <= self.dropout < 1, "a share, 0 or more and less than 1"),
                (
                    "dropout",
                    self.dropout,
                    not (self.merge_aware and self.dropout),
                    "0 with merge_aware, as a merged weight has none",
                ),
                ("max_length", self.max_length, self.max_length >= 2, "2 or more"),
                ("composable", self.composable, self.composable is None or self.composable >= 0, "a slot, 0 or more"),
            )
        )
        if wrong:
            raise InputError("; ".join(wrong))


def read_train_config(path: Path) -> dict[str, Any]:
    """Reads fields of TrainConfig from a TOML file. InputError lists unknown keys, and values of a wrong type."""
    value = read_toml(path, "--config names it")
    known = {field.name: str(field.type) for field in fields(TrainConfig)}
    if unknown := sorted(set(value) - set(known)):
        raise InputError(
            f"config {path}: {', '.join(unknown)} is not known; known: {', '.join(known)}{suggest_name(unknown, known)}"
        )
    if wrong := [f"{name} = {item!r} is not {known[name]}" for name, item in value.items() if not _fits(item, known[name])]:
        raise InputError(f"config {path}: {'; '.join(wrong)}")
    if "target_modules" in value:
        value["target_modules"] = tuple(value["target_modules"])
    return value


def _fits(value: object, annotation: str) -> bool:
    """True if a value from a TOML file is what a field's annotation says."""
    kinds = annotation.split(" | ")
    if isinstance(value, bool):
        return "bool" in kinds
    if isinstance(value, list):
        return "tuple[str, ...]" in kinds and all(isinstance(item, str) for item in value)
    return any(isinstance(value, _TOML_TYPES.get(kind, ())) for kind in kinds)
