"""Typer's options for the settings of a training run, made from TrainConfig."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, Field, fields
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from edgelora.cli.arguments import is_given, parse_template_options
from edgelora.cli.choices import choose
from edgelora.cli.terminal import print_table
from edgelora.in_torch.train_config import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_REQUIRED = ("base", "data", "output")  # the verb declares them itself
_ALL = "--help-all"


def list_settings() -> list[Field[Any]]:
    """Lists the settings that are options, in the order of their groups."""
    settings = [each for each in fields(TrainConfig) if each.name not in _REQUIRED]
    groups = list(dict.fromkeys(each.metadata["group"] for each in settings))
    return sorted(settings, key=lambda each: groups.index(each.metadata["group"]))


def name_flag(setting: Field[Any]) -> str:
    """Names the option of a setting.

    >>> name_flag(next(each for each in list_settings() if each.name == "batch_size"))
    '--batch-size'
    """
    singular = {"template_options": "--template-option"}
    return setting.metadata["flag"] or singular.get(setting.name) or f"--{setting.name.replace('_', '-')}"


def takes_settings(verb: Callable[..., None]) -> Callable[..., None]:
    """Gives a verb the settings of TrainConfig as options, in place of its `given`.

    The verb then gets those that the user set, by their field's name.
    """
    settings = list_settings()

    @wraps(verb)
    def call(**arguments: Any) -> None:
        context = arguments.pop("context")
        values = {each.name: arguments.pop(each.name) for each in settings}
        arguments.pop("help_all")
        given = {name: _convert(name, value) for name, value in values.items() if is_given(context, name)}
        verb(**arguments, given=given)

    own = [each for each in inspect.signature(verb, eval_str=True).parameters.values() if each.name != "given"]
    required = [each for each in own if each.default is inspect.Parameter.empty]
    added = [_make_parameter(each) for each in settings]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    context = inspect.Parameter("context", kind, annotation=typer.Context)
    everything = inspect.Parameter("help_all", kind, default=False, annotation=_HelpAll)
    parameters = [context, *required, *added, *own[len(required) :], everything]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _make_parameter(setting: Field[Any]) -> inspect.Parameter:
    annotate: Any = Annotated  # with types that are known at run time only
    said: Mapping[str, Any] = setting.metadata
    kind, default = _find_type(setting.name), None if setting.default is MISSING else setting.default
    names = {"rich_help_panel": said["group"], "hidden": said["rare"]}
    if said["choices"]:
        declared = choose(said["choices"], said["meaning"], panel=said["group"], hidden=said["rare"])
    elif kind is bool:
        declared = typer.Option(name_flag(setting), help=said["meaning"], **names)
    else:
        metavar = said["metavar"] or {int: "N", float: "NUMBER"}.get(kind, "KEY=JSON" if kind == list[str] | None else None)
        declared = typer.Option(name_flag(setting), metavar=metavar or "NUMBER", help=said["meaning"], **names)
    annotation = annotate[kind if default is not None or kind is bool or None in get_args(kind) else kind | None, declared]
    return inspect.Parameter(setting.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)


def _find_type(name: str) -> Any:
    """Finds the type of an option. Lists are words with commas, and several types of one setting are text."""
    if name == "template_options":
        return list[str] | None
    kinds = [kind for kind in (get_args(_HINTS[name]) or (_HINTS[name],)) if kind is not type(None)]
    return kinds[0] if kinds[0] in (int, float, bool, str) and len(kinds) == 1 else str


def _convert(name: str, value: Any) -> Any:
    """Turns the value of an option into that of its setting."""
    if name == "template_options":
        return parse_template_options(value)
    if name == "target_modules" and value == "all-linear":
        return None
    if tuple[str, ...] in get_args(_HINTS[name]):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if name == "validation":
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _show_all(value: bool) -> None:
    """Prints all settings with their defaults, and ends the process."""
    if value:
        rows = [(name_flag(each), _show_default(each), each.metadata["meaning"]) for each in list_settings()]
        print_table("Settings of edgelora train", ("option", "default", "meaning"), rows)
        raise typer.Exit


def _show_default(setting: Field[Any]) -> str:
    """Shows the default of a setting. A dash is none."""
    value = None if setting.default is MISSING else setting.default
    return "–" if value is None or value is False else f"{value:g}" if isinstance(value, float) else str(value)


def _read_hints() -> dict[str, Any]:
    """Reads the types of TrainConfig's fields, two of whose names are imported for type checkers alone."""
    from collections.abc import Mapping
    from pathlib import Path

    return get_type_hints(TrainConfig, localns={"Path": Path, "Mapping": Mapping})


_HINTS = _read_hints()
_HelpAll = Annotated[bool, typer.Option(_ALL, help="Show all settings, also the rare ones.", callback=_show_all, is_eager=True)]
