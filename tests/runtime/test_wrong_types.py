"""Values of wrong types at every public call and option end in a UsageError or an InputError of one line."""

from __future__ import annotations

import datetime
import decimal
from collections import deque
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgelora_runtime import Bundle, InputError, PackedCache, ResourceError, Runtime, UsageError
from edgelora_runtime.decode.options import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Hostile:
    """Its own methods fail."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__

    def __len__(self) -> int:
        raise RuntimeError("no len")

    def __bool__(self) -> bool:
        raise RuntimeError("no bool")


VALUES: dict[str, Any] = {
    "none": None,
    "true": True,
    "false": False,
    "zero": 0,
    "one": 1,
    "minus one": -1,
    "huge": 10**400,
    "more digits than Python prints": 10**5000,
    "float": 1.5,
    "tiny": 5e-324,
    "nan": float("nan"),
    "inf": float("inf"),
    "minus inf": float("-inf"),
    "complex": 1j,
    "decimal": decimal.Decimal("0.5"),
    "fraction": Fraction(1, 3),
    "empty text": "",
    "text": "a",
    "control characters": "a\x1b[31m\r\nb\0",
    "surrogate": "\ud800",
    "bytes": b"a",
    "bytearray": bytearray(b"a"),
    "empty list": [],
    "list": ["a", 1],
    "nested list": [[1]],
    "list of none": [None],
    "list of bools": [True, False],
    "list of floats": [1.0],
    "list of bytes": [b"a"],
    "tuple": (1, 2),
    "set": {1, 2},
    "frozen set": frozenset("ab"),
    "deque": deque([3, 4]),
    "range": range(3, 6),
    "empty dict": {},
    "dict": {"a": 1},
    "dict of bytes": {b"a": 1},
    "dict of none": {None: None},
    "dict of nan": {"plain": float("nan")},
    "dict of huge": {"plain": 10**400},
    "dict of large": {"plain": 1e308},
    "dict of text": {"plain": "1"},
    "dict of a list": {"plain": [1]},
    "array": np.array([3, 4]),
    "array of floats": np.array([0.5]),
    "array of two axes": np.zeros((2, 2), np.int64),
    "array of no axis": np.array(3),
    "array of objects": np.array([None, "a"], object),
    "numpy int": np.int64(3),
    "numpy float": np.float32(0.5),
    "numpy bool": np.True_,
    "object": object(),
    "class": int,
    "function": len,
    "lambda": lambda *given: given[-1],
    "generator": iter([1, 2]),
    "path": Path("/nowhere/at all"),
    "date": datetime.date(2025, 1, 2),
    "time": datetime.time(1, 2),
    "exception": ValueError("a"),
    "hostile": Hostile(),
    "list of hostile": [Hostile()],
    "dict of hostile": {"plain": Hostile()},
}
MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def opened(bundle32: Path) -> Iterator[Runtime]:
    with Runtime(bundle32, threads=1) as runtime:
        yield runtime


def use(call: Callable[[], Any]) -> str:
    """Makes a call. It works, or is refused in one printable line."""
    try:
        found = call()
        if hasattr(found, "close"):
            found.close()
    except (UsageError, InputError, ResourceError) as error:
        assert str(error).isprintable(), repr(str(error))
        assert len(str(error)) < 1000
        return "refused"
    return "taken"


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_request(opened: Runtime, name: str) -> None:
    """They are checked at the call: a stream that was made also gives its first piece."""
    prompt: Any = MESSAGES if name in ("tools", "documents", "template_options", "date") else [3, 4]
    for value in VALUES.values():
        request: dict[str, Any] = {"max_tokens": 2, name: value}
        try:
            stream = opened.stream(prompt, **request)
        except (UsageError, InputError) as error:
            assert str(error).isprintable(), repr(str(error))
            continue
        if name != "logits_processors":  # functions are the caller's own
            with stream:
                next(stream)


CALLS: dict[str, Callable[[Runtime, Any], Any]] = {
    "generate": lambda runtime, value: runtime.generate(value, max_tokens=1),
    "stream": lambda runtime, value: runtime.stream(value, max_tokens=1),
    "message": lambda runtime, value: runtime.generate([value], max_tokens=1),
    "content": lambda runtime, value: runtime.generate([{"role": "user", "content": value}], max_tokens=1),
    "role": lambda runtime, value: runtime.generate([{"role": value, "content": "a"}], max_tokens=1),
    "embed": lambda runtime, value: runtime.embed(value),
    "embed variant": lambda runtime, value: runtime.embed("a", variant=value),
    "embed mix": lambda runtime, value: runtime.embed("a", mix=value),
    "encode": lambda runtime, value: runtime.encode(value),
    "encode tools": lambda runtime, value: runtime.encode(MESSAGES, tools=value),
    "encode date": lambda runtime, value: runtime.encode(MESSAGES, date=value),
    "encode continue": lambda runtime, value: runtime.encode(MESSAGES, continue_final_message=value),
    "count_tokens": lambda runtime, value: runtime.count_tokens(value),
    "count_tokens variant": lambda runtime, value: runtime.count_tokens("a", variant=value),
    "logits": lambda runtime, value: runtime.logits(value),
    "logits variant": lambda runtime, value: runtime.logits([3], variant=value),
    "logits mix": lambda runtime, value: runtime.logits([3], mix=value),
    "iterate_logits": lambda runtime, value: list(runtime.iterate_logits(value)),
    "iterate_logits positions": lambda runtime, value: runtime.iterate_logits([3], positions=value),
    "route": lambda runtime, value: runtime.route(value),
    "switch": lambda runtime, value: runtime.switch(value),
    "switch mix": lambda runtime, value: runtime.switch(mix=value),
    "prefetch": lambda runtime, value: runtime.prefetch(value),
    "pin": lambda runtime, value: runtime.pin(value),
    "unpin": lambda runtime, value: runtime.unpin(value),
    "find_tokenizer": lambda runtime, value: runtime.find_tokenizer(value),
    "load_prompts": lambda runtime, value: runtime.load_prompts(value),
    "chat system": lambda runtime, value: runtime.chat(system=value),
    "chat variant": lambda runtime, value: runtime.chat(variant=value),
    "chat mix": lambda runtime, value: runtime.chat(mix=value),
    "chat switch": lambda runtime, value: runtime.chat().switch(value),
    "chat switch mix": lambda runtime, value: runtime.chat().switch(mix=value),
    "chat send": lambda runtime, value: runtime.chat(max_tokens=1).send(value),
    "chat stream": lambda runtime, value: runtime.chat(max_tokens=1).stream(value),
    "chat add": lambda runtime, value: runtime.chat().add(value),
    "load_chat": lambda runtime, value: runtime.load_chat(value),
    "Bundle.open": lambda runtime, value: Bundle.open(value),
    "Bundle.verify": lambda runtime, value: runtime.bundle.verify(value) if not callable(value) else None,
    "Bundle.has": lambda runtime, value: runtime.bundle.has(value),
    "Runtime": lambda runtime, value: Runtime(value),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_public_calls(opened: Runtime, name: str) -> None:
    found = {key: use(lambda value=value: CALLS[name](opened, value)) for key, value in VALUES.items()}  # type: ignore[misc]
    assert found["hostile"] == "refused" or name == "Bundle.has"
    assert opened.generate([3], variant="base", max_tokens=1).tokens, "the runtime goes on"


@pytest.mark.parametrize("name", ["save_prompts", "Conversation.save"])
def test_paths_to_write(opened: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for value in VALUES.values():
        use(lambda value=value: opened.save_prompts(value) if name == "save_prompts" else opened.chat().save(value))  # type: ignore[misc]


CONSTRUCTOR = ("memory_budget", "cache_budget", "packed_cache", "kernels", "threads", "provider", "target")


@pytest.mark.parametrize("name", CONSTRUCTOR)
def test_options_of_the_runtime(bundle32: Path, name: str) -> None:
    taken = {key for key, value in VALUES.items() if use(lambda value=value: Runtime(bundle32, **{name: value})) == "taken"}  # type: ignore[misc]
    allowed = {"none", "zero", "one", "numpy int"} if name in ("memory_budget", "cache_budget", "threads") else {"none"}
    assert taken <= allowed


def test_the_folder_of_packed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for key, value in VALUES.items():
        if key != "path":
            use(lambda value=value: PackedCache(value))  # type: ignore[misc]
            use(lambda value=value: PackedCache(tmp_path / "packed", budget=value))  # type: ignore[misc]


def test_numbers_of_numpy_are_taken(opened: Runtime) -> None:
    plain = opened.generate([3, 4], max_tokens=3, temperature=0.5, seed=1, top_k=5)
    numbers: Any = {"max_tokens": np.int32(3), "temperature": np.float32(0.5), "seed": np.uint8(1), "top_k": np.int64(5)}
    tokens: Any = np.array([3, 4])
    assert opened.generate(tokens, **numbers).tokens == plain.tokens
    assert opened.generate((3, 4), **numbers).tokens == plain.tokens


@pytest.mark.parametrize("call", ["generate", "stream", "chat"])
def test_an_unknown_option_names_the_call(opened: Runtime, call: str) -> None:
    arguments: list[Any] = [] if call == "chat" else ["a"]
    with pytest.raises(UsageError, match=f"^{call} has no option 'max_token'; did you mean 'max_tokens'"):
        getattr(opened, call)(*arguments, max_token=3)
