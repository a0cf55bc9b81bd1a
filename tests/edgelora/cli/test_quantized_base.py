"""Verbs on a base that is stored in 4 bits by bitsandbytes, as many that people fine-tune on: each as a command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from edgelora_export.base.base import Base
from edgelora_runtime import Runtime
from tests.edgelora.cli.test_half_precision import ROOT, edgelora
from tests.tiny import make_adapter, make_base, make_tokenizer, random_tokens, torch_logits

if TYPE_CHECKING:
    from pathlib import Path

auto: Any = AutoModelForCausalLM


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an NF4 base in bfloat16, an adapter, rows and a recipe."""
    folder = tmp_path_factory.mktemp("nf4")
    make_base(folder / "plain", intermediate_size=128)  # whole blocks of 64 in a row: see docs/log.md
    make_adapter(folder / "plain", folder / "a")
    config: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)  # type: ignore[no-untyped-call]
    model = auto.from_pretrained(folder / "plain", dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    shutil.rmtree(folder / "plain")
    rows = [json.dumps({"prompt": f"the cat number {n}", "completion": f" sat {n}"}) for n in range(24)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "train.toml").write_text("max_steps = 1\nbatch_size = 2\n", encoding="utf-8")
    (folder / "recipe.toml").write_text(
        'base = "base"\n[adapters]\na = "a"\n[quantization]\nbits = 32\n'
        "[variants.base]\nmix = {}\n[variants.a]\nmix = { a = 1.0 }\n",
        encoding="utf-8",
    )
    return folder


def load_dequantized(folder: Path) -> Any:
    """The base as transformers dequantizes it, in float32."""
    return auto.from_pretrained(folder / "base", dtype=torch.float32).dequantize().float().eval()


def test_export_gives_transformers_logits(workplace: Path) -> None:
    edgelora(workplace, "export", "recipe.toml", "--output", "bundle", "--gate", "off")
    tokens = random_tokens(30)
    base = load_dequantized(workplace)
    expected = {
        "base": torch_logits(base, tokens),
        "a": torch_logits(PeftModel.from_pretrained(base, workplace / "a").eval(), tokens),
    }
    assert np.abs(expected["a"] - expected["base"]).max() > 0.1
    with Runtime(workplace / "bundle", threads=1) as runtime:
        for variant, logits in expected.items():
            runtime.switch(variant)
            assert np.abs(runtime.logits(tokens) - logits).max() <= 1e-3, variant


def test_merging_writes_a_plain_checkpoint(workplace: Path) -> None:
    edgelora(workplace, "compose", "--adapter", "a=a:1.0", "--merge-into", "base", "--output", "merged")
    config = json.loads((workplace / "merged" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    merged = auto.from_pretrained(workplace / "merged", dtype=torch.float32).eval()
    expected = PeftModel.from_pretrained(load_dequantized(workplace), workplace / "a").eval()
    tokens = random_tokens(30)
    assert np.abs(torch_logits(merged, tokens) - torch_logits(expected, tokens)).max() <= 1e-3


@pytest.mark.parametrize("verb", ["export", "train", "compose"])
def test_a_format_that_is_not_read_is_one_line(workplace: Path, tmp_path: Path, verb: str) -> None:
    shutil.copytree(workplace / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text(encoding="utf-8"))
    config |= {"quantization_config": {"quant_method": "hqq"}, "_name_or_path": "someone/Model-7B"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "recipe.toml").write_text('base = "base"\n[variants.base]\nmix = {}\n', encoding="utf-8")
    options: dict[str, list[object]] = {
        "export": ["recipe.toml"],
        "train": ["--base", "base", "--data", workplace / "rows.jsonl"],
        "compose": ["--adapter", f"a={workplace / 'a'}:1.0", "--merge-into", "base"],
    }
    done = start(tmp_path, verb, *options[verb], "--output", "out")
    assert done.returncode == 3
    assert done.stderr == (
        "edgelora: base base: it is quantized as HQQ, which is not read; take the unquantized checkpoint "
        "(its config.json names someone/Model-7B)\n"
    )
    assert not (tmp_path / "out").exists()


def start(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))}
    command = [sys.executable, "-m", "edgelora", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_train_records_the_base_as_it_is_read(workplace: Path) -> None:
    train = ("train", "--base", "base", "--data", "rows.jsonl", "--output", "trained", "--config", "train.toml")
    report = json.loads(edgelora(workplace, *train))
    assert report["base_sha256"] == Base.open(workplace / "base").sha256
    edgelora(workplace, "compose", "--adapter", "t=trained:1.0", "--merge-into", "base", "--output", "merged-trained")
