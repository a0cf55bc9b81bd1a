"""Exports with GPTQ and the gate, killed at random moments: the output is old or new, and what was finished is not done again."""

from __future__ import annotations

import json
import random
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from edgelora_runtime import Bundle
from tests.forked_commands import KILLS, TERMINATIONS, WORDS, Commands, draw_signals

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")]
RECIPE = """\
base = {base}
[adapters]
a = {a}
b = {b}
[quantization]
method = "gptq"
[variants.base]
mix = {{}}
[variants.{name}]
mix = {{ a = {weight}, b = 0.5 }}
[variants.alone]
mix = {{ b = 1.0 }}
kind = "live"
"""


def write_recipes(folder: Path, base: Path, adapters: dict[str, Path]) -> list[Path]:
    """Two recipes whose bundles have no merged weight in common, and the text on which they are quantized and judged."""
    words = ("cat", "day", "sun", "moon", "mat", "cafe")
    lines = [json.dumps({"text": f"the {word} sat on the {other}. "}) for word in words for other in words[:2]]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    recipes = []
    for name, weight in (("first", 1.0), ("second", -0.75)):
        paths = {"base": base, "a": adapters["plain"], "b": adapters["other"]}
        named = {key: json.dumps(str(path)) for key, path in paths.items()}
        recipes.append(folder / f"{name}.toml")
        recipes[-1].write_text(RECIPE.format(**named, name=name, weight=weight), encoding="utf-8")
    return recipes


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.exists() else {}


def read_journal(folder: Path, published: int) -> list[str]:
    """The finished steps of an export that was cut short. The last line of a killed one may be cut short too.

    published: steps of a run that was killed between publishing and removing its journal. They are in the bundle, so the next run
    does them again.
    """
    path = folder / ".bundle.edgelora-staging.journal"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [line for line in (*lines[:1], *lines[1 + published :]) if line.endswith("\n")]


def parse_step(line: str) -> tuple[tuple[str, str], set[str]]:
    """A finished step's section and product, and its blobs."""
    entry = json.loads(line)
    return (entry["section"], entry["product"]), {tensor["location"] for tensor in entry["tensors"].values()}


def test_killed_exports(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    """After each signal the bundle is one of the two undisturbed ones, and the journal has grown and lost nothing."""
    recipes, draw = write_recipes(tmp_path, tiny_base, tiny_adapters), random.Random(27)
    target = tmp_path / "work" / "bundle"
    reached, finished, reused = dict.fromkeys(WORDS, 0), 0, 0
    with Commands(tmp_path) as commands:
        whole, seconds = [], 1e9
        for recipe in recipes:
            output = tmp_path / f"{recipe.stem}-whole"
            done = commands.run(["export", recipe.name, "--output", output, "--calibration", "text.jsonl", "--gate", "repair"])
            assert done.code == 0, done.errors
            whole.append(listing(output))
            seconds = min(seconds, done.seconds)
            assert Bundle.open(output).manifest.variants[recipe.stem].fidelity is not None, "the gate has measured it"
        turn, signals, published = 0, draw_signals(draw), 0
        while signals:
            number = signals[-1]
            arguments = ["export", recipes[turn].name, "--output", target, "--calibration", "text.jsonl", "--gate", "repair"]
            before, steps = listing(target), read_journal(target.parent, published)
            ended = commands.run(arguments, number, draw.uniform(0.0, 0.9 * seconds))
            after, left = listing(target), read_journal(target.parent, published)
            if ended.code == 0:
                finished, turn, published = finished + 1, 1 - turn, 0
                if len(steps) < 2:
                    seconds = min(seconds, ended.seconds)  # the machine may have less to do by now
                assert after == whole[1 - turn], "as if nothing had happened"
                assert [path.name for path in target.parent.iterdir()] == ["bundle"]
                continue
            signals.pop()
            reached[number] += 1
            replaced = after == whole[turn] != before  # then nothing is left to keep
            code, word = WORDS[number]
            assert ended.code == code, ended.errors
            assert after in (before, whole[turn]), "neither the old bundle nor the new one"
            assert not after or Bundle.open(target).verify() == []
            if left and after == before:
                assert left[: len(steps)] == steps, "a finished step is lost, or was done again"
                keys = [key for key, blobs in map(parse_step, left[1:]) if blobs <= whole[turn].keys()]  # no repair replaced them
                assert len(set(keys)) == len(keys), "a step was done twice"
                reused += len(steps) > 1
            if number == signal.SIGTERM:
                said = ended.errors.splitlines()
                assert said[-1] == word
                told = any("what is finished is kept in" in line for line in said)
                assert told or replaced or len(left) == len(steps), "it was finishing steps, and did not say that they are kept"
                assert not told or len(left) > 1
            if replaced or not left:
                published = published + len(left) - 1 if left else 0
    assert reached == {signal.SIGKILL: KILLS, signal.SIGTERM: TERMINATIONS}
    print(f"{KILLS} kills, {TERMINATIONS} terminations, {finished} exports finished, {reused} runs kept what was finished")
    assert finished
    assert reused
