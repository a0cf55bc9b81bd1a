"""Typer's options for requests, made from the runtime's declarations."""

from __future__ import annotations

import inspect
import json
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from edgelora.cli.arguments import parse_mix, parse_pairs, read_option_file
from edgelora.cli.choices import choose
from edgelora.cli.completion import complete_mix, complete_variants
from edgelora_runtime.decode.options import OPTIONS, TYPES
from edgelora_runtime.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class _Adaptation(NamedTuple):
    """An option that the command line takes in another form.

    type: of that form. convert: makes the runtime's value of it. flag: the option's name, if it is another one. complete: returns
    what the shell may complete.
    """

    type: Any
    help: str
    convert: Callable[[Any], Any]
    metavar: str | None = None
    flag: str | None = None
    complete: Callable[..., Any] | None = None


_ADAPTATIONS = {
    "variant": _Adaptation(str | None, OPTIONS["variant"].help, lambda name: name, "NAME", complete=complete_variants),
    "mix": _Adaptation(
        list[str] | None,
        "Mix live adapters for this call, with weight 1 if omitted; repeat for each.",
        parse_mix,
        "ADAPTER[=WEIGHT]",
        complete=complete_mix,
    ),
    "stop": _Adaptation(
        list[str] | None, "Text that ends the answer and is left out; repeat for each.", lambda texts: texts or None
    ),
    "keep_tokens": _Adaptation(
        list[str] | None,
        "Special token whose text stays in the answer, such as [TOOL_CALLS]; repeat for each.",
        lambda texts: texts or None,
        "TOKEN",
        "--keep-token",
    ),
    "logit_bias": _Adaptation(
        list[str] | None,
        "A number to add to a token's logit, by id or text; -100 bans it. Repeat for each.",
        lambda items: _parse_biases(items),
        "TOKEN=NUMBER",
    ),
    "json_schema": _Adaptation(
        Path | None, "A JSON schema that the answer must fit.", lambda path: read_option_file(path, "--json-schema"), "FILE"
    ),
    "grammar": _Adaptation(Path | None, OPTIONS["grammar"].help, lambda path: read_option_file(path, "--grammar"), "FILE"),
    "tools": _Adaptation(
        Path | None,
        "Tools for the chat template: a JSON list of their schemas.",
        lambda path: _read_list(path, "--tools"),
        "FILE.json",
    ),
    "documents": _Adaptation(
        Path | None,
        "Documents for the chat template: a JSON list of objects.",
        lambda path: _read_list(path, "--documents"),
        "FILE.json",
    ),
    "template_options": _Adaptation(
        list[str] | None,
        "A variable for the chat template, such as enable_thinking=false; repeat for each.",
        lambda items: _parse_template_options(items),
        "KEY=JSON",
        "--template-option",
    ),
    "date": _Adaptation(str | None, OPTIONS["date"].help, lambda day: day, "YYYY-MM-DD"),
}

# The headings of --help, each with its options. An option that is not here stands with the verb's own.
_PANELS = {
    "Sampling": ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"),
    "End of the answer": ("max_tokens", "stop", "timeout", "overflow", "ignore_eos"),
    "Form of the answer": ("json_schema", "regex", "grammar"),
    "Chat template": ("tools", "documents", "template_options", "date", "continue_final_message"),
    "Output": ("logprobs",),
    "Runtime": ("speculation",),
}
_PANEL_OF = {name: panel for panel, names in _PANELS.items() for name in names}


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
    panel = _PANEL_OF.get(name)
    if adaptation is None:
        if option.choices:
            declared = choose(option.choices, option.help, panel=panel)
        else:
            declared = typer.Option(help=option.help, rich_help_panel=panel)
        annotation = annotate[TYPES[name], declared]
    else:
        default = None
        declared = typer.Option(
            *([adaptation.flag] if adaptation.flag else []),
            help=adaptation.help,
            metavar=adaptation.metavar,
            autocompletion=adaptation.complete,
            rich_help_panel=panel,
        )
        annotation = annotate[adaptation.type, declared]
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)


def _convert(name: str, value: object) -> Any:
    return _ADAPTATIONS[name].convert(value) if name in _ADAPTATIONS else value


def _read_list(path: Path | None, option: str) -> list[Any] | None:
    """Reads the JSON list in the file that an option names. Raises InputError for anything else."""
    text = read_option_file(path, option)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{option} {path} is not valid JSON ({error})") from None
    if not isinstance(value, list):
        raise InputError(f"{option} {path} holds {type(value).__name__}, not a list of objects")
    return value


def _parse_biases(items: Sequence[str] | None) -> dict[int | str, float] | None:
    """Parses biases. Digits are a token's id, and anything else its text."""
    if not items:
        return None
    biases: dict[int | str, float] = {}
    for item in items:
        token, _, text = item.rpartition("=")  # the text of a token may hold the sign itself
        try:
            number = float(text)
        except ValueError:
            raise UsageError(f"--logit-bias {item!r} is not TOKEN=NUMBER, such as 42=-100 or ' cat'=5") from None
        biases[int(token) if token.isascii() and token.isdigit() else token] = number
    return biases


def _parse_template_options(items: Sequence[str] | None) -> dict[str, Any] | None:
    if not items:
        return None
    values: dict[str, Any] = {}
    for name, text in parse_pairs(items, "--template-option KEY=JSON").items():
        try:
            values[name] = json.loads(text)
        except (ValueError, RecursionError):
            quoted = json.dumps(text, ensure_ascii=False)
            raise UsageError(
                f"--template-option {name}={text}: {text!r} is not JSON; a text is written {name}='{quoted}'"
            ) from None
    return values
