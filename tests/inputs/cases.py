"""The shape of a case: one input that people bring, what transformers or PEFT makes of it, and what edgelora makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One row of the table of tried inputs.

    name: the input, as the docs' table calls it. part: what of a model it is. theirs: what transformers or PEFT gives, in a few
    words. ours: equal to theirs, or refused in one line.
    check: makes the input in an empty folder, runs both sides, and asserts that they agree, to 1e-5 in float32, or that
    edgelora's error is the one line that it should be. Returns what it saw: "equal to 3e-7", or the line.
    """

    name: str
    part: Literal["base", "adapter", "tokenizer", "template"]
    theirs: str
    ours: Literal["equal", "refused"]
    check: Callable[[Path], str]
