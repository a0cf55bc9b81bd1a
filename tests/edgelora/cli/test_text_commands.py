"""export, inspect and run, as commands, with an adapter that brought its own end and a recipe that names one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from transformers import AutoTokenizer

from tests.edgelora.cli.test_half_precision import edgelora
from tests.made_tokenizers import KINDS
from tests.tiny import make_adapter, make_base

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = """\
base = "base"
{}
[quantization]
bits = 32
[gate]
policy = "off"
[adapters]
law = "law"
[variants.plain]
mix = {{}}
[variants.law]
mix = {{ law = 1.0 }}
"""


def make_workplace(folder: Path, line: str) -> None:
    make_base(folder / "base", vocab_size=384, num_hidden_layers=1)
    (folder / "base" / "chat_template.jinja").unlink()
    KINDS["byte-level"](folder / "base")
    make_adapter(folder / "base", folder / "law")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.add_special_tokens({"eos_token": "<|law|>"})
    tokenizer.save_pretrained(folder / "law")
    (folder / "recipe.toml").write_text(RECIPE.format(line), encoding="utf-8")
    edgelora(folder, "export", "recipe.toml", "--output", "bundle")


def test_inspect_names_the_ends_and_what_an_adapter_brought(tmp_path: Path) -> None:
    make_workplace(tmp_path, "")
    found = json.loads(edgelora(tmp_path, "inspect", "bundle"))
    assert found["texts"] == {"own": [], "end_tokens": {"1": "</s>"}}
    plain, law = found["variants"]
    assert plain["texts"] is None
    assert law["texts"] == {"own": ["tokenizer"], "end_tokens": {"320": "<|law|>", "1": "</s>"}}
    answer = json.loads(edgelora(tmp_path, "run", "bundle", "--prompt", "the cat", "--variant", "law", "--max-tokens", "2"))
    assert answer["variant"] == "law"


def test_a_recipe_replaces_the_ends(tmp_path: Path) -> None:
    make_workplace(tmp_path, 'end_tokens = ["<s>", 7]')
    found = json.loads(edgelora(tmp_path, "inspect", "bundle"))
    assert list(found["texts"]["end_tokens"]) == ["0", "7"]
    assert list(found["variants"][1]["texts"]["end_tokens"]) == ["0", "7"]
