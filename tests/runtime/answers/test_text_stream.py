"""Streams: their pieces know their tokens, `with` closes them, and threads may share them."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from typing import TYPE_CHECKING, Any

import pytest

from edgelora_runtime import Piece, UsageError
from edgelora_runtime.session.model import _Steps
from tests.tiny import random_tokens

if TYPE_CHECKING:
    from edgelora_runtime import Runtime

PROMPT = random_tokens(20)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.3, "seed": 1, "logprobs": 2},
        {"stop": ["q", "z"], "temperature": 1.5, "seed": 4, "logprobs": 1},
        {"max_tokens": 1},
        {"ignore_eos": True, "logprobs": 3},
    ],
)
def test_pieces_have_the_tokens_of_the_answer(runtime: Runtime, options: Any) -> None:
    stream = runtime.stream(PROMPT, **{"max_tokens": 60, **options})
    pieces = list(stream)
    answer = stream.generation
    assert answer is not None
    assert "".join(pieces) == answer.text
    assert tuple(token for piece in pieces for token in piece.tokens) == answer.tokens
    assert tuple(each for piece in pieces for each in piece.logprobs) == answer.logprobs
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [answer.finish_reason]
    assert all(len(piece.logprobs) == len(piece.tokens) for piece in pieces) == ("logprobs" in options or not answer.tokens)


def test_a_pieces_text_is_that_of_its_tokens(runtime: Runtime) -> None:
    """Token by token, where each is a whole character by itself."""
    for piece in runtime.stream("the", regex="[a-f ]{30}", temperature=1.5, seed=0, max_tokens=40):
        assert runtime.tokenizer.decode(piece.tokens) == piece


def test_a_piece_is_a_text() -> None:
    piece = Piece("ab", tokens=(1, 2), finish_reason="stop", answer=1)
    assert piece == "ab"
    assert piece + "c" == "abc"
    assert {piece: 1} == {"ab": 1}
    assert piece.index("b") == 1
    for other in (copy.copy(piece), copy.deepcopy(piece), pickle.loads(pickle.dumps(piece))):
        assert (other, other.tokens, other.finish_reason, other.answer) == ("ab", (1, 2), "stop", 1)


def test_with_closes_a_stream(runtime: Runtime) -> None:
    with runtime.stream(PROMPT, max_tokens=500, ignore_eos=True) as stream:
        next(stream)
        assert stream.is_open
    assert not stream.is_open
    assert list(stream) == []
    assert stream.generation is None
    with pytest.raises(UsageError, match="the stream was closed"):
        stream.read()
    assert runtime.generate(PROMPT, max_tokens=1).reused_tokens == 19, "what was read stays cached"


def test_a_stream_that_ended_keeps_its_answer_when_closed(runtime: Runtime) -> None:
    with runtime.stream(PROMPT, max_tokens=3) as stream:
        answer = stream.read()
    assert stream.read() is answer is stream.generation


def test_its_repr_says_how_far_it_came(runtime: Runtime) -> None:
    stream = runtime.stream(PROMPT, max_tokens=3, ignore_eos=True)
    assert repr(stream) == "<TextStream open, 0 tokens so far>"
    stream.read()
    assert repr(stream) == "<TextStream ended: length, 3 tokens so far>"
    other = runtime.stream(PROMPT, max_tokens=3)
    other.close()
    assert repr(other) == "<TextStream closed, 0 tokens so far>"


def test_close_waits_for_a_step_of_another_thread(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other thread is in the middle of a step when close() is called; it then finds the end."""
    stream = runtime.stream(PROMPT, max_tokens=500, ignore_eos=True)
    next(stream)
    step, inside, go_on = _Steps.run, threading.Event(), threading.Event()

    def wait(*arguments: Any) -> Any:
        inside.set()
        go_on.wait(10)
        return step(*arguments)

    monkeypatch.setattr(_Steps, "run", wait)
    rest: list[str] = []
    reader = threading.Thread(target=lambda: rest.extend(stream))
    reader.start()
    inside.wait(10)
    closer = threading.Thread(target=stream.close)
    closer.start()
    go_on.set()
    closer.join(10)
    reader.join(10)
    assert not closer.is_alive()
    assert not reader.is_alive()
    assert not stream.is_open
    assert len(rest) < 5


def test_threads_that_share_a_stream_get_each_piece_once(runtime: Runtime) -> None:
    stream = runtime.stream(PROMPT, max_tokens=80, ignore_eos=True)
    got: list[Piece] = []
    threads = [threading.Thread(target=lambda: got.extend(stream)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stream.generation is not None
    assert sorted(token for piece in got for token in piece.tokens) == sorted(stream.generation.tokens)


def test_async_with_closes_a_stream(runtime: Runtime) -> None:
    async def run() -> None:
        async with runtime.stream(PROMPT, max_tokens=500, ignore_eos=True) as stream:
            async for piece in stream:
                assert isinstance(piece, Piece)
                break
        assert not stream.is_open
        other = runtime.stream(PROMPT, max_tokens=5, ignore_eos=True)
        assert (await other.read_async()).tokens == runtime.generate(PROMPT, max_tokens=5, ignore_eos=True).tokens

    asyncio.run(run())


def test_an_error_ends_a_stream(runtime: Runtime) -> None:
    def fail(tokens: Any, logits: Any) -> Any:
        raise KeyError("the caller's own")

    stream = runtime.stream(PROMPT, logits_processors=[fail])
    with pytest.raises(KeyError, match="own"):
        next(stream)
    assert not stream.is_open
    assert repr(stream) == "<TextStream failed: KeyError, 0 tokens so far>"
