"""Attacks by a bundle's tokenizer and its chat templates."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.attacks.attack import Attack, Copy, make_copy, use_bundle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


def tokenizer(**parts: Any) -> Callable[[Copy], None]:
    """A tokenizer with other parts."""

    def apply(copy: Copy) -> None:
        value = json.loads((copy.folder / TOKENIZER).read_bytes())
        copy.replace(TOKENIZER, json.dumps({**value, **parts}).encode())

    return apply


def change_tokenizer(change: Callable[[dict[str, Any]], object]) -> Callable[[Copy], None]:
    def apply(copy: Copy) -> None:
        value = json.loads((copy.folder / TOKENIZER).read_bytes())
        change(value)
        copy.replace(TOKENIZER, json.dumps(value).encode())

    return apply


def raw(name: str, content: bytes) -> Callable[[Copy], None]:
    return lambda copy: copy.replace(name, content)


def replacement(old: str, new: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def sequence(kind: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", kind: parts}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def template_of(tokens: int) -> dict[str, Any]:
    special = {"<s>": {"id": "<s>", "ids": [0] * tokens, "tokens": ["<s>"] * tokens}}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}


def cut_merges(merge: object) -> dict[str, Any]:
    """A model whose merge lacks the prefix of one byte that the library cuts off, within a character."""
    vocab = {"é": 0, "a": 1}
    return {"type": "BPE", "continuing_subword_prefix": "a", "vocab": vocab, "merges": [merge]}


def added(number: int, content: str = "<evil>") -> Callable[[dict[str, Any]], object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return lambda value: value["added_tokens"].append({"id": number, "content": content, "special": True, **flags})


TOKENIZERS: dict[str, Callable[[Copy], None]] = {
    "empty": raw(TOKENIZER, b""),
    "zeros": raw(TOKENIZER, bytes(100)),
    "a list": raw(TOKENIZER, b"[]"),
    "a hundred thousand brackets": raw(TOKENIZER, b"[" * 100_000),
    "not UTF-8": raw(TOKENIZER, b"\xff\xfe{}"),
    "merges cut within a character": tokenizer(model=cut_merges(["é", "é"])),
    "the same as text": tokenizer(model=cut_merges("é é")),
    "the same behind an escaped key": raw(
        TOKENIZER, json.dumps({"model": cut_merges(["é", "é"])}).replace("continuing", "continuin\\u0067").encode()
    ),
    "no model": tokenizer(model=None),
    "a model of another kind": tokenizer(model={"type": "Evil\x1b[2J"}),
    "a normalizer of another kind": tokenizer(normalizer={"type": "Evil"}),
    "forty doublings": tokenizer(normalizer=sequence("normalizers", [replacement("a", "aa")] * 40)),
    "doublings by an expression": tokenizer(normalizer=sequence("normalizers", [replacement(".", "aa", "Regex")] * 20)),
    "a replacement of a megabyte": tokenizer(normalizer=replacement("a", "b" * 1_000_000)),
    "a replacement of nothing": tokenizer(normalizer=sequence("normalizers", [replacement("", "b" * 200)] * 3)),
    "a prefix of a megabyte": tokenizer(normalizer={"type": "Prepend", "prepend": "b" * 1_000_000}),
    "a thousand normalizers": tokenizer(normalizer=sequence("normalizers", [{"type": "NFC"}] * 1000)),
    "sequences in sequences": tokenizer(
        normalizer=sequence("normalizers", [sequence("normalizers", [replacement("a", "aa")] * 30)])
    ),
    "a decoder that doubles": tokenizer(decoder=sequence("decoders", [replacement("a", "aa")] * 40)),
    "a decoder that replaces by a megabyte": tokenizer(decoder=replacement("a", "b" * 1_000_000)),
    "pre-tokenizers that double": tokenizer(
        pre_tokenizer=sequence("pretokenizers", [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}] * 40)
    ),
    "an exponential pattern": tokenizer(pre_tokenizer=split("(a+)+$")),
    "an exponential pattern of choices": tokenizer(pre_tokenizer=split("(?:a|a)*$")),
    "an exponential pattern in a class": tokenizer(pre_tokenizer=split("(?:[a-z]+|[)]+)*x")),
    "an exponential pattern of bounds": tokenizer(pre_tokenizer=split("(?:a{1,}){1,}$")),
    "an exponential pattern of options": tokenizer(pre_tokenizer=split("a?" * 100 + "[^a]")),
    "an exponential pattern of options in turns": tokenizer(pre_tokenizer=split("(?:a|a){0,30}b")),
    "a pattern that calls itself": tokenizer(pre_tokenizer=split(r"(?<x>a|\g<x>a)+b")),
    "three repetitions in a row": tokenizer(pre_tokenizer=split("a+a+a+b")),
    "an exponential normalizer": tokenizer(normalizer=replacement("(a+)+$", "b", "Regex")),
    "a pattern that is broken": tokenizer(pre_tokenizer=split("(((")),
    "a pattern of a megabyte": tokenizer(pre_tokenizer=split("a" * 1_000_000)),
    "a post-processor of a million tokens": tokenizer(post_processor=template_of(1_000_000)),
    "a post-processor that leaves the text out": tokenizer(post_processor={**template_of(1), "single": []}),
    "a token past the vocabulary": change_tokenizer(added((1 << 24) - 1, "the cat")),
    "configuration that is a list": raw(CONFIG, b"[]"),
    "configuration that is deep": raw(CONFIG, b'{"a":' * 50_000),
    "configuration that is not UTF-8": raw(CONFIG, b"\xff"),
}
LOOP = "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}"
CALLS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}"
DOUBLING = "{% set ns = namespace(s='ab') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}"
TEMPLATES: dict[str, str] = {
    "a loop without an end": LOOP,
    "calls without an end": CALLS,
    "a doubled text": DOUBLING,
    "a repeated text": "{{ 'a' * 10000000000 }}",
    "a wide text": "{{ 'a' | center(10000000000) }}",
    "a format of a wide text": "{{ '%10000000000d' % 1 }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a power in a condition": "{% if 9 ** (9 ** 9) %}{% endif %}",
    "a range of 2^62": "{% for i in range(4611686018427387904) %}{% endfor %}",
    "a text that it writes without an end": "{% for i in range(99999) %}{{ 'abcdefghij' * 1000 }}{% endfor %}",
    "a break outside of a loop": "{% break %}",
    "a template that is not closed": "{% for x in y %}",
    "an unknown filter": "{{ x | nope }}",
    "ten thousand brackets": "{{ " + "(" * 10_000 + ")" * 10_000 + " }}",
    "a way into Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a way into Python by a list": "{{ messages.append.__self__.__init__.__globals__ }}",
    "an import": "{% import '/etc/passwd' as x %}{{ x }}",
    "an include": "{% include '/etc/passwd' %}",
    "an exception with control characters": "{{ raise_exception('\x1b[2J\nevil') }}",
    "an exception of a megabyte": "{{ raise_exception('x' * 1000000) }}",
    "a name of control characters": "{% \x1b[2J\u202e %}",
    "300 kB": "x" * 300_000,
    "an assignment to itself": "{% set x.y = 1 %}",
    "nested lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "a date of a megabyte": "{{ strftime_now('%Y' * 1000000) }}",
}


def list_attacks(bundle: Path) -> Iterator[Attack]:
    for name, change in TOKENIZERS.items():
        yield Attack("tokenizer", name, make_copy(bundle, change), use_bundle)
    for name, text in TEMPLATES.items():
        yield Attack("template", name, make_copy(bundle, raw(TEMPLATE, text.encode())), use_bundle)
    yield Attack("template", "not UTF-8", make_copy(bundle, raw(TEMPLATE, b"\xff")), use_bundle)
