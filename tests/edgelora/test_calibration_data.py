"""Calibration sets: rows of the files in turn, disjoint, repeatable, and only from data that are still the same."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from edgelora.adapters import Adapter, Provenance, write_provenance
from edgelora.calibration_data import find_sources, find_training_data, gather_calibration, hash_data
from edgelora_runtime.errors import InputError
from tests.tiny import make_adapter

if TYPE_CHECKING:
    from pathlib import Path


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def write_rows(path: Path, count: int, mark: str = "q") -> Path:
    rows = [{"prompt": f"{mark}{n}:", "completion": f" {mark}{n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_fit_and_held_out_are_disjoint_and_repeatable(tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{mark}.jsonl", 40, mark) for mark in "ab"]
    one = gather_calibration(files, encode, widest=8)
    assert one == gather_calibration(files, encode, widest=8)
    assert not set(one.fit) & set(one.held_out)
    assert len(one.fit) + len(one.held_out) == 80
    assert len(one.held_out) == 10
    assert one.sources == {path.name: hash_data(path) for path in files}


def test_only_completions_count_and_texts_count_whole(tmp_path: Path) -> None:
    rows = gather_calibration([write_rows(tmp_path / "rows.jsonl", 1)], encode, widest=8)
    (sample,) = rows.held_out
    assert "".join(map(chr, sample.tokens[sample.start :])) == " q0"
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "abc"}\n{"text": "x"}\n')
    found = gather_calibration([texts], encode, widest=8)
    assert [sample.start for sample in (*found.fit, *found.held_out)] == [1]


def test_the_budget_grows_with_the_widest_product(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 9000)
    small, large = (gather_calibration([path], encode, widest=widest).fit_tokens for widest in (8, 20000))
    assert 16384 <= small < 16500
    assert 40000 <= large < 40200


def test_a_text_file_with_something_else_in_it(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "abc"}\n{"prompt": "x"}\n')
    with pytest.raises(InputError, match="text 2"):
        gather_calibration([path], encode, widest=8)


def test_training_data_are_found_while_they_are_the_same(tiny_base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 3)
    folder = tmp_path / "adapters" / "a"
    make_adapter(tiny_base, folder)
    assert find_training_data(Adapter.open(folder)) is None
    write_provenance(
        folder, Provenance("b", "0", "nf4", hash_data(data), 3, "default", 0, 4, 8.0, 1, 1e-3, data_file="../../rows.jsonl")
    )
    adapter = Adapter.open(folder)
    found = find_training_data(adapter)
    assert found is not None and found.resolve() == data
    write_rows(data, 4)
    assert find_training_data(adapter) is None
    assert find_sources({"a": adapter}, data) == ([data], ["a"])
