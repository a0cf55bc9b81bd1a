"""`edgelora eval`: scores a variant on a data file."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import Annotated

import typer

from edgelora.cli.arguments import (
    BundleArgument,
    JsonOption,
    MaxTokensOption,
    MixOption,
    TemplateOptions,
    VariantOption,
    parse_mix,
    parse_template_options,
)
from edgelora.cli.runtime_options import RuntimeOptions, takes_runtime_options
from edgelora.cli.terminal import print_json, print_line, print_next, print_table, quote_path, show_progress
from edgelora.data.rows import FORM
from edgelora.formatting import format_share
from edgelora_runtime.bundle.router import AUTO
from edgelora_runtime.errors import UsageError


@takes_runtime_options
def evaluate(
    bundle: BundleArgument,
    data: Annotated[Path, typer.Option(metavar="FILE.jsonl", help=f"JSON lines of {FORM}.")],
    runtime_options: RuntimeOptions,
    variant: VariantOption = None,
    mix: MixOption = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Score only this many rows, from the first.")] = None,
    max_tokens: MaxTokensOption = 64,
    template_option: TemplateOptions = None,
    json: JsonOption = False,
) -> None:
    """Score a variant on a data file: exact match, loss, and slot F1 where the completions are slots."""
    from edgelora.data.rows import read_rows
    from edgelora.evaluation import evaluate as run_evaluation

    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: use 1 or more")
    rows, options = read_rows(data)[:limit], parse_template_options(template_option)
    with (
        runtime_options.open(bundle) as runtime,
        show_progress("evaluating") as on_progress,
    ):
        name, weights, names = variant, parse_mix(mix), list(runtime.variants)
        if variant != AUTO:
            name = runtime.switch(variant, mix=weights).variant
        scores = run_evaluation(
            runtime, rows, variant=variant, mix=weights, max_tokens=max_tokens, template_options=options, on_progress=on_progress
        )
    if json:
        print_json({"bundle": bundle, "variant": name, "data": data, **vars(scores)})
        return
    columns = ["variant", "rows", "exact match %", "slot F1 %", "loss / token", "perplexity"]
    row = [str(name), str(scores.rows), format_share(scores.exact_match), format_share(scores.slot_f1)]
    print_table("", columns, [[*row, f"{scores.loss:.3f}", f"{scores.perplexity:.2f}"]])
    if scores.routed:
        print_line("routed to " + ", ".join(f"{variant} {count}" for variant, count in sorted(scores.routed.items())))
    others = [other for other in names if other != name]
    if others and weights is None:
        print_next(f"edgelora eval {quote_path(bundle)} --data {quote_path(data)} --variant {others[0]}, to compare")
    else:
        print_next(f'edgelora run {quote_path(bundle)} "…", to see an answer')
