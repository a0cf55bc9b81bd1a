"""A bundle whose bytes lie in the repository opens, is whole, and answers as it did when it was written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgelora_runtime import Bundle, Runtime
from edgelora_runtime.bundle.manifest import MANIFEST, VERSION, parse_manifest

GOLDEN = Path(__file__).with_name("golden")
ANSWERS = json.loads((GOLDEN / "answers.json").read_bytes())


def test_the_golden_bundle_is_whole_and_of_this_version() -> None:
    assert Bundle.open(GOLDEN / "bundle").verify() == []
    raw = (GOLDEN / "bundle" / MANIFEST).read_bytes()
    assert json.loads(raw)["version"] == ".".join(map(str, VERSION))


def test_the_manifest_is_written_back_byte_for_byte() -> None:
    raw = (GOLDEN / "bundle" / MANIFEST).read_bytes()
    assert parse_manifest(raw).dump() == raw


@pytest.mark.parametrize("kernels", ["onnxruntime", "auto"])
@pytest.mark.parametrize("variant", ANSWERS)
def test_the_golden_bundle_answers_as_it_did(variant: str, kernels: str) -> None:
    with Runtime(GOLDEN / "bundle", kernels=kernels, threads=1) as runtime:
        answer = runtime.generate("the cat", variant=variant, max_tokens=8, ignore_eos=True)
        logits = runtime.logits([5, 6, 7], variant=variant)[-1, :16]
    assert list(answer.tokens) == ANSWERS[variant]["tokens"]
    assert np.abs(logits - ANSWERS[variant]["logits"]).max() < 0.05 * np.std(ANSWERS[variant]["logits"])
