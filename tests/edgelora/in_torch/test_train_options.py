"""Settings reach the trainer, contradictions are refused, and the validation rows decide what is kept."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image

from edgelora.in_torch.run import optimizers
from edgelora.in_torch.run.estimate import count_steps
from edgelora.in_torch.run.loss_chart import draw_losses
from edgelora.in_torch.train import load_base, train
from edgelora.in_torch.train_config import OPTIMIZERS, REPORTS, SCHEDULES, TrainConfig
from edgelora_export.base.base import Base
from edgelora_runtime.errors import InputError, UsageError
from tests.edgelora.in_torch.mean_loss import mean_loss

if TYPE_CHECKING:
    from pathlib import Path

WORDS = ("cat", "day", "sun", "moon", "mat", "cafe", "one", "two", "three", "four")


def write_rows(path: Path, words: tuple[str, ...] = WORDS) -> Path:
    rows = [{"prompt": f"the {word}\n", "completion": f"{word} sat" * (1 + place % 3)} for place, word in enumerate(words)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path) -> TrainConfig:
    data = write_rows(tmp_path / "rows.jsonl")
    return TrainConfig(str(tiny_base), data, tmp_path / "a", quant="none", rank=2, lr=1e-2, max_steps=4, batch_size=2)


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers that have trained."""
    seen: list[Any] = []
    inner: Any = transformers.Trainer.train

    def record(self: Any, *arguments: Any, **settings: Any) -> Any:
        seen.append(self)
        return inner(self, *arguments, **settings)

    monkeypatch.setattr(transformers.Trainer, "train", record)
    return seen


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains(config: TrainConfig, optimizer: str) -> None:
    train(replace(config, optimizer=optimizer, max_steps=6))
    losses = [entry["loss"] for entry in read_metrics(config.output)]
    assert all(math.isfinite(loss) for loss in losses)
    assert set(optimizers.NAMES) == set(OPTIMIZERS)
    assert optimizers.describe_fallback("adamw") is None


def test_a_paged_optimizer_says_that_it_does_not_page_here(config: TrainConfig) -> None:
    said: list[str] = []
    train(replace(config, optimizer="paged_adamw_8bit", max_steps=1), on_message=said.append)
    line = "optimizer paged_adamw_8bit: bitsandbytes pages on GPUs alone, so here its state stays in memory"
    assert (line in said) == (not torch.cuda.is_available())


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_rise_in_warmup_and_then_take_their_course(config: TrainConfig, schedule: str) -> None:
    train(replace(config, schedule=schedule, max_steps=12, warmup=0.25, lr=1e-3))
    rates = [entry["learning_rate"] for entry in read_metrics(config.output)]
    assert rates[:4] == pytest.approx([0.0, 1e-3 / 3, 2e-3 / 3, 1e-3])
    rest = [place / 9 for place in range(9)]  # after warmup
    expected = {
        "linear": [1e-3 * (1 - share) for share in rest],
        "cosine": [1e-3 * (1 + math.cos(math.pi * share)) / 2 for share in rest],
        "constant": [1e-3] * 9,
        "inverse_sqrt": [1e-3 * math.sqrt(3 / (3 + place)) for place in range(9)],
        "polynomial": [1e-7 + (1e-3 - 1e-7) * (1 - share) for share in rest],
    }
    assert rates[3:] == pytest.approx(expected[schedule])


def test_lora_plus_gives_b_a_higher_rate_and_decay_is_kept(config: TrainConfig, trainers: list[Any]) -> None:
    train(replace(config, lora_plus=8.0, weight_decay=0.25, schedule="constant", warmup=0.0))
    names = {id(parameter): name for name, parameter in trainers[0].model.named_parameters()}
    rates = {
        (names[id(parameter)].split(".")[-3], group["lr"], group["weight_decay"])
        for group in trainers[0].optimizer.param_groups
        for parameter in group["params"]
    }
    assert rates == {("lora_A", 1e-2, 0.25), ("lora_B", 8e-2, 0.25)}


def test_settings_reach_the_trainer(config: TrainConfig, trainers: list[Any]) -> None:
    train(replace(config, accumulation=2, max_grad_norm=0.5, neftune=3.0, gradient_checkpointing=True, weight_decay=0.1))
    arguments = trainers[0].args
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (1, 2)
    assert (arguments.max_grad_norm, arguments.neftune_noise_alpha, arguments.weight_decay) == (0.5, 3.0, 0.1)
    assert arguments.gradient_checkpointing


@pytest.mark.slow
def test_parts_of_a_step_and_recomputed_activations_change_nothing(config: TrainConfig) -> None:
    losses = []
    for number, settings in enumerate(({}, {"accumulation": 2}, {"gradient_checkpointing": True})):
        made = replace(config, output=config.output.with_name(str(number)), **settings)  # type: ignore[arg-type]
        train(made)
        losses.append([entry["loss"] for entry in read_metrics(made.output)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patience": 2}, "patience needs validation; give a file or a share"),
        ({"batch_size": 6, "accumulation": 4}, "batch_size = 6 is not a multiple of accumulation = 4"),
        ({"start": "pissa", "composable": 0}, "start = pissa and composable both decide what A is"),
        ({"start": "olora", "dora": True}, "dora does not go with start = olora"),
        ({"validation": 1.5}, r"validation = 1\.5: use a share, more than 0 and less than 1, or a file"),
        ({"start": "pisa"}, "start = pisa: use one of default, gaussian"),
        ({"report_to": ("tensorbord",)}, r"report_to = tensorbord: use tensorboard, trackio, wandb; did you mean 'tensorboard'"),
        ({"preferences": True, "start": "pissa"}, "preferences compare with the base, which start = pissa leaves"),
        ({"checkpoint_minutes": 0}, "checkpoint_minutes = 0: use more than 0"),
    ],
)
def test_contradictions_are_refused(config: TrainConfig, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(config, **settings)


@pytest.mark.parametrize("name", REPORTS)
def test_a_reporter_that_is_not_installed_is_named(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("edgelora.in_torch.trainer.find_spec", lambda package: None)
    with pytest.raises(UsageError, match=f"report_to = {name}: not installed; run: pip install {name}"):
        train(replace(config, report_to=(name,)))


def test_tensorboard_gets_the_losses(config: TrainConfig) -> None:
    events: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(replace(config, report_to=("tensorboard",)))
    read = events.EventAccumulator(str(config.output.with_name("a.tensorboard")))
    read.Reload()
    losses = [entry["loss"] for entry in read_metrics(config.output)]
    assert [event.value for event in read.Scalars("train/loss")] == pytest.approx(losses)


# --- validation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["best", pytest.param("last", marks=pytest.mark.slow)])
def test_the_adapter_of_the_best_or_the_last_validation_is_kept(config: TrainConfig, tmp_path: Path, keep: str) -> None:
    """Rows that contradict those that are learned, so that the validation loss rises at once."""
    rows = [{"prompt": f"the {word}\n", "completion": "a day in the sun"} for word in WORDS[:4]]
    validation = tmp_path / "validation.jsonl"
    validation.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report = train(replace(config, max_steps=30, lr=3e-2, validation=str(validation), validate_every=3, keep=keep, batch_size=4))
    found = {entry["step"]: entry["eval_loss"] for entry in read_metrics(config.output) if "eval_loss" in entry}
    assert list(found) == list(range(0, 31, 3))
    best = min((loss, step) for step, loss in found.items() if step)[1]
    assert report.kept_step == (best if keep == "best" else 30) != best + (keep == "best")
    assert report.validation_loss == found[report.kept_step]
    model, tokenizer = load_base(Base.open(config.base), "none")
    read: Any = PeftModel.from_pretrained(model, str(config.output)).eval()
    assert mean_loss(read, tokenizer, validation) == pytest.approx(found[report.kept_step], rel=2e-2)


def test_patience_ends_a_run_that_gets_no_better(config: TrainConfig, tmp_path: Path) -> None:
    rows = [{"prompt": f"the {word}\n", "completion": "a day in the sun"} for word in WORDS[:4]]
    validation = tmp_path / "validation.jsonl"
    validation.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"validation": str(validation), "validate_every": 2, "patience": 3}
    report = train(replace(config, max_steps=200, lr=3e-2, batch_size=4, **settings))  # type: ignore[arg-type]
    assert report.steps == report.kept_step + 6 < 200


@pytest.mark.slow
def test_a_share_of_the_rows_is_held_out(config: TrainConfig) -> None:
    report = train(replace(config, validation=0.3, max_steps=10))
    steps = [entry["step"] for entry in read_metrics(config.output) if "eval_loss" in entry]
    assert (report.rows, steps) == (7, list(range(11)))


# --- what a run says and leaves ---------------------------------------------------------------------------------------------


def test_the_estimate_comes_before_the_first_step(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, steps and tokens as they then are."""
    monkeypatch.setattr("edgelora.in_torch.run.estimate._WORTH", 10)
    write_rows(config.data, WORDS * 4)
    said: list[tuple[str, int]] = []
    done: list[int] = []
    long = replace(config, max_steps=None, epochs=1.5, batch_size=4)
    report = train(long, on_message=lambda line: said.append((line, len(done))), on_progress=lambda step, *_: done.append(step))
    assert report.steps == count_steps(long, 40) == 15
    settings, estimate = (line for line, _ in said)
    assert {place for _, place in said} == {0}
    assert settings == (
        "settings: none base; rank 2, alpha 32 on all linear layers; adamw, lr 0.01, linear after 5% warmup; seed 0"
    )
    trained = sum(math.prod(tensor.shape) for tensor in load_factors(config.output))
    assert f"to train: {trained:,} parameters in 15 steps of 4 rows, " in estimate
    assert estimate.endswith("of memory on this machine")
    entries = read_metrics(config.output)
    tokens = int(estimate.split(" rows, ")[1].split(" tokens")[0].replace(",", ""))
    assert entries[-1]["num_tokens"] == pytest.approx(tokens, rel=0.1)


def load_factors(folder: Path) -> list[Any]:
    from safetensors.numpy import load_file

    return list(load_file(folder / "adapter_model.safetensors").values())


def test_a_trial_leaves_the_run_as_it_was(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, dropout=0.2)
    monkeypatch.setattr("edgelora.in_torch.run.estimate._WORTH", 1)
    said: list[str] = []
    train(config, on_message=said.append)
    assert "of memory on this machine" in said[-1]
    monkeypatch.setattr("edgelora.in_torch.run.estimate._WORTH", 10**9)
    train(replace(config, output=config.output.with_name("b")))
    name = "adapter_model.safetensors"
    assert (config.output / name).read_bytes() == (config.output.with_name("b") / name).read_bytes()


def test_the_folder_has_a_card_a_picture_and_metrics(config: TrainConfig) -> None:
    report = train(replace(config, validation=0.3))
    card = ModelCard.load(config.output / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["base_model"]) == ("peft", Base.open(config.base).name)
    assert data["tags"] == ["edgelora", "lora", "sft", f"base_model:adapter:{data['base_model']}"]
    for said in (report.base_sha256, "7 rows, SHA-256", "| seed, processes | 0, 1 |", "![losses over the steps](loss.png)"):
        assert said in card.text
    assert f"| {report.validation_loss:.4f} |" in card.text
    picture = Image.open(config.output / "loss.png")
    assert picture.size == (960, 480)
    colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 16) or []}
    assert {(31, 95, 168), (217, 102, 10)} <= colours
    losses = [entry["loss"] for entry in read_metrics(config.output) if "loss" in entry]
    assert report.train_loss == pytest.approx(sum(losses) / len(losses))


def test_a_picture_shows_where_a_loss_lies() -> None:
    """A line from the top left to the bottom right."""
    picture = Image.open(io.BytesIO(draw_losses([(step, 10.0 - step) for step in range(11)], []))).convert("RGB")
    blue = [(x, y) for x in range(picture.width) for y in range(60, picture.height) if picture.getpixel((x, y)) == (31, 95, 168)]
    left, right = min(blue), max(blue)
    assert left[1] < 70 and right[1] > 400
    assert left[0] < 120 and right[0] > 900


def test_one_step_is_enough_for_a_picture() -> None:
    assert Image.open(io.BytesIO(draw_losses([(1, 2.0)], [(1, 3.0)]))).size == (960, 480)
