"""What a request may ask for, as the keyword arguments of all calls that generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of Runtime.stream(), which says what they mean and what holds without them."""

    variant: str | None
    mix: Mapping[str, float] | None
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: Sequence[str]
    timeout: float | None
    overflow: str
    ignore_eos: bool
    logprobs: int
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    grammar: str | None
    speculation: str
