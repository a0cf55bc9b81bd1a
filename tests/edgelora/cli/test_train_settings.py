"""The options of `edgelora train` are the settings of TrainConfig: names, defaults, values, groups, and those from a file."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from edgelora.cli.app import app
from edgelora.cli.train_options import list_settings, name_flag
from edgelora.in_torch import train as training
from edgelora.in_torch.train import TrainReport
from edgelora.in_torch.train_config import TrainConfig

NEEDED = ["train", "--base", "b", "--data", "d", "--output", "o"]


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """The settings with which a training would have run."""
    seen: list[TrainConfig] = []

    def run(config: TrainConfig, **callbacks: Any) -> TrainReport:
        seen.append(config)
        return TrainReport(config.output, 1, 0, 0, 1, 1.0, 1.0, "0" * 64)

    monkeypatch.setattr(training, "train", run)
    return seen


def call(*arguments: str) -> str:
    done = CliRunner().invoke(app, [*NEEDED, *arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_without_options_the_defaults_of_the_dataclass_hold(configs: list[TrainConfig]) -> None:
    call()
    assert configs == [TrainConfig("b", Path("d"), Path("o"))]


def test_every_setting_is_an_option_with_its_default() -> None:
    command: Any = typer.main.get_command(app)
    options = {option.name: option for option in command.commands["train"].params}
    for setting in fields(TrainConfig):
        option = options[setting.name]
        if setting.name not in ("base", "data", "output"):
            default = setting.default if setting.default is not MISSING else None
            assert option.default == default, setting.name
            assert name_flag(setting) in option.opts
            assert option.hidden == setting.metadata["rare"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--target-modules", "q_proj,v_proj"], {"target_modules": ("q_proj", "v_proj")}),
        (["--target-modules", "all-linear"], {"target_modules": None}),
        (["--validation", "0.05"], {"validation": 0.05}),
        (["--validation", "held-out.jsonl"], {"validation": "held-out.jsonl"}),
        (["--report-to", "tensorboard,wandb"], {"report_to": ("tensorboard", "wandb")}),
        (["--from", "adapters/sql", "--lora-plus", "16"], {"from_adapter": "adapters/sql", "lora_plus": 16.0}),
        (["--dora", "--schedule", "cosine", "--modules-to-save", "lm_head"],
         {"dora": True, "schedule": "cosine", "modules_to_save": ("lm_head",)}),
        (["--template-option", "enable_thinking=false"], {"template_options": {"enable_thinking": False}}),
        (["--resume", "--checkpoint-minutes", "2.5"], {"resume": True, "checkpoint_minutes": 2.5}),
    ],
)  # fmt: skip
def test_options_become_settings(configs: list[TrainConfig], arguments: list[str], expected: dict[str, Any]) -> None:
    call(*arguments)
    assert configs == [TrainConfig("b", Path("d"), Path("o"), **expected)]


def test_an_option_overrides_the_file_also_with_its_default(configs: list[TrainConfig], tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text('rank = 4\nschedule = "cosine"\nvalidation = 0.1\nreport_to = ["wandb"]\n', encoding="utf-8")
    call("--config", str(path), "--rank", "16")
    assert configs == [TrainConfig("b", Path("d"), Path("o"), schedule="cosine", validation=0.1, report_to=("wandb",))]


def test_help_is_grouped_and_all_settings_are_a_table() -> None:
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "100"}).output
    assert set(re.findall(r"─ (.+?) ─", shown)) >= {each.metadata["group"] for each in list_settings()}
    everything = CliRunner().invoke(app, ["train", "--help-all"], env={"COLUMNS": "160"}).output
    for setting in list_settings():
        assert f" {name_flag(setting)} " in everything
        assert (f" {name_flag(setting)} " in shown) != setting.metadata["rare"]
