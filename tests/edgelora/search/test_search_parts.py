"""The parts of a search that need no model: rows, search space, trial log and objective."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgelora.adapters.folder import Adapter, Provenance, write_provenance
from edgelora.data.calibration import hash_data
from edgelora.data.rows import Row
from edgelora.data.scores import count_scores, main_score
from edgelora.exporting.recipe import read_recipe
from edgelora.mix.methods import MIX_METHODS
from edgelora.search.config import DISTINCT_METHODS, SearchConfig
from edgelora.search.held_out import hash_row, is_test_file, read_held_out
from edgelora.search.objective import Objective
from edgelora.search.report import render_recipe
from edgelora.search.space import Point, is_within, list_initial_points, propose, read_point
from edgelora.search.trial_log import Trial, TrialLog
from edgelora.search.trials import choose_best
from edgelora.search.workers import plan_workers
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

ROWS = [Row(f"question {number}", f" answer {number}") for number in range(20)]


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(vars(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def config(**settings: Any) -> SearchConfig:
    """Settings for two adapters."""
    folders = {"adapters": {"a": Path("a"), "b": Path("b")}, "data": {"a": Path("a.jsonl")}}
    return SearchConfig(**{"base": "base", "output": Path("out"), "budget": 20, **folders, **settings})


@pytest.mark.parametrize(
    ("name", "is_test"),
    [
        ("x.test.jsonl", True),
        ("test.jsonl", True),
        ("test-2.jsonl", True),
        ("sql_Test_split.jsonl", True),
        ("TESTSET.jsonl", True),
        ("test/rows.jsonl", True),
        ("latest.jsonl", False),
        ("testimonials.jsonl", False),
        ("contest.jsonl", False),
        ("test/held-out/rows.jsonl", False),
    ],
)
def test_names_of_test_splits(name: str, is_test: bool) -> None:
    assert is_test_file(Path("/data") / name) == is_test


def test_a_test_split_is_refused_by_its_name_and_by_that_of_what_a_link_leads_to(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.test.jsonl", ROWS)
    with pytest.raises(InputError, match="test split by its name"):
        read_held_out({"a": path}, {}, 0.5, print)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "held-out.jsonl").symlink_to(path)
    with pytest.raises(InputError, match="test split by its name"):
        read_held_out({"a": tmp_path / "elsewhere" / "held-out.jsonl"}, {}, 0.5, print)


@pytest.mark.parametrize("disguise", ["copy", "part", "respelt", "diluted"])
def test_a_test_split_under_another_name_is_refused_by_its_rows(disguise: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.test.jsonl", ROWS)
    rows = {
        "copy": ROWS,
        "part": ROWS[5:9],
        "respelt": [Row(f"  {str(row.prompt).upper()}", row.completion.replace(" ", "  ")) for row in ROWS],
        "diluted": [*ROWS, *(Row(f"other {number}", " x") for number in range(400))],
    }[disguise]
    with pytest.raises(InputError, match=r"a=.*held-out.jsonl: \d+ of its \d+ rows are among the 20 of .*a\.test\.jsonl"):
        read_held_out({"a": write_rows(tmp_path / "held-out.jsonl", rows)}, {}, 0.5, print)


def test_a_test_split_beside_an_adapters_training_data(tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    """Wherever the data are."""
    train = write_rows(tmp_path / "far" / "sql.train.jsonl", ROWS[:10])
    write_rows(tmp_path / "far" / "sql.test.jsonl", ROWS[10:])
    folder = shutil.copytree(tiny_adapters["plain"], tmp_path / "adapter")
    origin = Provenance("b", "b" * 64, "nf4", hash_data(train), 10, "", 0, 4, 8.0, 1, 1e-3, "../far/sql.train.jsonl")
    write_provenance(folder, origin)
    adapters = {"sql": Adapter.open(folder, "sql")}
    with pytest.raises(InputError, match=r"far/sql\.test\.jsonl"):
        read_held_out({"sql": write_rows(tmp_path / "near" / "rows.jsonl", ROWS[12:])}, adapters, 0.5, print)
    notes: list[str] = []
    read_held_out({"sql": write_rows(tmp_path / "near" / "rows.jsonl", ROWS[:4])}, adapters, 0.5, notes.append)
    assert notes == ["sql: sql was trained on 4 of 4 rows, so its figures there are optimistic"]


def test_rows_that_a_test_split_has_by_chance_are_left_out(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.test.jsonl", [ROWS[3], *(Row(f"tested {number}", " x") for number in range(20))])
    (tmp_path / "b.test.jsonl").write_text("not rows\n")
    notes: list[str] = []
    found = read_held_out({"a": write_rows(tmp_path / "a.jsonl", ROWS)}, {}, 0.25, notes.append)["a"]
    assert ROWS[3] not in found.searched + found.confirmed
    assert len(found.searched + found.confirmed) == 19
    assert notes[0].startswith(f"{tmp_path / 'b.test.jsonl'} is not compared")
    assert notes[1].startswith("a: 1 of 20 rows are also in")


def test_the_split_depends_on_the_rows_alone(tmp_path: Path) -> None:
    one = read_held_out({"a": write_rows(tmp_path / "1.jsonl", ROWS)}, {}, 0.3, print)["a"]
    other = read_held_out({"a": write_rows(tmp_path / "2.jsonl", [*ROWS[::-1], ROWS[4]])}, {}, 0.3, print)["a"]
    assert one == other
    assert one.sha256 == other.sha256
    assert (len(one.searched), len(one.confirmed)) == (14, 6)
    assert not {*map(hash_row, one.searched)} & {*map(hash_row, one.confirmed)}
    assert read_held_out({"a": tmp_path / "1.jsonl"}, {}, 0.0, print)["a"].confirmed == ()
    with pytest.raises(InputError, match="too few"):
        read_held_out({"a": write_rows(tmp_path / "3.jsonl", ROWS[:1])}, {}, 0.5, print)


@pytest.mark.parametrize(
    ("settings", "mention"),
    [
        ({"budget": 4}, "budget = 4"),
        ({"adapters": {"a": Path("a")}}, "adapters = a: use two"),
        ({"adapters": {"a b": Path("a"), "c": Path("c")}}, "adapters = a b: use letters"),
        ({"data": {}}, "data = none"),
        ({"methods": ("linear", "linear")}, "methods = linear, linear"),
        ({"methods": ("nope",)}, "methods = nope"),
        ({"weights": (1.0, 0.5)}, "weights = 1.0, 0.5"),
        ({"weights": (0.0, math.inf)}, "weights = 0.0, inf"),
        ({"density": (0.0, 0.5)}, "density = 0.0, 0.5"),
        ({"scale": (-1.0, 0.5)}, "scale = -1.0, 0.5"),
        ({"objective": "f1"}, "objective = f1"),
        ({"sampler": "cma"}, "sampler = cma"),
        ({"confirm": 1.0}, "confirm = 1.0"),
        ({"parallel": 0}, "parallel = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"max_tokens": 0}, "max_tokens = 0"),
    ],
)
def test_wrong_settings_are_all_named(settings: dict[str, Any], mention: str) -> None:
    with pytest.raises(InputError) as caught:
        config(**{"seed": -7, **settings})
    assert mention in str(caught.value)
    assert "seed = -" in str(caught.value)


def test_the_first_points() -> None:
    """The base, each adapter alone at weight 1, and equal weights by each method."""
    points = [read_point(config(), parameters) for parameters in list_initial_points(config())]
    assert [tuple(point.weights.values()) for point in points] == [(0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5)]
    many = config(methods=("ties", "dare_linear"), weights=(0.2, 0.6), scale=(2.0, 3.0), density=(0.5, 0.7), seed=9)
    points = [read_point(many, parameters) for parameters in list_initial_points(many)]
    assert {point.method for point in points[:3]} == {"linear"}, "which leaves an adapter as it is"
    assert points[1] == Point({"a": 1.0, "b": 0.0})
    assert points[3:] == [
        Point({"a": 1.0, "b": 1.0}, "ties", {"density": 0.5}),
        Point({"a": 1.0, "b": 1.0}, "dare_linear", {"density": 0.5, "seed": 9}),
    ]
    assert [is_within(many, parameters) for parameters in list_initial_points(many)] == [False, False, False, True, True]


@pytest.mark.parametrize(("weights", "equal"), [((0.6, 0.8), 0.8), ((-0.9, -0.1), -0.9), ((-0.3, 0.3), -0.3), ((0.2, 0.5), 0.5)])
def test_equal_weights_are_never_none(weights: tuple[float, float], equal: float) -> None:
    narrow = config(weights=weights)
    assert [set(read_point(narrow, point).weights.values()) for point in list_initial_points(narrow)[3:]] == [{equal}]


@pytest.mark.parametrize(
    ("machines", "parallel", "count", "share"),
    [
        ([{"CPU": 8.0}], 2, 2, {"num_cpus": 4}),
        ([{"CPU": 2.0}], 4, 2, {"num_cpus": 1}),
        ([{"CPU": 4.0}, {"CPU": 6.0}, {"memory": 1.0}], 1, 1, {"num_cpus": 4}),
        ([{"CPU": 3.0}, {"CPU": 3.0}], 3, 2, {"num_cpus": 2}),
        ([{"CPU": 8.0, "GPU": 2.0}], 3, 2, {"num_cpus": 1, "num_gpus": 1}),
    ],
)
def test_no_worker_asks_for_more_than_there_is(machines: Any, parallel: int, count: int, share: Any) -> None:
    assert plan_workers(machines, parallel) == (count, share)
    with pytest.raises(InputError, match="no CPU cores"):
        plan_workers([{"memory": 1.0}], parallel)


def test_all_methods_are_those_that_differ() -> None:
    assert set(MIX_METHODS) - set(DISTINCT_METHODS) == {"svd", "tsv", "iso_c"}


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_proposals_lie_in_the_ranges_and_depend_on_trials_and_seed_alone(sampler: str) -> None:
    if sampler == "gp":
        pytest.importorskip("scipy")
    wide = config(methods=("linear", "ties"), weights=(-0.5, 0.9), scale=(0.5, 2.0), sampler=sampler)
    tried = [(parameters, float(number)) for number, parameters in enumerate(list_initial_points(wide))]
    for _ in range(8):
        tried.append((propose(wide, tried, 1)[0], -float(len(tried))))
    assert all(is_within(wide, parameters) for parameters, _ in tried[5:])
    assert len({str(parameters) for parameters, _ in tried}) == len(tried)
    batch = propose(wide, tried, 3)
    assert batch == propose(wide, list(tried), 3)
    assert len({str(parameters) for parameters in batch}) == 3
    assert batch != propose(config(**{**vars(wide), "seed": 1}), tried, 3)


def test_more_trials_come_nearer_to_the_best() -> None:
    """On a parabola of three weights, proposals beat as many random trials."""
    three = config(adapters={name: Path(name) for name in "abc"}, sampler="tpe")
    best = np.array([0.9, 0.4, 0.6])

    def value(parameters: Any) -> float:
        return -float(np.sum((np.array([*read_point(three, parameters).weights.values()]) - best) ** 2))

    tried = [(parameters, value(parameters)) for parameters in list_initial_points(three)]
    while len(tried) < 40:
        parameters = propose(three, tried, 1)[0]
        tried.append((parameters, value(parameters)))
    drawn = np.random.default_rng(0).uniform(0, 1.5, (1000, 34, 3))
    chance = np.median((-((drawn - best) ** 2).sum(axis=2)).max(axis=1))
    assert max(found for _, found in tried) > chance


def trial(number: int, parameters: Any, **losses: float) -> Trial:
    return Trial(number, parameters, {task: (loss * 10, 10.0) for task, loss in losses.items()})


def test_what_is_chosen_never_keeps_less_than_equal_weights_or_an_adapter_alone() -> None:
    first = list_initial_points(config())
    losses = [(4.0, 4.0), (1.0, 5.0), (5.0, 1.0), (2.0, 2.0), (2.5, 2.5)]
    trials = [trial(number, first[number], a=a, b=b) for number, (a, b) in enumerate(losses)]
    objective = Objective.read(trials[0].quotients, {"a": trials[1].quotients, "b": trials[2].quotients}, higher_is_better=False)
    best, equal = choose_best(config(), trials, objective)
    assert (best.number, equal.number) == (3, 3)
    worse = trial(5, {"method": "linear", "weight a": 0.3, "weight b": 0.7}, a=3.0, b=3.0)
    assert choose_best(config(), [*trials, worse], objective)[0].number == 3
    better = trial(5, {"method": "linear", "weight a": 0.3, "weight b": 0.7}, a=1.1, b=1.1)
    assert choose_best(config(), [*trials, better], objective)[0].number == 5
    alone = [trials[0], trial(1, first[1], a=1.0, b=1.0), *trials[2:]]
    assert choose_best(config(), alone, objective)[0].number == 1
    narrow = config(weights=(0.5, 1.0))
    assert choose_best(narrow, alone, objective)[0].number == 3, "an adapter alone has a weight of 0"


def test_shares_kept_and_the_interval_of_a_difference() -> None:
    objective = Objective.read(
        {"a": 4.0, "b": 0.2, "c": 3.0},
        {"a": {"a": 2.0, "b": 0.3, "c": 2.8}, "b": {"a": 5.0, "b": 0.1, "c": 2.5}},
        higher_is_better=False,
    )
    assert objective.change == pytest.approx({"a": 2.0, "b": 0.1, "c": 0.5}), "c has no adapter of its own"
    assert objective.kept({"a": 3.0, "b": 0.1, "c": 3.5}) == pytest.approx((0.5 + 1.0 - 1.0) / 3)
    generator = np.random.default_rng(1)
    rows = {task: np.stack([generator.gamma(4, 2, 400), np.full(400, 3.0)], axis=1) for task in "abc"}
    moved = {task: found + [[0.3, 0]] * generator.normal(1, 1, (400, 1)) for task, found in rows.items()}
    difference, low, high = objective.difference(rows, moved, seed=0)
    per_row = np.stack([(moved[task] - rows[task])[:, 0] / 3 / objective.change[task] for task in "abc"])
    assert difference == pytest.approx(per_row.mean())
    spread = (
        np.sqrt((per_row.var(axis=1) / 400).sum()) / 3
    )  # all rows have the same number of tokens, so a normal interval of the mean applies
    assert (low, high) == pytest.approx((difference - 1.96 * spread, difference + 1.96 * spread), rel=0.06)
    with pytest.raises(InputError, match=r"b: the adapter b reaches 0.3, and the base alone 0.2"):
        Objective.read({"b": 0.2}, {"b": {"b": 0.3}}, higher_is_better=False)
    scores = Objective.read({"b": 0.2}, {"b": {"b": 0.7}}, higher_is_better=True)
    assert scores.kept({"b": 0.45}) == pytest.approx(0.5)


def test_counts_of_rows_are_the_main_score() -> None:
    right = ["from = a; to = b", "none", "day = mon"]
    written = ["to = b; from = c", "day = x", "day = mon"]
    for texts in ((written, right), (["x", " y "], ["x", "y"]), (["x", "y"], ["x", "z"])):
        counts = np.array(count_scores(*texts))
        assert counts[:, 0].sum() / counts[:, 1].sum() == pytest.approx(main_score(*texts))
    assert count_scores(written, right) == [(2, 4), (0, 1), (2, 2)]


def test_a_trial_log_keeps_trials_and_refuses_another_plan(tmp_path: Path) -> None:
    plan = {"weights": (0.0, 1.5), "data": {"a": "1"}}
    trial_log = TrialLog(tmp_path / "s", plan)
    first = trial(0, {"method": "linear", "weight a": 1 / 3}, a=0.1)
    trial_log.add(first)
    assert TrialLog(tmp_path / "s", plan).trials == {0: first}
    with pytest.raises(InputError, match=r"another|other data, seed"):
        TrialLog(tmp_path / "s", {**plan, "data": {"a": "2"}, "seed": 1})
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").touch()
    with pytest.raises(InputError, match="choose another --output"):
        TrialLog(tmp_path / "thesis", plan)


def test_a_line_that_a_kill_cut_short_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "s" / "trials.jsonl"
    for number in range(2):
        TrialLog(tmp_path / "s", {}).add(trial(number, {"method": "linear"}, a=1.0))
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 7), len(whole) - 1, len(whole)):
        path.write_bytes(whole[:length])
        trial_log = TrialLog(tmp_path / "s", {})
        assert list(trial_log.trials) == list(range(whole[:length].count(b"\n") - 1))
        for number in range(len(trial_log.trials), 2):
            trial_log.add(trial(number, {"method": "linear"}, a=1.0))
        assert path.read_bytes() == whole


def test_the_recipe_is_one_that_export_reads(tmp_path: Path) -> None:
    point = Point({"sql": 0.621, "my.adapter": -0.3}, "dare_ties", {"density": 0.45, "seed": 3})
    (tmp_path / "r.toml").write_text('base = "b"\n' + render_recipe({"sql": Path("a/sql"), "my.adapter": Path('c "d"')}, point))
    recipe = read_recipe(tmp_path / "r.toml")
    variant = recipe.variants["mix"]
    assert (variant.mix, variant.method, variant.density, variant.seed) == (point.weights, "dare_ties", 0.45, 3)
