"""Rows of training data that people bring: what transformers' template makes of them, and what edgelora trains on."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

from edgelora.data.encode_rows import RowEncoder
from edgelora.data.rows import Row, read_rows
from edgelora_runtime.errors import InputError
from tests.inputs.cases import Case
from tests.tiny import make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_MARK = "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
_PLAIN = "{{ m.content }}{{ eos_token }}"
_ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat"}]
_TURNS = [
    *_ASKED, {"role": "assistant", "content": "sat"}, {"role": "user", "content": "a day"},
    {"role": "assistant", "content": "in the sun"},
]  # fmt: skip
_CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}]}


def _template(answer: str, *, start: str = "{{ bos_token }}") -> str:
    return (
        start + "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}{{ m.tool_calls | tojson }}{{ eos_token }}"
        "{% elif m.role == 'assistant' %}" + answer + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )


def _tokenizer(template: str | None) -> Any:
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def _read(folder: Path, value: object) -> Row:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")
    (row,) = read_rows(path)
    return row


def _equal(
    template: str, value: dict[str, Any], learned: list[str], *, given: dict[str, Any] | None = None, **options: Any
) -> Callable[[Path], str]:
    """Checks that the tokens are transformers' own, and that the learned ones are these texts.

    given: the row as its user gives it, where that differs from what transformers must get.
    """

    def check(folder: Path) -> str:
        tokenizer, row = _tokenizer(template), _read(folder, given or value)
        found = RowEncoder(tokenizer, options).learn(row)
        messages = value.get("messages") or [*value["prompt"], *value["completion"]]
        whole = tokenizer.apply_chat_template(messages, tools=value.get("tools"), **options)["input_ids"]
        assert list(found.tokens) == whole
        assert whole.count(tokenizer.bos_token_id) <= 1
        runs: list[list[int]] = []
        for place, token in enumerate(found.tokens):
            if found.learned[place]:
                runs += [] if found.learned[place - 1] else [[]]
                runs[-1].append(token)
        assert [tokenizer.decode(run) for run in runs] == learned
        return f"equal: the same {len(whole)} tokens"

    return check


def _refused(template: str | None, value: object, line: str) -> Callable[[Path], str]:
    def check(folder: Path) -> str:
        try:
            RowEncoder(_tokenizer(template)).learn(_read(folder, value))
        except InputError as error:
            assert line in str(error)
            assert "rows.jsonl line 1" in str(error)
            return str(error)
        raise AssertionError("not refused")

    return check


CASES = [
    Case(
        "messages of two turns", "template", "the tokens of apply_chat_template", "equal",
        _equal(_template(_PLAIN), {"messages": _TURNS}, ["sat</s>", "in the sun</s>"]),
    ),
    Case(
        "messages, a template with {% generation %}", "template", "its mask of the assistant's tokens", "equal",
        _equal(_template(_MARK), {"messages": _TURNS}, ["sat</s>", "in the sun</s>"]),
    ),
    Case(
        "prompt and completion as messages", "template", "the tokens of apply_chat_template", "equal",
        _equal(_template(_PLAIN), {"prompt": _TURNS[:4], "completion": _TURNS[4:]}, ["in the sun</s>"]),
    ),
    Case(
        "a call of a tool as the answer", "template", "the call as the template writes it", "equal",
        _equal(
            _template(_PLAIN), {"messages": [*_ASKED, _CALL], "tools": [{"name": "clock"}]},
            [json.dumps(_CALL["tool_calls"]) + "</s>"],
        ),
    ),
    Case(
        "a template option", "template", "the template sees it", "equal",
        _equal(
            _template(_PLAIN, start="{{ bos_token }}{% if brief %}<brief>{% endif %}"), {"messages": _TURNS[:3]}, ["sat</s>"],
            brief=True,
        ),
    ),
    Case(
        "messages, a base without a chat template", "template", "ValueError of eight lines", "refused",
        _refused(None, {"messages": _TURNS}, "the base has no chat template to render messages with"),
    ),
    Case(
        "messages, a template that refuses a system message", "template", "TemplateError", "refused",
        _refused(
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}", {"messages": _TURNS},
            "the chat template refused the messages (no system)",
        ),
    ),
    Case(
        "messages, a template that rewrites earlier answers", "template", "another text for each length", "refused",
        _refused(
            "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and not loop.last %}[cut]{% endif %}{{ m.content }}"
            "{% endfor %}{% if add_generation_prompt %}<assistant>!{% endif %}",
            {"messages": _TURNS}, "what the assistant said cannot be told apart",
        ),
    ),
    Case(
        "messages, a template that wants parts", "template", "the tokens of messages with parts", "equal",
        _equal(
            "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}"
            "{{ eos_token if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
            {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in _TURNS]},
            ["sat</s>", "in the sun</s>"], given={"messages": _TURNS},
        ),
    ),
    Case(
        "half of a surrogate pair in a row", "tokenizer", "TypeError or UnicodeEncodeError", "refused",
        _refused(None, {"prompt": "a \ud83d b", "completion": "c"}, "prompt holds \\ud83d, half of a surrogate pair"),
    ),
]  # fmt: skip
