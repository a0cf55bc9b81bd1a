"""--help and the shell's completion, as users see them: groups, examples, choices, narrow terminals, names from a bundle."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from rich.cells import cell_len

from edgelora.cli.app import app, main
from edgelora.cli.choices import GRAINS, PROVIDERS, STARTS
from edgelora.cli.examples import EXAMPLES

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "runtime" / "bundle" / "golden" / "bundle"
VERBS = [["compose", name] if name in ("search", "learn", "report") else [name] for name in EXAMPLES]


class Shown(NamedTuple):
    """What a call printed on standard output, and its exit code."""

    code: int
    out: str


Call = Callable[..., Shown]


@pytest.fixture
def edgelora(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs the command line in this process, with an environment."""

    def call(*arguments: object, **environment: str) -> Shown:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        out, err = capfd.readouterr()
        assert err == ""
        return Shown(int(ended.value.code or 0), out)

    return call


def start(*arguments: object, **environment: str) -> Shown:
    """Runs the command line in a process of its own."""
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    command = [sys.executable, "-m", "edgelora", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True)
    assert done.stderr == ""
    return Shown(done.returncode, done.stdout)


def ask(words: str) -> dict[str, str]:
    """The environment in which bash asks what follows these words; the last one is not finished."""
    return {"_EDGELORA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}


def test_choices_are_those_that_the_code_takes() -> None:
    from edgelora.learn import learn
    from edgelora_runtime.session import providers

    assert (providers.PROVIDERS, learn.STARTS, tuple(learn.GRAINS)) == (PROVIDERS, STARTS, GRAINS)


@pytest.mark.parametrize("width", [50, 80, 140])
def test_help_fits_the_terminal(width: int, edgelora: Call) -> None:
    for verb in (["run"], ["compose"], []):
        shown = edgelora(*verb, "--help", COLUMNS=str(width)).out
        assert max(map(cell_len, shown.splitlines())) <= width


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_ends_its_help_with_an_example_that_it_takes(verb: list[str], edgelora: Call) -> None:
    shown = " ".join(edgelora(*verb, "--help", COLUMNS="200").out.split())
    example = EXAMPLES[verb[-1]]
    assert shown.endswith(f"Example: {example}")
    words = shlex.split(example)
    assert words[: len(verb) + 1] == ["edgelora", *verb]
    command: Any = typer.main.get_command(app)
    for name in verb:
        command = command.commands[name]
    command.make_context(verb[-1], words[len(verb) + 1 :])  # fails for an unknown option, or if one is missing


def test_options_and_verbs_stand_under_headings(edgelora: Call) -> None:
    shown = edgelora("run", "--help", COLUMNS="100").out
    headings = re.findall(r"─ (.+?) ─", shown)
    assert {"Sampling", "End of the answer", "Form of the answer", "Chat template", "Runtime", "Output"} <= set(headings)
    panels = dict(zip(headings, re.split(r"╭─ .+? ─", shown)[1:], strict=True))
    assert "--temperature" in panels["Sampling"]
    assert "--threads" in panels["Runtime"]
    headings = re.findall(r"─ (.+?) ─", edgelora("--help", COLUMNS="100").out)
    assert headings == ["Options", "Make adapters", "Make bundles", "Use bundles", "This machine"]


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("train", "nf4|int4|none"),
        ("run", "auto|cpu|cuda|webgpu"),
        ("run", "error|slide"),
        ("export", "repair"),
        ("compose learn", "regmean|linear"),
        ("compose search", "loss|score"),
        ("compose", "Choices: linear, svd, ties,"),
    ],
)
def test_choices_are_listed(verb: str, said: str, edgelora: Call) -> None:
    assert said in " ".join(re.sub(r"[│╭╰─╮╯]", "", edgelora(*verb.split(), "--help", COLUMNS="200").out).split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("edgelora ver", ["verify"]),
        ("edgelora compose le", ["learn"]),
        ("edgelora run b --provider c", ["cpu", "cuda"]),
        ("edgelora train --quant ", ["nf4", "int4", "none"]),
        ("edgelora compose search --method ties,mag", ["ties,magnitude"]),
        (f"edgelora run {GOLDEN} --variant t", ["tuned"]),
        (f"edgelora eval {GOLDEN} --variant ", ["base", "tuned", "alive"]),
        (f"edgelora bench {GOLDEN} --variant al", ["alive"]),
        (f"edgelora run {GOLDEN} --mix ", ["a="]),
        ("edgelora run nowhere --variant t", []),
    ],
)
def test_the_shell_completes(words: str, expected: list[str], edgelora: Call) -> None:
    assert edgelora(**ask(words)) == (0, "".join(f"{word}\n" for word in expected) or "\n")


def test_a_process_of_its_own_completes_and_fits_the_terminal() -> None:
    assert start(**ask(f"edgelora run {GOLDEN} --variant t")) == (0, "tuned\n")
    shown = start("bench", "--help", COLUMNS="44")
    assert max(map(cell_len, shown.out.splitlines())) <= 44


def test_zsh_sees_the_mix_of_a_variant(edgelora: Call) -> None:
    shown = edgelora(_EDGELORA_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=f"edgelora run {GOLDEN} --variant tun")
    assert shown.code == 0
    assert '"tuned":"1 a"' in shown.out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_of_the_shells_are_shown(shell: str, edgelora: Call) -> None:
    shown = edgelora(_EDGELORA_COMPLETE=f"source_{shell}")
    assert shown.code == 0
    assert f"_EDGELORA_COMPLETE=complete_{shell}" in shown.out, "the program's name, however it was started"
