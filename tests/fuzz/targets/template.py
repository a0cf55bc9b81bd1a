"""A chat template, rendered for one of several conversations."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora_runtime import Bundle
from edgelora_runtime.bundle.chat_template import CHAT_TEMPLATE, DEFAULT_TEMPLATE, ChatTemplates, find_turn_end
from edgelora_runtime.bundle.messages import check_chat
from edgelora_runtime.bundle.template_sandbox import VALUE_LIMIT
from edgelora_runtime.bundle.tokenizer import TOKENIZER, load_tokenizer
from tests.attacks.texts import TEMPLATES
from tests.fuzz.harness import Harness
from tests.fuzz.mutations import mutate_bytes, mutate_text

if TYPE_CHECKING:
    from random import Random

    from edgelora_runtime.bundle.messages import ChatOptions

SLOW = (
    "without an end",
    "doubled",
    "nested",
    "megabyte",
    "300 kB",
    "ten thousand",
)  # seeds that take most of a second, or are large
LONGEST = 2048  # bytes of a seed
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}
HELLO: dict[str, Any] = {"role": "user", "content": "hi"}
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
}
CHATS: tuple[tuple[list[dict[str, Any]], ChatOptions], ...] = (
    ([HELLO], {}),
    ([{"role": "system", "content": "s"}, HELLO, {"role": "assistant", "content": "a"}, HELLO], {"date": "2025-01-31"}),
    (
        [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]}],
        {"documents": [{"title": "t"}]},
    ),
    ([HELLO, CALL, {"role": "tool", "content": "1"}], {"tools": [TOOL], "template_options": {"enable_thinking": False}}),
    ([HELLO, {"role": "assistant", "content": "a "}], {"continue_final_message": True}),
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
WORDS = (
    *(
        "{{ ",
        " }}",
        "{% ",
        " %}",
        "{%- ",
        "-%}",
        "{% if ",
        "{% else %}",
        "{% endif %}",
        "{% for m in messages %}",
        "{% endfor %}",
    ),
    *(
        "{% for i in range(9999) %}",
        "{% set x = ",
        "{% set ns = namespace(a=1) %}",
        "ns.a",
        "{% macro f(x) %}",
        "{% endmacro %}",
        "f(f)",
    ),
    *(
        "{% call f(1) %}",
        "{% endcall %}",
        "{% generation %}",
        "{% endgeneration %}",
        "{% break %}",
        "{% continue %}",
        "{% raw %}",
    ),
    *(
        "{% filter upper %}",
        "{% endfilter %}",
        "{% set y %}",
        "{% endset %}",
        "{% with %}",
        "{% endwith %}",
        "{% block b %}",
        "{% endblock %}",
    ),
    *(
        " | tojson",
        " | tojson(indent=99)",
        " | join(x)",
        " | list",
        " | length",
        " | replace('', x)",
        " | center(9999999)",
        " | batch(2)",
    ),
    *(
        " | indent(9999)",
        " | wordwrap(1)",
        " | format(x)",
        " | sum",
        " | map('upper')",
        " | groupby('role')",
        " | urlize",
        " | xmlattr",
    ),
    *(
        " | pprint",
        " | tojson | safe",
        " | escape",
        " | striptags",
        " | truncate(1)",
        " | sort",
        " | unique",
        " | random",
        " | slice(99999)",
    ),
    *(" * 9999", " ** 999", " ~ ", " + ", " % ", "'%9999d' % 1", "'a' * 99999", "[1] * 99999", "x * x", "'{:>9999}'.format(1)"),
    *(
        "messages",
        "tools",
        "documents",
        "loop.index",
        "loop.cycle('a')",
        "loop.previtem",
        "bos_token",
        "self",
        "caller()",
        "varargs",
    ),
    *(
        ".split('')",
        ".join(x)",
        ".replace('a', x)",
        ".zfill(9999999)",
        ".expandtabs(9999)",
        ".encode()",
        ".translate(x)",
        ".items()",
    ),
    *(
        ".__class__",
        "['__init__']",
        "|attr('__globals__')",
        ".format_map(x)",
        ".to_bytes(9999999)",
        "cycler(1)",
        "joiner()",
        "dict(a=1)",
    ),
    *(
        "raise_exception('x')",
        "strftime_now('%Y')",
        "true",
        "none",
        "1/0",
        "9**9**9",
        "''",
        "[x, x]",
        "{'a': x}",
        "is defined",
        "not in",
    ),
    *(
        "{% import 'x' as y %}",
        "{% include messages %}",
        "{% extends 'x' %}",
        "{% autoescape true %}",
        "{% endautoescape %}",
        "{# ",
        " #}",
    ),
)


def build(bundle: Path, folder: Path) -> Harness:
    tokenizer = load_tokenizer((bundle / TOKENIZER).read_bytes())
    chats = [check_chat(messages, options) for messages, options in CHATS]

    def use(raw: bytes) -> None:
        """The chat is chosen by the first byte. A fifth of all inputs are only asked for the token that ends a turn."""
        chosen, text = raw[0] % (len(chats) + 1) if raw else 0, raw[1:]
        if chosen == len(chats):
            find_turn_end(text.decode(errors="replace"), tokenizer, SPECIAL)
        else:
            templates = ChatTemplates({DEFAULT_TEMPLATE: CHAT_TEMPLATE}, lambda name: text, SPECIAL)
            assert len(templates.render(chats[chosen])) <= VALUE_LIMIT, "a text beyond the limit"

    own = Bundle.open(bundle).read(CHAT_TEMPLATE).decode()
    hostile = [text for name, text in TEMPLATES.items() if not any(word in name for word in SLOW)]
    texts = [own, *read_real_templates(), *hostile]
    return Harness(
        [bytes([number % (len(chats) + 1)]) + text.encode() for number, text in enumerate(texts)], mutate, use, limit=2 * LONGEST
    )


def read_real_templates() -> list[str]:
    """The templates of published models that TRL brings, where it is installed."""
    found = find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found and found.origin else Path()
    return [
        path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja")) if found and path.stat().st_size < LONGEST
    ]


def mutate(raw: bytes, chance: Random) -> bytes:
    if chance.randrange(20) == 0:
        return mutate_bytes(raw, chance)
    chosen = raw[:1] if chance.randrange(4) else chance.randbytes(1)
    return chosen + mutate_text(raw[1:].decode(errors="replace"), chance, WORDS).encode(errors="replace")
