"""Each verb takes bases in each type, a multimodal one and a GGUF file, with adapters in bfloat16.

It runs in a process of its own, where no other import helps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from gguf import GGMLQuantizationType
from peft import PeftModel
from safetensors.torch import load_file, save_file

from edgelora_export.base.base import Base
from edgelora_export.weights.torch_model import load_model
from tests.gguf_files import write_gguf
from tests.multimodal import make_wrapper
from tests.tiny import greedy, load_base, make_adapter, make_base, make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[3]
GGUF = "base.gguf"


def edgelora(folder: Path, *arguments: object) -> str:
    """Standard output of a verb that must succeed, run in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))}
    command = [sys.executable, "-m", "edgelora", *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def convert(path: Path, dtype: torch.dtype) -> None:
    """Stores a safetensors file's tensors in another type."""
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def make_bases(folder: Path, kind: str) -> Path:
    """Makes the base: a Llama in a type or as a GGUF file, or Gemma 3 with vision. Returns a plain folder of the same model."""
    if kind == "multimodal":
        make_wrapper(folder / "base", "gemma3", torch.bfloat16)
        load_model(Base.open(folder / "base")).save_pretrained(folder / "plain")
        make_tokenizer().save_pretrained(folder / "plain")
        return folder / "plain"
    make_base(folder / "base")
    if kind == "gguf":
        write_gguf(folder / "base", folder / GGUF, kind=GGMLQuantizationType.F16)
        return (folder / "base").rename(folder / "plain")
    load_base(folder / "base").to(getattr(torch, kind)).save_pretrained(folder / "base")
    return folder / "base"


def name_base(folder: Path) -> str:
    return GGUF if (folder / GGUF).exists() else "base"


def write_rows(file: Path, model: Any = None) -> None:
    """Writes rows whose completions a model writes, so that it does well on them, or made-up ones."""
    rows = []
    for n in range(24):
        prompt, completion = f"the cat number {n}", f" sat {n}"
        if model is not None:
            completion = make_tokenizer().decode(
                greedy(model, make_tokenizer()(prompt)["input_ids"], 6), skip_special_tokens=True
            )
        rows.append(json.dumps({"prompt": prompt, "completion": completion or " "}))
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("float16", "float32", "multimodal", "gguf")]


@pytest.fixture(scope="module", params=["bfloat16", *SLOW])
def workplace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a base, two adapters in bfloat16, rows and a recipe."""
    folder = tmp_path_factory.mktemp(request.param)
    plain = make_bases(folder, request.param)
    for seed, name in enumerate(("a", "b"), 1):
        make_adapter(plain, folder / name, seed=seed)
        convert(folder / name / "adapter_model.safetensors", torch.bfloat16)
        write_rows(folder / f"{name}.jsonl", PeftModel.from_pretrained(load_base(plain), str(folder / name)))
    write_rows(folder / "rows.jsonl")
    (folder / "recipe.toml").write_text(
        f'base = "{name_base(folder)}"\n[adapters]\na = "a"\nb = "b"\n[quantization]\nmethod = "rtn"\n'
        "[variants.base]\nmix = {}\n"
        '[variants.both]\nmix = { a = 0.5, b = 0.5 }\n[variants.any]\nmix = { a = 1.0 }\nkind = "live"\n',
        encoding="utf-8",
    )
    yield folder


def test_train_saves_its_adapter(workplace: Path) -> None:
    train = ["train", "--base", name_base(workplace), "--data", "rows.jsonl", "--output", "trained", "--max-steps", "1"]
    assert json.loads(edgelora(workplace, *train))["steps"] == 1
    assert (workplace / "trained" / "adapter_model.safetensors").is_file()
    edgelora(workplace, "compose", "--adapter", "t=trained:1.0", "--adapter", "a=a:0.5", "--output", "mixed-trained")


def test_compose(workplace: Path) -> None:
    edgelora(workplace, "compose", "--adapter", "a=a:0.6", "--adapter", "b=b:0.6", "--method", "ties", "--output", "mixed")
    edgelora(workplace, "compose", "--adapter", "a=a:1.0", "--merge-into", name_base(workplace), "--output", "merged")
    if name_base(workplace) == GGUF:
        return
    types = [
        {tensor.dtype for tensor in load_file(workplace / name / "model.safetensors").values()} for name in ("merged", "base")
    ]
    assert types[0] == types[1]


@pytest.mark.slow
def test_compose_report(workplace: Path) -> None:
    adapters = ["--adapter", "a=a", "--adapter", "b=b", "--data", "a=a.jsonl", "--data", "b=b.jsonl", "--limit", "2"]
    edgelora(workplace, "compose", "report", *adapters, "--base", name_base(workplace), "--output", "report")


@pytest.mark.slow
def test_compose_learn(workplace: Path) -> None:
    adapters = ["--adapter", "a=a", "--adapter", "b=b", "--prompts", "a=rows.jsonl", "--prompts", "b=rows.jsonl"]
    edgelora(workplace, "compose", "learn", "--base", name_base(workplace), *adapters, "--output", "learned")


@pytest.mark.slow
def test_compose_search(workplace: Path) -> None:
    adapters = ["--adapter", "a=a", "--adapter", "b=b", "--data", "a=a.jsonl", "--data", "b=b.jsonl", "--budget", "5"]
    edgelora(
        workplace, "compose", "search", "--base", name_base(workplace), *adapters, "--sampler", "tpe", "--output", "searched"
    )
    assert (workplace / "searched" / "adapter" / "adapter_model.safetensors").is_file()


def test_export_and_eval(workplace: Path) -> None:
    edgelora(workplace, "export", "recipe.toml", "--output", "bundle", "--calibration", "rows.jsonl")
    found = json.loads(edgelora(workplace, "eval", "bundle", "--variant", "both", "--data", "rows.jsonl", "--limit", "2"))
    assert found["rows"] == 2
