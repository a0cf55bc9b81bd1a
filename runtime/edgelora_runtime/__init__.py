"""A runtime for edgelora bundles on numpy, onnxruntime and tokenizers, without torch or transformers.

Importing the package loads none of these. A name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgelora_runtime import _telemetry as _telemetry
from edgelora_runtime._version import __version__

if TYPE_CHECKING:
    from edgelora_runtime.answers.generation import Generation, Receipt, TokenLogprob, Usage
    from edgelora_runtime.answers.text_stream import Piece, TextStream
    from edgelora_runtime.bundle.folder import Bundle
    from edgelora_runtime.bundle.router import Route
    from edgelora_runtime.conversation import Conversation
    from edgelora_runtime.decode.options import GenerateOptions
    from edgelora_runtime.errors import (
        EdgeloraError,
        InputError,
        IntegrityError,
        MissingExtraError,
        ResourceError,
        UsageError,
    )
    from edgelora_runtime.residency.models import MemoryUsage
    from edgelora_runtime.residency.packed_cache import PackedCache
    from edgelora_runtime.runtime import Runtime

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
    "ResourceError",
    "Route",
    "Runtime",
    "TextStream",
    "TokenLogprob",
    "Usage",
    "UsageError",
    "__version__",
]

_MODULES = {
    "Bundle": "bundle.folder",
    "Conversation": "conversation",
    "EdgeloraError": "errors",
    "GenerateOptions": "decode.options",
    "Generation": "answers.generation",
    "InputError": "errors",
    "IntegrityError": "errors",
    "MemoryUsage": "residency.models",
    "MissingExtraError": "errors",
    "PackedCache": "residency.packed_cache",
    "Piece": "answers.text_stream",
    "Receipt": "answers.generation",
    "ResourceError": "errors",
    "Route": "bundle.router",
    "Runtime": "runtime",
    "TextStream": "answers.text_stream",
    "TokenLogprob": "answers.generation",
    "Usage": "answers.generation",
    "UsageError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
