"""Packed rows beside padded ones, as training takes them: tokens per second of a step, and the loss of each row.

`python -m benchmarks.packing DATA.jsonl` trains nothing: it times forward and backward passes of a LoRA adapter on the pocket
base, over the same rows, padded in batches and packed, interleaved. Seconds are those of the process's CPU time.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.pocket import find_base
from edgelora.data.encode_rows import RowEncoder
from edgelora.data.rows import read_rows
from edgelora.in_torch.packing import PackedCollator, check_packing, pack_rows
from edgelora.in_torch.train import load_base
from edgelora_export.base.base import Base

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgelora.data.encode_rows import LearnedTokens

Batch = dict[str, Any]


def main() -> None:
    """Prints one JSON object: rows, tokens, seconds of both, their ratio, and the largest difference of a row's loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--base", default=None)
    parser.add_argument("--quant", default="nf4", choices=("nf4", "none"))
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    base = arguments.base or str(find_base())
    model, tokenizer = load_base(Base.find(base), arguments.quant)
    adapted: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")).train()
    check_packing(adapted)
    encoder = RowEncoder(tokenizer)
    rows = [encoder.learn(row).cut(arguments.length) for row in read_rows(arguments.data)]
    rows = random.Random(0).sample(rows, min(arguments.rows, len(rows)))
    packed = [sequence.to_columns() for sequence in pack_rows(rows, arguments.length)]
    collate = PackedCollator(tokenizer.eos_token_id)
    ways = {
        "padded": [_pad(rows[at : at + arguments.batch_size]) for at in range(0, len(rows), arguments.batch_size)],
        "packed": [collate([sequence]) for sequence in packed],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, float] = {}
    for _ in range(arguments.rounds):
        for name, batches in ways.items():
            started = time.process_time()
            losses[name] = sum(_step(adapted, batch) for batch in batches)
            seconds[name].append(time.process_time() - started)
    tokens, best = sum(len(row.tokens) for row in rows), {name: min(each) for name, each in seconds.items()}
    found = {
        "rows": len(rows),
        "tokens": tokens,
        "longest_row": max(len(row.tokens) for row in rows),
        "positions": {name: sum(batch["input_ids"].numel() for batch in batches) for name, batches in ways.items()},
        "passes": {name: len(batches) for name, batches in ways.items()},
        "tokens_per_second": {name: tokens / each for name, each in best.items()},
        "ratio": best["padded"] / best["packed"],
        "nats": losses,
        "largest_difference_of_a_row": _compare(
            adapted,
            rows,
            {
                "padded": [(batch, [[int(mask.sum())] for mask in batch["attention_mask"]]) for batch in ways["padded"]],
                "packed": [(batch, [sequence["seq_lengths"]]) for batch, sequence in zip(ways["packed"], packed, strict=True)],
            },
        ),
    }
    print(json.dumps(found))


def _pad(rows: Sequence[LearnedTokens]) -> Batch:
    """Pads rows at their end, as TRL's collator does."""
    width = max(len(row.tokens) for row in rows)
    ids, labels, mask = (torch.full((len(rows), width), value) for value in (0, -100, 0))
    for place, row in enumerate(rows):
        count = len(row.tokens)
        ids[place, :count] = torch.tensor(row.tokens)
        mask[place, :count] = 1
        labels[place, :count] = torch.tensor([t if one else -100 for t, one in zip(row.tokens, row.learned, strict=True)])
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def _losses(model: Any, batch: Batch) -> Any:
    """Each position's loss in nats, float32 (B, T - 1), 0 where none counts."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")


def _step(model: Any, batch: Batch) -> float:
    loss = _losses(model, batch).sum()
    loss.backward()
    model.zero_grad()
    return float(loss.detach())


def _compare(
    model: Any, rows: Sequence[LearnedTokens], batches: Mapping[str, Sequence[tuple[Batch, Sequence[Sequence[int]]]]]
) -> dict[str, float]:
    """The largest difference between a row's loss per token in a batch and alone, in nats, by way.

    Padded batches show what the products of the base do by themselves when more rows come at once.
    """
    model.eval()
    found = {}
    with torch.no_grad():
        alone = {row.tokens: float(_losses(model, _pad([row])).sum()) / sum(row.learned) for row in rows}
        for name, each in batches.items():
            differences = []
            for batch, lengths in each:
                losses = _losses(model, batch)
                for place, row_lengths in enumerate(lengths):
                    at = 0
                    for length in row_lengths:
                        part = losses[place, at : at + length - 1]
                        tokens = tuple(batch["input_ids"][place, at : at + length].tolist())
                        count = int((batch["labels"][place, at + 1 : at + length] != -100).sum())
                        differences.append(abs(float(part.sum()) / count - alone[tokens]))
                        at += length
            found[name] = max(differences)
    return found


if __name__ == "__main__":
    main()
