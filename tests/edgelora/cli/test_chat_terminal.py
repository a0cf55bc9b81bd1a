"""`edgelora chat` in a real terminal, tmux's: Ctrl-C in an answer, history, several lines, completion, /mix, and a pipe."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "runtime" / "bundle" / "golden" / "bundle"
TMUX = shutil.which("tmux")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(TMUX is None, reason="needs tmux")]  # slow: it waits for what a screen shows


class Terminal:
    """A terminal of 90 × 40 characters in a tmux server of its own, with a chat in it."""

    def __init__(self, folder: Path, command: str) -> None:
        self.socket = str(folder / "tmux")
        path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
        shown = f"PYTHONPATH={shlex.quote(path)} {command}; echo ended with $?; sleep 60"
        self.tmux("-f", "/dev/null", "new-session", "-d", "-x", "90", "-y", "40", "-c", str(folder), shown)

    def tmux(self, *arguments: str) -> str:
        assert TMUX is not None
        return subprocess.run([TMUX, "-S", self.socket, *arguments], check=True, capture_output=True, text=True).stdout

    def keys(self, *names: str) -> None:
        self.tmux("send-keys", *names)

    def type(self, text: str) -> None:
        self.tmux("send-keys", "-l", text)

    @property
    def screen(self) -> str:
        return self.tmux("capture-pane", "-p", "-J", "-S", "-2000")

    def wait(self, pattern: str, seconds: float = 30) -> str:
        """Waits until a pattern is on the screen. Returns the screen."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.screen, re.MULTILINE):
            assert time.monotonic() < deadline, f"{pattern!r} did not come:\n{self.screen}"
            time.sleep(0.1)
        return self.screen


def chat(*arguments: object) -> str:
    return shlex.join([sys.executable, "-m", "edgelora", "chat", str(GOLDEN), *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal(tmp_path, chat("--max-tokens", 3))
    opened.wait("^base>")
    yield opened
    opened.tmux("kill-server")


def test_ctrl_c_stops_the_answer_and_not_the_chat(terminal: Terminal) -> None:
    terminal.type("/set overflow slide")
    terminal.keys("Enter")
    terminal.wait('^overflow = "slide"')
    terminal.type("/set max_tokens 200000")
    terminal.keys("Enter")
    terminal.wait("^max_tokens = 200000")
    terminal.type("/set regex [a-z ]{90000}")  # the model writes no end token before
    terminal.keys("Enter")
    terminal.wait("^regex = ")
    terminal.type("tell me")
    terminal.keys("Enter")
    time.sleep(2)
    assert "[stopped" not in terminal.screen
    terminal.keys("C-c")
    terminal.wait(r"^\[stopped, \d+ tokens?, .* tokens/s; base in [\d.]+ ms \(warm\)\]$")
    terminal.type("/stats")
    terminal.keys("Enter")
    terminal.wait("ended by cancelled")
    terminal.wait("^base, 1 turn$")
    terminal.keys("C-c")  # at the prompt it empties the line
    terminal.type("/qu")
    terminal.keys("C-c")
    terminal.type("/set max_tokens 3")
    terminal.keys("Enter")
    terminal.wait("^max_tokens = 3")
    terminal.keys("C-d")
    screen = terminal.wait("^ended with 0")
    assert "Traceback" not in screen


def test_history_several_lines_and_mix(terminal: Terminal) -> None:
    terminal.type("/mix a=0.7")
    terminal.keys("Enter")
    terminal.wait(r"^0\.7 a in [\d.]+ ms")
    terminal.wait(r"^0\.7 a>")
    terminal.type("one")
    terminal.keys("M-Enter")
    terminal.type("two")
    terminal.keys("Escape", "Enter")
    terminal.type("three")
    terminal.wait(r"^0\.7 a> one\n\.+ two\n\.+ three")
    terminal.keys("Enter")
    terminal.wait(r"^\[3 tokens, .*0\.7 a in ")
    terminal.type("/save kept.json")
    terminal.keys("Enter")
    terminal.wait(r"^saved 1 turn to kept\.json")
    terminal.keys("Up", "Up")
    terminal.wait(r"0\.7 a> one\n\.+ two\n\.+ three\s*$")
    terminal.keys("C-c")
    kept = (Path(terminal.socket).parent / "kept.json").read_text(encoding="utf-8")
    assert '"content": "one\\ntwo\\nthree"' in kept
    terminal.keys("C-d")
    terminal.wait("^ended with 0")


def test_completion_of_commands_and_names(terminal: Terminal) -> None:
    terminal.type("/vari")
    terminal.wait("makes a variant answer")
    terminal.keys("C-c")
    terminal.type("/variant tu")
    terminal.keys("Tab")
    terminal.wait("^base> /variant tuned")
    terminal.keys("Enter")
    terminal.wait("^tuned>")
    terminal.type("/mix ")
    terminal.wait("a= +live adapter")
    terminal.keys("C-c")
    terminal.type("/set speculation ")
    terminal.wait("auto")
    terminal.keys("C-c")
    terminal.type("/mx a=1")
    terminal.keys("Enter")
    terminal.wait("no command /mx; did you mean /mix?")


def test_sigterm_at_the_prompt_ends_the_chat(terminal: Terminal) -> None:
    process = terminal.tmux("list-panes", "-F", "#{pane_pid}").strip()
    children = subprocess.run(["pgrep", "-P", process], capture_output=True, text=True, check=True).stdout.split()
    subprocess.run(["kill", "-TERM", *children], check=True)
    screen = terminal.wait("^ended with 143")
    assert "edgelora: terminated" in screen
    assert "Traceback" not in screen


def test_a_pipe_is_answered_plainly_and_a_history_file_keeps_lines(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, f"sh -c {shlex.quote('echo hello | ' + chat('--max-tokens', 3) + ' | cat')}")
    try:
        screen = terminal.wait("^ended with 0")
        assert "base>" not in screen and "/help" not in screen and "\x1b" not in screen
    finally:
        terminal.tmux("kill-server")
    (tmp_path / "tmux").unlink(missing_ok=True)
    terminal = Terminal(tmp_path, chat("--max-tokens", 3, "--history", "lines"))
    try:
        terminal.wait("^base>")
        terminal.type("remember this")
        terminal.keys("Enter")
        terminal.wait(r"^\[3 tokens")
        terminal.keys("C-d")
        terminal.wait("^ended with 0")
        assert "+remember this" in (tmp_path / "lines").read_text(encoding="utf-8")
        assert (tmp_path / "lines").stat().st_mode & 0o077 == 0
    finally:
        terminal.tmux("kill-server")
