"""The files of `edgelora compose report`: figures, a page for people, and a recipe.

The recipe has the variants worth compiling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelora.formatting import format_bytes, to_json
from edgelora.report import palette
from edgelora.report.composition_report import name_mix
from edgelora.report.elements import Html, element, join
from edgelora.report.page import (
    NONE,
    render_chip,
    render_contents,
    render_lines,
    render_note,
    render_page,
    render_section,
    render_table,
)
from edgelora.report.pair_scores import EXCESS, KEPT
from edgelora.report.pictures import HeatMap, draw_heat_maps, format_cell
from edgelora.report.precompiling import render_recipe
from edgelora_export.weights.publish import staged_folder, write_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from edgelora.report.composition_report import CompositionReport, PairReport
    from edgelora.report.pair_scores import TaskScore
    from edgelora.report.palette import Scale
    from edgelora.report.precompiling import Plan

FIGURES, PAGE, RECIPE = "report.json", "report.html", "recipe.toml"
_PREDICTED = (
    " Predicted from the adapters alone, for inputs like those they were likely trained on. "
    "Run it again with --base and --data to measure every pair."
)
_MOST_NAMES = 4  # adapters that the title names
_ENERGY_NOTE = join(
    (
        "How loud the other adapter is on the task's inputs: E‖Δ",
        element("sub", "other"),
        "·x‖² / E‖Δ",
        element("sub", "own"),
        "·x‖².",
    )
)
_ENERGY = ("0: silent", "1 or more: as loud as its own")
_SIGNS = ("−1: opposite", "1: the same direction")
_OVERLAP = ("0: nothing shared", "1: one holds the other")
_SHARE_KEPT = ("0 or less: nothing kept", "1: all of it")


def write_composition(report: CompositionReport, output: Path) -> list[Path]:
    """Writes report.json, report.html and recipe.toml, replacing an older report."""
    recipe = render_recipe(report.plan, report.base, {name: one.folder for name, one in report.adapters.items()}, output)
    files = {FIGURES: to_json(report) + "\n", PAGE: render_composition(report, recipe), RECIPE: recipe}
    with staged_folder(output, marker=FIGURES) as folder:
        for name, text in files.items():
            write_file(folder / name, [text.encode()])
    return [output / name for name in files]


def render_composition(report: CompositionReport, recipe: str) -> Html:
    """The whole page. recipe: the plan as the text of a recipe.toml."""
    sections = {
        "verdicts": ("Merge or route", _render_verdicts(report)),
        "compile": ("Worth compiling", _render_plan(report.plan, recipe)),
        "adapters": ("The adapters", _render_adapters(report)),
        "pairs": ("Adapter against adapter", draw_heat_maps(_compare_adapters(report))),
        "layers": ("Layer by layer", draw_heat_maps(_compare_layers(report))),
    }
    names = [*report.adapters]
    named = ", ".join(names) if len(names) <= _MOST_NAMES else f"{len(names)} adapters"
    base = (" Base: ", element("b", report.base), ".") if report.base else ()
    rows = ", ".join(f"{count} of {name}" for name, count in report.rows.items())
    how = f" Measured on held-out rows: {rows}." if rows else _PREDICTED
    return render_page(
        f"Merge or route: {named}",
        join(("Which of these adapters one merged variant can serve, and what they do to each other.", *base, how)),
        render_contents((key, heading) for key, (heading, _) in sections.items()),
        *(render_section(key, heading, content) for key, (heading, content) in sections.items()),
        context="edgelora",
    )


def _render_verdicts(report: CompositionReport) -> Html:
    note = (
        "Merge: one variant serves both tasks. Route: each adapter needs a variant of its own, and every request goes to one. "
        f"A pair is merged if both tasks keep at least {KEPT:g} of what their adapter does alone. "
    )
    if report.scores:
        note += (
            "What a task keeps is the share of its adapter's gain over the base: in slot F1, or without slots in loss, which "
            f"must also stay within {EXCESS:g} nats per token of the adapter's. A dash: the adapter gains nothing. "
            f"{report.mixes_tried} mixes were tried; the best of each pair is shown, chosen on these same rows."
        )
    basis = "measured" if report.scores else "predicted"
    columns = ("pair", "verdict", "best mix", f"kept, {basis}", "reason")
    return element("div", render_table("Verdicts", columns, map(_list_pair, report.pairs)), render_note(note))


def _list_pair(pair: PairReport) -> list[str]:
    """A row of the table of verdicts."""
    verdict, score = pair.verdict, pair.score
    if score is None:
        mix = name_mix(pair.prediction.weights)
        kept = [f"{name}: {format_cell(share)}" for name, share in pair.prediction.kept.items()]
    else:
        mix = name_mix(score.weights, score.method)
        kept = [
            f"{name}: {format_cell(task.kept)}, loss {format_cell(task.excess, sign=True)}" for name, task in score.tasks.items()
        ]
    chip = render_chip(verdict.choice, solid=verdict.choice == "merge")
    return [pair.name, chip, mix, render_lines(kept), verdict.reason]


def _render_plan(plan: Plan, recipe: str) -> Html:
    rows = [
        [one.name, "merged", name_mix(one.mix, one.method), format_bytes(one.bytes), f"+{one.gain:.2f}"] for one in plan.merged
    ]
    rows += [[name, "live", name_mix({name: 1.0}), NONE, NONE] for name in plan.live]
    rows += [["factors of all adapters", "live", NONE, format_bytes(plan.live_bytes), NONE]] if plan.live else []
    rows += [["base", "merged", "bare base", format_bytes(plan.base_bytes), NONE]] if plan.base_bytes is not None else []
    total = f"{format_bytes(plan.bytes)} in all{'' if plan.base_bytes is not None else ', beside the base'}"
    if plan.budget is not None:
        total += f", {'within' if plan.fits else 'over'} the budget of {format_bytes(plan.budget)}"
    columns = ("variant", "kind", "mix", "size", "adds")
    return element(
        "div",
        render_note(
            f"{total}. Variants are in the order of what they add per byte. "
            "Adds: by how much the variant raises what the tasks keep, summed over the tasks."
        ),
        render_table("Worth compiling", columns, rows, figures=(3, 4)),
        render_note("recipe.toml, beside this page, is this plan as a recipe for edgelora export:"),
        element("pre", recipe, tabindex=0),
    )


def _render_adapters(report: CompositionReport) -> Html:
    rows = [
        [name, str(one.rank), str(one.modules), f"{one.norm:.3g}", f"{one.sha256[:12]}…"] for name, one in report.adapters.items()
    ]
    parts = [render_table("Adapters", ("adapter", "rank", "modules changed", "norm ‖ΔW‖", "sha256"), rows, figures=(1, 2, 3))]
    if report.scores:
        named = {"base": report.base_scores, **report.scores}
        scores = [[name, *(_name_score(row[task]) for task in report.rows)] for name, row in named.items()]
        columns = ("alone", *(f"on {task}" for task in report.rows))
        parts.append(render_table("Scores", columns, scores, figures=range(1, len(columns))))
        parts.append(render_note("Loss in nats per token of the right completions, and slot F1 where these are slots."))
    return element("div", *parts)


def _compare_adapters(report: CompositionReport) -> Iterator[HeatMap]:
    """Draws heat maps with a row per task and a column per mixed-in adapter."""
    names = [*report.adapters]
    pairs = {frozenset(pair.pair): pair for pair in report.pairs}

    def draw(
        title: str, note: str, scale: Scale, ends: tuple[str, str], value: Callable[[PairReport, str], float | None]
    ) -> HeatMap:
        cells = [[value(pairs[frozenset((one, other))], one) if one != other else None for other in names] for one in names]
        return HeatMap(title, note, scale, "task of", names, "mixed with", names, cells, ends)

    yield draw(
        "Kept, predicted",
        "Share of the task adapter's effect on its inputs that the best linear mix of the two should keep.",
        palette.KEPT,
        _SHARE_KEPT,
        lambda pair, name: pair.prediction.kept[name],
    )
    if report.scores:
        yield draw(
            "Kept, measured",
            "Share of the task adapter's gain over the base that the best mix tried keeps; no figure where there is no gain.",
            palette.KEPT,
            _SHARE_KEPT,
            lambda pair, name: pair.score.tasks[name].kept if pair.score else None,
        )
    yield draw(
        "Interference energy",
        _ENERGY_NOTE,
        palette.DISTURBANCE,
        _ENERGY,
        lambda pair, name: pair.prediction.energy[name],
    )
    yield draw(
        "Cosine",
        "Whether the two changes to the weights point the same way, over all modules.",
        palette.SIGN,
        _SIGNS,
        lambda pair, _: pair.overall.cosine,
    )


def _compare_layers(report: CompositionReport) -> Iterator[HeatMap]:
    """Draws heat maps with a column per layer.

    Rows are the pairs, or the tasks of each pair.
    """
    layers = [layer.removeprefix("layer ") for layer in report.layers]

    def draw(title: str, note: str, scale: Scale, ends: tuple[str, str], rows: Mapping[str, list[float | None]]) -> HeatMap:
        return HeatMap(title, note, scale, "pair", [*rows], "layer, from input to output", layers, [*rows.values()], ends)

    def by_pair(value: Callable[[PairReport, str], float | None]) -> dict[str, list[float | None]]:
        return {pair.name: [value(pair, layer) for layer in report.layers] for pair in report.pairs}

    yield draw(
        "Interference energy",
        _ENERGY_NOTE,
        palette.DISTURBANCE,
        _ENERGY,
        {
            f"{name} under {pair.other(name)}": [pair.prediction.layer_energy[name].get(layer) for layer in report.layers]
            for pair in report.pairs
            for name in pair.pair
        },
    )
    yield draw(
        "Opposite signs",
        "Share of the entries that both change noticeably whose signs differ; unrelated changes come to 0.5.",
        palette.DISTURBANCE,
        ("0: all agree", "1: all differ"),
        by_pair(lambda pair, layer: pair.layers[layer].sign_conflict),
    )
    yield draw(
        "Overlap of what they read",
        "How far the input directions of one lie among those of the other.",
        palette.SHARE,
        _OVERLAP,
        by_pair(lambda pair, layer: pair.layers[layer].row_overlap),
    )
    yield draw(
        "Overlap of what they write",
        "How far the output directions of one lie among those of the other.",
        palette.SHARE,
        _OVERLAP,
        by_pair(lambda pair, layer: pair.layers[layer].column_overlap),
    )
    yield draw(
        "Cosine",
        "Whether the two changes to the layer's weights point the same way.",
        palette.SIGN,
        _SIGNS,
        by_pair(lambda pair, layer: pair.layers[layer].cosine),
    )


def _name_score(score: TaskScore) -> str:
    return f"{score.loss:.3f}" + ("" if score.slot_f1 is None else f", F1 {score.slot_f1:.2f}")
