"""Options that take one of a few words: --help lists them, a typo names the nearest, and the shell completes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from edgelora_runtime.errors import UsageError, suggest_name

if TYPE_CHECKING:
    from collections.abc import Sequence

# Written here once more, as the modules that hold these load much. A test compares them.
PROVIDERS = ("auto", "cpu", "cuda", "webgpu")
STARTS = ("regmean", "linear")
GRAINS = ("factors", "core", "rank", "module")
DTYPES = ("float32", "float16", "bfloat16")


def choose(
    choices: Sequence[str],
    meaning: str,
    *,
    kind: str | None = None,
    several: bool = False,
    panel: str | None = None,
    hidden: bool = False,
) -> Any:
    """Returns a typer option that takes one of the choices.

    meaning: what --help says. kind: a word for the choices, if there are too many to stand beside the option; --help then lists
    them after the meaning. several: it takes some of them, separated by commas. panel: the heading of its group in --help.
    hidden: --help leaves it out.
    """

    def check(parameter: typer.CallbackParam, value: str | None) -> str | None:
        for word in () if value is None else value.split(",") if several else (value,):
            if word not in choices:
                name = max(parameter.opts, key=len)
                raise UsageError(f"{name} {word!r}: use one of {', '.join(choices)}{suggest_name([word], choices)}")
        return value

    def complete(incomplete: str) -> list[str]:
        first, comma, last = incomplete.rpartition(",") if several else ("", "", incomplete)
        return [f"{first}{comma}{choice}" for choice in choices if choice.startswith(last)]

    form = "|".join(choices)
    if kind is not None:
        form, meaning = f"{kind},…" if several else kind, f"{meaning} Choices: {', '.join(choices)}."
    return typer.Option(metavar=form, help=meaning, callback=check, autocompletion=complete, rich_help_panel=panel, hidden=hidden)
