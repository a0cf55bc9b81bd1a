"""The demo's base: transformers opens it, its tokenizer splits prompts as the demo needs, and seeds reproduce it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import torch

from edgelora.demo.base import BaseSettings, make_base, make_tokenizer
from edgelora.demo.muon import Muon, orthogonalize
from edgelora.demo.tasks import TASKS, general_row
from edgelora_export.base.base import Base

if TYPE_CHECKING:
    from pathlib import Path

TINY = BaseSettings(hidden=32, layers=1, heads=2, kv_heads=1, mlp=32, steps=12, batch_size=8, warmup_steps=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "base"
    make_base(folder, TINY)
    return folder


def test_base_opens_in_transformers_and_here(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    assert len(tokenizer) == model.config.vocab_size
    assert "model.embed_tokens.weight" in Base.open(folder)


def test_same_seed_same_base(folder: Path, tmp_path: Path) -> None:
    make_base(tmp_path / "again", TINY)
    make_base(tmp_path / "other", TINY, seed=1)
    assert Base.open(folder).sha256 == Base.open(tmp_path / "again").sha256
    assert Base.open(folder).sha256 != Base.open(tmp_path / "other").sha256


def test_training_lowers_the_loss_and_tells_its_progress(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    loss = make_base(tmp_path / "base", TINY, on_progress=lambda done, total, what: steps.append((done, total)))
    assert steps == [(step, 12) for step in range(1, 13)]
    assert 0 < loss < 6.6  # ln 768 is the loss of a uniform guess


def test_prompt_tokens_do_not_depend_on_what_follows() -> None:
    tokenizer, rng = make_tokenizer(768, 0), random.Random(5)
    for row in [general_row(rng) for _ in range(100)] + [make(rng) for make in TASKS.values() for _ in range(30)]:
        prompt, both = tokenizer(row.prompt)["input_ids"], tokenizer(f"{row.prompt}{row.completion}")["input_ids"]
        assert both[: len(prompt)] == prompt
        assert both[0] == tokenizer.bos_token_id
        assert tokenizer.decode(both, skip_special_tokens=True) == f"{row.prompt}{row.completion}"


def test_chat_template_writes_what_training_saw() -> None:
    tokenizer = make_tokenizer(768, 0)
    turns = [{"role": "user", "content": "Stamp: x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<s>Stamp: x\ny</s><s>z\n"


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 40)])
def test_muon_steps_as_torchs_own_does(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (Muon([ours], lr=0.02, weight_decay=0.1), torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1))
    for _ in range(5):
        gradient = torch.randn(shape)
        for matrix, optimizer in zip((ours, theirs), optimizers, strict=True):
            matrix.grad = gradient.clone()
            optimizer.step()
    moved = float((theirs.detach() - start).norm())
    apart = float((ours.detach() - theirs.detach()).norm())
    assert apart < 0.05 * moved  # bfloat16 has 8 bits, and five iterations amplify its errors


def test_orthogonalized_matrices_have_singular_values_near_1() -> None:
    torch.manual_seed(1)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(20, 50, dtype=torch.float64)))
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
