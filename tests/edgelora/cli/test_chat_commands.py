"""`edgelora chat` through a pipe: its commands, the file of a conversation, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from edgelora.cli.chat_commands import COMMANDS
from edgelora.cli.markdown_stream import find_last_block, strip_controls
from edgelora_runtime import Runtime

ROOT = Path(__file__).resolve().parents[3]
SHORT = ("/set max_tokens 1", "/set overflow slide")  # the golden bundle has a context of 64 tokens
GOLDEN = ROOT / "tests" / "runtime" / "bundle" / "golden" / "bundle"


def chat(folder: Path, *lines: str) -> tuple[list[dict[str, str]], str]:
    """The turns of a chat through a pipe, and what it said on standard error."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))}
    command = [sys.executable, "-m", "edgelora", "chat", str(GOLDEN), "--max-tokens", "4", "--json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, input="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    turns = json.loads(done.stdout)["turns"]
    assert isinstance(turns, list)
    return turns, done.stderr


def test_variants_mixes_options_and_again(tmp_path: Path) -> None:
    turns, said = chat(
        tmp_path,
        "hi",
        "/variant tuned",
        "/again",
        "/mix a=0.7",
        "hi",
        "/set max_tokens 1",
        "/again",
        "/reset",
        " /not a command",
        "/quit now",
        "hi",
    )
    assert [turn["variant"] for turn in turns] == ["base", "tuned", "0.7 a", "0.7 a", "0.7 a"]
    assert turns[4]["prompt"] == "/not a command"
    assert len(turns[3]["answer"]) <= len(turns[2]["answer"])
    assert "cut off after 4 tokens; /set max_tokens 8 allows more" in said


def test_what_is_refused_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"mine": 1}', encoding="utf-8")
    (tmp_path / "broken.json").write_text("[" * 100_000, encoding="utf-8")
    refused = {
        "/varant x": "no command /varant; did you mean /variant?",
        "/zzzz": "no command /zzzz; /help lists all",
        "/variant nope": "no variant 'nope'",
        "/variant auto": "no router",
        "/mix a": "'a' is not of the form /mix ADAPTER=WEIGHT",
        "/mix a=x": "'x' is not a number",
        "/mix b=1": "no live adapter b",
        "/set temprature 1": "no option temprature; did you mean temperature?",
        "/set temperature warm": "temperature = warm: use",
        "/set temperature -1": "temperature = -1: use 0 (greedy) or more",
        "/set seed x": "seed = 'x': use a whole number",
        "/set variant tuned": "/variant NAME sets it",
        "/save": "/save needs a file",
        "/save other.json": "it is left as it is, save to another file",
        "/load absent.json": "absent.json cannot be read (No such file",
        "/load broken.json": "broken.json",
        "/again": "nothing was asked yet",
    }
    turns, said = chat(tmp_path, *refused, "hi")
    lines = [line for line in said.splitlines() if line.startswith("edgelora: ")]
    assert len(lines) == len(refused), said
    for (command, part), line in zip(refused.items(), lines, strict=True):
        assert part in line, command
    assert [turn["variant"] for turn in turns] == ["base"]
    assert (tmp_path / "other.json").read_text(encoding="utf-8") == '{"mine": 1}'


def test_python_goes_on_with_a_saved_chat_and_back(tmp_path: Path) -> None:
    """One file format for the terminal and for apps."""
    whole, _ = chat(tmp_path, *SHORT, "/system be", "/variant tuned", "hi", "/save kept.json", "yo")
    with Runtime(GOLDEN, threads=1) as runtime:
        loaded = runtime.load_chat(tmp_path / "kept.json", max_tokens=1, overflow="slide")
        assert (loaded.system, loaded.variant) == ("be", "tuned")
        assert [message.get("variant") for message in loaded.history] == [None, "tuned"]
        assert loaded.send("yo").text == whole[1]["answer"]
        loaded.undo()
        loaded.save(tmp_path / "kept.json")
    again, _ = chat(tmp_path, *SHORT, "/load kept.json", "yo")
    assert again[0] == whole[1]


def test_a_failed_again_loses_no_turn(tmp_path: Path) -> None:
    turns, said = chat(tmp_path, *SHORT, "hi", '/set json_schema {"type": 7}', "/again", "/stats")
    assert len(turns) == 1
    assert "base, 1 turn" in said.splitlines()
    _, said = chat(tmp_path, "/help", "/variants")
    assert [line.split()[0] for line in said.splitlines() if line.startswith("/")] == list(COMMANDS)
    assert "* base: merged, the base" in said


def test_a_saved_conversation_goes_on_as_it_would_have(tmp_path: Path) -> None:
    whole, _ = chat(tmp_path, *SHORT, "/system be", "/mix a=0.5", "hi", "/save kept.json", "yo")
    again, said = chat(tmp_path, *SHORT, "/load kept.json", "yo")
    assert again[0] == whole[1]
    assert "1 turn loaded; 0.5 a in" in said
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
    value = json.loads((tmp_path / "kept.json").read_text(encoding="utf-8"))
    value["variant"], value["mix"] = "absent", None
    (tmp_path / "kept.json").write_text(json.dumps(value), encoding="utf-8")
    _, said = chat(tmp_path, "/load kept.json")
    assert "1 turn loaded, but base stays: no variant 'absent'" in said


@given(st.text())
def test_what_is_drawn_steers_no_terminal(text: str) -> None:
    shown = strip_controls(text)
    assert all(mark in "\t\n" or not (ord(mark) < 32 or 127 <= ord(mark) < 160) for mark in shown)
    assert [mark for mark in shown if mark.isprintable()] == [mark for mark in text if mark.isprintable()]


@given(
    st.lists(st.sampled_from(["# a\n", "b ", "\n", "\n\n", "- c\n", "```\n", "> d\n", "|e|f|\n|-|-|\n", "\u2028", "1. g\n"])).map(
        "".join
    )
)
def test_the_last_block_starts_at_a_line(text: str) -> None:
    end = find_last_block(text)
    assert 0 <= end <= len(text)
    assert end == 0 or text[end - 1] == "\n"
    assert end == 0 or text[end:].strip(" \n")
