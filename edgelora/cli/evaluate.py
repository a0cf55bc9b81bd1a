"""`edgelora eval`: scores a variant on a data file."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import Annotated

import typer

from edgelora.cli.arguments import (
    BundleArgument,
    JsonOption,
    KernelsOption,
    MaxTokensOption,
    MixOption,
    PackedCacheOption,
    ProviderOption,
    TemplateOptions,
    ThreadsOption,
    VariantOption,
    WholeGraphsOption,
    open_runtime,
    parse_mix,
    parse_template_options,
)
from edgelora.cli.terminal import print_json, print_table, show_progress
from edgelora.data.rows import FORM
from edgelora.formatting import format_share
from edgelora_runtime.bundle.router import AUTO
from edgelora_runtime.errors import UsageError


def evaluate(
    bundle: BundleArgument,
    data: Annotated[Path, typer.Option(help=f"JSON lines of {FORM}.")],
    variant: VariantOption = None,
    mix: MixOption = None,
    limit: Annotated[int | None, typer.Option(help="Score only this many rows, from the first.")] = None,
    max_tokens: MaxTokensOption = 64,
    template_option: TemplateOptions = None,
    threads: ThreadsOption = None,
    provider: ProviderOption = "auto",
    packed_cache: PackedCacheOption = False,
    whole_graphs: WholeGraphsOption = False,
    kernels: KernelsOption = "auto",
    json: JsonOption = False,
) -> None:
    """Score a variant on a data file: exact match, loss, and slot F1 where the completions are slots."""
    from edgelora.data.rows import read_rows
    from edgelora.evaluation import evaluate as run_evaluation

    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: use 1 or more")
    rows, options = read_rows(data)[:limit], parse_template_options(template_option)
    with (
        open_runtime(bundle, threads, provider, packed_cache, whole_graphs, kernels) as runtime,
        show_progress("evaluating") as on_progress,
    ):
        name, weights = variant, parse_mix(mix)
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
        print("routed to " + ", ".join(f"{variant} {count}" for variant, count in sorted(scores.routed.items())))
