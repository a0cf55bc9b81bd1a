"""Distillation: examples with teacher probabilities, and the loss of a mix on them.

A row's teacher is its own adapter.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora.data.rows import Row
from edgelora.in_torch.mixed_model import stack_adapters

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from edgelora.adapters.folder import Adapter
    from edgelora.in_torch.mixed_model import MixedModel

WRITTEN_TOKENS = 256  # longer completions that an adapter writes are dropped as unfinished


@dataclass(frozen=True)
class Example:
    """A row as tokens, with the completion and the end of text.

    start: index of the first token after the prompt. teacher: log probabilities of the row's own adapter, float16 (T, V).
    """

    tokens: list[int]
    start: int
    teacher: torch.Tensor


def write_rows(model: MixedModel, adapter: Adapter, rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Completes up to `count` of the rows' distinct prompts with the adapter."""
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    random.Random(seed).shuffle(prompts)  # noqa: S311  (not for secrets)
    _set_alone(model, adapter)
    asked = [Row(prompt, "") for prompt in prompts[:count]]
    written = [Row(row.prompt, text) for row, text in zip(asked, model.write(asked, WRITTEN_TOKENS), strict=True)]
    return [row for row in written if row.completion and len(model.tokenizer(row.completion)["input_ids"]) < WRITTEN_TOKENS]


def encode_rows(model: MixedModel, adapter: Adapter, rows: Sequence[Row]) -> list[Example]:
    """Encodes rows with their adapter's probabilities.

    These take 2 bytes per completion token and vocabulary entry.
    """
    import torch

    _set_alone(model, adapter)
    examples = []
    with torch.inference_mode():
        for row in rows:
            tokens, start = model.encoder.with_end(row)
            logits = model.model(input_ids=torch.tensor([tokens], device=model.model.device), use_cache=False).logits
            teacher = torch.log_softmax(logits[0, start - 1 : -1].float(), dim=-1).to(torch.float16)
            examples.append(Example(tokens, start, teacher.clone()))
    return examples


def distillation_loss(model: MixedModel, batch: Sequence[Sequence[Example]], share: float) -> torch.Tensor:
    """Computes (1 - share) · negative log likelihood + share · KL(adapter ‖ mix).

    The loss is in nats per token, the mean over adapters of their means: in a mean over all tokens, tasks with short completions
    would hardly count. batch: examples by adapter. share: LearnConfig.distillation_share.
    """
    import torch

    device = model.model.device
    examples = [example for group in batch for example in group]
    ids = torch.zeros(len(examples), max(len(example.tokens) for example in examples), dtype=torch.int64)
    for place, example in enumerate(examples):
        ids[place, : len(example.tokens)] = torch.tensor(example.tokens)
    # Attention is causal, so padding at the end needs no mask.
    logits = model.model(input_ids=ids.to(device), use_cache=False).logits
    log_probs = torch.cat(
        [logits[place, example.start - 1 : len(example.tokens) - 1] for place, example in enumerate(examples)]
    ).log_softmax(dim=-1)
    labels = torch.tensor([token for example in examples for token in example.tokens[example.start :]], device=device)
    hard = torch.nn.functional.nll_loss(log_probs, labels, reduction="none")
    teacher = torch.cat([example.teacher for example in examples]).float()
    divergence = torch.nn.functional.kl_div(log_probs, teacher, reduction="none", log_target=True).sum(dim=-1)
    tokens = [sum(len(example.tokens) - example.start for example in group) for group in batch]
    parts: list[torch.Tensor] = list(torch.split((1 - share) * hard + share * divergence, tokens))
    return torch.stack([part.mean() for part in parts]).mean()


def _set_alone(model: MixedModel, adapter: Adapter) -> None:
    stacks = stack_adapters({adapter.name: adapter}, str(model.model.device))
    for stack in stacks.values():
        stack.weights.fill_(1)
    model.set_stacks(stacks)
