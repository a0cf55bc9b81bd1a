"""Bases load as transformers loads them or fail in one line, and quiet_libraries silences what it should and restores it."""

from __future__ import annotations

import json
import logging
import warnings
from typing import TYPE_CHECKING, Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.utils import logging as transformers_logging

from edgelora_export.base.base import Base
from edgelora_export.weights.torch_model import load_model, quiet_libraries
from edgelora_runtime.errors import InputError
from tests.multimodal import make_wrapper
from tests.tiny import make_base

if TYPE_CHECKING:
    from pathlib import Path


def read_state() -> tuple[object, ...]:
    levels = [logging.getLogger(name).level for name in ("accelerate", "peft", "trl")]
    bars = transformers_logging.is_progress_bar_enabled(), datasets.is_progress_bar_enabled()
    return logging.root.manager.disable, levels, transformers_logging.get_verbosity(), bars


@pytest.mark.parametrize("whole_process", [True, False])
def test_libraries_are_silent_and_the_app_only_if_asked(
    whole_process: bool, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = read_state()
    with quiet_libraries(whole_process=whole_process):
        print("from the app")
        logging.getLogger("app").warning("from the app")
        logging.getLogger("peft").warning("from PEFT")
        warnings.warn("from a library", stacklevel=1)
        assert not transformers_logging.is_progress_bar_enabled()
        assert not datasets.is_progress_bar_enabled()
    assert capsys.readouterr().out == ("" if whole_process else "from the app\n")
    assert [record.name for record in caplog.records] == ([] if whole_process else ["app"])
    assert read_state() == before


def test_an_error_restores_everything_too() -> None:
    before = read_state()
    with pytest.raises(ValueError, match="within"), quiet_libraries():
        raise ValueError("within")
    assert read_state() == before


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_text_part_loads_in_the_type_asked_for_with_its_generation_settings(dtype: Any, tmp_path: Path) -> None:
    make_wrapper(tmp_path / "base", "llava", torch.bfloat16)
    path = tmp_path / "base" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [1, 7], "max_length": 99}), encoding="utf-8")
    model = load_model(Base.open(tmp_path / "base"), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype or torch.float32}
    assert (model.generation_config.eos_token_id, model.generation_config.max_length) == ([1, 7], 99)
    assert not model.training


def test_a_plain_folder_is_loaded_from_its_path(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    assert load_model(Base.open(tmp_path / "base")).name_or_path == str(tmp_path / "base")


def test_what_transformers_cannot_load_is_one_line(tmp_path: Path) -> None:
    auto: Any = AutoModelForCausalLM
    auto.from_config(GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"n_embd": 16}), encoding="utf-8")
    with pytest.raises(InputError, match="transformers cannot load base") as raised, quiet_libraries():
        load_model(Base.open(tmp_path / "base"))
    assert "\n" not in str(raised.value)
