"""Random damage of a bundle: verify names the file, and opening with verify="full" refuses the bundle."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edgelora_runtime import Bundle, IntegrityError
from tests.attacks.attack import Copy

if TYPE_CHECKING:
    from collections.abc import Callable

BUNDLE = Path(__file__).resolve().parents[1] / "runtime" / "bundle" / "golden" / "bundle"
FLIPS, TRUNCATIONS = 1000, 200


def flip(raw: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(raw)
    damaged[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def truncate(raw: bytes, chance: random.Random) -> bytes:
    return raw[: chance.randrange(len(raw))]


def damage(folder: Path, change: Callable[[bytes, random.Random], bytes], times: int) -> None:
    """Damages one random byte of all files' so many times, and checks that each time is noticed."""
    copy, chance = Copy(BUNDLE, folder), random.Random(0)
    opened = Bundle.open(folder)
    files = opened.manifest.files
    for name in chance.choices(list(files), [entry.size for entry in files.values()], k=times):
        good = (folder / name).read_bytes()
        copy.write_raw(name, change(good, chance))
        assert opened.verify() == [name]
        with pytest.raises(IntegrityError, match=re.escape(name)):
            Bundle.open(folder, verify="full")
        copy.write_raw(name, good)
    assert Bundle.open(folder, verify="full").verify() == []


@pytest.mark.slow
def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    damage(tmp_path / "bundle", flip, FLIPS)


@pytest.mark.slow
def test_every_truncation_is_found(tmp_path: Path) -> None:
    damage(tmp_path / "bundle", truncate, TRUNCATIONS)


def test_some_damage_is_found(tmp_path: Path) -> None:
    damage(tmp_path / "flipped", flip, 20)
    damage(tmp_path / "truncated", truncate, 5)
