"""quiet_libraries silences what it should, lets the app through where asked, and restores everything."""

from __future__ import annotations

import logging
import warnings

import datasets
import pytest
from transformers.utils import logging as transformers_logging

from edgelora_export.weights.torch_model import quiet_libraries


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
