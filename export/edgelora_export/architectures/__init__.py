"""Reads a Decoder from a config.json, with one small file per architecture family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora_export.architectures.gemma import read_gemma2, read_gemma3
from edgelora_export.architectures.granite import read_granite
from edgelora_export.architectures.llama import read_llama
from edgelora_export.architectures.mistral import read_ministral3, read_mistral
from edgelora_export.architectures.olmo2 import read_olmo2
from edgelora_export.architectures.phi3 import read_phi3
from edgelora_export.architectures.qwen import read_qwen2, read_qwen3
from edgelora_export.architectures.smollm3 import read_smollm3
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgelora_export.decoder.description import Decoder

_READERS: dict[str, Callable[[dict[str, Any], int | None], Decoder]] = {
    "gemma2": read_gemma2,
    "gemma3_text": read_gemma3,
    "granite": read_granite,
    "llama": read_llama,
    "ministral3": read_ministral3,
    "mistral": read_mistral,
    "olmo2": read_olmo2,
    "phi3": read_phi3,
    "qwen2": read_qwen2,
    "qwen3": read_qwen3,
    "smollm3": read_smollm3,
}


def native_types() -> list[str]:
    """Lists the model_type of every architecture that has a native graph."""
    return sorted(_READERS)


def read_decoder(config: dict[str, Any], context_length: int | None = None) -> Decoder:
    """Reads the decoder that a Hugging Face config describes.

    context_length: positions that the bundle can hold. None for the model's own, at most 32768, or the original one of long RoPE.
    Raises InputError for an architecture or a setting that the builder cannot express.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _READERS:
        raise InputError(f"model_type {kind!r} is not supported; supported: {', '.join(sorted(_READERS))}")
    try:
        return _READERS[kind](config, context_length)
    except InputError:
        raise
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:  # a value of another type than expected
        raise InputError(f"config.json of this {kind} has a value that cannot be used ({error!r:.200})") from error
