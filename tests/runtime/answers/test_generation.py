"""What an answer says of itself: its text, its usage, and its repr; and several answers to one prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from edgelora_runtime import Receipt, Runtime, UsageError
from edgelora_runtime.session.model import Model
from tests.runtime.test_runtime import generate_alone
from tests.tiny import random_tokens

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = random_tokens(30)


def test_it_prints_its_text(runtime: Runtime) -> None:
    found = runtime.generate(PROMPT, max_tokens=9)
    assert str(found) == f"{found}" == found.text
    assert repr(found).startswith(f"<Generation {found.text!r}: 9 tokens by base, length, ")
    long = runtime.generate(PROMPT, max_tokens=200, ignore_eos=True)
    assert len(repr(long)) < 300
    assert long.text not in repr(long)


def test_usage_counts_tokens(runtime: Runtime) -> None:
    first = runtime.generate(PROMPT, max_tokens=20, ignore_eos=True)
    usage = first.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, usage.total_tokens) == (30, 0, 20, 50)
    assert usage.tokens_per_second == pytest.approx(19 / (first.decode_ms / 1e3))
    assert runtime.generate(PROMPT, max_tokens=20).usage.cached_tokens == 29
    assert runtime.generate(PROMPT, max_tokens=1).usage.tokens_per_second == 0


def test_receipts_bundles_and_runtimes_say_what_they_are(runtime: Runtime, bundle32: Path) -> None:
    receipt = runtime.switch("plain")
    assert repr(receipt).startswith("<Receipt: plain in ")
    assert "(cold)" in repr(receipt)
    assert repr(Receipt("a", 1.25, cold=False, bytes_mapped=3, kv_reused_tokens=7)) == (
        "<Receipt: a in 1.2 ms (warm), 3 bytes mapped, 7 tokens cached>"
    )
    assert repr(runtime) == f"<Runtime {str(bundle32)!r}: 10 variants, current 'plain', cpu, {runtime.kernels}>"
    assert repr(runtime.bundle) == f"<Bundle {str(bundle32)!r}: llama of 2 layers, 10 variants, 5 adapters>"


def test_a_runtime_says_what_fits(runtime: Runtime, tiny_base: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    messages = [{"role": "user", "content": "the cat"}]
    assert runtime.context_length == AutoConfig.from_pretrained(tiny_base).max_position_embeddings
    assert runtime.count_tokens("one two three") == len(tokenizer("one two three")["input_ids"])
    rendered: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    assert runtime.count_tokens(messages) == len(rendered["input_ids"])
    assert set(runtime.adapters) == {"plain", "other", "rslora", "patterns", "attention"}
    assert runtime.adapters["plain"].rank == 4


# --- several answers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {}, {"temperature": 0.8, "speculation": "on"}])
def test_each_answer_is_that_of_its_own_seed(bundle32: Path, runtime: Runtime, options: Any) -> None:
    found = runtime.generate(PROMPT, variant="plain", n=3, seed=5, max_tokens=25, **options)
    answers = [found, *found.alternatives]
    options = {name: value for name, value in options.items() if name != "speculation"}
    alone = [generate_alone(bundle32, PROMPT, variant="plain", seed=5 + at, max_tokens=25, **options) for at in range(3)]
    assert [answer.tokens for answer in answers] == alone
    assert all(not answer.alternatives for answer in found.alternatives)


@pytest.mark.parametrize("speculation", ["off", "on"])
def test_the_prompt_is_read_once(runtime: Runtime, monkeypatch: pytest.MonkeyPatch, speculation: str) -> None:
    read: list[int] = []
    inner = Model.read

    def count(model: Model, cache: Any, tokens: Any, **settings: Any) -> Any:
        read.append(len(tokens))
        return inner(model, cache, tokens, **settings)

    monkeypatch.setattr(Model, "read", count)
    found = runtime.generate(PROMPT, n=4, max_tokens=3, ignore_eos=True, speculation=speculation)
    assert [size >= len(PROMPT) for size in read].count(True) == 1
    assert read[0] >= len(PROMPT)
    assert [answer.reused_tokens for answer in (found, *found.alternatives)] == [0, 30, 30, 30]


def test_pieces_name_their_answer(runtime: Runtime) -> None:
    stream = runtime.stream(PROMPT, n=3, temperature=1.2, seed=1, max_tokens=12)
    pieces = list(stream)
    assert stream.generation is not None
    for number, answer in enumerate((stream.generation, *stream.generation.alternatives)):
        mine = [piece for piece in pieces if piece.answer == number]
        assert "".join(mine) == answer.text
        assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + [answer.finish_reason]
    assert [piece.answer for piece in pieces] == sorted(piece.answer for piece in pieces)


def test_several_answers_over_the_context(runtime: Runtime, bundle32: Path) -> None:
    prompt = random_tokens(1100, seed=7)
    options: Any = {"variant": "base", "overflow": "slide", "ignore_eos": True, "max_tokens": 6}
    found = runtime.generate(prompt, n=2, **options)
    assert found.alternatives[0].tokens == found.tokens == generate_alone(bundle32, prompt, **options)


def test_several_constrained_answers(runtime: Runtime) -> None:
    found = runtime.generate("a", n=3, regex="(x|y|z){4}", temperature=1.5, seed=2, max_tokens=20)
    texts = [str(answer) for answer in (found, *found.alternatives)]
    assert all(len(text) == 4 and set(text) <= set("xyz") for text in texts)
    assert len(set(texts)) > 1


def test_cancelling_ends_them_all(runtime: Runtime) -> None:
    stream = runtime.stream(PROMPT, n=3, max_tokens=400, ignore_eos=True)
    next(stream)
    stream.cancel()
    found = stream.read()
    assert [answer.finish_reason for answer in (found, *found.alternatives)] == ["cancelled"] * 3
    assert [len(answer.tokens) for answer in found.alternatives] == [0, 0]


@pytest.mark.parametrize("n", [0, -1, 129, 1.5, "2", None, True])
def test_numbers_of_answers_that_make_no_sense(runtime: Runtime, n: Any) -> None:
    with pytest.raises(UsageError, match=r"^n = .*: use 1 to 128"):
        runtime.stream(PROMPT, n=n)
