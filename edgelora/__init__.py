"""edgelora: mix LoRA adapters on one 4-bit base, compile the mixes, switch between them in milliseconds."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgelora_runtime import (
    Bundle,
    EdgeloraError,
    Generation,
    InputError,
    IntegrityError,
    MissingExtraError,
    Receipt,
    ResourceError,
    Route,
    Runtime,
    TextStream,
    UsageError,
    __version__,
)

if TYPE_CHECKING:
    from edgelora.composing.compose import compose
    from edgelora.exporting.export import export
    from edgelora.in_torch.train import TrainConfig, train

__all__ = [
    "Bundle",
    "EdgeloraError",
    "Generation",
    "InputError",
    "IntegrityError",
    "MissingExtraError",
    "Receipt",
    "ResourceError",
    "Route",
    "Runtime",
    "TextStream",
    "TrainConfig",
    "UsageError",
    "__version__",
    "compose",
    "export",
    "train",
]

# Imported when first asked for: they bring torch or onnx. Package that may be absent → the extra that has it.
_LAZY = {"compose": "composing.compose", "export": "exporting.export", "train": "in_torch.train", "TrainConfig": "in_torch.train"}
_EXTRAS = {"onnx": "export", "onnx_ir": "export", "torch": "export", "transformers": "export"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'edgelora' has no attribute {name!r}")
    try:
        return getattr(import_module(f"edgelora.{_LAZY[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name in _EXTRAS:
            raise MissingExtraError(error.name, _EXTRAS[error.name]) from error
        raise
