"""An adapter that edgelora trains ends its answers, in torch and in the bundle, whatever kind of tokenizer its base has."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from edgelora.data.rows import Row
from edgelora.exporting.export import export
from edgelora.in_torch.reference import write_with_torch
from edgelora.in_torch.train import train
from edgelora.in_torch.train_config import TrainConfig
from edgelora_runtime import Runtime
from tests.made_tokenizers import KINDS
from tests.tiny import make_base

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [Row(f"question: how many {word}?", " answer: nine.") for word in ("cats", "moons", "mats", "days")]
MOST = 40  # tokens: an answer is half as long


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_answers_end(kind: str, tmp_path: Path) -> None:
    make_base(tmp_path / "base", vocab_size=384, eos_token_id=None, bos_token_id=None)  # no config names an end
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "base" / name).unlink()
    KINDS[kind](tmp_path / "base")
    rows = "\n".join(json.dumps({"prompt": row.prompt, "completion": row.completion}) for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(rows + "\n", encoding="utf-8")
    base, adapter = str(tmp_path / "base"), tmp_path / "adapter"
    report = train(
        TrainConfig(base, tmp_path / "rows.jsonl", adapter, quant="none", max_steps=60, batch_size=4, lr=1e-2, warmup=0.1)
    )
    assert report.train_loss < 2
    (tmp_path / "recipe.toml").write_text(
        'base = "base"\n[adapters]\na = "adapter"\n[quantization]\nbits = 32\n[gate]\npolicy = "off"\n'
        "[variants.a]\nmix = { a = 1.0 }\n",
        encoding="utf-8",
    )
    export(tmp_path / "recipe.toml", tmp_path / "bundle")
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        answers = [runtime.generate(str(row.prompt), max_tokens=MOST) for row in ROWS]
    assert [answer.finish_reason for answer in answers] == ["stop"] * len(ROWS)
    written = write_with_torch(base, adapter, ROWS, quant="none", max_tokens=MOST)
    assert [answer.text for answer in answers] == written
    assert [text.removeprefix(" ") for text in written] == ["answer: nine."] * len(ROWS)  # Llama 2's decoder drops the space
