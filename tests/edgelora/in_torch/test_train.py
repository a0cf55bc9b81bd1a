"""Training on a tiny real base: output files, names, reproducibility by seed, and errors for bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgelora.adapters.folder import Adapter, read_provenance
from edgelora.in_torch.train import load_base, train
from edgelora.in_torch.train_config import TrainConfig, read_train_config
from edgelora_export.base.base import Base
from edgelora_export.quantize.int4 import quantize_rtn
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [{"prompt": f"the {word}\n", "completion": f"{word} sat"} for word in ("cat", "day", "sun", "moon", "mat", "cafe")]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path) -> TrainConfig:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    return TrainConfig(str(tiny_base), data, tmp_path / "adapter", rank=4, alpha=8, lr=1e-2, max_steps=4, batch_size=3)


@pytest.mark.parametrize("quant", ["nf4", "int4", "none"])
def test_adapter_and_provenance_are_written(config: TrainConfig, tiny_base: Path, quant: str) -> None:
    report = train(replace(config, quant=quant))
    assert (report.rows, report.steps, report.base_sha256) == (6, 4, Base.open(tiny_base).sha256)
    assert report.train_loss > 0
    assert sorted(path.name for path in config.output.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "edgelora.json", "loss.png", "metrics.jsonl",
    ]  # fmt: skip
    factors = load_file(config.output / "adapter_model.safetensors")
    assert {array.dtype for array in factors.values()} == {np.dtype(np.float16)}
    assert any(np.abs(array).max() > 0 for name, array in factors.items() if "lora_B" in name)
    adapter = Adapter.open(config.output)
    assert adapter.rank == 4
    assert len(adapter.modules) == 14  # seven linear layers in each of two blocks, and not the head
    provenance = read_provenance(config.output)
    assert provenance is not None
    assert (provenance.base_quantization, provenance.data_rows, provenance.steps) == (quant, 6, 4)


def test_same_seed_same_bytes(config: TrainConfig, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(replace(config, output=tmp_path / name, seed=seed))
    first, again, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert first == again
    assert first != other


def test_adapter_learns_its_rows_and_to_stop(config: TrainConfig) -> None:
    """After enough steps, the model completes the prompt and ends with the end token."""
    import torch
    from peft import PeftModel

    seen: list[int] = []
    train(replace(config, quant="none", max_steps=120), on_progress=lambda done, total, what: seen.append(done))
    assert seen == list(range(1, 121))
    model, tokenizer = load_base(Base.open(config.base), "none")
    adapted: Any = PeftModel.from_pretrained(model, config.output).eval()
    row = ROWS[1]
    prompt = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        written = adapted.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20, pad_token_id=1
        )[0, prompt.shape[1] :]
    assert tokenizer.decode(written) == row["completion"] + tokenizer.eos_token


@pytest.mark.slow
def test_adapter_learns_to_answer_in_a_conversation_and_to_stop(config: TrainConfig) -> None:
    """As the model is asked at run time: by the template, whose turns end with no special token of their own."""
    import torch
    from peft import PeftModel

    rows = [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}] for row in ROWS]
    write_rows(config.data, [{"messages": messages} for messages in rows])
    train(replace(config, quant="none", max_steps=160))
    model, tokenizer = load_base(Base.open(config.base), "none")
    adapted: Any = PeftModel.from_pretrained(model, config.output).eval()
    asked = tokenizer.apply_chat_template(rows[1][:1], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        written = adapted.generate(
            input_ids=asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=20, pad_token_id=1
        )[0, asked.shape[1] :]
    assert tokenizer.decode(written) == f" {rows[1][1]['content']}\n{tokenizer.eos_token}"


def test_int4_base_is_on_the_export_grid(tiny_base: Path) -> None:
    model, _ = load_base(Base.open(tiny_base), "int4")
    name = "model.layers.0.mlp.down_proj.weight"
    held = model.get_parameter(name).detach().numpy()
    np.testing.assert_array_equal(held, quantize_rtn(Base.open(tiny_base).tensor(name)).dequantize())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no rows"),
        (["text"], "line 1 is str, not an object"),
        ([*ROWS, {"prompt": "x"}], "line 7 has no completion"),
        ([{"prompt": 1, "completion": "y"}], "line 1 has no prompt that is text"),
    ],
)
def test_bad_rows_are_named(config: TrainConfig, rows: list[Any], message: str) -> None:
    write_rows(config.data, rows)
    with pytest.raises(InputError, match=message):
        train(config)
    assert not config.output.exists()


def test_bad_json_absent_data_and_absent_base_are_named(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.jsonl does not exist"):
        train(replace(config, data=tmp_path / "absent.jsonl"))
    with pytest.raises(InputError, match="nowhere"):
        train(replace(config, base=str(tmp_path / "nowhere")))
    config.data.write_text('{"prompt": "x",\n', encoding="utf-8")
    with pytest.raises(InputError, match="line 1 is not JSON"):
        train(config)


def test_a_folder_that_is_no_adapter_is_left_alone(config: TrainConfig) -> None:
    config.output.mkdir()
    (config.output / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(InputError, match=r"exists and is not a folder with adapter_config\.json"):
        train(config)
    assert [path.name for path in config.output.iterdir()] == ["thesis.txt"]


def test_every_bad_setting_is_named_at_once(config: TrainConfig) -> None:
    with pytest.raises(InputError, match=r"quant = int8: .*; rank = 0: .*; lr = -1: .*; dropout = 1: "):
        replace(config, quant="int8", rank=0, lr=-1, dropout=1)


def test_train_config_file(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text('rank = 8\ntarget_modules = ["q_proj"]\n', encoding="utf-8")
    assert read_train_config(path) == {"rank": 8, "target_modules": ("q_proj",)}
    path.write_text("rnak = 8\n", encoding="utf-8")
    with pytest.raises(InputError, match="rnak is not known; known: base, data"):
        read_train_config(path)
