"""A runtime for edgelora bundles on numpy, onnxruntime and tokenizers, without torch or transformers."""

from edgelora_runtime import _telemetry as _telemetry
from edgelora_runtime._version import __version__
from edgelora_runtime.bundle.folder import Bundle
from edgelora_runtime.bundle.router import Route
from edgelora_runtime.decode.logprobs import TokenLogprob
from edgelora_runtime.decode.loop import Generation, Receipt, TextStream
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
    "EdgeloraError",
    "GenerateOptions",
    "Generation",
    "InputError",
    "IntegrityError",
    "MemoryUsage",
    "MissingExtraError",
    "PackedCache",
    "Receipt",
    "ResourceError",
    "Route",
    "Runtime",
    "TextStream",
    "TokenLogprob",
    "UsageError",
    "__version__",
]
