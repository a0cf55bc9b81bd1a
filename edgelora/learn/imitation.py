"""What a learned mix is to say: rows with the probabilities of each one's own adapter, and how far from them a mix is."""

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

WRITTEN_TOKENS = 256  # of a completion that an adapter writes; what has not ended by then is left out


@dataclass(frozen=True)
class Example:
    """A row as tokens, completion and end of text included. soft: log probabilities, float16 (T, V), of its adapter."""

    tokens: list[int]
    start: int
    soft: torch.Tensor


def write_rows(model: MixedModel, adapter: Adapter, rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most so many of the rows' distinct prompts, with what the adapter alone writes after them."""
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    random.Random(seed).shuffle(prompts)  # noqa: S311  (not for secrets)
    _set_alone(model, adapter)
    asked = [Row(prompt, "") for prompt in prompts[:count]]
    written = [Row(row.prompt, text) for row, text in zip(asked, model.write(asked, WRITTEN_TOKENS), strict=True)]
    return [row for row in written if row.completion and len(model.tokenizer(row.completion)["input_ids"]) < WRITTEN_TOKENS]


def encode_rows(model: MixedModel, adapter: Adapter, rows: Sequence[Row]) -> list[Example]:
    """Rows with what their adapter alone says of each token of the completion: 2 bytes for each entry of the vocabulary."""
    import torch

    end = [] if model.tokenizer.eos_token_id is None else [model.tokenizer.eos_token_id]
    _set_alone(model, adapter)
    examples = []
    with torch.inference_mode():
        for row in rows:
            whole, start = model.encode(row)
            tokens = whole + end
            logits = model.model(input_ids=torch.tensor([tokens], device=model.model.device), use_cache=False).logits
            soft = torch.log_softmax(logits[0, start - 1 : -1].float(), dim=-1).to(torch.float16)
            examples.append(Example(tokens, start, soft.clone()))
    return examples


def distance(model: MixedModel, batch: Sequence[Sequence[Example]], soft: float) -> torch.Tensor:
    """(1 - soft) · negative log likelihood + soft · KL(adapter ‖ mix), in nats per token: the mean over adapters of their means.

    batch: examples by adapter. A mean over all tokens would leave a task of short completions next to no say.
    """
    import torch

    device = model.model.device
    examples = [example for group in batch for example in group]
    ids = torch.zeros(len(examples), max(len(example.tokens) for example in examples), dtype=torch.int64)
    for place, example in enumerate(examples):
        ids[place, : len(example.tokens)] = torch.tensor(example.tokens)
    # Padding at the end is never seen by what stands before it, so no mask is needed.
    logits = model.model(input_ids=ids.to(device), use_cache=False).logits
    said = torch.cat(
        [logits[place, example.start - 1 : len(example.tokens) - 1] for place, example in enumerate(examples)]
    ).log_softmax(dim=-1)
    labels = torch.tensor([token for example in examples for token in example.tokens[example.start :]], device=device)
    hard = torch.nn.functional.nll_loss(said, labels, reduction="none")
    wanted = torch.cat([example.soft for example in examples]).float()
    divergence = torch.nn.functional.kl_div(said, wanted, reduction="none", log_target=True).sum(dim=-1)
    tokens = [sum(len(example.tokens) - example.start for example in group) for group in batch]
    parts: list[torch.Tensor] = list(torch.split((1 - soft) * hard + soft * divergence, tokens))
    return torch.stack([part.mean() for part in parts]).mean()


def _set_alone(model: MixedModel, adapter: Adapter) -> None:
    stacks = stack_adapters({adapter.name: adapter}, str(model.model.device))
    for stack in stacks.values():
        stack.weights.fill_(1)
    model.set_stacks(stacks)
