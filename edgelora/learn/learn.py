"""Mixes adapters on data: RegMean, then training on a few labelled rows.

RegMean uses the adapters' own rows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.adapters.checks import check_same_base, check_shapes
from edgelora.adapters.folder import find_template_options, open_adapters
from edgelora.composing.compose import check_composable, derive_provenance, write_composed
from edgelora.data.calibration import find_training_data, gather_samples
from edgelora.data.encode_rows import RowEncoder
from edgelora.data.rows import read_rows
from edgelora.in_torch.mixed_model import FactorStack, MixedModel
from edgelora.learn.distillation import Example, distillation_loss, encode_rows, write_rows
from edgelora.learn.regmean import solve_regmean
from edgelora.mix.methods.spectra import stack_factors
from edgelora_export.architectures import native_types, read_decoder
from edgelora_export.base.base import Base
from edgelora_export.base.tokenizer import load_tokenizer
from edgelora_export.weights.merged import check_modules
from edgelora_runtime.errors import InputError, list_wrong, suggest_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch

    from edgelora.adapters.folder import Adapter
    from edgelora.data.rows import Row
    from edgelora.mix.methods.deltas import Factors
    from edgelora_export.plan.calibration import Sample

    OnProgress = Callable[[int, int, str], None]

STARTS = ("regmean", "linear")
GRAINS = {"factors": 5e-4, "core": 5e-3, "rank": 5e-2, "module": 5e-2}  # what is learned → default learning rate
REGMEAN_TOKENS = 16384  # per adapter, if its rows have that many
WARMUP = 10  # steps to the full learning rate


@dataclass(frozen=True)
class LearnConfig:
    """The adapters to mix, and the data to mix them on.

    base: folder or hub id. adapters: folders by name. output: folder for the mixed adapter.
    labelled: JSONL rows by adapter. A few suffice, and they should be rows that the adapters were not trained on. Without
    labelled and written rows the start is the result. prompts: JSONL rows by adapter for RegMean, which uses their completions
    only as further input. By default the adapter's training rows.
    written: how many prompts of those rows each adapter completes itself. The mix also learns from these completions.
    start: regmean, or linear for equal weights.
    grain: what is learned. module: a weight per adapter and module (LoRA Soups, arXiv 2410.13025). rank: a weight per row of A.
    core: a matrix between a module's stacked A's and B's, as in LoRA-XS (arXiv 2405.17604). factors: all entries of A and B, a
    short training that starts from the merge. The other grains only reweight it.
    rows: labelled rows to use per adapter. steps, batch_size, lr: of AdamW, with linear decay after warmup. lr: None for the
    grain's default. distillation_share: share of the loss on the adapters' own probabilities. The rest is on the labels.
    template_options: what the chat template gets beside the messages of rows, in addition to what the adapters were trained with.
    """

    base: str
    adapters: Mapping[str, Path]
    output: Path
    labelled: Mapping[str, Path] = field(default_factory=dict)
    prompts: Mapping[str, Path] = field(default_factory=dict)
    start: str = "regmean"
    grain: str = "factors"
    rows: int = 100
    written: int = 0
    steps: int = 240
    batch_size: int = 16
    lr: float | None = None
    distillation_share: float = 0.7
    seed: int = 0
    template_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted((set(self.labelled) | set(self.prompts)) - set(self.adapters))
        wrong = list_wrong(
            (
                ("adapters", sorted(self.adapters), len(self.adapters) >= 2, "two or more"),
                (
                    "data",
                    ", ".join(unknown),
                    not unknown,
                    f"names of adapters: {', '.join(self.adapters)}{suggest_name(unknown, self.adapters)}",
                ),
                ("start", self.start, self.start in STARTS, f"one of {', '.join(STARTS)}"),
                ("grain", self.grain, self.grain in GRAINS, f"one of {', '.join(GRAINS)}"),
                ("rows", self.rows, self.rows >= 1, "1 or more"),
                ("written", self.written, self.written >= 0, "0 or more"),
                ("steps", self.steps, self.steps >= 1, "1 or more"),
                ("batch_size", self.batch_size, self.batch_size >= 1, "1 or more"),
                ("lr", self.lr, self.lr is None or self.lr > 0, "more than 0"),
                (
                    "distillation_share",
                    self.distillation_share,
                    0 <= self.distillation_share <= 1,
                    "a share, from 0 to 1",
                ),
                ("seed", self.seed, self.seed >= 0, "0 or more"),
            )
        )
        if wrong:
            raise InputError("; ".join(wrong))


@dataclass(frozen=True)
class LearnReport:
    """The result of learning.

    rows: labelled rows by adapter, {} without any. weights: how many numbers were learned. loss: mean of the last steps, in nats
    per token, or None if nothing was learned.
    """

    output: Path
    modules: int
    rank: int
    rows: Mapping[str, int]
    weights: int
    loss: float | None


def learn(
    config: LearnConfig,
    *,
    on_progress: OnProgress = lambda done, total, what: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> LearnReport:
    """Mixes adapters on data into one of their summed rank.

    The mix is written as a PEFT folder. Without rows to learn from, it is RegMean's.
    Raises InputError for adapters that do not fit each other or the base, for missing data, and for an output that exists and is
    not an adapter. The output is then unchanged.
    """
    base = Base.find(config.base)
    adapters = open_adapters(dict(sorted(config.adapters.items())), base=base.config, on_note=on_note)
    check_same_base(adapters, base.sha256)
    check_composable(adapters)
    if base.config.get("model_type") in native_types():
        check_shapes(adapters, read_decoder(base.config))
    labelled = {name: _sample_rows(read_rows(path), config.rows, config.seed) for name, path in sorted(config.labelled.items())}
    if config.start == "regmean":
        pairs = _run_regmean(config, base, adapters, on_progress)
    else:
        if not labelled and not config.written:
            raise InputError(
                "start = linear learns nothing without labelled rows or written ones; give some, or use edgelora compose"
            )
        share = np.float32(1 / len(adapters))
        pairs = {
            module: {
                name: _scale_factors(adapter.factors(module), share)
                for name, adapter in adapters.items()
                if module in adapter.modules
            }
            for module in sorted({module for adapter in adapters.values() for module in adapter.modules})
        }
    loss, count, rows = None, 0, {name: len(rows) for name, rows in labelled.items()}
    how = config.start
    if labelled or config.written:
        model = MixedModel.open(config.base, find_template_options(adapters, config.template_options))
        examples = _gather_examples(config, model, adapters, labelled, on_progress)
        factors, loss, count = _train_stacks(config, model, pairs, examples, on_progress)
        learned = sum(map(len, examples.values()))
        how += f", {config.grain} weights on {learned} rows, {learned - sum(rows.values())} of them written by the adapters"
    else:
        factors = {module: stack_factors([*each.values()]) for module, each in pairs.items()}
    provenance = derive_provenance(adapters, f"learned: {' + '.join(adapters)} ({how})", factors)
    write_composed(config.output, factors, next(iter(adapters.values())), provenance)
    on_progress(1, 1, "written")
    if labelled and (seen := _count_trained_rows(adapters, labelled)):
        on_note(f"{seen} of the labelled rows are rows that the adapters were trained on; new rows teach more")
    return LearnReport(
        config.output,
        len(factors),
        max(len(a) for a, _ in factors.values()),
        rows,
        count,
        loss,
    )


def _run_regmean(
    config: LearnConfig, base: Base, adapters: Mapping[str, Adapter], on_progress: OnProgress
) -> dict[str, dict[str, Factors]]:
    """RegMean's factors by module and adapter."""
    decoder = read_decoder(base.config)
    check_shapes(adapters, decoder)
    for name, adapter in adapters.items():
        check_modules(decoder, adapter.modules, f"adapter {name}")
    encode = RowEncoder(load_tokenizer(base), find_template_options(adapters, config.template_options))
    samples: dict[str, Sequence[Sample]] = {
        name: gather_samples(path, encode, REGMEAN_TOKENS, config.seed) for name, path in _find_prompts(config, adapters).items()
    }
    layers = len(decoder.layers)
    return solve_regmean(base, decoder, adapters, samples, lambda index: on_progress(index, layers, f"layer {index + 1}"))


def _find_prompts(config: LearnConfig, adapters: Mapping[str, Adapter]) -> dict[str, Path]:
    """The file of rows for RegMean, by adapter."""
    files = {name: config.prompts.get(name) or find_training_data(adapter) for name, adapter in adapters.items()}
    if blind := [name for name, path in files.items() if path is None]:
        raise InputError(
            f"{', '.join(blind)}: the training rows of these adapters are not where edgelora.json says; "
            "give --prompts NAME=FILE.jsonl, or use --start linear without --written"
        )
    return {name: path for name, path in files.items() if path is not None}


def _gather_examples(
    config: LearnConfig,
    model: MixedModel,
    adapters: Mapping[str, Adapter],
    labelled: Mapping[str, Sequence[Row]],
    on_progress: OnProgress,
) -> dict[str, list[Example]]:
    """Gathers the examples to learn from, by adapter.

    These are its labelled rows, and those that it writes for other prompts.
    """
    rows = {name: list(labelled.get(name, ())) for name in adapters}
    for done, (name, path) in enumerate(_find_prompts(config, adapters).items() if config.written else ()):
        on_progress(done, len(adapters), f"{name} writes")
        known = {row.prompt for row in rows[name]}
        others = [row for row in read_rows(path) if row.prompt not in known]
        rows[name] += write_rows(model, adapters[name], others, config.written, config.seed)
    return {name: encode_rows(model, adapters[name], each) for name, each in rows.items() if each}


def _sample_rows(rows: list[Row], count: int, seed: int) -> list[Row]:
    return rows if len(rows) <= count else random.Random(seed).sample(rows, count)  # noqa: S311  (not for secrets)


def _scale_factors(factors: Factors, share: np.float32) -> Factors:
    return factors[0], factors[1] * share


def _count_trained_rows(adapters: Mapping[str, Adapter], labelled: Mapping[str, Sequence[Row]]) -> int:
    files = {name: find_training_data(adapters[name]) for name in labelled}
    return sum(len(set(rows) & set(read_rows(path))) for name, rows in labelled.items() if (path := files[name]) is not None)


class _TrainableStack:
    """The stacked factors of one module, with the tensors that a grain learns."""

    def __init__(self, factors: Sequence[Factors], grain: str, device: torch.device) -> None:
        import torch

        self._a, self._b = (torch.from_numpy(factor).to(device) for factor in stack_factors(factors))
        total = len(self._a)
        self._core = torch.eye(total, device=device) if grain == "core" else None
        if grain == "module":  # each row of A has its adapter's weight
            owner = np.repeat(np.arange(len(factors)), [len(a) for a, _ in factors])
        else:
            owner = np.arange(total) if grain == "rank" else np.zeros(total, np.int64)
        self._owner, self._weights = torch.from_numpy(owner).to(device), torch.ones(int(owner.max()) + 1, device=device)
        if self._core is not None:
            self.learned = [self._core]
        else:
            self.learned = [self._a, self._b] if grain == "factors" else [self._weights]
        for tensor in self.learned:
            tensor.requires_grad_()

    def stack(self) -> FactorStack:
        """Returns the stack for MixedModel. Gradients reach the learned tensors."""
        return FactorStack(self._a if self._core is None else self._core @ self._a, self._b, self._owner, self._weights)

    def factors(self) -> Factors:
        stack = self.stack()
        a = stack.weights[stack.owner][:, None] * stack.a
        return a.detach().cpu().numpy(), stack.b.detach().cpu().numpy()


def _train_stacks(
    config: LearnConfig,
    model: MixedModel,
    pairs: Mapping[str, Mapping[str, Factors]],
    examples: Mapping[str, Sequence[Example]],
    on_progress: OnProgress,
) -> tuple[dict[str, Factors], float, int]:
    """Trains with AdamW on batches with the same number of examples per adapter.

    Returns the factors by module, the final loss, and how many numbers were learned.
    """
    import torch

    torch.manual_seed(config.seed)
    trainable = {
        module: _TrainableStack([*factors.values()], config.grain, model.model.device) for module, factors in pairs.items()
    }
    learned = [tensor for stack in trainable.values() for tensor in stack.learned]
    optimizer = torch.optim.AdamW(learned, weight_decay=0.0)
    draws, losses = random.Random(config.seed), []  # noqa: S311  (not for secrets)
    rate = GRAINS[config.grain] if config.lr is None else config.lr
    each = max(1, config.batch_size // len(examples))
    for step in range(config.steps):
        on_progress(step, config.steps, "steps")
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / WARMUP) * (1 - step / config.steps)
        model.set_stacks({module: stack.stack() for module, stack in trainable.items()})
        batch = [draws.sample(items, min(each, len(items))) for items in examples.values()]
        loss = distillation_loss(model, batch, config.distillation_share)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    factors = {module: stack.factors() for module, stack in trainable.items()}
    return factors, float(np.mean(losses[-WARMUP:])), sum(tensor.numel() for tensor in learned)
