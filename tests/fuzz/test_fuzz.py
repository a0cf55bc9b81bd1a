"""The fuzz harnesses: each takes its seeds and some hundred changes of them without a finding. atheris is not needed."""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING

import pytest

from edgelora_runtime import InputError
from tests.fuzz.harness import NAMES, Harness, Judge, build_harness, join_parts, read_peak, split_parts
from tests.fuzz.mutations import mutate_bytes, mutate_json, mutate_safetensors

if TYPE_CHECKING:
    from pathlib import Path

# Changes that the quick tests try, by what one costs. The slow ones try so many times more.
QUICK = {"manifest": 60, "graph": 60, "adapter": 80, "template": 30, "tokenizer": 60, "recipe": 150, "prompts": 80, "request": 30}
MORE = 30


def count_findings(name: str, folder: Path, changes: int) -> dict[str, bytes]:
    """Uses the seeds of a harness and changes of them, and changes of these. Returns the findings with the input of each."""
    harness, chance = build_harness(name, folder), random.Random(name)
    judge = Judge(harness, folder)
    harness.use(harness.seeds[0])  # which is good, so that changes of it get past the first checks
    inputs = list(harness.seeds)
    chance.shuffle(inputs)
    del inputs[changes // 4 :]
    for _ in range(changes):
        changed = harness.mutate(chance.choice(inputs), chance)
        if len(changed) <= harness.limit:
            inputs.append(changed)
    return {fault: raw for raw in inputs for fault in judge.find_faults(raw)}


@pytest.mark.parametrize("name", NAMES)
def test_a_harness_finds_nothing_in_some_hundred_inputs(name: str, tmp_path: Path) -> None:
    assert not count_findings(name, tmp_path, QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_harness_finds_nothing_in_thousands_of_inputs(name: str, tmp_path: Path) -> None:
    assert not count_findings(name, tmp_path, QUICK[name] * MORE)


def test_what_no_input_may_do_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path.parent / "outside.txt"
    outside.write_text("secret", encoding="utf-8")

    def use(raw: bytes) -> None:
        if raw == b"refused":
            raise InputError("no such thing")
        if raw == b"untyped":
            raise KeyError("x")
        if raw == b"opened":
            outside.read_text(encoding="utf-8")

    judge = Judge(Harness([], lambda raw, chance: raw, use), tmp_path)
    assert judge.find_faults(b"taken") == []
    assert judge.find_faults(b"refused") == []
    assert judge.find_faults(b"untyped") == ["raised KeyError: \"'x'\""]
    assert judge.find_faults(b"opened") == [f"opened 'open {outside}'"]
    assert read_peak() > 1 << 20 or sys.platform == "win32"
    peaks = iter([0, 2 << 30])
    monkeypatch.setattr("tests.fuzz.harness.read_peak", lambda: next(peaks))
    assert judge.find_faults(b"taken") == ["took 2048 MiB"]


def test_mutations_keep_what_a_reader_checks_first() -> None:
    chance = random.Random(0)
    header = b'{"__metadata__": {}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    raw = len(header).to_bytes(8, "little") + header + bytes(4)
    changed = [mutate_safetensors(raw, chance, lambda text: mutate_json(text, chance)) for _ in range(100)]
    fitting = sum(int.from_bytes(each[:8], "little") <= len(each) - 8 for each in changed)
    assert fitting > 80
    assert len(set(changed)) > 60
    assert len({mutate_bytes(b"abc", chance) for _ in range(50)}) > 20
    assert split_parts(join_parts(b"a", b"", b"bc"), 3) == [b"a", b"", b"bc"]
    assert split_parts(b"\xff\xff\xff\xffab", 2) == [b"ab", b""]
