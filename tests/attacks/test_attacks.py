"""Hostile inputs of every kind are refused in one printable line, in bounded time and memory, and nothing else is opened."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from edgelora_runtime import InputError
from tests.attacks.attack import Attack
from tests.attacks.listing import list_attacks
from tests.attacks.run import run_attacks
from tests.attacks.worker import Outcome, Watch, run_attack

BUNDLE = Path(__file__).resolve().parents[1] / "runtime" / "bundle" / "golden" / "bundle"
QUICK = 8  # one of so many attacks is run by the quick tests


def check(numbers: range) -> None:
    attacks = list_attacks(BUNDLE)
    failed = {attacks[number].label: outcome.faults for number, outcome in run_attacks(BUNDLE, numbers) if outcome.faults}
    assert not failed


def test_some_attacks_of_every_part_are_refused() -> None:
    check(range(0, len(list_attacks(BUNDLE)), QUICK))


@pytest.mark.slow
def test_all_attacks_are_refused() -> None:
    check(range(len(list_attacks(BUNDLE))))


def test_there_are_hundreds_of_attacks_and_each_has_a_name_of_its_own() -> None:
    labels = [attack.label for attack in list_attacks(BUNDLE)]
    assert len(labels) > 300
    assert not [label for label, count in Counter(labels).items() if count > 1]


def test_what_an_attack_may_not_do_is_seen(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("secret", encoding="utf-8")

    def leave(folder: Path) -> None:
        outside.read_text(encoding="utf-8")
        (folder / "inside.txt").write_text("mine", encoding="utf-8")
        raise InputError("refused")

    def run(what: Attack) -> list[str]:
        return run_attack(what, watch).faults

    def make(folder: Path) -> None:
        (folder / "made").mkdir()

    def fail(error: BaseException) -> Attack:
        def raise_it(folder: Path) -> None:
            assert (folder / "made").is_dir()
            raise error

        return Attack("x", "x", make, raise_it)

    watch = Watch()
    assert run(fail(InputError("no such thing"))) == []
    assert run(Attack("x", "taken", make, lambda folder: None)) == ["was taken"]
    assert run(Attack("x", "left", make, leave)) == [f"opened 'open {outside}'"]
    assert "raised SystemExit" in run(fail(SystemExit()))[0]
    assert "raised ValueError" in run(fail(ValueError("x")))[0]
    assert "with the message ''" in run(fail(InputError("")))[0]
    assert Outcome("InputError", "a\x1b", typed=True).faults == ["was refused with the message 'a\\x1b'"]
    assert Outcome("InputError", "a", typed=True, seconds=3, bytes=2 << 30).faults == ["took 3.0 seconds", "took 2048 MiB"]


def test_the_limits_of_an_attack_end_with_it() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    seen: list[tuple[int, int]] = []
    run_attack(Attack("x", "x", lambda folder: None, lambda folder: seen.append(resource.getrlimit(resource.RLIMIT_AS))), Watch())
    assert seen != [before]
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.slow
def test_a_worker_that_hangs_is_told_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.attacks.run.PATIENCE", 0.0)  # every attack counts as hung
    found = list(run_attacks(BUNDLE, range(2)))
    assert [number for number, _ in found] == [0, 1]
    assert any(outcome.error == "death" for _, outcome in found)
