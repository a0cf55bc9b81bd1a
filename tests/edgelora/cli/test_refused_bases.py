"""Each verb that opens a base refuses an encoder in one line, as a command, before it loads or writes anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from tests.tiny import make_adapter, make_base, make_tokenizer

ROOT = Path(__file__).resolve().parents[3]
TWO = ["--adapter", "a=a", "--adapter", "b=b"]
COMMANDS: dict[str, list[str]] = {
    "train": ["train", "--base", "bert", "--data", "rows.jsonl", "--output", "out"],
    "export": ["export", "recipe.toml", "--output", "out"],
    "merge": ["compose", "--adapter", "a=a:1.0", "--merge-into", "bert", "--output", "out"],
    "report": ["compose", "report", *TWO, "--base", "bert", "--output", "out"],
    "learn": [
        "compose",
        "learn",
        *TWO,
        "--base",
        "bert",
        "--prompts",
        "a=rows.jsonl",
        "--prompts",
        "b=rows.jsonl",
        "--output",
        "out",
    ],
    "search": ["compose", "search", *TWO, "--base", "bert", "--data", "a=rows.jsonl", "--budget", "5", "--output", "out"],
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder / "bert")
    make_tokenizer().save_pretrained(folder / "bert")
    make_base(folder / "base")
    for name in ("a", "b"):
        make_adapter(folder / "base", folder / name)
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8, encoding="utf-8")
    (folder / "recipe.toml").write_text('base = "bert"\n[variants.base]\nmix = {}\n', encoding="utf-8")
    return folder


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS.keys())
def test_an_encoder_is_refused_by_each_verb(arguments: list[str], workplace: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))}
    done = subprocess.run(
        [sys.executable, "-m", "edgelora", *arguments],
        cwd=workplace,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert "is an encoder (BertForMaskedLM); give a decoder-only language model" in lines[-1]
    assert "Traceback" not in done.stderr
    assert not (workplace / "out").exists()
