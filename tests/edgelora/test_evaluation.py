"""The loss of a completion covers its own tokens, even if a token spans prompt and completion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from edgelora.data.chats import Chat
from edgelora.data.rows import Row
from edgelora.evaluation import completion_loss, evaluate, log_likelihood
from edgelora.in_torch.mixed_model import MixedModel
from edgelora_runtime.decode.options import OPTIONS
from edgelora_runtime.errors import InputError, UsageError
from tests.tiny import load_base, make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora_runtime import Runtime


def reference_loss(base: Path, ids: list[int], start: int) -> float:
    """torch's cross entropy of ids[start:], in nats."""
    with torch.no_grad():
        logits = load_base(base)(torch.tensor([ids])).logits[0, start - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum"))


@pytest.mark.parametrize(
    ("prompt", "completion", "spans"),
    [("the cat", " sat on the mat", False), ("the ca", "t sat", True), ("a da", "y in", True), ("t", "he cat", True)],
)
def test_completion_loss_is_torchs(prompt: str, completion: str, spans: bool, runtime: Runtime, tiny_base: Path) -> None:
    """Tokens count from the first one that differs from the prompt's; the first token of all has no likelihood."""
    tokenizer = make_tokenizer()
    head, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + completion)["input_ids"]
    assert (ids[: len(head)] != head) == spans
    start = next((at for at, (one, other) in enumerate(zip(head, ids, strict=False)) if one != other), len(head))
    nats, count = completion_loss(runtime, Row(prompt, completion), variant="base")
    assert count == len(ids) - max(start, 1)
    assert nats == pytest.approx(reference_loss(tiny_base, ids, max(start, 1)), rel=1e-4)


def test_scores_of_right_answers(runtime: Runtime) -> None:
    """Rows with the variant's own completions score 100%."""
    steps: list[int] = []
    rows = [Row(prompt, runtime.generate(prompt, variant="base", max_tokens=4).text + "!") for prompt in ("the cat", "a day")]
    right = [Row(row.prompt, row.completion[:-1]) for row in rows]
    found = evaluate(runtime, right, variant="base", max_tokens=4, on_progress=lambda done, total, what: steps.append(done))
    assert found.exact_match == 1.0
    assert found.perplexity == pytest.approx(np.exp(found.loss))
    assert steps == [0, 1, 2]
    assert evaluate(runtime, rows, variant="base", max_tokens=4).exact_match == 0.0


def test_log_likelihood_of_large_logits() -> None:
    logits = np.array([[1000.0, 0.0], [-1000.0, -1001.0]], np.float32)
    np.testing.assert_allclose(log_likelihood(logits, [0, 1]), [0.0, -1 - np.log1p(np.exp(-1))], atol=1e-9)


def test_no_rows_are_refused(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="no rows"):
        evaluate(runtime, [])


def make_chat_row(question: str, answer: str) -> Row:
    prompt = Chat.of([{"role": "user", "content": question}])
    return Row(prompt, answer, prompt.answer(answer))


def test_loss_of_an_answer_is_torchs_after_the_rendered_prompt(runtime: Runtime, tiny_base: Path) -> None:
    """The special tokens of the template, and no second start of text."""
    tokenizer = make_tokenizer()
    messages = [{"role": "user", "content": "the cat"}]
    head = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + " sat"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[: len(head)] == head
    nats, count = completion_loss(runtime, make_chat_row("the cat", " sat"), variant="base")
    assert count == len(ids) - len(head)
    assert nats == pytest.approx(reference_loss(tiny_base, ids, len(head)), rel=1e-4)


def test_losses_of_conversations_are_those_of_the_search(runtime: Runtime, tiny_base: Path) -> None:
    rows = [make_chat_row("the cat", "sat on the mat"), make_chat_row("a day", "in the sun"), Row("the ca", "t sat")]
    found = MixedModel.open(str(tiny_base)).losses(rows)
    for row, (nats, count) in zip(rows, found, strict=True):
        expected, tokens = completion_loss(runtime, row, variant="base")
        assert (nats, count) == (pytest.approx(expected, rel=1e-4), tokens)


def test_right_answers_in_a_conversation_score_in_both(runtime: Runtime, tiny_base: Path) -> None:
    asked = [Chat.of([{"role": "user", "content": text}]) for text in ("the cat", "a day")]
    texts = [runtime.generate(chat.messages, variant="base", max_tokens=4).text for chat in asked]
    rows = [make_chat_row(chat.messages[0]["content"], text) for chat, text in zip(asked, texts, strict=True)]
    assert evaluate(runtime, rows, variant="base", max_tokens=4).exact_match == 1.0
    assert MixedModel.open(str(tiny_base)).write(rows, 4) == texts


def test_an_answer_without_text_is_not_scored(runtime: Runtime) -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "clock"}]}
    chat = Chat.of([{"role": "user", "content": "a day"}, call])
    with pytest.raises(InputError, match="rows line 1: the answer has no text"):
        evaluate(runtime, [Row(chat.start(1), "", chat, place="rows line 1")])


@pytest.mark.skipif("template_options" not in OPTIONS, reason="requests take no template options yet")
def test_template_options_reach_the_template(runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="messages"):
        evaluate(runtime, [make_chat_row("a", "b")], variant="base", template_options={"messages": []})
