"""A bundle's manifest, beside the good files of the golden bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelora_runtime import Bundle
from edgelora_runtime.bundle.manifest import MANIFEST, parse_manifest
from tests.attacks.attack import Copy
from tests.fuzz.harness import Harness
from tests.fuzz.mutations import mutate_json

if TYPE_CHECKING:
    from pathlib import Path

WORDS = (
    "live",
    "merged",
    "growing",
    "in_place",
    "nf4",
    "int4",
    "trained",
    "float",
    "passed",
    "1.1",
    "auto",
    "cpu",
    "gpu",
    "tokenizer.json",
)


def build(bundle: Path, folder: Path) -> Harness:
    copy = Copy(bundle, folder / "bundle")
    good = (bundle / MANIFEST).read_bytes()

    def use(raw: bytes) -> None:
        copy.write_raw(MANIFEST, raw)
        manifest = Bundle.open(copy.folder).manifest
        assert parse_manifest(manifest.dump()) == manifest, "what it writes is not what it reads"

    return Harness([good, good.replace(b'"1.0"', b'"1.7"')], lambda raw, chance: mutate_json(raw, chance, WORDS), use)
