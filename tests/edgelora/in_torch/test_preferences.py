"""DPO: rows of preferences, their tokens, and the loss at its start and after steps, against the paper's formula."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel

from edgelora.adapters.folder import Adapter
from edgelora.data.encode_rows import RowEncoder
from edgelora.in_torch.preferences import Pair, encode_preferences, read_preferences
from edgelora.in_torch.train import load_base, train
from edgelora.in_torch.train_config import TrainConfig
from edgelora_export.base.base import Base
from edgelora_runtime.errors import InputError
from tests.tiny import make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

ROWS: list[dict[str, Any]] = [
    {"prompt": "the cat\n", "chosen": "sat on the mat", "rejected": "ran"},
    {"prompt": "the day\n", "chosen": "one two", "rejected": "three four in the sun"},
    {
        "prompt": [{"role": "user", "content": "Who sat?"}],
        "chosen": [{"role": "assistant", "content": "the cat"}],
        "rejected": [{"role": "assistant", "content": "the moon"}],
    },
]


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path) -> TrainConfig:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return TrainConfig(
        str(tiny_base), data, tmp_path / "a", rank=4, alpha=8, lr=5e-3, max_steps=8, batch_size=3, preferences=True, warmup=0.0
    )


def test_the_tokens_are_those_of_a_bundle(config: TrainConfig) -> None:
    """As RowEncoder encodes each answer alone; an answer repeated with its prompt is the same."""
    encoder = RowEncoder(make_tokenizer())
    pairs, cut = encode_preferences(encoder, read_preferences(config.data), 1024)
    assert cut == 0
    end = encoder.tokenizer.eos_token_id
    for pair, row in zip(pairs, ROWS[:2], strict=False):
        assert list(pair.prompt) == encoder(row["prompt"])
        for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            assert encoder.tokenizer.decode(answer[:-1]) == row[name]
            assert answer[-1] == end
    whole = encoder.tokenizer.apply_chat_template(ROWS[2]["prompt"] + ROWS[2]["chosen"])["input_ids"]
    assert list(pairs[2].prompt + pairs[2].chosen)[: len(whole)] == list(whole)
    repeated = {**ROWS[2], "chosen": ROWS[2]["prompt"] + ROWS[2]["chosen"], "rejected": ROWS[2]["prompt"] + ROWS[2]["rejected"]}
    config.data.write_text(json.dumps(repeated) + "\n", encoding="utf-8")
    assert encode_preferences(encoder, read_preferences(config.data), 1024)[0] == [pairs[2]]


def log_likelihood(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return float(logits[torch.arange(len(answer)), list(answer)].sum())


def dpo_loss(policy: Any, reference: Any, pairs: list[Pair], beta: float) -> float:
    """Equation 7 of arXiv 2305.18290."""
    losses = []
    for pair in pairs:
        ratios = [
            log_likelihood(policy, pair.prompt, answer) - log_likelihood(reference, pair.prompt, answer)
            for answer in (pair.chosen, pair.rejected)
        ]
        losses.append(math.log1p(math.exp(-beta * (ratios[0] - ratios[1]))))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("quant", [pytest.param("nf4", marks=pytest.mark.slow), "none"])
def test_the_loss_is_that_of_the_paper_and_falls(config: TrainConfig, tiny_base: Path, quant: str) -> None:
    """From ln 2, where both models agree. The adapter is then a plain one, which edgelora and PEFT read."""
    config = replace(config, quant=quant)
    train(config)
    losses = [json.loads(line)["loss"] for line in (config.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < 0.9 * losses[0]
    reference, tokenizer = load_base(Base.open(tiny_base), quant)
    policy: Any = PeftModel.from_pretrained(load_base(Base.open(tiny_base), quant)[0], str(config.output)).eval()
    pairs, _ = encode_preferences(RowEncoder(tokenizer), read_preferences(config.data), 1024)
    after = dpo_loss(policy, reference, pairs, config.beta)
    assert after < losses[-1]  # which was taken before the last step
    assert len(Adapter.open(config.output).modules) == 14
    assert not (config.output / "ref").exists()
    # A run that goes on compares with the adapter as it was, and so starts at ln 2 again.
    second = replace(config, output=config.output.with_name("b"), from_adapter=str(config.output), max_steps=2)
    train(second)
    again = [json.loads(line)["loss"] for line in (second.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert again[0] == pytest.approx(math.log(2), abs=1e-4)


def test_validation_and_settings_hold_for_preferences_too(config: TrainConfig) -> None:
    report = train(replace(config, validation=str(config.data), validate_every=4, quant="none", accumulation=3))
    assert report.validation_loss is not None
    assert report.validation_loss < math.log(2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "chosen": "b"}', r'line 1 is no preference; each line is \{"prompt": …, "chosen": …, "rejected": …\}'),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "line 1: chosen and rejected are the same"),
        ('{"prompt": "a", "chosen": "b", "rejected": 3}', "line 1 rejected has no completion that is text"),
        ('{"prompt": "a", "chosen":', "line 1 is not JSON"),
        ("[]", "line 1 is no preference"),
        ("", "holds no rows"),
    ],
)
def test_what_is_no_preference_is_named(config: TrainConfig, line: str, message: str) -> None:
    config.data.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        train(config)


def test_pairs_that_are_cut_off_are_left_out(config: TrainConfig) -> None:
    report = train(replace(config, max_length=8, quant="none", max_steps=1))
    assert (report.rows, report.rows_left_out > 0) == (3, True)
    with pytest.raises(InputError, match="no preference has a token of its answers among its first max_length = 2"):
        train(replace(config, max_length=2, quant="none"))
