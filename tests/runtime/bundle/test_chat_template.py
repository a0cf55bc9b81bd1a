"""Chat templates: semantics as transformers has them, hostile ones contained, named ones picked, and the end of a turn."""

# ruff: noqa: E501 - a template stands on one line, since a line break is text

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from edgelora_runtime.bundle.chat_template import (
    ChatTemplate,
    ChatTemplates,
    check_template,
    find_turn_end,
    list_templates,
    read_special_tokens,
)
from edgelora_runtime.bundle.messages import check_chat
from edgelora_runtime.errors import InputError, IntegrityError, UsageError
from tests.tiny import make_tokenizer

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hé <b>"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def render(source: str, messages: list[dict[str, Any]] = HELLO, **options: Any) -> str:
    return ChatTemplate(source, TOKENS).render(check_chat(messages, options))  # type: ignore[arg-type]


SAME: dict[str, str] = {
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ messages | tojson(ensure_ascii=True, sort_keys=True) }}",
    "separators": "{{ messages | tojson(separators=(',', ':')) }}",
    "tokens that are set": "{{ bos_token }}{{ eos_token }}{{ unk_token is defined }}{{ pad_token }}|",
    "None": "{{ tools is none }}{{ documents is none }}{{ tools }}{{ messages[0].tool_calls is defined }}",
    "generation": "{% generation %}{% set x = 1 %}a{{ x }}{% endgeneration %}{{ x is defined }}",
    "break and continue": "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "loop variables": "{% for i in 'abc' %}{{ loop.index }}/{{ loop.length }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.last }}{% endfor %}",
    "filtered loop": "{% for i in range(6) if i % 2 %}{{ loop.index0 }}{{ i }}{{ loop.revindex }}{% else %}-{% endfor %}",
    "loop over a dict": "{% for k, v in messages[0].items() %}{{ k ~ '=' ~ v }}{% endfor %}{% for k in {'a': 1} %}{{ k }}{% endfor %}",
    "recursive loop": "{% for n in [[1, [2]], 3] recursive %}{% if n is iterable %}<{{ loop(n) }}>{% else %}{{ n }}{% endif %}{% endfor %}",
    "macro and call": "{% macro f(x) %}[{{ x }}{{ caller() }}]{% endmacro %}{% call f(1) %}in{% endcall %}{% set b %}z{{ f }}{% endset %}",
    "captured text": "{% set b %}z{% for i in [1, 2] %}{{ i }}{% endfor %}{% endset %}{{ b | upper ~ b }}{% filter upper %}a{{ b }}{% endfilter %}",
    "namespace": "{% set ns = namespace(a=1, b=[]) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ ns }}{{ dict(a=1) }}{{ dict.fromkeys(['a']) }}",
    "formats": "{{ '%s-%05.1f' | format('a', 2.5) }}{{ 'x%dy' % 3 }}{{ '{:>5}|{a}'.format(1, a=2) }}{{ 2 ** 10 }}{{ 'ab' * 3 }}{{ [1] * 2 }}{{ 'at: 123456 {}'.format(1) }}{{ '%d%% of 123456' % 5 }}",
    "text methods": "{{ 'a,b'.split(',') }}{{ ' x '.strip().center(5, '*') }}{{ '-'.join(['a', 'b']) }}{{ 'aXb'.replace('X', '..') }}{{ 'a\tb'.expandtabs() }}",
    "methods in loops": "{% for i in [1] %}{{ 'a\tb'.expandtabs() }}{{ (5).to_bytes(2, 'big') }}{{ 'x'.zfill(3) }}{% endfor %}",
    "filters": "{{ 'b a' | title | replace('A', 'c') | indent(2, first=true) | trim }}{{ [3, 1] | sort | join('+') }}{{ messages | map(attribute='role') | join('/') }}"
    "{{ [1, 2, 3] | batch(2) | list }}{{ 'x' | center(7) }}{{ [[1], [2]] | map('first') | sum }}{{ 'a<b' | e }}{{ 'long words here' | wordwrap(5) }}",
    "escaping": "{% autoescape true %}{{ '<' ~ messages[0].content }}{{ messages[0].content | safe ~ '<' }}{% endautoescape %}{{ '<' }}",
    "trimmed blocks": "a\n  {% if true %}\nb\n  {% endif %}\nc\n",
    "undefined": "[{{ nothing }}]{{ nothing | default('d') }}{{ 'x' if nothing }}{{ messages[5] }}",
    "errors": "{{ raise_exception('no') }}",
    "an underscore in a namespace": "{% set ns = namespace() %}{% set ns._a = 1 %}",
    "undefined in depth": "{{ nothing.at.all }}",
    "not iterable": "{% for i in 5 %}{{ i }}{% endfor %}",
    "a missing template": "{% include 'x' %}",
    "undefined to JSON": "{{ nothing | tojson }}",
}


@pytest.mark.parametrize("source", SAME.values(), ids=SAME.keys())
def test_a_template_means_what_it_means_in_transformers(source: str) -> None:
    try:
        theirs = make_tokenizer().apply_chat_template(HELLO, chat_template=source, tokenize=False, add_generation_prompt=True)
    except Exception:
        with pytest.raises(InputError) as raised:
            render(source)
        assert str(raised.value).isprintable()
    else:
        assert render(source) == theirs


HOSTILE = {
    "a product": "{{ 'a' * 1000000000 }}",
    "a power": "{{ 10 ** 1000000000 }}",
    "a product of numbers": "{% set n = namespace(a=9) %}{% for i in range(9999) %}{% set n.a = n.a * n.a %}{% endfor %}",
    "a list": "{{ [1] * 1000000000 }}",
    "a filter's width": "{{ 'a' | center(1000000000) }}",
    "an indent": "{{ 'a\nb' | indent(1000000000) }}",
    "an indent of JSON": "{{ [1] | tojson(indent=1000000000) }}",
    "a batch": "{{ [1] | batch(1000000000, 2) | list }}",
    "a format's width": "{{ '%1000000000d' % 1 }}",
    "a format's star": "{{ '%*d' | format(1000000000, 1) }}",
    "a new format": "{{ '{:1000000000}'.format(1) }}",
    "a nested format": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "a method": "{{ 'a'.ljust(1000000000) }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "doubling by ~": "{% set n = namespace(a='a') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "doubling by +": "{% set n = namespace(a=[1]) %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "doubling by replace": "{% set n = namespace(a='a') %}{% for i in range(99) %}{% set n.a = n.a | replace('a', 'aa') %}{% endfor %}",
    "nested lists": "{% set n = namespace(a=[]) %}{% for i in range(99) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}",
    "nested lists to JSON": "{% set n = namespace(a=[]) %}{% for i in range(99) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a | tojson }}",
    "nested lists as text": "{% set n = namespace(a=[]) %}{% for i in range(99) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a | upper | length }}",
    "a namespace": "{% set n = namespace(a=[]) %}{% for i in range(99) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n }}",
    "join": "{{ (['a' * 1000000] * 1000) | join | length }}",
    "captured text": "{% set x %}{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}{% endset %}",
    "output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "range": "{{ range(1000000000) | list }}",
    "random text": "{{ lipsum(1000000) }}",
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__.x }}",
    "an import": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "strftime": "{{ strftime_now('%Y' * 1000) }}",
    "changes": "{{ messages.append(1) }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_template_is_stopped_in_one_line(source: str) -> None:
    started = time.process_time()
    with pytest.raises(InputError) as raised:
        render(source)
    assert str(raised.value).isprintable()
    assert time.process_time() - started < 10, "far more than any of them takes"


def test_a_template_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgelora_runtime.bundle.template_sandbox._SECONDS", 0.2)
    empty = "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}"
    calls = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}"
    for source in (empty, calls):
        with pytest.raises(InputError, match=r"takes more than 0\.2 seconds"):
            render(source)


def test_nothing_is_computed_while_a_template_is_compiled() -> None:
    started = time.process_time()
    for expression in ("'a' * 10000000000", "'a' | center(10000000000)", "'%10000000000d' % 1", "9 ** 9999999999"):
        check_template(f"{{% if false %}}{{{{ {expression} }}}}{{% endif %}}".encode())
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"a\n{% for x in y %}", "t line 2 is not a valid template"),
        (b"{% break %}", "t is not a valid template"),
        (b"{{ x | nope }}", "t line 1 .*nope"),
        (b"\xff", r"t is not UTF-8 \(byte 0\)"),
        (b"x" * (1 << 19), "t has 524288 bytes"),
        (b"{% generation %}", "t line 1"),
        ("{% for\u202e\x1b %}".encode(), "t line 1"),
    ],
)
def test_a_template_that_is_not_valid_is_named_with_its_line(raw: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        check_template(raw, "t")
    assert str(raised.value).isprintable()


def test_the_day_can_be_fixed() -> None:
    source = "{{ strftime_now('%d %b %Y %H:%M') }}"
    assert render(source, date="2025-01-31") == "31 Jan 2025 00:00"
    assert re.fullmatch(r"\d\d \w{3} \d{4} \d\d:\d\d", render(source))


def test_special_tokens_are_those_of_transformers(tmp_path: Any) -> None:
    import json

    from transformers import AutoTokenizer

    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_bytes()) | {
        "pad_token": {
            "__type": "AddedToken",
            "content": "<s>",
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
        },
        "unk_token": None,
        "add_bos_token": True,
        "image_token": "</s>",
        "extra_special_tokens": {"audio_token": "<s>"},
    }
    path.write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(tmp_path).special_tokens_map
    assert read_special_tokens(config) == theirs
    assert set(theirs) == {"bos_token", "eos_token", "pad_token", "image_token", "audio_token"}


def picked(files: dict[str, bytes], **options: Any) -> str:
    templates = ChatTemplates(list_templates(files), files.__getitem__, TOKENS)
    return templates.render(check_chat(HELLO, options))  # type: ignore[arg-type]


def test_named_templates_are_picked_as_transformers_picks_them() -> None:
    names = {"default": "plain", "tool_use": "with tools", "rag": "with documents"}
    files = {
        "chat_template.jinja": b"plain",
        "chat_template.tool_use.jinja": b"with tools",
        "chat_template.rag.jinja": b"with documents",
        "tokenizer.json": b"",
    }
    tokenizer = make_tokenizer()
    before, tokenizer.chat_template = tokenizer.chat_template, names
    try:
        for tools, name in ((None, None), ([], None), ([{"a": 1}], None), (None, "rag"), ([{"a": 1}], "default")):
            theirs = tokenizer.apply_chat_template(HELLO, tools=tools, chat_template=name, tokenize=False)
            assert picked(files, tools=tools, template_options={} if name is None else {"chat_template": name}) == theirs
    finally:
        tokenizer.chat_template = before
    with pytest.raises(UsageError, match="no chat template 'x' in this bundle; use one of default, rag, tool_use"):
        picked(files, template_options={"chat_template": "x"})
    with pytest.raises(UsageError, match="no default chat template; give the template option chat_template one of rag"):
        picked({"chat_template.rag.jinja": b"x"})
    with pytest.raises(InputError, match="no chat template"):
        picked({})


def test_a_broken_template_is_compiled_only_when_it_is_picked() -> None:
    files = {"chat_template.jinja": b"plain", "chat_template.tool_use.jinja": b"{% if %}"}
    assert picked(files) == "plain"
    with pytest.raises(IntegrityError, match=r"chat_template\.tool_use\.jinja line 1 .*plain prompts still work"):
        picked(files, tools=[])


LISTS = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages[0].content }}", "one\ntwo"),
        ("{{ 'user: ' + messages[0].content }}", "user: one\ntwo"),
        ("{{ messages[0].content | tojson }}", '"one\\ntwo"'),
        ("{% for part in messages[0].content %}<{{ part.text }}>{% endfor %}", "<one><two>"),
        ("{{ messages[0].content[0].text }}", "one\ntwo"),
        ("{% if messages[0].content is string %}s{{ messages[0].content }}{% endif %}", "sone\ntwo"),
        ("{{ raise_exception('never') if messages[0].content is not string }}{{ messages[0].content }}", "one\ntwo"),
        ("{'text': '{{ messages[0].content }}'}", "{'text': 'one\ntwo'}"),
        ("nothing of it", "nothing of it"),
    ],
)
def test_no_part_of_a_content_is_lost(source: str, expected: str) -> None:
    assert render(source, LISTS) == expected


def test_text_for_a_template_that_reads_parts_alone() -> None:
    source = "{% for m in messages %}{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endfor %}"
    assert render(source) == "<hé <b>>"
    template = ChatTemplate("{{ raise_exception('x') if not ready }}" + source, TOKENS)
    with pytest.raises(InputError):
        template.render(check_chat(HELLO, {}))
    assert template.render(check_chat(HELLO, {"template_options": {"ready": True}})) == "<hé <b>>"


def test_the_end_of_a_turn_is_found() -> None:
    tokenizer = make_tokenizer().backend_tokenizer
    close = "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    for source, expected in (
        (close + "</s>\n{% endfor %}", 1),
        (close + "\n </s>{% endfor %}", 1),
        (close + "{{ eos_token }}{% endfor %}", 1),
        (close + "\n{% endfor %}</s>", 1),
        (close + " end </s>{% endfor %}", None),
        (close + "{% endfor %}", None),
        ("{% for m in messages %}{{ m.content[0].text }}</s>{% endfor %}", 1),
        ("no content</s>", None),
        ("{{ raise_exception('x') }}", None),
    ):
        assert find_turn_end(source, tokenizer, TOKENS) == expected, source
    with pytest.raises(InputError, match="line 1"):
        find_turn_end("{% if %}", tokenizer, TOKENS)
