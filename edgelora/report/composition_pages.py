"""A composition report for people: a table in the terminal; a page of heat maps, the figures and a recipe in a folder."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from edgelora.formatting import format_bytes, to_json
from edgelora.report.pictures import draw_heat_map, render_page, render_table
from edgelora.report.precompiling import render_recipe
from edgelora_export.weights.publish import staged_folder, write_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from edgelora.report.composition_report import CompositionReport, PairReport
    from edgelora.report.pair_scores import TaskScore
    from edgelora.report.precompiling import Plan

FIGURES, PAGE, RECIPE = "report.json", "report.html", "recipe.toml"


def write_composition(report: CompositionReport, output: Path) -> list[Path]:
    """Writes report.json, report.html and recipe.toml into a folder, in place of an older report there."""
    recipe = render_recipe(report.plan, report.base, {name: one.folder for name, one in report.adapters.items()}, output)
    files = {FIGURES: to_json(report) + "\n", PAGE: _render(report, recipe), RECIPE: recipe}
    with staged_folder(output, marker=FIGURES) as folder:
        for name, text in files.items():
            write_file(folder / name, [text.encode()])
    return [output / name for name in files]


def show_composition(
    report: CompositionReport, print_table: Callable[[str, Sequence[str], Sequence[Sequence[str]]], None]
) -> None:
    """Prints a line per pair, the adapters' own scores, and what is worth compiling."""
    if report.base_scores:
        columns = ["loss / token, slot F1", *report.rows]
        named = {"base": report.base_scores, **report.scores}
        print_table("", columns, [[name, *map(_name_score, row.values())] for name, row in named.items()])
    columns = ["pair", "cosine", "sign conflict", "row overlap", "energy of the other", "kept, predicted", "measured", "verdict"]
    print_table("", columns, [_describe(pair) for pair in report.pairs])
    for pair in report.pairs:
        print(f"{_name(pair)}: {pair.verdict.choice} ({pair.verdict.basis}: {pair.verdict.reason})")
    if report.mixes_tried:
        print(f"{report.mixes_tried} mixes were tried, the best of each pair is shown, chosen on these very rows")
    print(_describe_plan(report.plan))


def _describe(pair: PairReport) -> list[str]:
    predicted = pair.prediction
    return [
        _name(pair),
        f"{pair.overall.cosine:.2f}",
        f"{pair.overall.sign_conflict:.2f}",
        f"{pair.overall.row_overlap:.2f}",
        " / ".join(f"{predicted.energy[name]:.2f}" for name in pair.pair),
        " / ".join(f"{predicted.kept[name]:.2f}" for name in pair.pair),
        "–" if pair.score is None else " / ".join(_share(pair.score.tasks[name].kept) for name in pair.pair),
        pair.verdict.choice,
    ]


def _describe_plan(plan: Plan) -> str:
    merged = ", ".join(f"{variant.name} ({format_bytes(variant.bytes)})" for variant in plan.merged) or "none"
    live = f"; live: {', '.join(plan.live)} ({format_bytes(plan.live_bytes)} for all factors)" if plan.live else ""
    beside = " beside the base" if plan.base_bytes is None else f", {format_bytes(plan.base_bytes)} of it the base"
    over = "" if plan.fits else f"; this is more than the budget of {format_bytes(plan.budget or 0)}"
    return f"worth compiling, best first: {merged}{live}. {format_bytes(plan.bytes)}{beside}{over}"


def _render(report: CompositionReport, recipe: str) -> str:
    names = [*report.adapters]
    verdicts = [(_name(pair), pair.verdict.choice, pair.verdict.basis, pair.verdict.reason) for pair in report.pairs]
    pairs = {frozenset(pair.pair): pair for pair in report.pairs}

    def by_layer(title: str, value: Callable[[PairReport, str], float | None]) -> str:
        cells = [[value(pair, layer) for layer in report.layers] for pair in report.pairs]
        return draw_heat_map(title, [_name(pair) for pair in report.pairs], report.layers, cells)

    def by_adapter(title: str, value: Callable[[PairReport, str], float | None]) -> str:
        cells = [[value(pairs[frozenset((one, other))], one) if one != other else None for other in names] for one in names]
        return draw_heat_map(title, names, names, cells)

    sides = [(pair, name) for pair in report.pairs for name in pair.pair]
    parts = [
        render_table(verdicts),
        draw_heat_map(
            "Interference energy by layer: how loud the other adapter is on the first one's inputs, 1 is as loud as itself",
            [f"{name} under {_other(pair, name)}" for pair, name in sides],
            report.layers,
            [[pair.prediction.layer_energy[name].get(layer) for layer in report.layers] for pair, name in sides],
        ),
        by_layer("Share of entries with opposite signs by layer", lambda pair, layer: pair.layers[layer].sign_conflict),
        by_layer("Overlap of what is read, by layer", lambda pair, layer: pair.layers[layer].row_overlap),
        by_layer("Overlap of what is written, by layer", lambda pair, layer: pair.layers[layer].column_overlap),
        by_layer("Cosine of the deltas by layer", lambda pair, layer: pair.layers[layer].cosine),
        by_adapter("Interference energy: row under column", lambda pair, name: pair.prediction.energy[name]),
        by_adapter("Cosine", lambda pair, _: pair.overall.cosine),
        by_adapter("Predicted share that the row's task keeps in the mix", lambda pair, name: pair.prediction.kept[name]),
    ]
    if report.scores:
        parts.append(
            by_adapter("Measured share that it keeps", lambda pair, name: pair.score.tasks[name].kept if pair.score else None)
        )
        parts.append(_render_scores(report))
    parts.append(f"<h2>Worth compiling</h2><p>{escape(_describe_plan(report.plan))}</p><pre>{escape(recipe)}</pre>")
    return render_page("Composition report", *parts)


def _render_scores(report: CompositionReport) -> str:
    """The base and each adapter alone, on every task."""
    header: Sequence[str] = ["", *report.rows]
    named: Mapping[str, Sequence[str]] = {
        "base": [_name_score(score) for score in report.base_scores.values()],
        **{name: [_name_score(score) for score in row.values()] for name, row in report.scores.items()},
    }
    return "<h2>Loss per token and slot F1</h2>" + render_table([header, *([name, *row] for name, row in named.items())])


def _name(pair: PairReport) -> str:
    return " + ".join(pair.pair)


def _other(pair: PairReport, name: str) -> str:
    return pair.pair[1] if name == pair.pair[0] else pair.pair[0]


def _name_score(score: TaskScore) -> str:
    return f"{score.loss:.3f}" + ("" if score.slot_f1 is None else f", {score.slot_f1:.2f}")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
