"""`run --chat` and `chat` pass tools, documents, template options and the date to the chat template."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgelora_runtime import Runtime
from tests.tiny import export_base, make_base

ROOT = Path(__file__).resolve().parents[3]
TEMPLATE = (
    "{{ bos_token }}{{ strftime_now('%d.%m.%Y') }}{{ tools | tojson }}{{ documents | tojson }}{{ thinking }}{{ name }}"
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "find"}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    make_base(folder / "base")
    (folder / "base" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    export_base(folder / "base", folder / "bundle")
    (folder / "tools.json").write_text(json.dumps(TOOLS), encoding="utf-8")
    (folder / "documents.json").write_text('[{"title": "é"}]', encoding="utf-8")
    (folder / "object.json").write_text("{}", encoding="utf-8")
    (folder / "broken.json").write_text("[", encoding="utf-8")
    return folder


def call(folder: Path, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))}
    command = [sys.executable, "-m", "edgelora", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, input=stdin, encoding="utf-8")


def expect_tokens(folder: Path, text: str) -> int:
    """The number of tokens of what the template should have written."""
    with Runtime(folder / "bundle", threads=1) as runtime:
        return len(runtime.encode(text))


GIVEN = ["--tools", "tools.json", "--documents", "documents.json", "--date", "2025-01-31", "--template-option", "thinking=false"]
WRITTEN = '<s>31.01.2025[{"type": "function", "function": {"name": "find"}}][{"title": "é"}]False'


def test_run_passes_all_of_them(folder: Path) -> None:
    arguments = ["--chat", "--prompt", "hi", "--max-tokens", 1, "--json", *GIVEN, "--template-option", 'name="zz"']
    done = call(folder, "run", "bundle", *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt_tokens"] == expect_tokens(folder, WRITTEN + "zzuser: hi")


def test_chat_passes_all_of_them(folder: Path) -> None:
    done = call(folder, "chat", "bundle", "--max-tokens", 2, "--json", *GIVEN, stdin="hi\nho\n")
    assert done.returncode == 0, done.stderr
    turns = json.loads(done.stdout)["turns"]
    with Runtime(folder / "bundle", threads=1) as runtime:
        options: dict[str, Any] = {"tools": TOOLS, "documents": [{"title": "é"}], "date": "2025-01-31"}
        said: list[dict[str, str]] = []
        for turn in turns:
            said.append({"role": "user", "content": turn["prompt"]})
            answer = runtime.generate(said, max_tokens=2, template_options={"thinking": False}, **options).text
            assert turn["answer"] == answer
            said.append({"role": "assistant", "content": answer})
    assert [turn["prompt"] for turn in turns] == ["hi", "ho"]


REFUSED: dict[str, tuple[list[str], int, str]] = {
    "no chat": (["--tools", "tools.json"], 2, "tools: only a chat template reads this, but the prompt is text; pass messages"),
    "no list": (["--chat", "--tools", "object.json"], 3, "--tools object.json holds dict, not a list of objects"),
    "no JSON": (["--chat", "--documents", "broken.json"], 3, "--documents broken.json is not valid JSON"),
    "no file": (["--chat", "--tools", "absent.json"], 3, "absent.json"),
    "no date": (["--chat", "--date", "31.1.2025"], 2, "date = '31.1.2025': use YYYY-MM-DD"),
    "a text without quotes": (["--chat", "--template-option", "name=zz"], 2, "'zz' is not JSON; a text is written name='\"zz\"'"),
    "no equals sign": (["--chat", "--template-option", "name"], 2, "'name' is not of the form --template-option KEY=JSON"),
    "a clash": (["--chat", "--template-option", "tools=[]"], 2, "template option 'tools' is given by the option tools"),
    "no such template": (["--chat", "--template-option", 'chat_template="rag"'], 2, "no chat template 'rag' in this bundle"),
}


@pytest.mark.parametrize(("arguments", "code", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_mistakes_are_named_in_one_line(folder: Path, arguments: list[str], code: int, said: str) -> None:
    done = call(folder, "run", "bundle", "--prompt", "hi", *arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_template_that_does_not_compile_is_named_by_export(folder: Path) -> None:
    make_base(folder / "broken")
    (folder / "broken" / "chat_template.jinja").write_text("{{ bos_token }}\n{% if %}", encoding="utf-8")
    (folder / "recipe.toml").write_text('base = "broken"\n[quantization]\nmethod = "rtn"\n[variants.base]\nmix = {}\n')
    done = call(folder, "export", "recipe.toml", "--output", "out")
    assert done.returncode == 3, done.stderr
    assert "chat_template.jinja line 2 is not a valid template" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "out").exists()
