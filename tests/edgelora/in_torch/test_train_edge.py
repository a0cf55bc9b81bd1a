"""Training's edge: what cannot be trained is refused in time, and what was trained is never lost."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from edgelora.adapters.folder import Adapter, read_provenance
from edgelora.in_torch import save_adapter, train_config
from edgelora.in_torch import train as training
from edgelora.in_torch.target_modules import list_layers
from edgelora.in_torch.train import train
from edgelora.in_torch.train_config import TrainConfig, read_train_config
from edgelora_export.base.base import Base
from edgelora_runtime.errors import EdgeloraError, InputError, ResourceError
from tests.tiny import load_base, make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [{"prompt": f"the {word}\n", "completion": f"{word} sat"} for word in ("cat", "day", "sun", "moon")]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path) -> TrainConfig:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    return TrainConfig(
        str(tiny_base), data, tmp_path / "adapter", quant="none", rank=2, alpha=4, lr=1e-3, max_steps=1, batch_size=2
    )


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(base: str, quant: str) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(training, "load_base", fail)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "q_prj"), r"no layer of the base is named 'q_prj'; near are q_proj, .*; it has .*down_proj"),
        (("query_key_value",), "'query_key_value'"),
        (("layers.9.self_attn.q_proj",), "'layers.9.self_attn.q_proj'; near are .*self_attn.q_proj"),
        (("proj",), "'proj'"),
        ((), "target_modules is empty"),
    ],
)
def test_unknown_target_modules_are_named_with_near_ones(config: TrainConfig, targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(replace(config, target_modules=targets))
    assert not config.output.exists()


def test_layers_are_those_of_the_loaded_model(tiny_base: Path) -> None:
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    loaded = [name for name, module in load_base(tiny_base).named_modules() if isinstance(module, kinds)]
    assert list_layers(Base.open(tiny_base).config) == loaded


def test_parts_of_names_and_the_embedding_can_be_targets(config: TrainConfig) -> None:
    train(replace(config, target_modules=("layers.1.self_attn.q_proj", "embed_tokens")))
    assert set(Adapter.open(config.output).modules) == {"model.layers.1.self_attn.q_proj", "model.embed_tokens"}


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a \\ud800 b", "completion": "c"}', r"line 1: prompt holds \\ud800, half of a surrogate pair"),
        ('{"prompt": "a", "completion": "\\udfff"}', r"line 1: completion holds \\udfff"),
        (
            '{"messages": [{"role": "user", "content": "\\udc00"}, {"role": "assistant", "content": "a"}]}',
            r"line 1 holds \\udc00",
        ),
    ],
)
def test_halves_of_surrogate_pairs_are_named(config: TrainConfig, row: str, message: str) -> None:
    config.data.write_text(row + "\n")
    with pytest.raises(InputError, match=message):
        train(config)


def test_long_rows_are_cut_or_left_out_and_counted(config: TrainConfig) -> None:
    """A row is left out if its prompt alone fills max_length."""
    tokenizer = make_tokenizer()
    rows = [
        {"prompt": "the cat", "completion": " sat"},
        {"prompt": "the cat", "completion": " sat on the mat" * 40},
        {"prompt": "a day in the sun" * 40, "completion": " sat"},
    ]
    lengths = [[len(tokenizer(text)["input_ids"]) for text in (row["prompt"], row["prompt"] + row["completion"])] for row in rows]
    assert [prompt > 32 for prompt, _ in lengths] == [False, False, True]
    assert [whole > 32 for _, whole in lengths] == [False, True, True]
    write_rows(config.data, rows)
    report = train(replace(config, max_length=32))
    assert (report.rows, report.rows_cut, report.rows_left_out) == (3, 1, 1)
    provenance = read_provenance(config.output)
    assert provenance is not None
    assert (provenance.data_rows, provenance.rows_cut, provenance.rows_left_out) == (3, 1, 1)


@pytest.mark.usefixtures("no_loading")
def test_rows_that_are_all_too_long_are_refused_before_the_base_is_loaded(config: TrainConfig) -> None:
    first = len(make_tokenizer()("the cat" * 40)["input_ids"]) + 1
    write_rows(config.data, [{"prompt": "the cat" * 40, "completion": "x"}, {"prompt": "a day" * 400, "completion": "y"}])
    with pytest.raises(InputError, match=rf"max_length = 32; the nearest is its token {first}; raise max_length"):
        train(replace(config, max_length=32))


def test_a_loss_that_is_not_finite_ends_the_run(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    load = training.load_held_base

    def load_broken(base: Base, quant: str, **more: Any) -> Any:
        model = load(base, quant, **more)
        model.lm_head.weight.data[5] = float("nan")
        return model

    monkeypatch.setattr(training, "load_held_base", load_broken)
    with pytest.raises(InputError, match="training diverged: the loss is nan at step 1; lower --lr"):
        train(replace(config, max_steps=3))
    assert not config.output.exists()


def test_a_learning_rate_that_blows_up_ends_the_run(config: TrainConfig) -> None:
    with pytest.raises(InputError, match="training diverged"):
        train(replace(config, lr=1e38, max_steps=8, warmup=0.0))
    assert [path.name for path in config.output.parent.iterdir()] == ["rows.jsonl"]


@pytest.mark.usefixtures("no_loading")
def test_an_output_that_cannot_be_is_refused_before_training(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"exists and is not a folder with adapter_config\.json"):
        train(replace(config, output=tmp_path / "file"))
    with pytest.raises(OSError, match="file"):
        train(replace(config, output=tmp_path / "file" / "adapter"))


def test_a_full_disk_is_found_before_training(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(config.data.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    steps: list[int] = []
    with pytest.raises(ResourceError, match="the adapter needs 1 MiB, but the disk of"):
        train(config, on_progress=lambda done, total, what: steps.append(done))
    assert steps == []
    assert not config.output.exists()


# --- what fails late keeps the adapter --------------------------------------------------------------------------------------


def fail_with(error: Exception) -> Any:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("place", ["save_adapter", "write_provenance", "write_records"])
@pytest.mark.parametrize(
    ("error", "kind"), [(OSError(28, "No space left on device"), ResourceError), (RuntimeError("odd"), EdgeloraError)]
)
def test_late_failures_keep_the_adapter(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception, kind: type[EdgeloraError]
) -> None:
    monkeypatch.setattr(training, place, fail_with(error))
    with pytest.raises(kind, match=r"the trained adapter is kept in .*adapter\.kept") as raised:
        train(config)
    assert "\n" not in str(raised.value)
    assert not config.output.exists()
    kept = config.output.with_name("adapter.kept")
    monkeypatch.undo()
    train(config)
    for name in Adapter.open(config.output).modules:
        for one, other in zip(Adapter.open(kept).factors(name), Adapter.open(config.output).factors(name), strict=True):
            assert (one == other).all()
    assert read_provenance(kept) is not None
    assert sorted(path.name for path in config.output.parent.iterdir()) == ["adapter", "adapter.kept", "rows.jsonl"]


def test_a_refused_rename_keeps_the_adapter_beside_an_earlier_one(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config.output.with_name("adapter.kept").mkdir()
    monkeypatch.setattr("edgelora_export.weights.publish.replace_folder", fail_with(PermissionError(13, "denied")))
    with pytest.raises(ResourceError, match=r"denied.*; the trained adapter is kept in .*adapter\.kept-2"):
        train(config)
    assert len(Adapter.open(config.output.with_name("adapter.kept-2")).modules) == 14


def test_factors_too_large_for_fp16_are_saved_in_fp32(config: TrainConfig, tiny_base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_base(tiny_base), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    large = dict(model.named_parameters())["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    large.data[0, 0] = 1e6
    save_adapter.save_adapter(model, tmp_path / "large")
    a, _ = Adapter.open(tmp_path / "large").factors("model.layers.0.self_attn.q_proj")
    assert float(a[0, 0]) == 1e6


# --- settings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('target_modules = "q_proj"', r"target_modules = 'q_proj' is not tuple\[str, \.\.\.\] \| None"),
        ('rank = "8"', "rank = '8' is not int"),
        ("rank = true", "rank = True is not int"),
        ("rslora = 1", "rslora = 1 is not bool"),
        ("template_options = 3", "template_options = 3 is not Mapping"),
        ("rank = 1.5\nlr = []", r"rank = 1.5 is not int; lr = \[\] is not float"),
    ],
)
def test_wrong_types_in_a_config_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "train.toml"
    path.write_text(text + "\n")
    with pytest.raises(InputError, match=message):
        read_train_config(path)


def test_every_field_can_stand_in_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text(
        'base = "b"\ndata = "d"\noutput = "o"\nquant = "none"\nrank = 1\nalpha = 2\nepochs = 1.5\nlr = 1e-3\n'
        "max_steps = 1\nseed = 0\nbatch_size = 1\nwarmup = 0\ndropout = 0.0\nrslora = true\ntarget_modules = []\nmax_length = 9\n"
        "gradient_checkpointing = false\ncomposable = 1\naccumulation = 1\nschedule = 'cosine'\noptimizer = 'adamw'\n"
        "weight_decay = 0.1\nmax_grad_norm = 1\nlora_plus = 16\nneftune = 5\nmodules_to_save = ['lm_head']\ndora = true\n"
        "start = 'eva'\nfrom_adapter = 'a'\npreferences = false\nbeta = 0.1\nvalidation = 0.05\nvalidate_every = 10\n"
        "patience = 3\nkeep = 'best'\ncheckpoint_every = 50\ncheckpoint_minutes = 10\nresume = true\nreport_to = ['wandb']\n"
        "log_every = 5\nmerge_aware = false\npacking = true\nformat = 'auto'\n[template_options]\nenable_thinking = false\n"
    )
    assert set(read_train_config(path)) == set(train_config.TrainConfig.__dataclass_fields__)
