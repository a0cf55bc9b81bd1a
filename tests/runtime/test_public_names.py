"""The names that apps import from edgelora_runtime."""

from __future__ import annotations

import inspect

import pytest

import edgelora_runtime

NAMES = {
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
    "ResourceError",
    "Route",
    "Runtime",
    "TextStream",
    "TokenLogprob",
    "Usage",
    "UsageError",
    "__version__",
}


def test_only_these_names_are_public() -> None:
    assert set(edgelora_runtime.__all__) == NAMES
    assert edgelora_runtime.__all__ == sorted(edgelora_runtime.__all__)


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_each_public_class_has_a_docstring_of_its_own(name: str) -> None:
    public = getattr(edgelora_runtime, name)
    assert inspect.isclass(public)
    assert public.__doc__
    assert not public.__doc__.startswith(f"{name}("), "one that dataclass writes"


def test_the_version_is_a_version() -> None:
    assert edgelora_runtime.__version__[0].isdigit()
