"""Every error that edgelora raises on purpose: one tree, one exit code per branch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class EdgeloraError(Exception):
    """Base of the tree; its message is one line that says what, which value, and what to do."""

    exit_code = 1


class UsageError(EdgeloraError, ValueError):
    """A call that cannot mean anything: an unknown variant, a temperature below zero."""

    exit_code = 2


class InputError(EdgeloraError, ValueError):
    """A file or value that was given and is not usable: a recipe, a row, an adapter of another base."""

    exit_code = 3


class IntegrityError(EdgeloraError):
    """A bundle that is not what its manifest says, or a variant that lost its adapter."""

    exit_code = 4


class ResourceError(EdgeloraError, OSError):
    """Not enough disk or memory; nothing was left half-written."""

    exit_code = 5


class MissingExtraError(EdgeloraError, ImportError):
    """An optional dependency is absent; the message names the extra that brings it."""

    exit_code = 2

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'edgelora[{extra}]'")


def list_wrong(checks: Iterable[tuple[str, object, bool, str]]) -> list[str]:
    """What to say of each (name, value, whether it may be so, what may be) that may not be so."""
    return [f"{name} = {value}: use {allowed}" for name, value, holds, allowed in checks if not holds]
