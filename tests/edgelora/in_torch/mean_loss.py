"""The loss of a model in transformers on rows, as a reference for what training reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from edgelora.data.encode_rows import RowEncoder
from edgelora.data.rows import read_rows

if TYPE_CHECKING:
    from pathlib import Path


def mean_loss(model: Any, tokenizer: Any, data: Path) -> float:
    """Nats per learned token of a file, as transformers' own loss has it."""
    total, count = 0.0, 0
    for row in (RowEncoder(tokenizer).learn(row) for row in read_rows(data)):
        labels = [token if learned else -100 for token, learned in zip(row.tokens, row.learned, strict=True)]
        with torch.no_grad():
            loss = float(model(input_ids=torch.tensor([row.tokens]), labels=torch.tensor([labels])).loss)
        total, count = total + loss * sum(row.learned), count + sum(row.learned)
    return total / count
