"""Mixes in torch: their losses equal the runtime's and PEFT's, and removing a mix restores the base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config

from edgelora.adapters.folder import Adapter
from edgelora.data.rows import Row
from edgelora.evaluation import completion_loss
from edgelora.in_torch.mixed_model import BATCH_TOKENS, MixedModel, stack_adapters
from edgelora.mix.mix import Mix
from edgelora_runtime.errors import InputError
from tests.tiny import greedy, load_base, make_adapter, make_base, make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora_runtime import Runtime

ROWS = [
    Row("the cat", " sat on the mat"),
    Row("the ca", "t sat"),
    Row("one two", " three four five, and the moon " * 4),
    Row("t", "he cat"),
    Row("a day in the sun, and", " the moon"),
]
LINEAR = {"plain": 0.6, "attention": -0.4, "rslora": 0.3}  # as in tiny_recipe


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> MixedModel:
    return MixedModel.open(str(tiny_base))


def open_all(folders: dict[str, Path], *names: str) -> dict[str, Adapter]:
    return {name: Adapter.open(folders[name], name) for name in names}


def peft_loss(base: Path, adapter: Path, rows: list[Row]) -> float:
    """The loss of PEFT's model, row by row and without padding, in nats per token."""
    peft = PeftModel.from_pretrained(load_base(base), str(adapter)).eval()
    tokenizer, nats, count = make_tokenizer(), 0.0, 0
    for row in rows:
        head, ids = tokenizer(row.prompt)["input_ids"], tokenizer(f"{row.prompt}{row.completion}")["input_ids"]
        start = max(1, next((at for at, (one, other) in enumerate(zip(head, ids, strict=False)) if one != other), len(head)))
        with torch.no_grad():
            logits = peft(torch.tensor([ids])).logits[0, start - 1 : -1]
        nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum"))
        count += len(ids) - start
    return nats / count


@pytest.mark.parametrize(
    ("variant", "mix"),
    [("base", None), ("linear", ("linear", LINEAR)), ("ties", ("ties", {"plain": 0.7, "other": 0.5}))],
)
def test_losses_are_the_runtimes(
    variant: str, mix: Any, model: MixedModel, tiny_adapters: dict[str, Path], runtime: Runtime
) -> None:
    """Each row's nats and tokens, in the order of the rows, independent of batching."""
    model.set_mix(None if mix is None else Mix(open_all(tiny_adapters, *mix[1]), mix[1], mix[0], 0.3))
    expected = [completion_loss(runtime, row, variant=variant) for row in ROWS]
    np.testing.assert_allclose(model.losses(ROWS), expected, rtol=2e-4)
    assert model.loss(ROWS) == pytest.approx(sum(nats for nats, _ in expected) / sum(count for _, count in expected), rel=1e-4)


def test_a_single_adapter_is_pefts(model: MixedModel, tiny_base: Path, tiny_adapters: dict[str, Path]) -> None:
    model.set_mix(Mix(open_all(tiny_adapters, "patterns"), {"patterns": 1.0}))
    assert model.loss(ROWS) == pytest.approx(peft_loss(tiny_base, tiny_adapters["patterns"], ROWS), rel=1e-5)


def test_taking_a_mix_off_leaves_the_very_bits(model: MixedModel, tiny_adapters: dict[str, Path]) -> None:
    model.set_mix(None)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    adapters = open_all(tiny_adapters, *LINEAR)
    for weight in (1e4, -1e-4, 3.0):
        model.set_mix(Mix(adapters, dict.fromkeys(LINEAR, weight)))
    assert any(not torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
    model.set_stacks(stack_adapters(adapters))
    model.set_mix(None)
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_stacks_are_the_mix_and_follow_their_weights(model: MixedModel, tiny_adapters: dict[str, Path]) -> None:
    adapters = open_all(tiny_adapters, *LINEAR)
    model.set_mix(None)
    bare = model.loss(ROWS)
    stacks = stack_adapters(adapters)
    model.set_stacks(stacks)
    assert model.loss(ROWS) == pytest.approx(bare, rel=1e-7), "weights begin at 0"
    for stack in stacks.values():
        stack.weights.copy_(torch.tensor(list(LINEAR.values())))
    stacked = model.losses(ROWS)
    model.set_mix(Mix(adapters, LINEAR))
    np.testing.assert_allclose(stacked, model.losses(ROWS), rtol=1e-5)


def test_weights_of_stacks_get_gradients(model: MixedModel, tiny_adapters: dict[str, Path]) -> None:
    """The gradient of one weight of one module matches a finite difference."""
    stacks = stack_adapters(open_all(tiny_adapters, *LINEAR))
    for stack in stacks.values():
        stack.weights.copy_(torch.tensor(list(LINEAR.values()))).requires_grad_()
    model.set_stacks(stacks)
    torch.cat([model.nats(batch) for batch in model.batches(ROWS)]).sum().backward()  # type: ignore[no-untyped-call]
    weights, step = stacks["model.layers.0.mlp.down_proj"].weights, 0.02
    assert weights.grad is not None
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            weights[0] += sign * step
        found.append(model.losses(ROWS)[:, 0].sum())
        with torch.no_grad():
            weights[0] -= sign * step
    assert float(weights.grad[0]) == pytest.approx((found[0] - found[1]) / (2 * step), rel=0.02)
    assert float(weights.grad[1]) == 0, "attention has no factors there"


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_tied_head_keeps_the_bases_weights(tmp_path: Path) -> None:
    """As in PEFT, an adapter on a tied embedding changes the input and not the head."""
    make_base(tmp_path / "base", tie_word_embeddings=True)
    make_adapter(tmp_path / "base", tmp_path / "a", target_modules=["embed_tokens"])
    tied = MixedModel.open(str(tmp_path / "base"))
    adapters = open_all({"a": tmp_path / "a"}, "a")
    tied.set_mix(Mix(adapters, {"a": 1.0}))
    assert tied.loss(ROWS) == pytest.approx(peft_loss(tmp_path / "base", tmp_path / "a", ROWS), rel=1e-5)
    tied.set_mix(None)
    assert tied.model.lm_head.weight is tied.model.model.embed_tokens.weight
    with pytest.raises(InputError, match="is an embedding"):
        stack_adapters(adapters)


def test_transposed_layers(tmp_path: Path) -> None:
    """GPT-2 stores its weights as (K, N)."""
    make_base(tmp_path / "base", config_class=GPT2Config, n_embd=64, n_layer=2, n_head=4, n_positions=256)
    make_adapter(tmp_path / "base", tmp_path / "a", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = MixedModel.open(str(tmp_path / "base"))
    adapters = open_all({"a": tmp_path / "a"}, "a")
    expected = peft_loss(tmp_path / "base", tmp_path / "a", ROWS)
    model.set_mix(Mix(adapters, {"a": 1.0}))
    assert model.loss(ROWS) == pytest.approx(expected, rel=1e-5)
    stacks = stack_adapters(adapters)
    for stack in stacks.values():
        stack.weights.fill_(1.0)
    model.set_stacks(stacks)
    assert model.loss(ROWS) == pytest.approx(expected, rel=1e-5)


def test_write_is_transformers_greedy(model: MixedModel, tiny_base: Path) -> None:
    """Prompts of several lengths in one batch come back in order."""
    model.set_mix(None)
    tokenizer = make_tokenizer()
    expected = [tokenizer.decode(greedy(load_base(tiny_base), tokenizer(row.prompt)["input_ids"], 6)) for row in ROWS]
    assert model.write(ROWS, max_tokens=6) == expected


def test_batches_hold_all_rows_and_not_too_many_tokens(model: MixedModel) -> None:
    rows = [Row("the cat", " sat" * count) for count in (3, 200, 1, 90, 90, 90, 2, 400)] + [Row("a", " day" * 1500)]
    batches = list(model.batches(rows))
    assert sorted(place for batch in batches for place in batch.rows) == list(range(len(rows)))
    assert all(batch.ids.numel() <= BATCH_TOKENS or len(batch.rows) == 1 for batch in batches)
    assert len(batches) < len(rows)


def test_a_row_of_one_token_has_no_loss(model: MixedModel) -> None:
    row = Row("t", "h")
    assert len(make_tokenizer()("th")["input_ids"]) == 1
    np.testing.assert_array_equal(model.losses([row]), [[0, 0]])
    np.testing.assert_allclose(model.losses([row, *ROWS])[1:], model.losses(ROWS), rtol=1e-5)


def test_an_adapter_of_another_model(model: MixedModel, tmp_path: Path) -> None:
    make_base(tmp_path / "deep", num_hidden_layers=3)
    make_adapter(tmp_path / "deep", tmp_path / "a")
    with pytest.raises(InputError, match=r"no layer model\.layers\.2"):
        model.set_mix(Mix(open_all({"a": tmp_path / "a"}, "a"), {"a": 1.0}))
    model.set_mix(None)
