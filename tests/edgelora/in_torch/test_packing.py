"""Packed rows: each once, no sequence too long, and the loss of each row as if it were alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MambaConfig

from edgelora.data.encode_rows import LearnedTokens
from edgelora.in_torch.packing import PackedCollator, check_packing, pack_rows
from edgelora_export.weights.torch_model import quiet_libraries
from edgelora_runtime.errors import InputError
from tests.tiny import make_tokenizer, random_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


def make_row(length: int, seed: int) -> LearnedTokens:
    """A row whose last half is learned."""
    return LearnedTokens(tuple(random_tokens(length, seed=seed)), tuple(place >= length // 2 for place in range(length)))


ROWS = [make_row(length, length) for length in (1, 2, 3, 5, 8, 9, 13, 21, 22, 30)]


def make_model(attention: str | None = "sdpa", config: Any = None) -> Any:
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config or LlamaConfig(**SHAPE), attn_implementation=attention).float().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15)
    return model


def row_losses(logits: Any, labels: Any) -> list[float]:
    """The loss of each learned token of one sequence, in nats."""
    losses = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="none")
    return [float(loss) for loss, label in zip(losses, labels[1:], strict=True) if label != -100]


@given(st.lists(st.integers(1, 20), max_size=30))
def test_each_row_is_packed_once(lengths: Sequence[int]) -> None:
    rows = [make_row(length, number) for number, length in enumerate(lengths)]
    packed = pack_rows(rows, 20)
    found = []
    for sequence in packed:
        assert len(sequence.tokens) == len(sequence.learned) == sum(sequence.lengths) <= 20
        at = 0
        for length in sequence.lengths:
            assert not sequence.learned[at]
            found.append(sequence.tokens[at : at + length])
            at += length
    assert sorted(found) == sorted(row.tokens for row in rows)
    # Best fit leaves at most one sequence half empty.
    assert sum(len(sequence.tokens) <= 10 for sequence in packed) <= 1


def test_a_row_that_is_too_long_is_refused() -> None:
    with pytest.raises(InputError, match="a row of 30 tokens does not fit into sequences of 20"):
        pack_rows(ROWS, 20)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "sliding"])
def test_the_loss_of_each_row_is_that_of_the_row_alone(attention: str, family: str) -> None:
    sliding: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
    model = make_model(attention, Gemma3TextConfig(**SHAPE, **sliding) if family == "sliding" else None)
    alone: dict[tuple[int, ...], list[float]] = {}
    packed: dict[tuple[int, ...], list[float]] = {}
    with torch.no_grad():
        for row in ROWS[1:]:
            ids = torch.tensor([row.tokens])
            labels = torch.tensor([token if learned else -100 for token, learned in zip(row.tokens, row.learned, strict=True)])
            alone[row.tokens] = row_losses(model(ids, use_cache=False).logits[0], labels)
        sequences = pack_rows(ROWS[1:], 48)
        assert len(sequences) == 3
        batch = PackedCollator(1)([sequence.to_columns() for sequence in sequences])
        logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for number, sequence in enumerate(sequences):
            at = 0
            for length in sequence.lengths:
                part = slice(at, at + length)
                packed[sequence.tokens[part]] = row_losses(logits[number, part], batch["labels"][number, part])
                at += length
    assert packed.keys() == alone.keys()
    for tokens, losses in alone.items():
        assert packed[tokens] == pytest.approx(losses, abs=1e-5)


def test_trls_trainer_takes_a_packed_step_as_an_unpacked_one(tmp_path: Path) -> None:
    """One step over the same rows: the same loss and the same weights."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    found = []
    for columns in (
        [{"input_ids": row.tokens, "completion_mask": [*map(int, row.learned)]} for row in ROWS[1:]],
        [sequence.to_columns() for sequence in pack_rows(ROWS[1:], 48)],
    ):
        with quiet_libraries():
            settings = SFTConfig(
                str(tmp_path), per_device_train_batch_size=len(columns), max_steps=1, report_to=[], save_strategy="no",
                completion_only_loss=True, max_length=48, bf16=False, use_cpu=True, disable_tqdm=True, learning_rate=0.1,
                optim="sgd", logging_steps=1,
            )  # fmt: skip
            trainer: Any = SFTTrainer(
                make_model(),
                settings,
                train_dataset=Dataset.from_list(columns),
                data_collator=PackedCollator(1) if "seq_lengths" in columns[0] else None,
                processing_class=make_tokenizer(),
            )
            trainer.train()
        weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
        found.append((trainer.state.log_history[0]["loss"], weights))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert float((found[0][1] - found[1][1]).abs().max()) < 1e-5


def test_models_in_which_rows_see_each_other_are_refused() -> None:
    for attention in ("sdpa", "eager"):
        model = make_model(attention)
        check_packing(model)
        assert model.training, "as it was before"
    recurrent = make_model(None, MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(InputError, match=r"packed would see each other in this base \(MambaForCausalLM\).*train without packing"):
        check_packing(recurrent)
