"""compose report on tiny adapters: its figures, verdicts, byte counts against a real bundle, plans, and files."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from edgelora.adapters.folder import Adapter
from edgelora.cli.app import main
from edgelora.data.rows import Row
from edgelora.exporting.recipe import read_recipe
from edgelora.in_torch.mixed_model import MixedModel
from edgelora.inspection import describe_bundle
from edgelora.mix.mix import Mix
from edgelora.report.composition_pages import write_composition
from edgelora.report.composition_report import (
    EQUAL_WEIGHTS,
    TSV,
    TSV_WEIGHTS,
    CompositionReport,
    PairReport,
    report_composition,
)
from edgelora.report.output_interference import CANDIDATES
from edgelora.report.pair_scores import EXCESS, KEPT, TaskScore, rate_mix
from edgelora.report.precompiling import (
    GRID,
    Candidate,
    count_base_bytes,
    count_live_bytes,
    count_merged_bytes,
    plan_variants,
    render_recipe,
)
from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_runtime import Bundle
from edgelora_runtime.errors import InputError, UsageError
from tests.edgelora.report.parsed_page import check_page
from tests.tiny import LINEARS, load_base, make_adapter, make_tokenizer

ROWS = [("the cat", " sat on the mat"), ("a day in", " the sun"), ("one two", " three four and the moon")]
SLOTS = [("Größe", " none"), ("one two three", " size = four; day = sun")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, files = tmp_path_factory.mktemp("rows"), {}
    for name, rows in (("plain", ROWS), ("other", SLOTS), ("attention", ROWS[::-1])):
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({"prompt": one, "completion": other}) + "\n" for one, other in rows))
    return files


@pytest.fixture(scope="module")
def adapters(tiny_adapters: dict[str, Path]) -> dict[str, Path]:
    return {name: tiny_adapters[name] for name in ("plain", "other", "attention")}


@pytest.fixture(scope="module")
def progress() -> list[tuple[int, int]]:
    """The steps of `measured`, and how many it said there are."""
    return []


@pytest.fixture(scope="module")
def measured(
    tiny_base: Path, adapters: dict[str, Path], data: dict[str, Path], progress: list[tuple[int, int]]
) -> CompositionReport:
    return report_composition(
        adapters, base=str(tiny_base), data=data, on_progress=lambda done, total, what: progress.append((done, total))
    )


def find(report: CompositionReport, *names: str) -> PairReport:
    return next(pair for pair in report.pairs if pair.pair == names)


def torch_model(base: Path, *adapters: tuple[Path, float]) -> Any:
    """The base with a weighted sum of adapters, which PEFT calls cat."""
    if not adapters:
        return load_base(base)
    model = PeftModel.from_pretrained(load_base(base), str(adapters[0][0]), adapter_name="0")
    for place, (folder, _) in enumerate(adapters[1:], 1):
        model.load_adapter(str(folder), adapter_name=str(place))
    names = [str(place) for place in range(len(adapters))]
    model.add_weighted_adapter(names, [weight for _, weight in adapters], "mix", combination_type="cat")
    model.set_adapter("mix")
    return model.eval()


def torch_loss(model: Any, rows: list[tuple[str, str]]) -> float:
    """Mean negative log likelihood of the completions' tokens, one row at a time."""
    tokenizer, nats, tokens = make_tokenizer(), 0.0, 0
    for prompt, completion in rows:
        whole, start = tokenizer(prompt + completion)["input_ids"], len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0, start - 1 : -1]
        nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(whole[start:]), reduction="sum"))
        tokens += len(whole) - start
    return nats / tokens


def test_the_total_counts_every_step(measured: CompositionReport, progress: list[tuple[int, int]]) -> None:
    assert measured.mixes_tried
    *steps, last = progress
    assert all(done < total for done, total in steps)
    assert last[0] == last[1]


def test_energies_match_those_of_real_inputs(measured: CompositionReport, tiny_base: Path, adapters: dict[str, Path]) -> None:
    """E‖Δ_other·x‖² / E‖Δ·x‖² with the deltas of PEFT, on the inputs that transformers feeds to each layer."""
    model = load_base(tiny_base)
    seen: dict[str, list[Any]] = {}

    def note(name: str, layer: Any, inputs: Any) -> None:
        seen.setdefault(name, []).append(inputs[0][0])

    for name, layer in model.named_modules():
        if name.endswith(LINEARS):
            layer.register_forward_pre_hook(partial(note, name))
    for prompt, completion in ROWS:
        with torch.no_grad():
            model(torch.tensor([make_tokenizer()(prompt + completion)["input_ids"]]))
    energies: dict[tuple[str, str], float] = {}
    for name in ("plain", "other"):
        peft_model: Any = PeftModel.from_pretrained(load_base(tiny_base), str(adapters[name]))
        for module, inputs in seen.items():
            delta = peft_model.get_submodule(f"base_model.model.{module}").get_delta_weight("default").detach()
            energies[name, module] = float(torch.square(torch.cat(inputs) @ delta.T).sum())
    found = find(measured, "plain", "other").prediction
    assert found.inputs == "data"
    for layer in (0, 1):
        own, foreign = (sum(energies[name, module] for module in seen if f".{layer}." in module) for name in ("plain", "other"))
        assert found.layer_energy["plain"][f"layer {layer}"] == pytest.approx(foreign / own, rel=1e-4)
    assert found.energy["plain"] == pytest.approx(np.mean([*found.layer_energy["plain"].values()]))


def test_losses_match_torch(measured: CompositionReport, tiny_base: Path, adapters: dict[str, Path]) -> None:
    assert measured.base_scores["plain"].loss == pytest.approx(torch_loss(torch_model(tiny_base), ROWS), rel=1e-4)
    alone = torch_loss(torch_model(tiny_base, (adapters["other"], 1.0)), SLOTS)
    assert measured.scores["other"]["other"].loss == pytest.approx(alone, rel=1e-4)
    assert measured.scores["other"]["other"].slot_f1 is not None
    assert measured.scores["other"]["plain"].slot_f1 is None
    score = find(measured, "plain", "other").score
    assert score is not None
    assert score.method == "linear"
    mixed = torch_model(tiny_base, *((adapters[name], weight) for name, weight in score.weights.items()))
    assert score.tasks["plain"].loss == pytest.approx(torch_loss(mixed, ROWS), rel=1e-4)


def test_the_shown_mix_is_the_best_of_those_tried(
    measured: CompositionReport, tiny_base: Path, adapters: dict[str, Path]
) -> None:
    pair = find(measured, "plain", "attention")
    assert pair.score is not None
    tries = dict.fromkeys([*((weight, weight) for weight in EQUAL_WEIGHTS), tuple(pair.prediction.weights.values())])
    assert pair.score.tried == len(tries) + len(TSV_WEIGHTS)
    assert measured.mixes_tried == sum(other.score.tried for other in measured.pairs if other.score)
    worst = {}
    for weights in tries:
        model = torch_model(tiny_base, *zip((adapters[name] for name in pair.pair), weights, strict=True))
        losses = {"plain": torch_loss(model, ROWS), "attention": torch_loss(model, ROWS[::-1])}
        worst["linear", weights] = max(losses[name] - measured.scores[name][name].loss for name in losses)
    mixed = MixedModel.open(str(tiny_base))
    rows = {"plain": ROWS, "attention": ROWS[::-1]}
    for weight in TSV_WEIGHTS:
        mixed.set_mix(Mix({name: Adapter.open(adapters[name]) for name in pair.pair}, dict.fromkeys(pair.pair, weight), TSV))
        worst[TSV, (weight, weight)] = max(
            mixed.loss([Row(*row) for row in some]) - measured.scores[name][name].loss for name, some in rows.items()
        )
    assert (pair.score.method, tuple(pair.score.weights.values())) == min(worst, key=lambda each: worst[each])
    assert max(score.excess for score in pair.score.tasks.values()) == pytest.approx(min(worst.values()), rel=1e-4)


def test_a_recipe_names_the_method_of_a_mix_that_is_no_sum(adapters: dict[str, Path], tmp_path: Path) -> None:
    mixes = [Candidate("a-b", {"a": 1.0, "b": 1.0}, {"a": 0.9, "b": 0.97}, 100, TSV), Candidate("a", {"a": 1.0}, {"a": 1.0}, 100)]
    plan = plan_variants(mixes, ["a", "b"], 30, None, None)
    folders = {"a": adapters["plain"], "b": adapters["other"]}
    (tmp_path / "recipe.toml").write_text(render_recipe(plan, "base", folders, tmp_path), encoding="utf-8")
    found = read_recipe(tmp_path / "recipe.toml").variants
    assert {name: variant.method for name, variant in found.items()} == {"base": "linear", "a-b": TSV, "a": "linear"}


def test_pairs_layers_and_modules(measured: CompositionReport, adapters: dict[str, Path]) -> None:
    assert [pair.pair for pair in measured.pairs] == [("plain", "other"), ("plain", "attention"), ("other", "attention")]
    assert measured.layers == ("layer 0", "layer 1")
    pair = find(measured, "plain", "attention")
    module = "model.layers.1.self_attn.k_proj"
    one, other = (Adapter.open(adapters[name]).dense(module).astype(np.float64) for name in pair.pair)
    assert pair.modules[module].cosine == pytest.approx((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))
    assert pair.modules["model.layers.1.mlp.up_proj"].modules == 0
    assert (pair.layers["layer 0"].modules, pair.overall.modules) == (4, 8)
    assert measured.rows == {"plain": 3, "other": 2, "attention": 3}
    assert set(pair.prediction.weights.values()) <= set(CANDIDATES)


def test_without_data_predictions_decide(adapters: dict[str, Path]) -> None:
    report = report_composition(adapters)
    assert report.pairs[0].prediction.inputs == "adapters"
    assert (report.scores, report.mixes_tried, report.pairs[0].score) == ({}, 0, None)
    assert all(pair.verdict.basis == "predicted" for pair in report.pairs)


def test_verdicts_from_adapters_alone(tiny_base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """Near copies merge, as that holds for all inputs. Adapters with disjoint inputs do not: real inputs may reach both."""
    shutil.copytree(adapters["plain"], tmp_path / "copy")
    alike = report_composition({"a": adapters["plain"], "b": tmp_path / "copy"})
    assert alike.pairs[0].verdict.choice == "merge"
    assert sum(alike.pairs[0].prediction.weights.values()) == pytest.approx(1)
    assert [*alike.pairs[0].prediction.kept.values()] == pytest.approx([1, 1])
    for half in (0, 1):
        make_adapter(tiny_base, tmp_path / str(half), seed=half, target_modules=["q_proj", "up_proj"])
        tensors = load_file(tmp_path / str(half) / "adapter_model.safetensors")
        for name in tensors:
            if "lora_A" in name:
                tensors[name][:, half::2] = 0
        save_file(tensors, tmp_path / str(half) / "adapter_model.safetensors")
    apart = report_composition({"a": tmp_path / "0", "b": tmp_path / "1"}).pairs[0]
    assert apart.prediction.energy == {"a": 0, "b": 0}
    assert apart.verdict.choice == "route"
    assert "should keep 0.4" in apart.verdict.reason


def test_a_mix_never_gets_the_name_of_an_adapter(adapters: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(adapters["plain"], tmp_path / "copy")
    same = {"a": adapters["plain"], "b": tmp_path / "copy", "a-b": adapters["other"]}
    assert [variant.name for variant in report_composition(same).plan.merged] == ["a-b-2", "a-b"]


@pytest.mark.parametrize(
    ("mix", "base", "alone", "holds"),
    [
        (TaskScore(0.2, KEPT * 0.7 + 0.001), TaskScore(6.0, 0.0), TaskScore(0.1, 0.7), True),
        (TaskScore(0.2, KEPT * 0.7 - 0.01), TaskScore(6.0, 0.0), TaskScore(0.1, 0.7), False),
        (TaskScore(1.0 + 0.9 * EXCESS, None), TaskScore(2.0, None), TaskScore(1.0, None), True),
        (TaskScore(1.0 + 1.1 * EXCESS, None), TaskScore(9.0, None), TaskScore(1.0, None), False),
        (TaskScore(1.09, None), TaskScore(1.3, None), TaskScore(1.0, None), False),
        (TaskScore(1.0, None), TaskScore(1.0, None), TaskScore(1.0, None), True),
    ],
    ids=["score kept", "score lost", "little loss", "little of the gain, but too much", "much of a small gain", "no gain"],
)
def test_what_a_task_needs(mix: TaskScore, base: TaskScore, alone: TaskScore, holds: bool) -> None:
    rated = rate_mix(mix, base, alone)
    assert rated.holds is holds
    assert rated.excess == pytest.approx(mix.loss - alone.loss)
    if base.loss > alone.loss:
        assert rated.kept_loss == pytest.approx((base.loss - mix.loss) / (base.loss - alone.loss))


def test_bytes_match_those_of_a_bundle(bundle4: Path, tiny_base: Path, tiny_adapters: dict[str, Path]) -> None:
    """The counts match an exported bundle, apart from graphs, padding and products in 8 bits."""
    decoder = read_decoder(Base.open(tiny_base).config)
    bundle = Bundle.open(bundle4)
    described = {variant.name: variant for variant in describe_bundle(bundle).variants}
    for name in ("plain", "attention"):
        graphs = sum(bundle.manifest.files[graph.file].size for graph in bundle.manifest.variants[name].graphs.values())
        wide = set(described[name].int8)
        extra = sum(
            linear.rows * linear.columns // 2 for linear in decoder.linears if linear.name in wide
        )  # 8 bits where 4 were counted
        counted = count_merged_bytes([Adapter.open(tiny_adapters[name])], decoder) + extra
        assert described[name].private_bytes - graphs == pytest.approx(counted, rel=0.02)
    base = described["base"]
    graph = next(iter(bundle.manifest.variants["base"].graphs.values()))
    norms = base.bytes - bundle.manifest.files[graph.file].size - count_base_bytes(decoder)
    tables = decoder.context_length * decoder.head_size * 4  # sines and cosines, float32
    assert norms == pytest.approx(tables, rel=0.05)
    files = [entry.file for entry in bundle.manifest.adapters.values() if entry.file]
    counted = count_live_bytes(Adapter.open(folder) for folder in tiny_adapters.values())
    assert sum(bundle.manifest.files[file].size for file in files) == pytest.approx(counted, rel=0.3)  # headers, in tiny files


def test_bytes_without_the_base_count_modules_alone(tiny_adapters: dict[str, Path]) -> None:
    attention = Adapter.open(tiny_adapters["attention"])
    expected = sum(rows * (GRID.row_bytes(columns) + 4 * columns // 32) for rows, columns, _ in attention.shapes.values())
    assert count_merged_bytes([attention], None) == expected
    both = [attention, Adapter.open(tiny_adapters["plain"])]
    assert count_merged_bytes(both, None) == count_merged_bytes(both[1:], None), "a module that both change is stored once"


CANDIDATES_OF_THREE = [
    Candidate("a", {"a": 1.0}, {"a": 1.0}, 100),
    Candidate("b", {"b": 1.0}, {"b": 1.0}, 100),
    Candidate("c", {"c": 1.0}, {"c": 1.0}, 100),
    Candidate("a-b", {"a": 0.7, "b": 0.7}, {"a": 0.9, "b": 0.97}, 100),
]
PLANS: dict[str, tuple[int | None, int | None, list[str], list[str], int, bool]] = {
    "no limit: the mix first, then what it lost": (None, None, ["a-b", "c", "a"], [], 300, True),
    "room for two": (200, None, ["a-b", "c"], [], 200, True),
    "the base takes its part": (400, 200, ["a-b", "c"], [], 400, True),
    "room for one beside the live ones": (130, None, ["a-b"], ["c"], 130, True),
    "room for the live ones alone": (50, None, [], ["a", "b", "c"], 30, True),
    "no room at all": (20, None, [], ["a", "b", "c"], 30, False),
}


@pytest.mark.parametrize(("budget", "base", "merged", "live", "size", "fits"), PLANS.values(), ids=PLANS.keys())
def test_plans_under_a_budget(
    budget: int | None, base: int | None, merged: list[str], live: list[str], size: int, fits: bool
) -> None:
    plan = plan_variants(CANDIDATES_OF_THREE, ["a", "b", "c"], 30, base, budget)
    assert [variant.name for variant in plan.merged] == merged
    assert (list(plan.live), plan.bytes, plan.fits) == (live, size, fits)
    assert all(one.gain >= other.gain for one, other in zip(plan.merged, plan.merged[1:], strict=False))


def test_files_of_a_report(measured: CompositionReport, tiny_base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """Export can read the recipe, and the page needs no other file."""
    figures, page, recipe = write_composition(measured, tmp_path / "report")
    found = read_recipe(recipe)
    routed = tmp_path / "report" / "routed.toml"
    routed.write_text(recipe.read_text(encoding="utf-8").replace("# [router]", "[router]"), encoding="utf-8")
    assert (found.router, read_recipe(routed).router is not None) == (None, len(found.variants) > 2)
    assert Path(found.base).resolve() == tiny_base.resolve()
    assert {name: path.resolve() for name, path in found.adapters.items()} == {n: p.resolve() for n, p in adapters.items()}
    assert set(found.variants) == {"base", *(variant.name for variant in measured.plan.merged), *measured.plan.live}
    value = json.loads(figures.read_text(encoding="utf-8"))
    assert value["pairs"][0]["verdict"]["choice"] == measured.pairs[0].verdict.choice
    shown = check_page(page.read_text(encoding="utf-8"), {"report.html"})
    assert "plain under other" in shown.text and measured.pairs[0].verdict.reason in shown.text
    assert len(shown.all("figure")) == 9
    write_composition(measured, tmp_path / "report")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").touch()
    with pytest.raises(InputError, match="choose another --output"):
        write_composition(measured, tmp_path / "thesis")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "one adapter": ({"adapters": {"plain": "x"}}, "at least two"),
    "a name that no variant may have": ({"adapters": {"plain": "x", "a b": "x"}}, "adapter a b: use letters"),
    "data without a base": ({"data": {"plain": "x", "other": "x"}}, "--data needs the --base"),
    "data for some": ({"base": "x", "data": {"plain": "x"}}, "adapter other has no --data other=ROWS.jsonl"),
    "data for another": ({"base": "x", "data": {"plain": "x", "other": "x", "c": "x"}}, "--data c=… belongs to no adapter"),
    "no rows": ({"limit": 0}, "limit = 0"),
}


@pytest.mark.parametrize(("change", "mention"), WRONG.values(), ids=WRONG.keys())
def test_arguments_that_do_not_fit_together(change: dict[str, Any], mention: str) -> None:
    with pytest.raises(UsageError, match=mention):
        report_composition(**{"adapters": {"plain": "x", "other": "x"}, **change})


def test_adapters_that_are_not_products_are_refused(tiny_base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    make_adapter(tiny_base, tmp_path / "dora", use_dora=True)
    with pytest.raises(InputError, match=r"dora: .* is DoRA.*compares factors"):
        report_composition({"plain": adapters["plain"], "dora": tmp_path / "dora"})


def test_the_command_line(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgelora", "compose", "report", *arguments, "--output", str(tmp_path / "r")])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capfd.readouterr()

    given = [item for name, folder in adapters.items() for item in ("--adapter", f"{name}={folder}")]
    code, out, err = call(*given, "--disk", "1MiB", "--memory", "1 KiB", "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    assert out == (tmp_path / "r" / "report.json").read_text(encoding="utf-8")
    plan = json.loads(out)["plan"]
    assert (plan["budget"], plan["fits"], plan["merged"]) == (1024, False, [])
    code, out, err = call(*given)
    assert code == 0
    assert "plain + other: route (predicted: " in out
    assert "worth compiling, best first: plain (" in out or "worth compiling, best first: attention (" in out
    code, out, err = call(*given[:2])
    assert (code, out) == (2, "")
    assert "at least two" in err
    assert err.count("\n") == 1
    assert call(*given, "--disk", "much")[0] == 2
