"""The settings of a training run: their defaults, limits and meanings, from which --help, --config and the docs are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from edgelora.data.shapes import FORMATS
from edgelora_export.base.files import read_toml
from edgelora_runtime.errors import InputError, list_wrong, suggest_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

QUANTS = ("nf4", "int4", "none")
STARTS = ("default", "gaussian", "pissa", "olora", "eva", "loftq")
SCHEDULES = ("linear", "cosine", "constant", "inverse_sqrt", "polynomial")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "paged_lion_8bit", "adafactor", "sgd")
KEEPS = ("best", "last")
REPORTS = ("tensorboard", "trackio", "wandb")

_ADAPTER, _RUN, _OPTIMIZER, _DATA = "Adapter", "Run", "Optimizer", "Data"  # headings of groups in --help
_VALIDATION, _CHECKPOINTS, _REPORTS = "Validation", "Checkpoints", "Reports"
_TOML_TYPES: Mapping[str, Any] = {"str": str, "Path": str, "int": int, "float": (int, float), "Mapping[str, Any]": dict}

_Limit = tuple["Callable[[Any], bool]", str]  # what a value must fulfil, and its words
_POSITIVE: _Limit = (lambda value: 0 < value < math.inf, "more than 0")
_NOT_NEGATIVE: _Limit = (lambda value: 0 <= value < math.inf, "0 or more")
_COUNT: _Limit = (lambda value: value >= 1, "1 or more")
_SHARE: _Limit = (lambda value: 0 <= value < 1, "a share, 0 or more and less than 1")


def setting(
    default: Any,
    meaning: str,
    group: str,
    *,
    metavar: str | None = None,
    choices: tuple[str, ...] = (),
    limit: _Limit | None = None,
    rare: bool = False,
    flag: str | None = None,
) -> Any:
    """Declares a setting.

    meaning: for --help and the docs. group: its heading there. limit: what a value other than None must fulfil. rare: --help
    leaves it out, and --help-all shows it. flag: the name of its option, if that is not its own.
    """
    if choices:
        limit = (lambda value: value in choices, f"one of {', '.join(choices)}")
    metadata = {
        "meaning": meaning,
        "group": group,
        "metavar": metavar,
        "choices": choices,
        "limit": limit,
        "rare": rare,
        "flag": flag,
    }
    if default == {}:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run.

    base: folder, GGUF file or hub id. data: a file or folder of rows, a data set on disk, or the name of one in the hub's cache.
    output: folder for the adapter. The other fields say what they are for where they are declared, and docs/reference/training.md
    lists them.
    """

    base: str
    data: Path
    output: Path
    quant: str = setting("nf4", "Form of the base while training; int4 is the grid that export writes.", _ADAPTER, choices=QUANTS)
    merge_aware: bool = setting(
        False, "With --quant int4: train the merged weights as they ship, rounded. Export keeps their codes.", _ADAPTER
    )
    rank: int = setting(16, "LoRA rank.", _ADAPTER, metavar="N", limit=_COUNT)
    alpha: float = setting(32.0, "LoRA alpha; the scale is alpha / rank.", _ADAPTER, metavar="NUMBER", limit=_POSITIVE)
    epochs: float = setting(1.0, "Passes over the data.", _RUN, metavar="NUMBER", limit=_POSITIVE)
    lr: float = setting(2e-4, "Peak learning rate.", _OPTIMIZER, metavar="NUMBER", limit=_POSITIVE)
    max_steps: int | None = setting(None, "Optimizer steps; overrides --epochs.", _RUN, metavar="N", limit=_COUNT)
    seed: int = setting(0, "Random seed.", _RUN, metavar="N", limit=(lambda value: 0 <= value < 1 << 32, "0 to 2^32 - 1"))
    batch_size: int = setting(16, "Rows per optimizer step, over all processes.", _RUN, metavar="N", limit=_COUNT)
    accumulation: int = setting(
        1,
        "Parts in which each process computes its rows of a step; more parts need less memory.",
        _RUN,
        metavar="N",
        limit=_COUNT,
    )
    schedule: str = setting("linear", "Course of the learning rate after warmup.", _OPTIMIZER, choices=SCHEDULES)
    warmup: float = setting(0.05, "Share of all steps in which the learning rate rises.", _OPTIMIZER, limit=_SHARE, rare=True)
    optimizer: str = setting("adamw", "Optimizer; the 8-bit and paged ones are bitsandbytes'.", _OPTIMIZER, choices=OPTIMIZERS)
    weight_decay: float = setting(0.0, "Weight decay.", _OPTIMIZER, limit=_NOT_NEGATIVE, rare=True)
    max_grad_norm: float = setting(
        1.0, "Longest gradient; longer ones are scaled to it. 0: none.", _OPTIMIZER, limit=_NOT_NEGATIVE, rare=True
    )
    lora_plus: float | None = setting(
        None, "LoRA+ (arXiv 2402.12354): B's learning rate is this many times A's.", _OPTIMIZER, limit=_POSITIVE, rare=True
    )
    neftune: float | None = setting(
        None, "NEFTune (arXiv 2310.05914): alpha of the noise on embeddings.", _OPTIMIZER, limit=_POSITIVE, rare=True
    )
    target_modules: tuple[str, ...] | None = setting(
        None, "Layers to adapt, by name or its last parts; all-linear if omitted.", _ADAPTER, metavar="NAME,…"
    )
    modules_to_save: tuple[str, ...] | None = setting(
        None, "Embedding or head to train and save whole, as embed_tokens or lm_head.", _ADAPTER, metavar="NAME,…", rare=True
    )
    dropout: float = setting(0.0, "Dropout in front of A.", _ADAPTER, limit=_SHARE, rare=True)
    rslora: bool = setting(False, "Scale by alpha / √rank (arXiv 2312.03732).", _ADAPTER, rare=True)
    dora: bool = setting(False, "Also train each row's norm (DoRA, arXiv 2402.09353).", _ADAPTER, rare=True)
    start: str = setting("default", "Values that A and B start from.", _ADAPTER, choices=STARTS, rare=True)
    composable: int | None = setting(
        None,
        "For adapters to be mixed: freeze A to this slot (0, 1, …) of a shared basis.",
        _ADAPTER,
        metavar="SLOT",
        limit=(lambda value: value >= 0, "a slot, 0 or more"),
    )
    from_adapter: str | None = setting(
        None, "Go on with this adapter; its rank, alpha and layers hold.", _ADAPTER, metavar="ADAPTER", flag="--from"
    )
    max_length: int = setting(
        1024,
        "Tokens per row; longer rows are cut at their end.",
        _DATA,
        metavar="N",
        limit=(lambda value: value >= 2, "2 or more"),
    )
    format: str = setting("auto", "Shape of the rows; auto looks.", _DATA, choices=FORMATS)
    packing: bool = setting(
        False, "Join short rows into sequences of --max-length, in which none sees another; rows then means sequences.", _DATA
    )
    template_options: Mapping[str, Any] = setting(
        {}, "What the chat template gets beside the messages, as enable_thinking=false; repeat for each.", _DATA
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass, to save memory.", _RUN)
    preferences: bool = setting(False, "Learn from rows of prompt, chosen and rejected, by DPO (arXiv 2305.18290).", _DATA)
    beta: float = setting(0.1, "DPO's beta: how close the adapter stays to its start.", _DATA, limit=_POSITIVE, rare=True)
    validation: float | str | None = setting(
        None, "Rows to validate on: a file, or a share of the data such as 0.05.", _VALIDATION, metavar="FILE|SHARE"
    )
    validate_every: int | None = setting(
        None, "Steps between validations; a tenth of all if omitted.", _VALIDATION, limit=_COUNT, rare=True
    )
    patience: int | None = setting(
        None, "Stop after this many validations without a better loss.", _VALIDATION, metavar="N", limit=_COUNT
    )
    keep: str = setting(
        "best", "Which adapter to keep, by its validation loss; without --validation the last.", _VALIDATION, choices=KEEPS
    )
    checkpoint_every: int | None = setting(None, "Steps between checkpoints.", _CHECKPOINTS, metavar="N", limit=_COUNT)
    checkpoint_minutes: float | None = setting(
        10.0, "Minutes between checkpoints.", _CHECKPOINTS, metavar="NUMBER", limit=_POSITIVE
    )
    resume: bool = setting(False, "Go on from the last checkpoint, with the same settings and data.", _CHECKPOINTS)
    report_to: tuple[str, ...] | None = setting(None, f"Also report to {', '.join(REPORTS)}.", _REPORTS, metavar="NAME,…")
    log_every: int = setting(10, "Steps between lines of progress in a pipe.", _REPORTS, metavar="N", limit=_COUNT)

    def __post_init__(self) -> None:
        wrong = list_wrong(
            (each.name, value, limit[0](value), limit[1])
            for each in fields(self)
            if (limit := each.metadata.get("limit")) and (value := getattr(self, each.name)) is not None
        )
        if isinstance(self.validation, float | int) and not 0 < self.validation < 1:
            wrong.append(f"validation = {self.validation}: use a share, more than 0 and less than 1, or a file")
        if unknown := [name for name in self.report_to or () if name not in REPORTS]:
            wrong.append(f"report_to = {', '.join(unknown)}: use {', '.join(REPORTS)}{suggest_name(unknown, REPORTS)}")
        wrong += self._find_contradictions()
        if wrong:
            raise InputError("; ".join(wrong))

    def _find_contradictions_of_merging(self) -> list[str]:
        """Lists the settings with which a merged weight is not Q(W + s·B·A)."""
        wrong = []
        if self.quant != "int4":
            wrong.append(f"merge_aware computes with the int4 weights that ship, and quant = {self.quant}; use quant = int4")
        if self.dropout:
            wrong.append(f"dropout = {self.dropout} does not go with merge_aware, as a merged weight has none; leave it out")
        if self.start in ("pissa", "olora", "loftq"):
            wrong.append(f"start = {self.start} changes the base that merge_aware merges into; use another start")
        if self.dora or self.modules_to_save:
            wrong.append(f"{'dora' if self.dora else 'modules_to_save'} does not go with merge_aware; leave one out")
        return wrong

    def _find_contradictions(self) -> list[str]:
        """Lists the settings that do not go together."""
        wrong = []
        if self.patience is not None and self.validation is None:
            wrong.append("patience needs validation; give a file or a share of the data")
        if self.batch_size % self.accumulation:
            wrong.append(f"batch_size = {self.batch_size} is not a multiple of accumulation = {self.accumulation}")
        if self.start != "default" and self.composable is not None:
            wrong.append(f"start = {self.start} and composable both decide what A is; leave one out")
        if self.start != "default" and self.from_adapter is not None:
            wrong.append(f"start = {self.start} and from_adapter both decide where A and B start; leave one out")
        if self.start in ("pissa", "olora", "loftq") and self.dora:
            wrong.append(f"dora does not go with start = {self.start}; leave one out")
        if self.merge_aware:
            wrong += self._find_contradictions_of_merging()
        if self.start == "loftq" and self.quant == "none":
            wrong.append("start = loftq makes up for a quantized base; use quant = nf4 or int4")
        if self.packing and (self.preferences or self.start == "eva"):
            wrong.append(f"packing does not go with {'preferences' if self.preferences else 'start = eva'}; leave one out")
        if self.preferences and self.start in ("pissa", "olora", "loftq"):
            wrong.append(f"preferences compare with the base, which start = {self.start} leaves; use another start")
        return wrong


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
    return {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}


def _fits(value: object, annotation: str) -> bool:
    """True if a value from a TOML file is what a field's annotation says."""
    kinds = annotation.split(" | ")
    if isinstance(value, bool):
        return "bool" in kinds
    if isinstance(value, list):
        return "tuple[str, ...]" in kinds and all(isinstance(item, str) for item in value)
    return any(isinstance(value, _TOML_TYPES.get(kind, ())) for kind in kinds)
