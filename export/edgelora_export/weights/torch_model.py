"""Loads a whole base into transformers, for tools that need it: Optimum and auto-round."""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import TYPE_CHECKING, Any

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgelora_export.weights.base import Base


def load_model(base: Base) -> Any:
    """Loads the base as a transformers model in float32 on the CPU. Raises InputError if transformers cannot load it."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"transformers cannot load base {base.folder} ({first_line(error)})") from error
    return model.eval()


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, cut to a readable length."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences torch, transformers, Optimum and auto-round inside the block."""
    import transformers.utils.logging as transformers_logging_untyped

    transformers_logging: Any = transformers_logging_untyped
    before, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if bars:
            transformers_logging.enable_progress_bar()
