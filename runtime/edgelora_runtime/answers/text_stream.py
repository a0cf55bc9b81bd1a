"""A streamed answer: pieces of text with their tokens, for `for` and `async for`, closed by `with`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from edgelora_runtime.errors import UsageError
from edgelora_runtime.session.process import Elsewhere, call_in_child, keep_in_child, leave_in_child

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterator
    from types import TracebackType
    from typing import Self

    from edgelora_runtime.answers.generation import Generation, TokenLogprob


T = TypeVar("T")
_MOST_WAITING = 256  # streams that tasks read at the same time; asyncio's own threads are few, and would keep steps small


@cache
def _open_pool() -> ThreadPoolExecutor:
    """Returns the threads in which tasks read streams. They start as they are needed, and a forked child has none of them."""
    call_in_child(_open_pool.cache_clear)
    return ThreadPoolExecutor(_MOST_WAITING, thread_name_prefix="edgelora-stream")


class Piece(str):
    """A piece of an answer: a text of whole characters that knows the tokens behind it.

    tokens: the ids that were written since the piece before. All pieces together have the tokens of the answer. logprobs: one per
    token, if the request asked for them. finish_reason: why the answer ends here, None for all pieces but its last. The last
    piece can be empty. answer: the number of the answer that the piece belongs to, from 0, if the request asked for several.
    """

    __slots__ = ("answer", "finish_reason", "logprobs", "tokens")

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None
    answer: int

    def __new__(
        cls,
        text: str = "",
        *,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        finish_reason: str | None = None,
        answer: int = 0,
    ) -> Self:
        piece = super().__new__(cls, text)
        piece.tokens, piece.logprobs, piece.finish_reason, piece.answer = tokens, logprobs, finish_reason, answer
        return piece


class TextStream:
    """An iterator over the pieces of an answer. Iterate with `for` or `async for`.

    `generation` is set once the iterator is exhausted, and read() does that. `async for` waits for each piece in a thread, and
    cancelling the task ends the generation. As a context manager, the stream is closed at the end of the block, whatever has been
    read. Threads that share a stream each get some of its pieces.

    pieces: yields them and returns the Generation. cancel: makes the generator end before its next step, from any thread.
    """

    def __init__(self, pieces: Generator[Piece, None, Generation], cancel: Callable[[], None]) -> None:
        self.generation: Generation | None = None
        self._pieces = keep_in_child(pieces)  # freed, it would wait for the step that it shares with other threads
        self._cancel = cancel
        self._turn: threading.RLock | Elsewhere = threading.RLock()  # a generator runs in one thread at a time
        self._tokens = 0
        self._state = "open"
        leave_in_child("TextStream", self, "_turn", "_pieces")

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        with self._turn:
            try:
                piece = next(self._pieces)
            except StopIteration as end:
                if end.value is not None:
                    self.generation, self._state = end.value, f"ended: {end.value.finish_reason}"
                raise
            except BaseException as error:
                self._state = f"failed: {type(error).__name__}"
                raise
            self._tokens += len(piece.tokens)
            return piece

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        piece = await self._run(lambda: next(self, None))  # StopIteration cannot cross a future
        if piece is None:
            raise StopAsyncIteration
        return piece

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        import asyncio

        self.cancel()
        await asyncio.to_thread(self.close)

    def __repr__(self) -> str:
        return f"<TextStream {self._state}, {self._tokens} tokens so far>"

    @property
    def is_open(self) -> bool:
        """True until the last piece was read, the stream was closed, or it failed. False in a forked child."""
        return self._state == "open" and not isinstance(self._turn, Elsewhere)

    def read(self) -> Generation:
        """Reads the rest and returns the whole answer. Raises UsageError for a stream that was closed before its end."""
        for _ in self:
            pass
        if self.generation is None:
            raise UsageError("TextStream.read: the stream was closed, so there is no answer; call stream() again")
        return self.generation

    async def read_async(self) -> Generation:
        """Reads the rest in a thread, as read() does."""
        return await self._run(self.read)

    async def _run(self, call: Callable[[], T]) -> T:
        """Runs a call in a thread. Cancelling the task ends the generation before its next step."""
        import asyncio  # costs a tenth of the package's import time, and few callers await

        try:
            return await asyncio.get_running_loop().run_in_executor(_open_pool(), copy_context().run, call)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Ends the generation before its next step. Safe from any thread.

        The text so far is the answer.
        """
        self._cancel()

    def close(self) -> None:
        """Ends the generation and drops the answer. The KV cache keeps what was read so far.

        Safe from any thread. Waits for a step that another thread computes.
        """
        if not self.is_open:
            return
        self._cancel()
        with self._turn:
            if self.is_open:
                self._pieces.close()
                self._state = "closed"
