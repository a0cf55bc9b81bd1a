"""Eight processes that write the same output, or fill the same packed cache, at once."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from edgelora_runtime import Bundle
from tests.forked_commands import Commands

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")]
PROCESSES = 8
VARIANTS = 3


def test_eight_exports_to_one_output_and_eight_that_fill_one_cache(
    tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One export wins, and the others say so in one line. The cache ends with one whole entry for each graph."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    adapters = [f"a{place}" for place in range(PROCESSES)]
    for place, name in enumerate(adapters):  # bundles that all differ
        lines = [f"base = {json.dumps(str(tiny_base))}", "[adapters]", f"a = {json.dumps(str(tiny_adapters['plain']))}"]
        for number in range(VARIANTS):
            lines += [f"[variants.v{number}]", f"mix = {{ a = {1 + place + number / 10} }}"]
        (tmp_path / f"{name}.toml").write_text("\n".join(lines), encoding="utf-8")
    target = tmp_path / "work" / "bundle"
    with Commands(tmp_path) as commands:
        ended = commands.run_at_once([["export", f"{name}.toml", "--output", target, "--gate", "off"] for name in adapters])
        won = [place for place, each in enumerate(ended) if each.code == 0]
        assert won, "somebody wins"
        for place, each in enumerate(ended):
            if place not in won:
                said = f"edgelora: another process is writing {target}; wait until it ends, or choose another --output"
                assert (each.code, each.errors.splitlines()[-1]) == (3, said)
        bundle = Bundle.open(target)
        assert bundle.verify() == []
        mixes = {name: variant.mix["a"] for name, variant in bundle.manifest.variants.items()}
        assert mixes in [{f"v{number}": 1 + place + number / 10 for number in range(VARIANTS)} for place in won]
        assert [path.name for path in target.parent.iterdir()] == ["bundle"]
        print(f"{len(won)} of {PROCESSES} exports ended with 0, one after another; the others were refused")

        ask = ["run", target, "--prompt", "the cat", "--max-tokens", 8, "--kernels", "onnxruntime", "--threads", 1, "--json"]
        variants = [f"v{place % VARIANTS}" for place in range(PROCESSES)]
        alone = {name: json.loads(commands.run([*ask, "--variant", name]).output)["text"] for name in set(variants)}
        found = commands.run_at_once([[*ask, "--variant", name, "--packed-cache"] for name in variants])
        assert [each.code for each in found] == [0] * PROCESSES, [each.errors for each in found]
        assert [json.loads(each.output)["text"] for each in found] == [alone[name] for name in variants]
        folder = tmp_path / "cache" / "edgelora" / "packed"
        entries = sorted(folder.iterdir())
        assert len(entries) == VARIANTS, entries
        for entry in entries:
            sizes = json.loads((entry / "entry.json").read_text(encoding="ascii"))
            assert sizes == {path.name: path.stat().st_size for path in entry.iterdir() if path.name != "entry.json"}
        again = commands.run([*ask, "--variant", "v0", "--packed-cache"])
        assert json.loads(again.output)["text"] == alone["v0"]
        assert sorted(folder.iterdir()) == entries
