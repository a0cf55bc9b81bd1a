"""Verbs take MLX folders and GGUF adapters as they take PEFT's, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from peft import PeftModel

from edgelora.adapters.folder import Adapter
from edgelora_export.base.base import Base
from edgelora_runtime import Runtime
from tests.inputs.adapters import train, write_gguf, write_mlx
from tests.tiny import load_base, make_base, make_tokenizer, random_tokens, torch_logits

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[3]
TOKENS = random_tokens(24, seed=2)


def edgelora(folder: Path, *arguments: object, code: int = 0) -> str:
    """What a verb prints, run in a process of its own: its standard output, or its error where it must fail."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))}
    command = [sys.executable, "-m", "edgelora", *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a base, and one adapter in three forms: PEFT, MLX, GGUF as llama.cpp's script writes it."""
    folder = tmp_path_factory.mktemp("kinds")
    make_base(folder / "base")
    train(folder / "base", folder / "peft")
    write_gguf(folder / "peft", folder / "other.gguf")
    write_mlx(folder / "peft", folder / "mlx", "lora", layers=2)
    yield folder


def assert_equal(folder: Path, path: str, factor: float = 1.0) -> None:
    """Asserts that an adapter is PEFT's, times a factor."""
    config = Base.open(folder / "base").config
    ours, theirs = Adapter.open(folder / path, base=config), Adapter.open(folder / "peft")
    assert ours.modules == theirs.modules
    for module in theirs.modules:
        np.testing.assert_allclose(ours.dense(module), factor * theirs.dense(module), atol=1e-6)


def write_likelier_rows(folder: Path) -> None:
    """Writes rows whose completion, one word, the adapter makes much likelier than the base does."""
    tokenizer = make_tokenizer()
    words = [token for token in range(2, 300) if tokenizer.decode([token]).startswith(" ") and len(tokenizer.decode([token])) > 1]
    base, adapted = load_base(folder / "base"), PeftModel.from_pretrained(load_base(folder / "base"), str(folder / "peft"))
    rows = []
    for number in range(12):
        prompt = f"the cat number {number}"
        tokens = tokenizer(prompt)["input_ids"]
        gain = torch.log_softmax(torch.from_numpy(torch_logits(adapted, tokens)[-1]), 0) - torch.log_softmax(
            torch.from_numpy(torch_logits(base, tokens)[-1]), 0
        )
        rows.append({"prompt": prompt, "completion": tokenizer.decode([max(words, key=lambda word: float(gain[word]))])})
    (folder / "likelier.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_compose_reads_each_form(workplace: Path) -> None:
    mixed = ["--adapter", "m=mlx:0.25", "--adapter", "p=peft:0.5", "--adapter", "g=other.gguf:0.25"]
    report = json.loads(edgelora(workplace, "compose", *mixed, "--base", "base", "--output", "mixed"))
    assert report["modules"] == 14
    assert_equal(workplace, "mixed")


def test_compose_writes_gguf(workplace: Path) -> None:
    edgelora(workplace, "compose", "--adapter", "m=mlx:0.5", "--base", "base", "--output", "half.gguf")
    assert_equal(workplace, "half.gguf", 0.5)
    edgelora(workplace, "compose", "--adapter", "h=half.gguf:2.0", "--output", "again")  # the file has the number of heads
    assert_equal(workplace, "again")
    edgelora(workplace, "compose", "--adapter", "p=peft:1.0", "--dtype", "float16", "--output", "small.gguf")  # it names its base
    assert (workplace / "small.gguf").stat().st_size < 0.7 * (workplace / "half.gguf").stat().st_size


def test_export_and_inspect_read_each_form(workplace: Path) -> None:
    (workplace / "recipe.toml").write_text(
        'base = "base"\n[adapters]\nm = "mlx"\ng = { path = "other.gguf", trained_on = "none" }\n[quantization]\nbits = 32\n'
        "[variants.base]\nmix = {}\n[variants.m]\nmix = { m = 1.0 }\n[variants.g]\nmix = { g = 1.0 }\n"
        '[variants.alive]\nmix = { g = 1.0 }\nkind = "live"\n',
        encoding="utf-8",
    )
    edgelora(workplace, "export", "recipe.toml", "--output", "bundle")
    theirs = torch_logits(PeftModel.from_pretrained(load_base(workplace / "base"), str(workplace / "peft")), TOKENS)
    with Runtime(workplace / "bundle", threads=1) as runtime:
        assert np.abs(runtime.logits(TOKENS, variant="base") - theirs).max() > 0.1
        for variant in ("m", "g", "alive"):
            assert np.abs(runtime.logits(TOKENS, variant=variant) - theirs).max() <= 2e-3, variant
    for path, form in (("mlx", "MLX"), ("other.gguf", "GGUF"), ("peft", "PEFT")):
        shown = json.loads(edgelora(workplace, "inspect", path))
        assert (shown["form"], shown["rank"], len(shown["modules"]), shown["notes"]) == (form, 4, 14, [])


@pytest.mark.slow
def test_learn_search_and_report_read_each_form(workplace: Path) -> None:
    rows = [json.dumps({"prompt": f"the cat number {n}", "completion": f" sat {n}"}) for n in range(12)]
    (workplace / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    adapters = ["--adapter", "m=mlx", "--adapter", "g=other.gguf"]
    prompts = ["--prompts", "m=rows.jsonl", "--prompts", "g=rows.jsonl"]
    edgelora(workplace, "compose", "learn", "--base", "base", *adapters, *prompts, "--output", "learned")
    assert Adapter.open(workplace / "learned").modules == Adapter.open(workplace / "peft").modules
    report = json.loads(edgelora(workplace, "compose", "report", *adapters, "--base", "base", "--output", "report"))
    assert report["pairs"][0]["overall"]["cosine"] == pytest.approx(1.0, abs=1e-4)
    write_likelier_rows(workplace)
    search = ["--data", "m=likelier.jsonl", "--budget", "5", "--output", "searched"]
    assert json.loads(edgelora(workplace, "compose", "search", "--base", "base", *adapters, *search))["configurations"] == 5


REFUSED = {
    "a GGUF file without the number of heads": (["--adapter", "g=other.gguf:1", "--output", "x"], "give the base"),
    "a GGUF output without a base": (["--adapter", "m=mlx:1", "--output", "x.gguf"], "give the base"),
    "an output that is another file": (["--adapter", "p=peft:1", "--output", "taken.gguf"], "is not a GGUF file"),
    "a model in GGUF": (["--adapter", "w=model.gguf:1", "--base", "base", "--output", "x"], "is not a LoRA adapter"),
    "a file that is no adapter": (["--adapter", "t=taken.gguf:1", "--output", "x"], "is no GGUF file"),
    "a damaged GGUF file": (["--adapter", "c=cut.gguf:1", "--base", "base", "--output", "x"], "not a readable GGUF file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_line_says_what_is_wrong(workplace: Path, name: str) -> None:
    import gguf

    (workplace / "taken.gguf").write_text("notes")
    (workplace / "cut.gguf").write_bytes((workplace / "other.gguf").read_bytes()[:700])
    model = gguf.GGUFWriter(workplace / "model.gguf", "llama")
    model.add_type("model")
    model.write_header_to_file()
    model.write_kv_data_to_file()
    model.write_tensors_to_file()
    model.close()
    arguments, line = REFUSED[name]
    said = edgelora(workplace, "compose", *arguments, code=3)
    assert line in said
    assert "Traceback" not in said
    assert not (workplace / "x").exists()
    assert not (workplace / "x.gguf").exists()
    assert (workplace / "taken.gguf").read_text() == "notes"
