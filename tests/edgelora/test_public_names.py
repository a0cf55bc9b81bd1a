"""The names that apps import from edgelora."""

from __future__ import annotations

import pytest

import edgelora
import edgelora_runtime

PUBLIC = {
    "Bundle",
    "Conversation",
    "EdgeloraError",
    "GenerateOptions",
    "Generation",
    "InputError",
    "IntegrityError",
    "MemoryUsage",
    "MissingExtraError",
    "PackedCache",
    "Piece",
    "Receipt",
    "Recipe",
    "ResourceError",
    "Route",
    "Runtime",
    "TextStream",
    "TokenLogprob",
    "TrainConfig",
    "Usage",
    "UsageError",
    "__version__",
    "compose",
    "evaluate",
    "export",
    "train",
}


def test_public_names_are_pinned_and_listed() -> None:
    assert set(edgelora.__all__) == PUBLIC
    assert len(edgelora.__all__) == len(PUBLIC)
    assert set(dir(edgelora)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_every_public_name_imports_and_is_documented(name: str) -> None:
    assert getattr(edgelora, name).__doc__


@pytest.mark.parametrize("name", sorted(PUBLIC & set(edgelora_runtime.__all__)))
def test_runtime_names_are_the_runtimes(name: str) -> None:
    assert getattr(edgelora, name) is getattr(edgelora_runtime, name)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        edgelora.nothing  # noqa: B018
