"""compose learn on a tiny base: what it learns and writes, reproducibility by seed, and errors for bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel

from edgelora.adapters.folder import Adapter
from edgelora.composing.compose import compose
from edgelora.data.rows import Row, read_rows
from edgelora.in_torch.mixed_model import MixedModel
from edgelora.in_torch.reference import write_completions
from edgelora.in_torch.train import train
from edgelora.in_torch.train_config import TrainConfig
from edgelora.learn.distillation import distillation_loss, encode_rows, write_rows
from edgelora.learn.learn import GRAINS, LearnConfig, learn
from edgelora.mix.mix import Mix
from edgelora_runtime.errors import InputError
from tests.tiny import load_base, make_tokenizer, torch_logits

WORDS = ("cat", "day", "sun", "moon", "mat", "cafe")
TASKS = {"sat": ("the {}\n", "{} sat"), "one": ("one {}\n", " two {}")}


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LearnConfig, dict[str, Path]]:
    """Two adapters of small tasks, trained on four words, and rows with the other two."""
    folder = tmp_path_factory.mktemp("learning")
    adapters, labelled = {}, {}
    for name, (prompt, completion) in TASKS.items():
        lines = [json.dumps({"prompt": prompt.format(word), "completion": completion.format(word)}) + "\n" for word in WORDS]
        (folder / f"{name}.jsonl").write_text("".join(lines[:4]))
        labelled[name] = folder / f"{name}.labelled.jsonl"
        labelled[name].write_text("".join(lines[4:]))
        adapters[name] = folder / name
        config = TrainConfig(
            str(tiny_base), folder / f"{name}.jsonl", adapters[name], rank=4, lr=1e-2, max_steps=40, batch_size=4
        )
        train(config)
    return LearnConfig(str(tiny_base), adapters, folder / "out", steps=30, batch_size=4), labelled


def measure(config: LearnConfig, labelled: dict[str, Path]) -> float:
    model = MixedModel.open(config.base)
    model.set_mix(Mix({"only": Adapter.open(config.output)}, {"only": 1.0}))
    return sum(model.loss(read_rows(path)) for path in labelled.values())


def test_regmean_alone_learns_nothing_and_beats_the_mean(trained: tuple[LearnConfig, dict[str, Path]], tmp_path: Path) -> None:
    config, _ = trained
    report = learn(replace(config, output=tmp_path / "regmean"))
    assert (report.rows, report.weights, report.loss, report.rank, report.modules) == ({}, 0, None, 8, 14)
    own = {name: config.output.parent / f"{name}.jsonl" for name in TASKS}
    compose({name: (folder, 0.5) for name, folder in config.adapters.items()}, tmp_path / "mean")
    kept, mean = (measure(replace(config, output=tmp_path / name), own) for name in ("regmean", "mean"))
    assert kept < 0.7 * mean
    provenance = Adapter.open(tmp_path / "regmean").provenance
    assert provenance is not None
    assert provenance.init == "learned: one + sat (regmean)"


def test_the_teacher_is_the_adapter_in_peft(trained: tuple[LearnConfig, dict[str, Path]]) -> None:
    """The teacher's probabilities are PEFT's, at every token of the completion and at the end."""
    config, labelled = trained
    rows = read_rows(labelled["sat"])
    model: Any = PeftModel.from_pretrained(load_base(Path(config.base)), config.adapters["sat"]).eval()
    examples = encode_rows(MixedModel.open(config.base), Adapter.open(config.adapters["sat"]), rows)
    for row, example in zip(rows, examples, strict=True):
        tokenizer = make_tokenizer()
        assert tokenizer.decode(example.tokens[example.start :]).strip() == f"{row.completion}</s>".strip()
        wanted = torch_logits(model, example.tokens)[example.start - 1 : -1]
        wanted = wanted - np.log(np.exp(wanted.astype(np.float64)).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(example.teacher.float().numpy(), wanted, atol=0.05)  # fp16, for values down to -40


def test_every_adapter_counts_the_same(trained: tuple[LearnConfig, dict[str, Path]]) -> None:
    """Regardless of the length of its completions."""
    config, labelled = trained
    model = MixedModel.open(config.base)
    short, long = (
        encode_rows(model, Adapter.open(config.adapters[name]), rows)
        for name, rows in (("sat", read_rows(labelled["sat"])[:1]), ("one", [Row("one moon\n", " two moon" * 9)]))
    )
    model.set_stacks({})
    both, first, second = (distillation_loss(model, batch, 0.7).item() for batch in ([short, long], [short], [long]))
    assert abs(first - second) > 0.1
    assert both == pytest.approx((first + second) / 2, rel=1e-5)


def test_an_adapter_writes_what_peft_writes_and_sees_no_label(trained: tuple[LearnConfig, dict[str, Path]]) -> None:
    config, _ = trained
    rows = [Row(row.prompt, label) for label in ("x", "y") for row in read_rows(config.output.parent / "sat.jsonl")]
    model, adapter = MixedModel.open(config.base), Adapter.open(config.adapters["sat"])
    written = write_rows(model, adapter, rows, 3, 0)
    peft: Any = PeftModel.from_pretrained(load_base(Path(config.base)), adapter.folder).eval()
    assert 1 <= len({row.prompt for row in written}) == len(written) <= 3
    assert [row.completion for row in written] == write_completions(peft, model.encoder, written, 64)


def test_what_adapters_write_makes_it_better(trained: tuple[LearnConfig, dict[str, Path]], tmp_path: Path) -> None:
    config, _ = trained
    config = replace(config, start="linear")
    own = {name: config.output.parent / f"{name}.jsonl" for name in TASKS}
    report = learn(replace(config, written=4, output=tmp_path / "written"))
    compose({name: (folder, 0.5) for name, folder in config.adapters.items()}, tmp_path / "mean")
    written, mean = (measure(replace(config, output=tmp_path / name), own) for name in ("written", "mean"))
    assert written < 0.7 * mean
    assert report.rows == {}
    provenance = Adapter.open(tmp_path / "written").provenance
    assert provenance is not None
    assert provenance.init == "learned: one + sat (linear, factors weights on 8 rows, 8 of them written by the adapters)"


@pytest.mark.parametrize("grain", GRAINS)
def test_labels_make_it_better(trained: tuple[LearnConfig, dict[str, Path]], tmp_path: Path, grain: str) -> None:
    config, labelled = trained
    config = replace(config, start="linear", grain=grain)
    ends = []
    for steps in (1, config.steps):
        learn(replace(config, labelled=labelled, steps=steps, output=tmp_path / f"{steps}", lr=1e-9 if steps == 1 else None))
        ends.append(measure(replace(config, output=tmp_path / f"{steps}"), labelled))
    assert ends[1] < 0.95 * ends[0]


def test_the_same_seed_writes_the_same_factors(trained: tuple[LearnConfig, dict[str, Path]], tmp_path: Path) -> None:
    config, labelled = trained
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        learn(replace(config, labelled=labelled, rows=1, steps=3, seed=seed, output=tmp_path / name))
    first, again, other = (Adapter.open(tmp_path / name) for name in "abc")
    module = min(first.modules)
    np.testing.assert_array_equal(first.dense(module), again.dense(module))
    assert not np.array_equal(first.dense(module), other.dense(module))


def test_rows_that_were_trained_on_are_noted(trained: tuple[LearnConfig, dict[str, Path]], tmp_path: Path) -> None:
    config, _ = trained
    notes: list[str] = []
    seen = {"sat": config.output.parent / "sat.jsonl"}
    learn(replace(config, labelled=seen, steps=1, output=tmp_path / "m"), on_note=notes.append)
    assert len(notes) == 1
    assert notes[0].startswith("4 of the labelled rows")


def test_bad_input_is_reported_in_one_line(trained: tuple[LearnConfig, dict[str, Path]], tiny_adapters: dict[str, Path]) -> None:
    config, _ = trained
    with pytest.raises(InputError, match="grain = entry: use one of"):
        replace(config, grain="entry", rows=0)
    with pytest.raises(InputError, match="written = -1: use 0 or more"):
        replace(config, written=-1)
    with pytest.raises(InputError, match="names of adapters: sat, one"):
        replace(config, labelled={"two": config.output})
    with pytest.raises(InputError, match="without labelled rows"):
        learn(replace(config, start="linear"))
    with pytest.raises(InputError, match="other, plain: the training rows"):
        learn(replace(config, adapters={"plain": tiny_adapters["plain"], "other": tiny_adapters["other"]}))
    assert not config.output.exists()
