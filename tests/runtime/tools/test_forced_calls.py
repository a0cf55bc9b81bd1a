"""Calls forced on a tiny model through Runtime, with templates of several families and their marks as special tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edgelora_runtime import Runtime
from edgelora_runtime.tools.format import ToolFormat
from tests.runtime.tools.formats import TEMPLATES, USER, make_marked_base
from tests.runtime.tools.test_grammars import NAMED, SCHEMA, TOOLS
from tests.tiny import export_base

ROOT = Path(__file__).resolve().parents[3]
# The tiny model writes at random, so thoughts, which may be of any length, are left out.
FAMILIES = [
    "qwen2_5",
    "qwen3_vl",
    "llama3_1",
    "lfm2_v2",
    "mistral-list",
    "mistral-ids",
    "phi-4-mini",
    "granite-4",
    "hermes",
    "smollm3",
    "smollm2",
]
FAMILIES = [name for name in [*FAMILIES, "function-gemma"] if name in TEMPLATES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose tokenizer has the marks of all families."""
    folder = tmp_path_factory.mktemp("tools")
    make_marked_base(folder / "base")
    export_base(folder / "base", folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def runtime(folder: Path) -> Runtime:
    return Runtime(folder, threads=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_forced_call_is_parsed(runtime: Runtime, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A required call, of a named function, and its answer while it is written."""
    from edgelora_runtime.bundle.chat_template import ChatTemplate, ChatTemplates

    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    monkeypatch.setattr(ChatTemplates, "pick", lambda *_: template)  # one bundle serves all templates
    found = ToolFormat.of(runtime.tokenizer)
    options: dict[str, Any] = {"max_tokens": 600, "temperature": 1.0, "keep_tokens": found.keep_tokens, "tools": TOOLS}
    for choice, seed in (("required", 0), (NAMED, 1)):
        parser = found.parser(TOOLS, choice)
        stream = runtime.stream([USER], seed=seed, grammar=found.grammar(TOOLS, choice, parallel=False), **options)
        deltas = [delta for piece in stream for delta in parser.push(piece)]
        deltas += parser.finish()
        assert stream.generation is not None
        assert stream.generation.finish_reason == "stop"
        answer = found.parse(stream.generation.text, TOOLS, choice)
        assert not answer.text
        (call,) = answer.calls
        assert choice == "required" or call.name == "find"
        jsonschema.validate(json.loads(call.arguments), SCHEMA if call.name == "find" else {"maxProperties": 0})
        assert "".join(getattr(delta, "arguments", "") for delta in deltas) == call.arguments


def test_special_tokens_are_kept_only_if_asked(runtime: Runtime) -> None:
    """The text of an answer has a named special token, in its place among characters of several tokens."""
    mark = "[TOOL_CALLS]"
    token = runtime.tokenizer.added_tokens[mark]
    grammar = f'start: "日本" <[{token}]> " é🙂" <[{runtime.tokenizer.added_tokens["[ARGS]"]}]>'
    for kept, expected in (((), "日本 é🙂"), ((mark,), f"日本{mark} é🙂"), (("no token",), "日本 é🙂")):
        stream = runtime.stream("a", grammar=grammar, max_tokens=40, keep_tokens=kept)
        pieces = list(stream)
        assert stream.generation is not None
        assert "".join(pieces) == stream.generation.text == expected


def test_the_command_keeps_special_tokens(runtime: Runtime, folder: Path, tmp_path: Path) -> None:
    grammar = tmp_path / "grammar.lark"
    grammar.write_text(f'start: "day" <[{runtime.tokenizer.added_tokens["[TOOL_CALLS]"]}]>', encoding="utf-8")
    command = [sys.executable, "-m", "edgelora", "run", str(folder), "--prompt", "a", "--grammar", str(grammar)]
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    for options, expected in (([], "day"), (["--keep-token", "[TOOL_CALLS]"], "day[TOOL_CALLS]")):
        done = subprocess.run(
            [*command, *options],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
        assert ("[TOOL_CALLS]" in done.stdout) == bool(options)
