"""Requests with messages: what the template is given, cached prompts, and stop strings that are special tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from edgelora_runtime import InputError, Runtime, UsageError
from tests.tiny import export_base, make_base

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEMPLATE = (
    "{{ bos_token }}{{ strftime_now('%Y-%m-%d') }}{{ tools | tojson }}{{ documents | tojson }}{{ thinking }}"
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "the cat"}]
GIVEN: dict[str, Any] = {"tools": [{"name": "f"}], "documents": [{"title": "t"}], "date": "2025-01-31"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats") / "base"
    make_base(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    export_base(folder, folder.parent / "bundle")
    return folder


@pytest.fixture
def opened(base: Path) -> Iterator[Runtime]:
    with Runtime(base.parent / "bundle", threads=1) as runtime:
        yield runtime


def test_options_reach_the_template(opened: Runtime, base: Path) -> None:
    from transformers import AutoTokenizer

    source = TEMPLATE.replace("strftime_now('%Y-%m-%d')", "'2025-01-31'")
    theirs: Any = AutoTokenizer.from_pretrained(base).apply_chat_template(
        HELLO,
        chat_template=source,
        tools=GIVEN["tools"],
        documents=GIVEN["documents"],
        thinking=False,
        add_generation_prompt=True,
        return_dict=False,
    )
    options = GIVEN | {"template_options": {"thinking": False}}
    assert opened.encode(HELLO, **options) == theirs
    found = opened.generate(HELLO, max_tokens=5, **options)
    assert found.prompt_tokens == len(theirs)
    assert found.tokens == opened.generate(theirs, max_tokens=5).tokens


def test_a_fixed_date_keeps_cached_prompts(opened: Runtime) -> None:
    def ask(**options: Any) -> int:
        return opened.generate(HELLO, max_tokens=1, **options).reused_tokens

    assert ask(date="2025-01-31") == 0
    assert ask(date="2025-01-31") == len(opened.encode(HELLO, date="2025-01-31")) - 1
    assert ask(date="1999-01-31") == 1, "<s> alone"


def test_options_for_a_template_need_messages(opened: Runtime) -> None:
    for prompt in ("the cat", [5, 6]):
        with pytest.raises(UsageError, match=r"tools and documents and date: only a chat template reads this"):
            opened.generate(prompt, **GIVEN)
        with pytest.raises(UsageError, match="pass messages"):
            opened.encode(prompt, tools=[])
    unknown: dict[str, Any] = {"tool": []}
    with pytest.raises(UsageError, match="encode has no option 'tool'"):
        opened.encode(HELLO, **unknown)


def test_parts_are_their_text(opened: Runtime) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "cat"}]}]
    assert opened.encode(parts, date="2025-01-31") == opened.encode([{"role": "user", "content": "the\ncat"}], date="2025-01-31")


def test_invalid_unicode_is_refused(opened: Runtime) -> None:
    for prompt in ("a\ud800", [{"role": "user", "content": "a\ud800"}]):
        with pytest.raises(InputError) as raised:
            opened.generate(prompt)
        assert "\\ud800" in str(raised.value) or "U+D800" in str(raised.value)


def test_a_stop_string_that_is_a_special_token_ends_at_that_token(opened: Runtime) -> None:
    """Decoding leaves <s> out, so no stop string could be seen in the text. At a high temperature the model writes it."""
    for seed in range(200):
        options: dict[str, Any] = {"max_tokens": 60, "temperature": 3.0, "seed": seed, "ignore_eos": True}
        whole = opened.generate("the cat", **options).tokens
        if 0 in whole[1:]:
            break
    else:
        pytest.fail("no <s> in 200 generations")
    for stop in (["never there", "<s>"], "<s>"):
        found = opened.generate("the cat", stop=stop, **options)
        assert found.tokens == whole[: whole.index(0)]
        assert found.finish_reason == "stop"
        assert found.text == opened.tokenizer.decode(found.tokens)


def test_a_last_message_is_continued(opened: Runtime) -> None:
    said = [*HELLO, {"role": "assistant", "content": "sat on "}]
    tokens = opened.encode(said, date="2025-01-31", continue_final_message=True)
    text = opened.tokenizer.render_chat(said, date="2025-01-31", continue_final_message=True)
    assert text.endswith("</s>assistant: sat on ")
    assert tokens == opened.encode(text)
    nothing: list[Any] = [[], None, ""]
    for content in nothing:
        empty = [*HELLO, {"role": "assistant", "content": content}]
        with pytest.raises(InputError, match="the last message has no content to continue"):
            opened.encode(empty, continue_final_message=True)
    with pytest.raises(UsageError, match="continue_final_message: only a chat template reads this"):
        opened.generate("the cat", continue_final_message=True)
