"""Mixes LoRA adapters on one 4-bit base, compiles the mixes, and switches between them in milliseconds."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import edgelora_runtime
from edgelora_runtime import __version__
from edgelora_runtime.errors import MissingExtraError

if TYPE_CHECKING:
    from edgelora.composing.compose import compose
    from edgelora.evaluation import evaluate
    from edgelora.exporting.export import export
    from edgelora.exporting.recipe import Recipe
    from edgelora.in_torch.train import train
    from edgelora.in_torch.train_config import TrainConfig
    from edgelora_runtime import (
        Bundle,
        Conversation,
        EdgeloraError,
        GenerateOptions,
        Generation,
        InputError,
        IntegrityError,
        MemoryUsage,
        PackedCache,
        Piece,
        Receipt,
        ResourceError,
        Route,
        Runtime,
        TextStream,
        TokenLogprob,
        Usage,
        UsageError,
    )

__all__ = [
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
]

# Our own names that are loaded on first use, as the runtime's are: name → module.
_LAZY = {
    "Recipe": "edgelora.exporting.recipe",
    "TrainConfig": "edgelora.in_torch.train_config",
    "compose": "edgelora.composing.compose",
    "evaluate": "edgelora.evaluation",
    "export": "edgelora.exporting.export",
    "train": "edgelora.in_torch.train",
}
# Packages that may be absent → the extra that has them.
_EXTRAS = dict.fromkeys(("ml_dtypes", "onnx", "onnx_ir", "torch", "transformers"), "export")


def __getattr__(name: str) -> Any:
    if name in __all__ and name in edgelora_runtime.__all__:
        return getattr(edgelora_runtime, name)
    if name not in _LAZY:
        raise AttributeError(f"module 'edgelora' has no attribute {name!r}")
    try:
        return getattr(import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name in _EXTRAS:
            raise MissingExtraError(error.name, _EXTRAS[error.name]) from error
        raise


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
