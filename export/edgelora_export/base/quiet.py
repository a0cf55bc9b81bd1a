"""Silences the libraries on top of torch and transformers, and cuts their errors to one line."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOGGERS = ("accelerate", "bitsandbytes", "datasets", "peft", "trl")  # transformers has a verbosity of its own


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, cut to a readable length."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def quiet_libraries(*, whole_process: bool = True) -> Iterator[None]:
    """Silences warnings, advice and progress bars of torch, transformers and the libraries on top of them, and restores them.

    whole_process: standard output and log messages below errors go too, as Optimum and auto-round print and log in many ways.
    Training passes False: it takes minutes and calls back into the app, whose own output and logs must come through.
    """
    import transformers.utils.logging as transformers_logging_untyped

    transformers_logging: Any = transformers_logging_untyped
    datasets: Any = sys.modules.get("datasets")  # its bars show only where somebody imported it
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    disabled, verbosity = logging.root.manager.disable, transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    data_bars = datasets is not None and datasets.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if data_bars:
            datasets.disable_progress_bars()
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if whole_process:
                logging.disable(logging.WARNING)
                stack.enter_context(contextlib.redirect_stdout(None))
            yield
    finally:
        logging.disable(disabled)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if data_bars:
            datasets.enable_progress_bars()
