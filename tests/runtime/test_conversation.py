"""Conversations: what the model reads is the template's text of the turns so far, whoever answers, and files bring them back."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelora_runtime import InputError, Runtime, UsageError
from tests.runtime.test_runtime import generate_alone
from tests.tiny import make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

SHORT: Any = {"max_tokens": 6, "ignore_eos": True}


def render(messages: list[dict[str, str]]) -> list[int]:
    """The tokens of a conversation, by transformers."""
    tokens: list[int] = make_tokenizer().apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return tokens


def test_turns_are_read_as_transformers_renders_them(bundle32: Path, runtime: Runtime) -> None:
    chat = runtime.chat(variant="plain", system="be brief", **SHORT)
    messages = [{"role": "system", "content": "be brief"}]
    for number, text in enumerate(("the cat", "a day", "two")):
        messages.append({"role": "user", "content": text})
        answer = chat.send(text)
        assert answer.tokens == generate_alone(bundle32, render(messages), variant="plain", **SHORT)
        assert answer.usage.cached_tokens > 0 or number == 0, "a turn reads only what is new"
        messages.append({"role": "assistant", "content": str(answer)})
    assert chat.messages == messages
    assert chat.history == tuple(
        {**each, **({"variant": "plain"} if each["role"] == "assistant" else {})} for each in messages[1:]
    )


def test_variants_and_mixes_take_turns(bundle32: Path, runtime: Runtime) -> None:
    chat = runtime.chat(**SHORT)
    first = chat.send("the cat")
    assert first.variant == "base"
    chat.switch("plain")
    prompt = render([*chat.messages, {"role": "user", "content": "again"}])  # type: ignore[list-item]
    assert chat.send("again").tokens == generate_alone(bundle32, prompt, variant="plain", **SHORT)
    chat.switch(mix={"plain": 0.5, "other": -0.25})
    prompt = render([*chat.messages, {"role": "user", "content": "more"}])  # type: ignore[list-item]
    mixed = chat.send("more")
    assert mixed.tokens == generate_alone(bundle32, prompt, mix={"plain": 0.5, "other": -0.25}, **SHORT)
    assert (chat.variant, chat.mix) == (None, {"plain": 0.5, "other": -0.25})
    assert chat.send("once", variant="other").variant == "other", "an option of a turn holds for that turn"
    assert chat.send("then").variant == mixed.variant
    assert [each["variant"] for each in chat.history if each["role"] == "assistant"] == [
        "base", "plain", mixed.variant, "other", mixed.variant,
    ]  # fmt: skip
    chat.switch()
    assert chat.send("end").variant == "base"
    assert runtime.current == "base"


def test_undo_takes_back_a_turn(runtime: Runtime) -> None:
    chat = runtime.chat(**SHORT)
    chat.send("the cat")
    before = chat.history
    first = chat.send("a day")
    assert chat.undo() == "a day"
    assert chat.history == before
    assert chat.send("a day").tokens == first.tokens
    assert chat.undo() == "a day"
    assert chat.undo() == "the cat"
    with pytest.raises(UsageError, match="the user has said nothing"):
        chat.undo()


def test_a_streamed_turn_enters_the_history_when_complete(runtime: Runtime) -> None:
    chat = runtime.chat(**SHORT)
    stream = chat.stream("the cat")
    next(stream)
    assert chat.history == ()
    calls: tuple[Any, ...] = (lambda: chat.stream("a"), chat.undo, lambda: chat.add({"role": "user", "content": "a"}))
    for call in calls:
        with pytest.raises(UsageError, match="the last answer is not complete"):
            call()
    answer = stream.read()
    history: Any = chat.history
    assert [turn["content"] for turn in history] == ["the cat", answer.text]
    with chat.stream("a day") as stream:
        next(stream)
    assert len(chat.history) == 2, "a closed stream leaves no turn"
    stream = chat.stream("a day", max_tokens=500)
    next(stream)
    stream.cancel()
    assert stream.read().finish_reason == "cancelled"
    assert chat.history[-1]["content"] == stream.generation.text
    chat.send("too late", timeout=1e-9)
    assert chat.history[-1]["content"] == stream.generation.text, "no token, no turn"


def test_a_stream_that_nobody_holds_ends_its_turn(runtime: Runtime) -> None:
    chat = runtime.chat(max_tokens=500, ignore_eos=True)
    for _ in chat.stream("the cat"):
        break
    assert chat.send("a day", max_tokens=3).tokens


def test_a_turn_that_fails_leaves_the_history(runtime: Runtime) -> None:
    chat = runtime.chat(**SHORT)
    chat.send("the cat")
    before = chat.history
    with pytest.raises(InputError, match="context holds"):
        chat.send("word " * 2000)
    with pytest.raises(UsageError, match="no variant 'nope'"):
        chat.send("a", variant="nope")
    assert chat.history == before
    assert chat.send("a").tokens


def test_added_messages_are_answered(bundle32: Path, runtime: Runtime) -> None:
    chat = runtime.chat(**SHORT)
    messages = [{"role": "user", "content": "the cat"}, {"role": "tool", "content": "42"}]
    for message in messages:
        chat.add(message)
    assert chat.send().tokens == generate_alone(bundle32, render(messages), variant="base", **SHORT)
    for wrong in ({"content": "no role"}, "text", None, [{"role": "user", "content": "a"}]):
        with pytest.raises(InputError):
            chat.add(wrong)  # type: ignore[arg-type]


def test_conversations_run_beside_each_other(runtime: Runtime) -> None:
    texts = ["the cat", "a day", "one two", "naïve"]
    alone = [[str(turn) for turn in talk(runtime, text)] for text in texts]
    found: dict[str, list[str]] = {}
    threads = [
        threading.Thread(target=lambda text=text: found.update({text: [str(turn) for turn in talk(runtime, text)]}))
        for text in texts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[text] for text in texts] == alone


def talk(runtime: Runtime, text: str) -> list[Any]:
    chat = runtime.chat(variant="plain", **SHORT)
    return [chat.send(text), chat.send("again")]


def test_asyncio_and_threads_say_the_same(runtime: Runtime) -> None:
    async def run() -> list[str]:
        chat = runtime.chat(variant="plain", **SHORT)
        first = str(await chat.send_async("the cat"))
        return [first, "".join([piece async for piece in chat.stream("again")])]

    assert asyncio.run(run()) == [str(turn) for turn in talk(runtime, "the cat")]


# --- files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speaker", [{"variant": "plain"}, {"mix": {"plain": 0.5}}, {}])
def test_a_saved_conversation_goes_on(runtime: Runtime, tmp_path: Path, speaker: Any) -> None:
    chat = runtime.chat(system="kurz → 🙂", **speaker, **SHORT)
    chat.send("the cat\n naïve 日本語")
    chat.save(tmp_path / "chat.json")
    again = runtime.load_chat(tmp_path / "chat.json", **SHORT)
    assert (again.history, again.messages, again.variant, again.mix) == (chat.history, chat.messages, chat.variant, chat.mix)
    assert again.send("a day").text == chat.send("a day").text
    assert json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))["system"] == "kurz → 🙂"
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]


BAD_FILES = {
    "no JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "another format": b'{"format": "other"}',
    "nested deeply": b"[" * 100_000,
    "no messages": b'{"format": "edgelora chat 1", "variant": null, "mix": null, "system": null}',
    "system of a number": b'{"format": "edgelora chat 1", "variant": null, "mix": null, "system": 3, "messages": []}',
    "unknown variant": b'{"format": "edgelora chat 1", "variant": "x", "mix": null, "system": null, "messages": []}',
    "unknown adapter": b'{"format": "edgelora chat 1", "variant": null, "mix": {"x": 1}, "system": null, "messages": []}',
    "message of a number": b'{"format": "edgelora chat 1", "variant": null, "mix": null, "system": null, "messages": [1]}',
    "mix of text": b'{"format": "edgelora chat 1", "variant": null, "mix": {"plain": "a"}, "system": null, "messages": []}',
}


@pytest.mark.parametrize("raw", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_other_files_are_refused(runtime: Runtime, tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "chat.json").write_bytes(raw)
    with pytest.raises(InputError, match=r"chat\.json") as refused:
        runtime.load_chat(tmp_path / "chat.json")
    assert "\n" not in str(refused.value)


KEYS = st.sampled_from(["variant", "mix", "system", "messages", "role", "content"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6),
)


def write_like_a_conversation(content: Any) -> bytes:
    return json.dumps({"format": "edgelora chat 1", **content}).encode()


@given(raw=st.binary(max_size=300) | st.dictionaries(KEYS, VALUES, max_size=4).map(write_like_a_conversation))
def test_any_file_loads_or_is_refused(open_runtime: Runtime, scratch: Path, raw: bytes) -> None:
    scratch.write_bytes(raw)
    try:
        open_runtime.load_chat(scratch)
    except InputError as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def open_runtime(bundle32: Path) -> Any:
    with Runtime(bundle32, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chats") / "chat.json"


def test_a_file_that_cannot_be_written_or_read_is_named(runtime: Runtime, tmp_path: Path) -> None:
    from edgelora_runtime import ResourceError

    chat = runtime.chat(**SHORT)
    with pytest.raises(ResourceError, match="absent"):
        chat.save(tmp_path / "absent" / "chat.json")
    with pytest.raises(UsageError, match="not a plain file"):
        chat.save(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        runtime.load_chat(tmp_path / "absent.json")


def test_a_bundle_without_a_template_holds_no_conversation(tiny_base: Path, tmp_path: Path) -> None:
    import shutil

    from tests.tiny import export_base

    base = shutil.copytree(tiny_base, tmp_path / "base")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (base / name).unlink(missing_ok=True)
    export_base(base, tmp_path / "bundle")
    with Runtime(tmp_path / "bundle", threads=1) as opened, pytest.raises(UsageError, match=r"chat: .* no chat template"):
        opened.chat()


def test_its_repr_says_who_answers(runtime: Runtime) -> None:
    assert repr(runtime.chat(variant="plain")) == "<Conversation with plain: 0 messages>"
    assert repr(runtime.chat(mix={"plain": 0.5})) == "<Conversation with {'plain': 0.5}: 0 messages>"
    assert repr(runtime.chat()) == "<Conversation with the current variant: 0 messages>"
