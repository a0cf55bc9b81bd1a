"""The loss of a completion covers its own tokens, even if a token spans prompt and completion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from edgelora.data.rows import Row
from edgelora.evaluation import completion_loss, evaluate, log_likelihood
from edgelora_runtime.errors import InputError
from tests.tiny import load_base, make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora_runtime import Runtime


def reference_loss(base: Path, ids: list[int], start: int) -> float:
    """torch's cross entropy of ids[start:], in nats."""
    with torch.no_grad():
        logits = load_base(base)(torch.tensor([ids])).logits[0, start - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum"))


@pytest.mark.parametrize(
    ("prompt", "completion", "spans"),
    [("the cat", " sat on the mat", False), ("the ca", "t sat", True), ("a da", "y in", True), ("t", "he cat", True)],
)
def test_completion_loss_is_torchs(prompt: str, completion: str, spans: bool, runtime: Runtime, tiny_base: Path) -> None:
    """Tokens count from the first one that differs from the prompt's; the first token of all has no likelihood."""
    tokenizer = make_tokenizer()
    head, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + completion)["input_ids"]
    assert (ids[: len(head)] != head) == spans
    start = next((at for at, (one, other) in enumerate(zip(head, ids, strict=False)) if one != other), len(head))
    nats, count = completion_loss(runtime, Row(prompt, completion), variant="base")
    assert count == len(ids) - max(start, 1)
    assert nats == pytest.approx(reference_loss(tiny_base, ids, max(start, 1)), rel=1e-4)


def test_scores_of_right_answers(runtime: Runtime) -> None:
    """Rows with the variant's own completions score 100%."""
    steps: list[int] = []
    rows = [Row(prompt, runtime.generate(prompt, variant="base", max_tokens=4).text + "!") for prompt in ("the cat", "a day")]
    right = [Row(row.prompt, row.completion[:-1]) for row in rows]
    found = evaluate(runtime, right, variant="base", max_tokens=4, on_progress=lambda done, total, what: steps.append(done))
    assert found.exact_match == 1.0
    assert found.perplexity == pytest.approx(np.exp(found.loss))
    assert steps == [0, 1, 2]
    assert evaluate(runtime, rows, variant="base", max_tokens=4).exact_match == 0.0


def test_log_likelihood_of_large_logits() -> None:
    logits = np.array([[1000.0, 0.0], [-1000.0, -1001.0]], np.float32)
    np.testing.assert_allclose(log_likelihood(logits, [0, 1]), [0.0, -1 - np.log1p(np.exp(-1))], atol=1e-9)


def test_no_rows_are_refused(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="no rows"):
        evaluate(runtime, [])
