"""Loads a whole base into transformers, for tools that need it: Optimum and auto-round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora_export.base.quiet import first_line as first_line
from edgelora_export.base.quiet import quiet_libraries as quiet_libraries
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from edgelora_export.base.base import Base


def load_model(base: Base) -> Any:
    """Loads the base as a transformers model in float32 on the CPU. Raises InputError if transformers cannot load it."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"transformers cannot load base {base.path} ({first_line(error)})") from error
    return model.eval()
