"""Tensors of safetensors files are read by their own bytes: every type, any rows, and broken files in one line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edgelora_export.base.safetensors_folder import INDEX, SINGLE, SafetensorsFolder
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

TYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a matrix of each type, made of random bytes."""
    folder = tmp_path_factory.mktemp("tensors")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in TYPES:
        kind = getattr(torch, name)
        octets = torch.randint(0, 2 if name == "bool" else 256, (7, 5 * kind.itemsize), dtype=torch.uint8, generator=generator)
        tensors[name] = octets.view(kind)
    tensors["scalar"] = torch.tensor(3.5)
    tensors["cube"] = torch.arange(24.0).reshape(2, 3, 4)
    save_file(tensors, folder / SINGLE)
    return folder


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_read_as_torch_reads_it(folder: Path, name: str) -> None:
    theirs = load_file(folder / SINGLE)[name]
    tensors = SafetensorsFolder.open(folder)
    ours = tensors.read(name)
    assert ours.shape == tensors.shape(name) == (7, 5)
    assert ours.dtype == tensors.dtype(name)
    assert ours.dtype.name == name
    assert ours.tobytes() == theirs.contiguous().view(torch.uint8).numpy().tobytes()


@given(st.sampled_from([*TYPES, "cube"]), st.integers(-9, 9), st.integers(-9, 9))
def test_rows_are_those_of_a_slice(folder: Path, name: str, start: int, stop: int) -> None:
    tensors = SafetensorsFolder.open(folder)
    assert tensors.read_rows(name, start, stop).tobytes() == tensors.read(name)[start:stop].tobytes()
    assert tensors.read_rows(name, start, stop).shape == tensors.read(name)[start:stop].shape


def test_scalars(folder: Path) -> None:
    tensors = SafetensorsFolder.open(folder)
    assert tensors.shape("scalar") == ()
    np.testing.assert_array_equal(tensors.read("scalar"), np.float32(3.5))


def test_a_header_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening the file anew for each tensor costs more than reading a small one."""
    opened: list[Any] = []

    def count(path: Path, framework: str) -> Any:
        opened.append(path)
        return safe_open(path, framework=framework)

    monkeypatch.setattr("edgelora_export.base.safetensors_folder.safe_open", count)
    tensors = SafetensorsFolder.open(folder)
    opened.clear()
    for name in tensors.files:
        tensors.shape(name)
        tensors.read(name)
    assert len(opened) <= 1


def write(folder: Path, content: bytes) -> SafetensorsFolder:
    (folder / SINGLE).write_bytes(content)
    return SafetensorsFolder.open(folder)


def test_a_type_that_numpy_has_not(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 2, dtype=torch.complex64)}, tmp_path / SINGLE)
    tensors = SafetensorsFolder.open(tmp_path)
    with pytest.raises(InputError, match=r"tensor a of .* is stored as C64, which is not supported"):
        tensors.read("a")


def test_a_file_that_is_cut_off(folder: Path, tmp_path: Path) -> None:
    whole = (folder / SINGLE).read_bytes()
    with pytest.raises(InputError, match="is not a readable safetensors file"):
        write(tmp_path, whole[:-1])


def test_a_file_that_becomes_shorter_after_it_was_opened(folder: Path, tmp_path: Path) -> None:
    whole = (folder / SINGLE).read_bytes()
    tensors = write(tmp_path, whole)
    tensors.shape("cube")
    (tmp_path / SINGLE).write_bytes(whole[:1500])
    with pytest.raises(InputError, match="became shorter while it was read"):
        for name in tensors.files:
            tensors.read(name)
    (tmp_path / SINGLE).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        tensors.read("cube")


def test_an_index_that_names_a_tensor_of_another_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes((folder / SINGLE).read_bytes())
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {"cube": "a.safetensors", "lost": "a.safetensors"}}), encoding="utf-8"
    )
    with pytest.raises(InputError, match=r"lost.*model.safetensors.index.json.*download it again"):
        SafetensorsFolder.open(tmp_path).read("lost")
