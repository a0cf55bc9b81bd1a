"""The output of `edgelora compose report`: pairs, the adapters' own scores, and mixes worth compiling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelora.cli.terminal import print_line, print_table
from edgelora.formatting import format_bytes

if TYPE_CHECKING:
    from edgelora.report.composition_report import CompositionReport, PairReport
    from edgelora.report.pair_scores import TaskScore
    from edgelora.report.precompiling import Plan

_COLUMNS = ("pair", "cosine", "sign conflict", "row overlap", "energy of the other", "kept, predicted", "measured", "verdict")


def show_composition(report: CompositionReport) -> None:
    """Prints the report on standard output."""
    if report.base_scores:
        columns = ["loss / token, slot F1", *report.rows]
        named = {"base": report.base_scores, **report.scores}
        print_table("", columns, [[name, *map(_name_score, row.values())] for name, row in named.items()])
    print_table("", _COLUMNS, [_describe(pair) for pair in report.pairs])
    for pair in report.pairs:
        print_line(f"{pair.name}: {pair.verdict.choice} ({pair.verdict.basis}: {pair.verdict.reason})")
    if report.mixes_tried:
        print_line(f"{report.mixes_tried} mixes were tried; the best of each pair is shown, chosen on these same rows")
    print_line(_describe_plan(report.plan))


def _describe(pair: PairReport) -> list[str]:
    predicted = pair.prediction
    return [
        pair.name,
        f"{pair.overall.cosine:.2f}",
        f"{pair.overall.sign_conflict:.2f}",
        f"{pair.overall.row_overlap:.2f}",
        " / ".join(f"{predicted.energy[name]:.2f}" for name in pair.pair),
        " / ".join(f"{predicted.kept[name]:.2f}" for name in pair.pair),
        "–" if pair.score is None else " / ".join(_name_share(pair.score.tasks[name].kept) for name in pair.pair),
        pair.verdict.choice,
    ]


def _describe_plan(plan: Plan) -> str:
    merged = ", ".join(f"{variant.name} ({format_bytes(variant.bytes)})" for variant in plan.merged) or "none"
    live = f"; live: {', '.join(plan.live)} ({format_bytes(plan.live_bytes)} for all factors)" if plan.live else ""
    total = format_bytes(plan.bytes)
    total += " beside the base" if plan.base_bytes is None else f", {format_bytes(plan.base_bytes)} of it the base"
    over = "" if plan.fits else f"; this is more than the budget of {format_bytes(plan.budget or 0)}"
    return f"worth compiling, best first: {merged}{live}. {total}{over}"


def _name_score(score: TaskScore) -> str:
    return f"{score.loss:.3f}" + ("" if score.slot_f1 is None else f", {score.slot_f1:.2f}")


def _name_share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
