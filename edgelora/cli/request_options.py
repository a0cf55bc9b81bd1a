"""Typer's options for requests, made from the runtime's declarations."""

from __future__ import annotations

import inspect
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from edgelora.cli.arguments import parse_mix, read_option_file
from edgelora_runtime.decode.options import OPTIONS, TYPES

if TYPE_CHECKING:
    from collections.abc import Callable


class _Adaptation(NamedTuple):
    """An option that the command line takes in another form.

    type: of that form. convert: makes the runtime's value of it.
    """

    type: Any
    help: str
    convert: Callable[[Any], Any]
    metavar: str | None = None


_ADAPTATIONS = {
    "mix": _Adaptation(list[str] | None, "Mix live adapters for this call; repeat for each.", parse_mix, "ADAPTER=WEIGHT"),
    "stop": _Adaptation(
        list[str] | None, "Text that ends the answer and is left out; repeat for each.", lambda texts: texts or None
    ),
    "json_schema": _Adaptation(
        Path | None, "A JSON schema that the answer must fit.", lambda path: read_option_file(path, "--json-schema"), "FILE"
    ),
    "grammar": _Adaptation(Path | None, OPTIONS["grammar"].help, lambda path: read_option_file(path, "--grammar"), "FILE"),
}


def takes_request_options(*names: str, **defaults: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a verb the named request options, in place of its **options.

    The verb then gets **options as Runtime.stream() takes them. An option that is absent is left out, so that the runtime's
    default holds. defaults: the verb's own.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        @wraps(verb)
        def call(**arguments: Any) -> None:
            values = {name: _convert(name, arguments.pop(name)) for name in names}
            verb(**arguments, **{name: value for name, value in values.items() if value is not None})

        own = list(inspect.signature(verb, eval_str=True).parameters.values())[:-1]
        required = [parameter for parameter in own if parameter.default is inspect.Parameter.empty]
        added = [_make_parameter(name, defaults.get(name, OPTIONS[name].default)) for name in names]
        parameters = [*required, *added, *own[len(required) :]]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return call

    return decorate


def _make_parameter(name: str, default: object) -> inspect.Parameter:
    option, adaptation = OPTIONS[name], _ADAPTATIONS.get(name)
    annotate: Any = Annotated  # with types that are known at run time only
    if adaptation is None:
        annotation = annotate[TYPES[name], typer.Option(help=option.help, metavar="|".join(option.choices) or None)]
    else:
        default = None
        annotation = annotate[adaptation.type, typer.Option(help=adaptation.help, metavar=adaptation.metavar)]
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)


def _convert(name: str, value: object) -> Any:
    return _ADAPTATIONS[name].convert(value) if name in _ADAPTATIONS else value
