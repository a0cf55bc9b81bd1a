"""compose search on a tiny model: never worse than the initial points, reproducible, and continued after a kill."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from peft import PeftModel

from edgelora.adapters.folder import WEIGHTS, Adapter
from edgelora.data.rows import Row, read_rows
from edgelora.in_torch.mixed_model import MixedModel
from edgelora.mix.mix import Mix
from edgelora.search.config import SearchConfig
from edgelora.search.held_out import read_held_out
from edgelora.search.run import REPORT, search
from edgelora.search.trial_log import TRIALS_FILE
from edgelora_runtime.errors import InputError, MissingExtraError
from tests.edgelora.cli.test_cli import call as call  # a fixture
from tests.tiny import load_base, make_adapter, make_base

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.edgelora.cli.test_cli import Result

ROOT = Path(__file__).resolve().parents[3]
WORDS = ("the", "cat", "sat", "on", "mat", "a", "day", "in", "sun", "and", "moon", "one", "two", "three", "four")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base, three adapters, and for each the rows of a random pool whose likelihood it raises most."""
    folder = tmp_path_factory.mktemp("search")
    make_base(folder / "base", hidden_size=32, intermediate_size=48, num_attention_heads=2)
    draw = random.Random(0)
    pool = [Row(" ".join(draw.choices(WORDS, k=3)), " " + " ".join(draw.choices(WORDS, k=4))) for _ in range(150)]
    model = MixedModel.open(str(folder / "base"))
    base = model.losses(pool)[:, 0]
    adapters, data = {}, {}
    for seed, name in enumerate(("one", "two", "three")):
        make_adapter(folder / "base", folder / name, seed=seed, size=0.2)
        adapters[name], data[name] = folder / name, folder / f"{name}.jsonl"
        model.set_mix(Mix({name: Adapter.open(folder / name)}, {name: 1.0}))
        gains = base - model.losses(pool)[:, 0]
        likelier = sorted(range(len(pool)), key=lambda place: -gains[place])[:16]
        data[name].write_text("".join(json.dumps(vars(pool[place])) + "\n" for place in likelier))
    return {"base": str(folder / "base"), "adapters": adapters, "data": data}


def options(inputs: dict[str, Any], *more: object) -> list[str]:
    """The command line's arguments."""
    pairs = [("--adapter", f"{name}={folder}") for name, folder in inputs["adapters"].items()]
    pairs += [("--data", f"{name}={path}") for name, path in inputs["data"].items()]
    return ["compose", "search", "--base", inputs["base"], *(item for pair in pairs for item in pair), *map(str, more)]


def read_trials(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / TRIALS_FILE).read_text().splitlines()[1:]]


def test_the_best_is_written_and_never_worse_than_the_initial_points(inputs: dict[str, Any], tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    report = search(SearchConfig(**inputs, output=tmp_path / "s", budget=16), on_progress=lambda *step: steps.append(step))
    assert report.configurations == len(read_trials(tmp_path / "s")) == 16
    assert report.resumed == 0
    assert steps[-1][:2] == (16, 16)
    assert "best keeps" in steps[-2][2]
    stored = json.loads((tmp_path / "s" / REPORT).read_text())
    kept = [item["kept"] for item in stored["trials"]]
    assert kept[0] == 0
    assert report.best.searched == max(kept[1:]) == kept[report.best.trial]
    assert report.equal.searched == max(kept[4:6])
    assert report.best.searched > report.equal.searched, "the search found something"
    assert stored["report"]["best"]["mix"]["weights"] == dict(report.best.mix.weights)
    assert stored["budget"] == 16
    assert report.interval[0] <= report.difference <= report.interval[1]
    assert report.difference == pytest.approx(report.best.kept - report.equal.kept)


def test_the_adapter_that_is_written_does_what_the_report_says(inputs: dict[str, Any], tmp_path: Path) -> None:
    """In PEFT, on the rows kept out of the search."""
    report = search(SearchConfig(**inputs, output=tmp_path / "s", budget=10))
    rows = read_held_out(inputs["data"], {}, 0.5, print)
    peft = MixedModel(
        PeftModel.from_pretrained(load_base(Path(inputs["base"])), str(report.adapter)), MixedModel.open(inputs["base"]).tokenizer
    )
    for task, found in rows.items():
        assert report.rows[task] == (len(found.searched), len(found.confirmed)) == (8, 8)
        assert peft.loss(found.confirmed) == pytest.approx(report.best.figures[task], rel=1e-4)


def test_the_same_search_finds_the_same_and_another_seed_tries_others(inputs: dict[str, Any], tmp_path: Path) -> None:
    settings = {**inputs, "budget": 11, "methods": ("linear", "ties", "dare_linear"), "weights": (-0.2, 1.2)}
    one, other, third = (
        search(SearchConfig(**settings, output=tmp_path / name, seed=seed)) for name, seed in (("1", 0), ("2", 0), ("3", 1))
    )
    assert read_trials(tmp_path / "1") == read_trials(tmp_path / "2")
    assert (one.best, one.interval) == (other.best, other.interval)
    assert (one.adapter / WEIGHTS).read_bytes() == (other.adapter / WEIGHTS).read_bytes()
    assert read_trials(tmp_path / "3")[8:] != read_trials(tmp_path / "1")[8:]
    assert third.configurations == 11
    assert {item["parameters"]["method"] for item in read_trials(tmp_path / "1")[4:8]} == {"linear", "ties", "dare_linear"}


def test_methods_that_no_rank_holds_are_measured_as_written(inputs: dict[str, Any], tmp_path: Path) -> None:
    report = search(SearchConfig(**inputs, output=tmp_path / "s", budget=8, methods=("ties",), weights=(0.5, 1.5)))
    assert report.largest_error > 0.01
    rows = read_held_out(inputs["data"], {}, 0.5, print)
    model = MixedModel.open(inputs["base"])
    model.set_mix(Mix({"written": Adapter.open(report.adapter)}, {"written": 1.0}))
    kept = [
        (read_base(report, task) - model.loss(found.confirmed)) / read_span(tmp_path / "s", task) for task, found in rows.items()
    ]
    assert report.written_kept == pytest.approx(sum(kept) / 3, rel=1e-4)


def read_base(report: Any, task: str) -> float:
    return float(report.base[task])


def read_span(folder: Path, task: str) -> float:
    """The gain of the task's own adapter over the base on the search's rows, from the trial log."""
    place = 1 + ["one", "two", "three"].index(task)
    base, own = (read_trials(folder)[number]["figures"][task] for number in (0, place))
    return float(base[0] / base[1] - own[0] / own[1])


@pytest.mark.slow
def test_a_larger_budget_continues_and_repeats_no_trial(inputs: dict[str, Any], tmp_path: Path) -> None:
    search(SearchConfig(**inputs, output=tmp_path / "s", budget=9, parallel=2))
    longer = search(SearchConfig(**inputs, output=tmp_path / "s", budget=14, parallel=2))
    assert (longer.configurations, longer.resumed) == (14, 9)
    at_once = search(SearchConfig(**inputs, output=tmp_path / "t", budget=14, parallel=2))
    assert read_trials(tmp_path / "s") == read_trials(tmp_path / "t")
    assert longer.best == at_once.best
    before = (tmp_path / "s" / TRIALS_FILE).read_bytes()
    again = search(SearchConfig(**inputs, output=tmp_path / "s", budget=14, parallel=2))
    assert again.resumed == 14
    assert again.best == longer.best
    assert (tmp_path / "s" / TRIALS_FILE).read_bytes() == before
    fewer = search(SearchConfig(**inputs, output=tmp_path / "s", budget=7, parallel=2))
    assert (fewer.configurations, fewer.resumed) == (7, 7)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_search_continues_with_the_same_trials(inputs: dict[str, Any], tmp_path: Path) -> None:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    command = [
        sys.executable,
        "-m",
        "edgelora",
        *options(inputs, "--budget", 500, "--sampler", "tpe", "--output", tmp_path / "s"),
    ]
    trial_log = tmp_path / "s" / TRIALS_FILE
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL) as process:
        while not trial_log.exists() or trial_log.read_bytes().count(b"\n") < 9:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    done = len(read_trials(tmp_path / "s")) if trial_log.read_bytes().endswith(b"\n") else trial_log.read_bytes().count(b"\n") - 1
    assert 8 <= done < 500
    settings = {**inputs, "budget": done + 4, "sampler": "tpe"}
    report = search(SearchConfig(**settings, output=tmp_path / "s"))
    assert (report.configurations, report.resumed) == (done + 4, done)
    search(SearchConfig(**settings, output=tmp_path / "t"))
    assert read_trials(tmp_path / "s") == read_trials(tmp_path / "t")


def test_another_plan_is_refused(inputs: dict[str, Any], tmp_path: Path) -> None:
    search(SearchConfig(**inputs, output=tmp_path / "s", budget=7))
    before = (tmp_path / "s" / TRIALS_FILE).read_bytes()
    first_rows = {**inputs["data"], "one": tmp_path / "rows.jsonl"}
    first_rows["one"].write_text("".join(json.dumps(vars(row)) + "\n" for row in read_rows(inputs["data"]["one"])[:10]))
    for settings, named in (
        ({"seed": 1}, "seed"),
        ({"weights": (0.0, 2.0), "methods": ("ties",)}, "methods, weights"),
        ({"data": first_rows}, "data"),
        ({"adapters": {**inputs["adapters"], "one": inputs["adapters"]["two"]}}, "adapters"),
    ):
        with pytest.raises(InputError, match=f"a search with other {named};"):
            search(SearchConfig(**{**inputs, **settings, "output": tmp_path / "s", "budget": 7}))
    assert (tmp_path / "s" / TRIALS_FILE).read_bytes() == before


def test_the_score_of_what_is_written(inputs: dict[str, Any], tmp_path: Path) -> None:
    """Rows that each adapter completes exactly: alone it scores 1, and the base scores less."""
    model = MixedModel.open(inputs["base"])
    data = {}
    for name, folder in inputs["adapters"].items():
        model.set_mix(Mix({name: Adapter.open(folder)}, {name: 1.0}))
        rows = read_rows(inputs["data"][name])
        texts = model.write(rows, max_tokens=3)
        data[name] = tmp_path / f"{name}.jsonl"
        written = [Row(row.prompt, text) for row, text in zip(rows, texts, strict=True) if text.strip()]
        data[name].write_text("".join(json.dumps(vars(row)) + "\n" for row in written))
    settings = {**inputs, "data": data, "objective": "score", "max_tokens": 3, "confirm": 0.0}
    report = search(SearchConfig(**settings, output=tmp_path / "s", budget=8))
    assert [report.adapters[name][name] for name in data] == [1.0, 1.0, 1.0]
    assert max(report.base.values()) < 1
    assert all(kept == 0 for _, kept in report.rows.values())
    assert report.best.searched == pytest.approx(report.best.kept), "without rows kept out it is measured on those searched on"
    assert report.best.searched >= 1 / 3 - 1e-9


def test_without_optuna_the_extra_is_named(inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"edgelora\[search\]"):
        search(SearchConfig(**inputs, output=tmp_path / "s", budget=7))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"edgelora\[ray\]"):
        search(SearchConfig(**inputs, output=tmp_path / "s", budget=7, address="local"))
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtraError, match=r"scipy .*edgelora\[search\]"):
        search(SearchConfig(**inputs, output=tmp_path / "t", budget=7, sampler="gp"))


def test_adapters_that_no_mix_is_written_of(inputs: dict[str, Any], tmp_path: Path) -> None:
    make_adapter(Path(inputs["base"]), tmp_path / "dora", use_dora=True)
    settings = {**inputs, "adapters": {**inputs["adapters"], "dora": tmp_path / "dora"}}
    with pytest.raises(InputError, match=r"dora: model\.layers\.0\S+ is DoRA"):
        search(SearchConfig(**settings, output=tmp_path / "s", budget=9))
    assert not (tmp_path / "s").exists()


def test_the_command_line(call: Callable[..., Result], inputs: dict[str, Any], tmp_path: Path) -> None:
    found = call(*options(inputs, "--budget", 8, "--output", tmp_path / "s", "--weights", "-0.5:1.5", "--json"))
    assert found.code == 0, found.err
    assert found.json["configurations"] == 8
    assert set(found.json["best"]["mix"]["weights"]) == {"one", "two", "three"}
    shown = call(*options(inputs, "--budget", 8, "--output", tmp_path / "s", "--weights=-0.5:1.5"))
    assert "8 configurations tried, 8 of them in earlier runs" in shown.out
    assert "[variants.mix]" in shown.out
    assert "95% interval" in shown.out


@pytest.mark.parametrize(
    ("more", "code", "mention"),
    [
        (["--budget", "3"], 3, "budget = 3"),
        (["--budget", "8", "--method", "nope"], 2, "--method 'nope': use one of"),
        (["--budget", "8", "--weights", "1"], 2, "for example 0:1.5"),
        (["--budget", "8", "--weights", "0:much"], 2, "'much' is not a number"),
        (["--budget", "8", "--weights", "1:0"], 3, "weights = 1.0, 0.0"),
        (["--budget", "8", "--density", "0:1"], 3, "density = 0.0, 1.0"),
        (["--budget", "8", "--adapter", "one=x"], 2, "one is given twice"),
        (["--budget", "8", "--data", "rows.jsonl"], 3, "rows.jsonl does not exist"),
        (["--budget", "8", "--data", "four=TMP/x.test.jsonl"], 3, "test split by its name"),
        (["--budget", "8", "--ray", "127.0.0.1:1", "--parallel", "0"], 3, "parallel = 0"),
        ([], 2, "--budget"),
    ],
)
def test_wrong_calls(
    call: Callable[..., Result], inputs: dict[str, Any], tmp_path: Path, more: list[str], code: int, mention: str
) -> None:
    more = [item.replace("TMP", str(tmp_path)) for item in more]
    found = call(*options(inputs, *more, "--output", tmp_path / "s"), "--json")
    assert found.code == code, found.err
    assert mention in found.json["error"]
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_trials_on_ray_are_those_of_one_process(inputs: dict[str, Any], tmp_path: Path) -> None:
    settings = {**inputs, "budget": 12, "parallel": 2}
    on_ray = search(SearchConfig(**settings, output=tmp_path / "r", address="local"))
    here = search(SearchConfig(**settings, output=tmp_path / "l"))
    key = lambda item: item["trial"]  # noqa: E731
    assert sorted(read_trials(tmp_path / "r"), key=key) == read_trials(tmp_path / "l")
    assert on_ray.best == here.best
    with pytest.raises(InputError, match="no Ray cluster at nowhere"):
        search(SearchConfig(**settings, output=tmp_path / "x", address="nowhere"))
