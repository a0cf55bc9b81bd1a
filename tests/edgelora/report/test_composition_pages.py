"""The page of a composition report, from figures given here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgelora.report.composition_pages import render_composition
from edgelora.report.composition_report import AdapterFigures, CompositionReport, PairReport, Prediction, Verdict
from edgelora.report.interference import Interference
from edgelora.report.pair_scores import MixScore, PairScore, TaskScore
from edgelora.report.precompiling import ChosenVariant, Plan
from tests.edgelora.report.parsed_page import Node, check_page

HOSTILE = """"><script>alert('1')</script><img src=x onerror=alert(1)> &amp; </td></table></pre>"""


def make_report(one: str = "sql", other: str = "law", *, measured: bool = True) -> CompositionReport:
    """Two adapters, two layers and a module outside of them."""
    figures = Interference(0.4, 0.35, 0.3, 0.9, 0.2, (3.0, 4.0), 8)
    layers = ("layer 0", "layer 1", "lm_head")
    energies = {"layer 0": 0.25, "layer 1": 12.5}
    pair = PairReport(
        (one, other),
        figures,
        {layer: replace(figures, cosine=cosine) for layer, cosine in zip(layers, (0.5, -0.5, 0.0), strict=True)},
        {},
        Prediction(
            "data",
            {one: 0.5, other: 0.6},
            {one: 0.75, other: -0.25},
            {one: 0.8, other: 1.25},
            {one: energies, other: {**energies, "lm_head": 0.0}},
        ),
        PairScore(
            {one: 0.7, other: 1.0},
            {one: MixScore(1.5, 0.9, 0.9, 0.95, 0.05, 0.95), other: MixScore(2.0, None, None, None, -0.5, None)},
            4,
            "core_tsv",
        )
        if measured
        else None,
        Verdict("merge", "measured", f"{one} keeps 0.95 of its slot F1"),
    )
    scores = {one: TaskScore(1.0, 0.9), other: TaskScore(2.5, None)}
    return CompositionReport(
        "LFM2-1.2B",
        {
            one: AdapterFigures(Path("a"), "0123456789abcdef" * 4, 4, 8, 3.0),
            other: AdapterFigures(Path("b"), "f" * 64, 8, 8, 4.0),
        },
        layers,
        (pair,),
        {one: 30, other: 20} if measured else {},
        scores if measured else {},
        {one: scores, other: scores} if measured else {},
        4 if measured else 0,
        Plan(
            (ChosenVariant("both", {one: 0.7, other: 1.0}, 2048, 1.5, "core_tsv"),), (other,), 5120, 1024, 512, 4096, fits=False
        ),
    )


def read(report: CompositionReport, recipe: str = "base = 1\n") -> Node:
    return check_page(render_composition(report, recipe), {"report.html"})


def section(page: Node, key: str) -> Node:
    return page.one("section", **{"aria-labelledby": key})


def maps(page: Node, key: str) -> dict[str, list[list[str]]]:
    """The cells of a section's heat maps below the columns' names."""
    return {figure.one("h3").text: figure.one("tbody").rows for figure in section(page, key).all("figure")}


def test_verdicts_come_first_with_weights_and_reasons() -> None:
    page = read(make_report())
    assert page.one("h1").text == "Merge or route: sql, law"
    assert "Base: LFM2-1.2B. Measured on held-out rows: 30 of sql, 20 of law." in page.one("header").text
    found = page.all("section")[0]
    assert found.one("table").rows == [
        ["pair", "verdict", "best mix", "kept, measured", "reason"],
        [
            "sql + law",
            "merge",
            "0.7 sql + 1 law by core_tsv",
            "sql: 0.95, loss +0.05law: –, loss −0.50",
            "sql keeps 0.95 of its slot F1",
        ],
    ]
    assert "4 mixes were tried" in found.text and "at least 0.8" in found.text


def test_what_is_worth_compiling_has_sizes_and_the_recipe() -> None:
    found = section(read(make_report(), "[variants]\n"), "compile")
    assert found.one("table").rows[1:] == [
        ["both", "merged", "0.7 sql + 1 law by core_tsv", "2.0 KiB", "+1.50"],
        ["law", "live", "1 law", "–", "–"],
        ["factors of all adapters", "live", "–", "512 B", "–"],
        ["base", "merged", "bare base", "1.0 KiB", "–"],
    ]
    assert "5.0 KiB in all, over the budget of 4.0 KiB." in found.text
    assert found.one("pre").text == "[variants]\n"


def test_adapters_and_what_each_scores_alone() -> None:
    adapters, scores = section(read(make_report()), "adapters").all("table")
    assert adapters.rows[1] == ["sql", "4", "8", "3", "0123456789ab…"]
    assert scores.rows == [
        ["alone", "on sql", "on law"],
        *([name, "1.000, F1 0.90", "2.500"] for name in ("base", "sql", "law")),
    ]


def test_maps_between_adapters() -> None:
    assert maps(read(make_report()), "pairs") == {
        "Kept, predicted": [["sql", "–", "0.75"], ["law", "−0.25", "–"]],
        "Kept, measured": [["sql", "–", "0.95"], ["law", "–", "–"]],
        "Interference energy": [["sql", "–", "0.80"], ["law", "1.25", "–"]],
        "Cosine": [["sql", "–", "0.40"], ["law", "0.40", "–"]],
    }


def test_maps_by_layer() -> None:
    page = read(make_report())
    assert maps(page, "layers") == {
        "Interference energy": [["sql under law", "0.25", "12.5", "–"], ["law under sql", "0.25", "12.5", "0.00"]],
        "Opposite signs": [["sql + law", "0.35", "0.35", "0.35"]],
        "Overlap of what they read": [["sql + law", "0.90", "0.90", "0.90"]],
        "Overlap of what they write": [["sql + law", "0.20", "0.20", "0.20"]],
        "Cosine": [["sql + law", "0.50", "−0.50", "0.00"]],
    }
    columns = section(page, "layers").all("thead")[0].rows[1]
    assert columns == ["0", "1", "lm_head"]


def test_a_report_without_data_says_that_it_predicts() -> None:
    page = read(make_report(measured=False))
    assert "Predicted from the adapters alone" in page.one("header").text
    assert page.all("section")[0].one("table").rows[:2] == [
        ["pair", "verdict", "best mix", "kept, predicted", "reason"],
        ["sql + law", "merge", "0.5 sql + 0.6 law", "sql: 0.75law: −0.25", "sql keeps 0.95 of its slot F1"],
    ]
    assert "mixes were tried" not in page.text
    assert "Kept, measured" not in maps(page, "pairs")
    assert len(section(page, "adapters").all("table")) == 1


@pytest.mark.parametrize("measured", [True, False])
def test_hostile_names_stay_text(measured: bool) -> None:
    report = make_report(HOSTILE, f"b{HOSTILE}", measured=measured)
    hostile = replace(report, base=HOSTILE, layers=(HOSTILE,), pairs=tuple(_rename_layers(pair) for pair in report.pairs))
    page = read(hostile, HOSTILE)
    assert page.one("pre").text == HOSTILE
    assert all(HOSTILE in part.text for part in (page.one("title"), page.one("h1"), page.one("header")))
    assert all(HOSTILE in found.text for found in page.all("section"))


def _rename_layers(pair: PairReport) -> PairReport:
    prediction = replace(pair.prediction, layer_energy={name: {HOSTILE: 1.0} for name in pair.pair})
    return replace(pair, layers={HOSTILE: pair.overall}, prediction=prediction)


def test_many_adapters_are_counted_in_the_title() -> None:
    report = make_report()
    others = {f"adapter-{place}": report.adapters["sql"] for place in range(3)}
    names = [*report.adapters, *others]
    pairs = tuple(
        replace(
            report.pairs[0],
            pair=(one, other),
            prediction=Prediction(
                "data", {one: 1, other: 1}, {one: 1, other: 1}, {one: 1, other: 1}, {one: {"layer 0": 1}, other: {}}
            ),
            score=None,
        )
        for place, one in enumerate(names)
        for other in names[place + 1 :]
    )
    page = read(replace(report, adapters={**report.adapters, **others}, pairs=pairs, scores={}, base_scores={}, rows={}))
    assert page.one("h1").text == "Merge or route: 5 adapters"
    assert len(maps(page, "layers")["Interference energy"]) == 20
