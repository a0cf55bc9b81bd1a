"""Verbs take a GGUF file where they take a folder, each in a process of its own, and give what they give for the folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel
from transformers import AutoTokenizer

from edgelora_runtime import Runtime
from tests.gguf_files import write_gguf
from tests.tiny import load_base, make_adapter, make_base, random_tokens, torch_logits

ROOT = Path(__file__).resolve().parents[3]
TOKENS = random_tokens(30)
RECIPE = """\
base = "{base}"
[quantization]
bits = 32
[adapters]
a = "a"
[variants.base]
mix = {{}}
[variants.merged]
mix = {{ a = 1.0 }}
[variants.unmerged]
mix = {{ a = 1.0 }}
kind = "live"
"""


def edgelora(folder: Path, *arguments: object) -> str:
    """Standard output of a verb that must succeed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))}
    command = [sys.executable, "-m", "edgelora", *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as a folder and as a file, and an adapter that PEFT made."""
    folder = tmp_path_factory.mktemp("gguf")
    make_base(folder / "base")
    make_adapter(folder / "base", folder / "a")
    write_gguf(folder / "base", folder / "model.gguf")
    return folder


def test_export_merges_adapters_into_the_file_as_peft_does(workplace: Path) -> None:
    (workplace / "recipe.toml").write_text(RECIPE.format(base="model.gguf"), encoding="utf-8")
    edgelora(workplace, "export", "recipe.toml", "--output", "bundle")
    expected = torch_logits(PeftModel.from_pretrained(load_base(workplace / "base"), workplace / "a").eval(), TOKENS)
    with Runtime(workplace / "bundle", threads=1) as runtime:
        for variant, tolerance in (("merged", 2e-4), ("unmerged", 2e-3)):  # live factors are in fp16
            assert np.abs(runtime.logits(TOKENS, variant=variant) - expected).max() <= tolerance
        assert np.abs(runtime.logits(TOKENS, variant="base") - expected).max() > 1e-2
    said = json.loads(edgelora(workplace, "run", "bundle", "--prompt", "the cat", "--max-tokens", "4"))
    assert said


def test_merge_into_writes_a_plain_checkpoint(workplace: Path) -> None:
    edgelora(workplace, "compose", "--adapter", "a=a:1.0", "--merge-into", "model.gguf", "--output", "plain")
    expected = torch_logits(PeftModel.from_pretrained(load_base(workplace / "base"), workplace / "a").eval(), TOKENS)
    assert np.abs(torch_logits(load_base(workplace / "plain"), TOKENS) - expected).max() <= 1e-4
    text = "<s>the café 🙂"
    theirs, ours = (AutoTokenizer.from_pretrained(workplace / name) for name in ("base", "plain"))
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
