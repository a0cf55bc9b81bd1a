"""Log probabilities against transformers' own logits in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora_runtime import Runtime


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_logprobs_are_those_of_transformers(runtime: Runtime, tiny_base: Path, temperature: float) -> None:
    from tests.tiny import load_base, torch_logits

    prompt = [5, 9, 4]
    found = runtime.generate(prompt, variant="base", max_tokens=8, temperature=temperature, seed=3, logprobs=4)
    assert [each.token for each in found.logprobs] == list(found.tokens)
    logits = torch_logits(load_base(tiny_base), [*prompt, *found.tokens])
    rows = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()[len(prompt) - 1 :]
    for row, each in zip(rows, found.logprobs, strict=False):
        assert each.logprob == pytest.approx(row[each.token], abs=2e-4)
        assert [token for token, _ in each.top] == np.argsort(-row)[:4].tolist()
        assert [value for _, value in each.top] == pytest.approx(np.sort(row)[::-1][:4].tolist(), abs=2e-4)


def test_there_are_none_by_default_and_a_negative_count_is_refused(runtime: Runtime) -> None:
    assert runtime.generate([5], max_tokens=2).logprobs == ()
    with pytest.raises(UsageError, match="logprobs = -1"):
        runtime.generate([5], max_tokens=2, logprobs=-1)
