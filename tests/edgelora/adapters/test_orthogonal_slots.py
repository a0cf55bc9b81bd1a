"""Adapters made to be mixed: slots of one orthonormal basis, during training and in the saved adapter."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelora.adapters.folder import Adapter
from edgelora.adapters.orthogonal_slots import basis_rows
from edgelora.in_torch.train import train
from edgelora.in_torch.train_config import TrainConfig
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [{"prompt": f"the {word}\n", "completion": f"{word} sat"} for word in ("cat", "day", "sun")]


@given(st.integers(2, 90), st.data(), st.text(max_size=8))
def test_slots_are_orthogonal_parts_of_one_basis(columns: int, data: st.DataObject, module: str) -> None:
    rank = data.draw(st.integers(1, columns))
    rows = np.concatenate([basis_rows(module, columns, slot, rank) for slot in range(columns // rank)]).astype(np.float64)
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)) * columns / (3 * rank), atol=1e-5 * columns)


def test_modules_have_bases_of_their_own() -> None:
    assert not np.allclose(basis_rows("one", 32, 0, 4), basis_rows("two", 32, 0, 4))


@pytest.mark.parametrize("slot", [-1, 16])
def test_a_slot_that_a_module_lacks_is_refused(slot: int) -> None:
    with pytest.raises(InputError, match="slots 0 to 15"):
        basis_rows("m", 64, slot, 4)


def test_training_leaves_the_slot_as_it_is(tiny_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    adapters = []
    for slot in (0, 1):
        folder = tmp_path / f"slot-{slot}"
        train(TrainConfig(str(tiny_base), data, folder, rank=4, alpha=8, lr=1e-2, max_steps=3, composable=slot))
        adapters.append(Adapter.open(folder))
        assert adapters[-1].provenance is not None
        assert adapters[-1].provenance.init == f"composable: slot {slot}"
    for module in adapters[0].modules:
        (first, b), (second, _) = (adapter.factors(module) for adapter in adapters)
        np.testing.assert_allclose(first, basis_rows(module, first.shape[1], 0, 4), atol=2e-3)  # fp16 on disk
        assert np.abs(first @ second.T).max() < 1e-2
        assert np.abs(b).max() > 0
