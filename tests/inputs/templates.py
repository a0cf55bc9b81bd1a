"""Chat templates that people bring: a bundle's tokens equal those of transformers on the same folder."""

# ruff: noqa: E501 - a template stands on one line, since a line break is text

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from edgelora_runtime import InputError, IntegrityError, Runtime
from tests.inputs.cases import Case
from tests.tiny import export_base, make_base

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Messages = list[dict[str, Any]]

TURNS: Messages = [
    {"role": "user", "content": " the cat "},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "é 🙂"},
]
TOOLS = [
    {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {"é": {"type": "string"}}}}}
]
CALLED: Messages = [
    TURNS[0],
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "find", "arguments": {"é": 1}}}]},
    {"role": "tool", "content": "mat"},
]
PARTS: Messages = [{"role": "user", "content": [{"type": "text", "text": "the cat"}, {"type": "text", "text": "sat"}]}]
READS_PARTS = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
)
PLAIN = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def make_folder(folder: Path, template: str | dict[str, str] | None, **config: Any) -> Path:
    """A tiny base with a chat template, or with named ones in tokenizer_config.json."""
    base = folder / "base"
    make_base(base)
    (base / "chat_template.jinja").unlink()
    if isinstance(template, str):
        (base / "chat_template.jinja").write_text(template, encoding="utf-8")
    elif template is not None:
        config["chat_template"] = [{"name": name, "template": text} for name, text in template.items()]
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | config), encoding="utf-8")
    return base


def compare(folder: Path, base: Path, messages: Messages, reference: Messages | None = None, **options: Any) -> str:
    """Compares the tokens of a chat. reference: the messages for transformers, if it gets others."""
    from transformers import AutoTokenizer

    export_base(base, folder / "bundle")
    variables = options.get("template_options", {})
    theirs = AutoTokenizer.from_pretrained(base).apply_chat_template(
        reference or messages,
        tools=options.get("tools"),
        documents=options.get("documents"),
        add_generation_prompt=True,
        return_dict=False,
        **variables,
    )
    with Runtime(folder / "bundle", threads=1) as runtime:
        ours = runtime.encode(messages, **options)
        assert ours == theirs
        assert runtime.generate(messages, max_tokens=1, **options).prompt_tokens == len(theirs)
    return f"equal: {len(theirs)} tokens"


def check_named(folder: Path) -> str:
    base = make_folder(folder, {"default": PLAIN, "tool_use": "tools: {{ tools | tojson }}" + PLAIN})
    seen = compare(folder / "a", base, TURNS)
    return f"{seen} without tools, {compare(folder / 'b', base, TURNS, tools=TOOLS)} with"


def check_named_files(folder: Path) -> str:
    base = make_folder(folder, PLAIN)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | length }} tools" + PLAIN, encoding="utf-8")
    (base / "additional_chat_templates" / "rag.jinja").write_text("{{ documents | tojson }}", encoding="utf-8")
    seen = compare(folder / "a", base, TURNS, tools=TOOLS)
    compare(folder / "b", base, TURNS, documents=[{"title": "t", "text": "x"}], template_options={"chat_template": "rag"})
    return seen


def check_generation(folder: Path) -> str:
    source = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}."
    return compare(folder, make_folder(folder, source), TURNS)


def check_loop_controls(folder: Path) -> str:
    source = "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% elif loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}."
    return compare(folder, make_folder(folder, source), TURNS)


def check_date(folder: Path) -> str:
    from transformers.utils import chat_template_utils

    base = make_folder(folder, "Today is {{ strftime_now('%d %b %Y') }}." + PLAIN)
    day = datetime.datetime(2025, 1, 31)
    with patch.object(chat_template_utils, "datetime") as clock:
        clock.now.return_value = day
        return compare(folder, base, TURNS, date="2025-01-31")


def check_tools(folder: Path) -> str:
    source = (
        "{{ tools | tojson(indent=2) }}{% for m in messages %}{{ m.role }}{{ m.content }}"
        "{% for call in m.tool_calls %}{{ call | tojson(sort_keys=True) }}{% endfor %}{% endfor %}"
    )
    return compare(folder, make_folder(folder, source), CALLED, tools=TOOLS)


def check_none(folder: Path) -> str:
    source = "{% for m in messages %}{{ m.role }}{{ m.content is defined }}{{ m.content }}{{ tools is none }}{{ unk_token is defined }}{% endfor %}"
    return compare(folder, make_folder(folder, source), CALLED)


def check_variables(folder: Path) -> str:
    source = "{{ enable_thinking }}{{ effort | default('none') }}" + PLAIN
    return compare(folder, make_folder(folder, source), TURNS, template_options={"enable_thinking": False})


def check_parts(folder: Path) -> str:
    return compare(folder, make_folder(folder, READS_PARTS), PARTS)


def check_parts_as_text(folder: Path) -> str:
    return compare(folder, make_folder(folder, PLAIN), PARTS, [{"role": "user", "content": "the cat\nsat"}])


def check_special_tokens(folder: Path) -> str:
    base = make_folder(
        folder, "{{ bos_token }}{{ image_token }}{{ pad_token }}{{ sep_token is defined }}", image_token="<s>", pad_token="</s>"
    )
    return compare(folder, base, TURNS)


def check_second_start(folder: Path) -> str:
    """A tokenizer that adds <s>, and a template that writes it."""
    base = make_folder(folder, PLAIN)
    path = base / "tokenizer.json"
    tokenizer = json.loads(path.read_bytes())
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, text],
        "pair": [start, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    seen = compare(folder, base, TURNS)
    with Runtime(folder / "bundle", threads=1) as runtime:
        assert runtime.encode(TURNS)[:2].count(0) == 1
        assert runtime.encode("the cat")[0] == 0
    return f"{seen}, one <s>"


def refuse(error: type[Exception], action: Callable[[], object]) -> str:
    try:
        action()
    except error as raised:
        return str(raised)
    raise AssertionError("nothing was refused")


def check_image(folder: Path) -> str:
    export_base(make_folder(folder, READS_PARTS), folder / "bundle")
    image: Messages = [{"role": "user", "content": [{"type": "image", "image": "cat.png"}, *PARTS[0]["content"]]}]
    with Runtime(folder / "bundle", threads=1) as runtime:
        return refuse(InputError, lambda: runtime.generate(image))


def check_broken_export(folder: Path) -> str:
    base = make_folder(folder, "{{ bos_token }}\n{% for m in messages %}{{ m.content }}")
    said = refuse(InputError, lambda: export_base(base, folder / "bundle"))
    assert "line 2" in said
    assert not (folder / "bundle").exists()
    return said


def check_broken_bundle(folder: Path) -> str:
    """A bundle of an earlier version, whose export did not look."""
    export_base(make_folder(folder, PLAIN), folder / "bundle")
    manifest = json.loads((folder / "bundle" / "bundle.json").read_bytes())
    broken = b"{% for m in messages %}"
    (folder / "bundle" / "chat_template.jinja").write_bytes(broken)
    from hashlib import sha256

    manifest["files"]["chat_template.jinja"] = {"size": len(broken), "sha256": sha256(broken).hexdigest()}
    (folder / "bundle" / "bundle.json").write_text(json.dumps(manifest))
    with Runtime(folder / "bundle", threads=1) as runtime:
        assert len(runtime.generate("the cat", max_tokens=2, ignore_eos=True).tokens) == 2
        return refuse(IntegrityError, lambda: runtime.generate(TURNS))


CASES = [
    Case("named templates in tokenizer_config.json", "template", "default, and tool_use with tools", "equal", check_named),
    Case(
        "named templates in additional_chat_templates/",
        "template",
        "tool_use with tools, any other by its name",
        "equal",
        check_named_files,
    ),
    Case("a generation block", "template", "its text", "equal", check_generation),
    Case("break and continue", "template", "loops as in Python", "equal", check_loop_controls),
    Case("strftime_now", "template", "the day, here a fixed one", "equal", check_date),
    Case("tools and tool calls, with tojson's keywords", "template", "JSON as the keywords say", "equal", check_tools),
    Case("content None, tokens that are not set", "template", "both undefined, tools None", "equal", check_none),
    Case("a variable of the caller's, enable_thinking", "template", "passed on", "equal", check_variables),
    Case("content as parts, for a template that reads them", "template", "the parts' texts", "equal", check_parts),
    Case("content as parts, for a template of texts", "template", "Python's notation of the list", "equal", check_parts_as_text),
    Case("special tokens with names of their own", "template", "passed by name", "equal", check_special_tokens),
    Case("a template that writes <s>, a tokenizer that adds it", "template", "one <s>", "equal", check_second_start),
    Case("an image in a message", "template", "the text of a placeholder", "refused", check_image),
    Case("a template that does not compile, at export", "template", "TemplateSyntaxError", "refused", check_broken_export),
    Case("a template that does not compile, in a bundle", "template", "TemplateSyntaxError", "refused", check_broken_bundle),
]
