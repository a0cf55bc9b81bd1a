"""The chat templates of real model families that TRL ships, rendered as transformers renders them."""

from __future__ import annotations

import datetime
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer

from edgelora_runtime.bundle.chat_template import ChatTemplate, check_template, find_turn_end
from edgelora_runtime.bundle.messages import check_chat
from edgelora_runtime.errors import InputError
from tests.tiny import make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    Messages = list[dict[str, Any]]

_TRL = find_spec("trl")
_FOLDER = None if _TRL is None or _TRL.origin is None else Path(_TRL.origin).parent / "chat_templates"
TEMPLATES = [] if _FOLDER is None else sorted(_FOLDER.glob("*.jinja"))
pytestmark = pytest.mark.skipif(not TEMPLATES, reason="TRL's chat templates are absent: pip install trl")

DAY = "2025-03-09"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}  # of make_tokenizer(), whose unk and pad are not set
SYSTEM = {"role": "system", "content": "Answer briefly.\n"}
TURNS = [
    {"role": "user", "content": " What's the weather in Zürich? <b>&\n"},
    {"role": "assistant", "content": "Sunny 🙂"},
    {"role": "user", "content": "And\ttomorrow?"},
    {"role": "assistant", "content": "  Rain.  "},
    {"role": "user", "content": "Thanks"},
]
THOUGHTS = {1: "The user asks\nabout the weather.", 3: "It will rain."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Returns the weather, e.g. "é".',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "c"}},
                "required": ["city"],
            },
            "return": {"type": "string"},
        },
    }
]
CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}}
CALLED: list[dict[str, Any]] = [
    TURNS[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefgh1", "content": '{"sky": "blue"}'},
]
CALLS = {
    "called": CALLED,
    "answered": [*CALLED, {"role": "assistant", "content": "Blue."}, {"role": "user", "content": "ok"}],
    "with text": [CALLED[0], CALLED[1] | {"content": "Let me look."}, CALLED[2]],
    "as JSON": [
        CALLED[0],
        CALLED[1] | {"tool_calls": [CALL | {"function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'}}]},
        CALLED[2],
    ],
    "two": [CALLED[0], CALLED[1] | {"tool_calls": [CALL, CALL | {"id": "abcdefgh2"}]}, CALLED[2], CALLED[2]],
    "thought": [CALLED[0], CALLED[1] | {"reasoning_content": "I need a tool."}, CALLED[2]],
}


def conversations() -> Iterator[tuple[str, Messages, dict[str, Any]]]:
    """Every kind of conversation, with what the template is given besides it."""
    for count, system, thinking, tools in product(range(1, 6), (False, True), (False, True), (None, TOOLS)):
        said = [
            turn | {"reasoning_content": THOUGHTS[at]} if thinking and at in THOUGHTS else turn
            for at, turn in enumerate(TURNS[:count])
        ]
        name = f"{count} turns, system {system}, thinking {thinking}, tools {tools is not None}"
        yield name, [SYSTEM, *said] if system else said, {"tools": tools}
    for (kind, said), system, given in product(CALLS.items(), (False, True), (None, TOOLS)):
        yield f"calls {kind}, system {system}", [SYSTEM, *said] if system else list(said), {"tools": given}
    for value, count in product((False, True), (1, 2, 3)):
        yield f"enable_thinking {value}", TURNS[:count], {"tools": None, "enable_thinking": value}
    yield "documents", TURNS[:1], {"tools": None, "documents": [{"title": "t", "text": "x"}]}
    yield (
        "other variables",
        TURNS[:3],
        {"tools": None, "reasoning_effort": "high", "date_string": "1 May", "builtin_tools": ["browser"]},
    )


def as_parts(messages: Messages) -> Messages:
    return [
        message | {"content": [{"type": "text", "text": message["content"]}]} if message.get("content") is not None else message
        for message in messages
    ]


def render_theirs(source: str, messages: Messages, settings: dict[str, Any], answer: bool) -> str | None:
    """transformers' rendering, or None where the template raises."""
    try:
        text: str = make_tokenizer().apply_chat_template(
            messages, tokenize=False, chat_template=source, add_generation_prompt=answer, **settings
        )
    except Exception:
        return None
    return text


def render_ours(template: ChatTemplate, messages: Messages, settings: dict[str, Any], answer: bool) -> str | None:
    variables = {key: value for key, value in settings.items() if key not in ("tools", "documents")}
    chat = check_chat(
        messages,
        {
            "tools": settings["tools"],
            "documents": settings.get("documents"),
            "template_options": variables,
            "date": DAY,
        },
    )
    try:
        return template.render(chat, add_generation_prompt=answer)
    except InputError as error:
        assert "\n" not in str(error)
        return None


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import chat_template_utils

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Frozen:
            return cls.fromisoformat(DAY)

    monkeypatch.setattr(chat_template_utils, "datetime", Frozen)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_renders_as_transformers_does(path: Path, frozen: None) -> None:
    source = check_template(path.read_bytes(), path.name)
    template = ChatTemplate(source, TOKENS)
    seen = [render_theirs(source, messages, {"tools": None}, True) for messages in (TURNS[:1], as_parts(TURNS[:1]))]
    # Some multimodal templates write the texts of parts alone: transformers then loses a content that is text, in silence.
    loses_text = seen[0] is None or "Zürich" not in seen[0]
    assert any(text is not None and "Zürich" in text for text in seen)
    rendered = 0
    for name, messages, settings in conversations():
        for answer in (False, True):
            theirs = render_theirs(source, as_parts(messages) if loses_text else messages, settings, answer)
            ours = render_ours(template, messages, settings, answer)
            assert ours == theirs, name
            rendered += ours is not None
    assert rendered > 10


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_parts_of_text_are_written_as_transformers_writes_them_or_as_their_text(path: Path, frozen: None) -> None:
    """Where transformers writes a list of parts as Python, loses it or raises, the parts' text stands in its place."""
    source = path.read_text(encoding="utf-8")
    template = ChatTemplate(source, TOKENS)
    for messages in ([TURNS[0]], [SYSTEM, *TURNS[:3]]):
        as_text, as_list = (render_theirs(source, kind, {"tools": None}, True) for kind in (messages, as_parts(messages)))
        ours = render_ours(template, as_parts(messages), {"tools": None}, True)
        if as_list is not None and "Zürich" in as_list and "'text'" not in as_list and '"text"' not in as_list:
            assert ours == as_list
        else:
            assert ours == as_text


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_last_message_is_continued_as_transformers_continues_it(path: Path, frozen: None) -> None:
    source = path.read_text(encoding="utf-8")
    template = ChatTemplate(source, TOKENS)
    seen = render_theirs(source, TURNS[:1], {"tools": None}, True)
    loses_text = seen is None or "Zürich" not in seen
    for said in (TURNS[:2], TURNS[:4], [SYSTEM, *TURNS[:2]], TURNS[:3]):
        messages = as_parts(said) if loses_text else said
        theirs = render_theirs(source, messages, {"tools": None, "continue_final_message": True}, False)
        try:
            ours = template.render(check_chat(said, {"continue_final_message": True, "date": DAY}))
        except InputError:
            ours = None
        assert ours == theirs


# As the families' own generation_config.json files name them. GLM's turns have no end of their own.
ENDS = {
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
    "phi3": "<|end|>",
    "gptoss": "<|return|>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "smolvlm": "<end_of_utterance>",
    "glm4moe": None,
}


@pytest.mark.parametrize(("family", "end"), ENDS.items())
def test_the_end_of_a_turn_is_the_familys_own(family: str, end: str | None) -> None:
    added = Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str())
    others = ["<|im_start|>", "<|eot|>", "<|user|>", "<|assistant|>", "<think>", "</think>", "<start_of_turn>", "<|start|>"]
    added.add_special_tokens([*others, *filter(None, ENDS.values())])
    path = next(path for path in TEMPLATES if path.stem == family)
    found = find_turn_end(path.read_text(encoding="utf-8"), added, TOKENS)
    assert (None if found is None else added.id_to_token(found)) == end
