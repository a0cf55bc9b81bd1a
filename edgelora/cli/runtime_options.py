"""The options with which verbs open a bundle: threads, provider, packed cache, whole graphs, kernels, budgets."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Any, get_type_hints

from edgelora.cli.arguments import (  # noqa: TC001  (typer reads the annotations)
    CacheBudgetOption,
    KernelsOption,
    MemoryBudgetOption,
    PackedCacheOption,
    ProviderOption,
    ThreadsOption,
    WholeGraphsOption,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgelora_runtime import Runtime

_PARAMETER = "runtime_options"


@dataclass(frozen=True)
class RuntimeOptions:
    """The options of a verb that opens a bundle, as the user gave them."""

    threads: ThreadsOption = None
    provider: ProviderOption = "auto"
    packed_cache: PackedCacheOption = False
    whole_graphs: WholeGraphsOption = False
    kernels: KernelsOption = "auto"
    memory_budget: MemoryBudgetOption = None
    cache_budget: CacheBudgetOption = None

    def open(self, bundle: Path) -> Runtime:
        """Opens a bundle with these options."""
        from edgelora_runtime import PackedCache, Runtime

        return Runtime(bundle, **{**asdict(self), "packed_cache": PackedCache() if self.packed_cache else None})


def takes_runtime_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Gives a verb these options, in place of its parameter runtime_options. They come before --json in its help."""
    own = inspect.signature(verb, eval_str=True).parameters.values()
    hints = get_type_hints(RuntimeOptions, include_extras=True)
    added = [
        inspect.Parameter(
            field.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=field.default, annotation=hints[field.name]
        )
        for field in fields(RuntimeOptions)
    ]

    @wraps(verb)
    def call(**arguments: Any) -> None:
        options = RuntimeOptions(**{parameter.name: arguments.pop(parameter.name) for parameter in added})
        verb(**arguments, **{_PARAMETER: options})

    last = [parameter for parameter in own if parameter.name == "json"]
    kept = [parameter for parameter in own if parameter.name not in (_PARAMETER, "json")]
    parameters = [*kept, *added, *last]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call
