"""Budgets in bytes for loaded models, cached prompts and live mixes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelora_runtime.residency.memory import find_free_memory, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

_MODELS_SHARE, _PROMPTS_SHARE = 0.75, 0.1  # of the memory that is free when a bundle is opened
_LIVE_SHARE, _MIN_LIVE = 0.1, 32 << 20  # of the live graph's blobs, and in bytes


def find_budgets(models: int | str | None, prompts: int | str | None) -> tuple[int | None, int | None]:
    """Returns the bytes for loaded models and for cached prompts.

    They are as given, otherwise a share of the free memory. None means no limit.
    """
    given = parse_bytes(models), parse_bytes(prompts)
    free = find_free_memory() if None in given else None
    shares = (None, None) if free is None else (int(free * _MODELS_SHARE), int(free * _PROMPTS_SHARE))
    for_models, for_prompts = (share if size is None else size for size, share in zip(given, shares, strict=True))
    return for_models, for_prompts


def find_live_budget(blobs: Mapping[str, int]) -> int:
    """Returns the bytes for live adapters, a share of the live graph's blobs (bytes by name).

    Many mixes then cost little more than one.
    """
    return max(_MIN_LIVE, int(_LIVE_SHARE * sum(blobs.values())))
