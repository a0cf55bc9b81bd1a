"""A merged checkpoint equals PEFT's merge, and transformers loads it like any other."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgelora.composing.merge_into_base import MERGED, merge_into
from edgelora_export.base.base import Base
from edgelora_export.base.safetensors_folder import INDEX
from edgelora_runtime.errors import InputError
from tests.edgelora.cli.test_cli import start
from tests.tiny import load_base, make_adapter, make_tokenizer, random_tokens, torch_logits

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = random_tokens(30, seed=5)


def by_peft(base: Path, adapter: Path) -> Any:
    model: Any = PeftModel.from_pretrained(load_base(base), str(adapter)).merge_and_unload()
    return model.eval()


def test_transformers_loads_pefts_logits(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    report = merge_into(str(tiny_base), {"a": (tiny_adapters["patterns"], 1.0)}, tmp_path / "merged")
    assert report.modules == 14
    found: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    found.eval()
    expected = torch_logits(by_peft(tiny_base, tiny_adapters["patterns"]), TOKENS)
    assert np.abs(torch_logits(found, TOKENS) - expected).max() <= 1e-4
    assert np.abs(torch_logits(load_base(tiny_base), TOKENS) - expected).max() > 0.1
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode("the cat") == make_tokenizer().encode("the cat")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_shards_stay_and_dtypes_convert(dtype: str, tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    load_base(tiny_base).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    assert (tmp_path / "base" / INDEX).is_file()
    merge_into(str(tmp_path / "base"), {"a": (tiny_adapters["plain"], 1.0)}, tmp_path / "merged", dtype=dtype)
    shards = {path.name for path in (tmp_path / "base").glob("*.safetensors")}
    assert {path.name for path in (tmp_path / "merged").glob("*.safetensors")} == shards
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    for name, expected in by_peft(tmp_path / "base", tiny_adapters["plain"]).state_dict().items():
        difference = (model.state_dict()[name].float() - expected).abs().max()
        assert difference <= (2**-11 if dtype == "float16" else 2**-8) * expected.abs().max() + 1e-6


def test_the_base_keeps_its_dtype(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    load_base(tiny_base).half().save_pretrained(tmp_path / "base")
    merge_into(str(tmp_path / "base"), {"a": (tiny_adapters["plain"], 0.5)}, tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118  (not a dict)


def test_a_folder_that_is_not_ours_stays(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    """In particular the base itself."""
    before = Base.open(tiny_base).sha256
    with pytest.raises(InputError, match="choose another --output"):
        merge_into(str(tiny_base), {"a": (tiny_adapters["plain"], 1.0)}, tiny_base)
    assert Base.open(tiny_base).sha256 == before
    for _ in range(2):  # a second run replaces the first one's output
        merge_into(str(tiny_base), {"a": (tiny_adapters["plain"], 1.0)}, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / MERGED).read_bytes())["base_sha256"] == before


def test_what_the_type_cannot_hold_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    make_adapter(tiny_base, tmp_path / "a", size=1e6)
    with pytest.raises(InputError, match="float16 cannot hold"):
        merge_into(str(tiny_base), {"a": (tmp_path / "a", 1.0)}, tmp_path / "merged", dtype="float16")
    assert not (tmp_path / "merged").exists()


def test_command_line(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    adapter = f"a={tiny_adapters['plain']}:1.0"
    command = ("compose", "--adapter", adapter, "--output", tmp_path / "merged", "--json")
    done = start(*command, "--merge-into", tiny_base)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["modules"] == 14
    assert start(*command, "--dtype", "float16").returncode == 2
