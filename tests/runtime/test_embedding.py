"""Embeddings: the mean of the final states, against transformers and PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from edgelora_runtime import InputError, Runtime
from tests.tiny import load_base, random_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def embed_with_torch(model: Any, tokens: list[int]) -> NDArray[np.float32]:
    with torch.no_grad():
        states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]
    mean = states.mean(dim=0)
    found: NDArray[np.float32] = (mean / mean.norm()).numpy()
    return found


@pytest.mark.parametrize("length", [1, 7, 64, 65, 300])
def test_an_embedding_is_the_mean_of_transformers_states(runtime: Runtime, tiny_base: Path, length: int) -> None:
    tokens = random_tokens(length, seed=length)
    found = runtime.embed(tokens, variant="base")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, embed_with_torch(load_base(tiny_base), tokens), atol=1e-5)
    assert np.linalg.norm(found) == pytest.approx(1)


@pytest.mark.parametrize("choice", [{"variant": "patterns"}, {"mix": {"plain": 1.0}}])
def test_an_embedding_of_an_adapter_is_pefts(
    runtime: Runtime, tiny_base: Path, tiny_adapters: dict[str, Path], choice: dict[str, Any]
) -> None:
    from peft import PeftModel

    name = choice.get("variant", "plain")
    model = PeftModel.from_pretrained(load_base(tiny_base), str(tiny_adapters[name])).eval()
    tokens = random_tokens(30)
    np.testing.assert_allclose(
        runtime.embed(tokens, **choice), embed_with_torch(model, tokens), atol=1e-4
    )  # live adapters are fp16


def test_embedding_does_not_change_generations(runtime: Runtime) -> None:
    expected = runtime.generate(random_tokens(20), max_tokens=20).tokens
    stream = runtime.stream(random_tokens(20), max_tokens=20)
    while next(stream, None) is not None:
        runtime.embed("the cat")
    assert stream.generation is not None
    assert stream.generation.tokens == expected


def test_an_empty_text_has_no_embedding(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="empty"):
        runtime.embed("")
