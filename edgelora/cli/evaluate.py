"""`edgelora eval`: scores a bundle's variants, or adapters on their base, on a data file."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgelora.cli.arguments import (
    JsonOption,
    MaxTokensOption,
    MixOption,
    TemplateOptions,
    parse_mix,
    parse_paths,
    parse_template_options,
)
from edgelora.cli.choices import choose
from edgelora.cli.completion import complete_variants
from edgelora.cli.runtime_options import RuntimeOptions, takes_runtime_options
from edgelora.cli.terminal import print_json, print_line, print_next, print_note, print_table, quote_path, show_progress
from edgelora.data.rows import FORM
from edgelora.data.shapes import FORMATS
from edgelora.formatting import format_share
from edgelora.in_torch.train_config import QUANTS
from edgelora_runtime.bundle.router import AUTO
from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgelora.data.rows import Row
    from edgelora.evaluation import Scores

_ADAPTERS, _SCORES = "Adapters in torch", "Scores"  # headings of groups in --help


@takes_runtime_options
def evaluate(
    data: Annotated[Path, typer.Option(metavar="DATA", help=f"A file or folder of rows, such as {FORM}.")],
    runtime_options: RuntimeOptions,
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="The bundle's folder; omitted with --base.", show_default=False)
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A variant, or auto for the bundle's router; repeat to compare. The bundle's default if omitted.",
            autocompletion=complete_variants,
        ),
    ] = None,
    mix: MixOption = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="In place of a bundle: the base of adapters.", rich_help_panel=_ADAPTERS),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]ADAPTER", help="An adapter on --base; repeat to compare.", rich_help_panel=_ADAPTERS),
    ] = None,
    quant: Annotated[str, choose(QUANTS, "Form of the base, as in training.", panel=_ADAPTERS)] = "none",
    format: Annotated[  # noqa: A002 - the option's name
        str, choose(FORMATS, "Shape of the rows; auto looks.", panel=_SCORES)
    ] = "auto",
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Score only this many rows, from the first.", rich_help_panel=_SCORES)
    ] = None,
    rouge: Annotated[bool, typer.Option("--rouge", help="Score ROUGE-L too.", rich_help_panel=_SCORES)] = False,
    regex: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Score how often this finds the same in the answer as in the right one: its first group, or all of it.",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    max_tokens: MaxTokensOption = 64,
    template_option: TemplateOptions = None,
    json: JsonOption = False,
) -> None:
    """Score variants or adapters on data: exact match, loss, and slot F1 where the completions are slots."""
    from edgelora.data.rows import read_rows
    from edgelora.data.sources import TEST
    from edgelora.evaluation import Measures

    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: use 1 or more")
    if (bundle is None) == (base is None):
        raise UsageError("give either a bundle or --base BASE, with --adapter for each adapter")
    if stray := [option for option, value in (("--variant", variant), ("--mix", mix)) if base is not None and value]:
        raise UsageError(f"{' and '.join(stray)} are of bundles; leave them out with --base")
    if adapter and base is None:
        raise UsageError("--adapter needs --base BASE; the adapters of a bundle are its variants")
    if mix and variant and len(variant) > 1:
        raise UsageError("--mix goes with one --variant")
    rows, options = read_rows(data, format, splits=TEST)[:limit], parse_template_options(template_option)
    settings = {"max_tokens": max_tokens, "template_options": options, "measures": Measures(rouge, regex)}
    others: list[str] = []
    if bundle is None:
        found = _evaluate_adapters(str(base), adapter or [], quant, rows, settings)
    else:
        found, others = _evaluate_variants(runtime_options, bundle, variant or [], parse_mix(mix), rows, settings)
    if json:
        _print_as_json(found, {"bundle": bundle} if bundle else {"base": base}, data)
        return
    _print_scores(found)
    if others and mix is None:
        print_next(f"edgelora eval {quote_path(str(bundle))} --data {quote_path(data)} --variant {others[0]}, to compare")
    elif bundle is not None:
        print_next(f'edgelora run {quote_path(bundle)} "…", to see an answer')
    else:
        print_next("edgelora init, which writes a recipe of the adapters in this folder")


def _evaluate_variants(
    runtime_options: RuntimeOptions,
    bundle: Path,
    names: Sequence[str],
    mix: Mapping[str, float] | None,
    rows: Sequence[Row],
    settings: Mapping[str, Any],
) -> tuple[dict[str, Scores], list[str]]:
    """Scores variants of a bundle. Also returns the names of the others."""
    from edgelora.evaluation import evaluate as run_evaluation

    found: dict[str, Scores] = {}
    with runtime_options.open(bundle) as runtime, show_progress("evaluating") as on_progress:
        wanted: Sequence[str | None] = names or [None]
        for given in wanted:
            name = given if given == AUTO else runtime.switch(given, mix=mix).variant
            found[str(name)] = run_evaluation(runtime, rows, variant=given, mix=mix, on_progress=on_progress, **settings)
        return found, [other for other in runtime.variants if other not in found]


def _evaluate_adapters(
    base: str, adapters: Sequence[str], quant: str, rows: Sequence[Row], settings: Mapping[str, Any]
) -> dict[str, Scores]:
    from edgelora.in_torch.evaluate_adapters import evaluate_adapters

    paths = parse_paths(adapters, "--adapter [NAME=]ADAPTER")
    with show_progress("evaluating") as on_progress:
        return evaluate_adapters(base, paths, rows, quant=quant, on_note=print_note, on_progress=on_progress, **settings)


def _print_as_json(found: Mapping[str, Scores], what: Mapping[str, object], data: Path) -> None:
    """Prints the scores of one variant as they are, and those of several by name."""
    key = "variant" if "bundle" in what else "adapter"
    each = [{key: name, **vars(scores)} for name, scores in found.items()]
    print_json({**what, "data": data, **(each[0] if len(each) == 1 else {f"{key}s": each})})


def _print_scores(found: Mapping[str, Scores]) -> None:
    """Prints a row per variant, each score with its 95% interval."""
    shares = [
        (title, name)
        for title, name in (
            ("exact match %", "exact_match"),
            ("slot F1 %", "slot_f1"),
            ("ROUGE-L %", "rouge_l"),
            ("regex %", "regex"),
        )
        if name in ("exact_match", "slot_f1") or any(getattr(scores, name) is not None for scores in found.values())
    ]
    columns = ["variant", "rows", *(title for title, _ in shares), "loss / token", "perplexity"]
    lines = []
    for variant, scores in found.items():
        line = [variant, str(scores.rows)]
        for _, name in shares:
            bounds = scores.intervals.get(name)
            interval = f" [{format_share(bounds[0])}, {format_share(bounds[1])}]" if bounds else ""
            line.append(format_share(getattr(scores, name)) + interval)
        for name, digits in (("loss", 3), ("perplexity", 2)):
            low, high = scores.intervals[name]
            line.append(f"{getattr(scores, name):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
        lines.append(line)
    print_table("", columns, lines)
    print_line("[…]: 95% bootstrap interval over the rows")
    for scores in found.values():
        if scores.routed:
            print_line("routed to " + ", ".join(f"{variant} {count}" for variant, count in sorted(scores.routed.items())))
