"""`edgelora eval` as its user starts it: variants and adapters in one table, the scores that a user asks for, intervals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from edgelora.data.encode_rows import RowEncoder
from edgelora.data.rows import read_rows
from edgelora.evaluation import Measures, evaluate
from edgelora.in_torch.evaluate_adapters import evaluate_adapters
from edgelora.in_torch.train import load_base
from edgelora_export.base.base import Base
from edgelora_runtime.errors import InputError, UsageError
from tests.tiny import make_adapter, make_base

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora_runtime import Runtime

ROWS = (
    {"prompt": "the cat", "completion": " sat #1"},
    {"messages": [{"role": "user", "content": "a day"}, {"role": "assistant", "content": "in the sun #2"}]},
    {"instruction": "one two", "output": "three four #3"},
)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def edgelora(*arguments: object) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[3]
    path = os.pathsep.join(str(root / part) for part in (".", "export", "runtime"))
    command = [sys.executable, "-m", "edgelora", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"})


def test_variants_and_adapters_score_the_same(bundle32: Path, tiny_adapters: dict[str, Path], rows: Path) -> None:
    """In float32 a merged variant is its adapter: as commands, several of each at once."""
    common = ("--data", rows, "--max-tokens", 4, "--rouge", "--regex", r"#(\d)", "--json")
    variants = edgelora("eval", bundle32, "--variant", "base", "--variant", "plain", *common)
    assert variants.returncode == 0, variants.stderr
    adapters = edgelora("eval", "--base", bundle32.parent / "base", "--adapter", f"plain={tiny_adapters['plain']}", *common)
    assert adapters.returncode == 0, adapters.stderr
    by_name = {scores["variant"]: scores for scores in json.loads(variants.stdout)["variants"]}
    assert list(by_name) == ["base", "plain"]
    alone = json.loads(adapters.stdout)
    assert alone["adapter"] == "plain"
    for score in ("loss", "perplexity"):
        assert alone[score] == pytest.approx(by_name["plain"][score], rel=1e-4)
        assert alone["intervals"][score] == pytest.approx(by_name["plain"]["intervals"][score], rel=1e-4)
        assert alone[score] != pytest.approx(by_name["base"][score], rel=1e-4)
    for score in ("exact_match", "slot_f1", "rouge_l", "regex"):
        assert alone[score] == by_name["plain"][score]


def test_a_table_of_several(bundle32: Path, rows: Path) -> None:
    found = edgelora("eval", bundle32, "--variant", "base", "--variant", "plain", "--data", rows, "--max-tokens", 2, "--rouge")
    assert found.returncode == 0, found.stderr
    for word in ("exact match %", "ROUGE-L %", "perplexity", "base", "plain", "0.0 [0.0, 0.0]", "95% bootstrap interval"):
        assert word in found.stdout, found.stdout
    assert "regex" not in found.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "mention"),
    [
        (["--data", "ROWS"], 2, "give either a bundle or --base BASE"),
        (["BUNDLE", "--base", "x", "--data", "ROWS"], 2, "give either a bundle or --base BASE"),
        (["--base", "x", "--variant", "y", "--data", "ROWS"], 2, "--variant are of bundles"),
        (["BUNDLE", "--adapter", "x", "--data", "ROWS"], 2, "--adapter needs --base BASE"),
        (["BUNDLE", "--regex", "(", "--data", "ROWS"], 2, "--regex (: not a regular expression"),
        (["BUNDLE", "--regex", "#4", "--data", "ROWS"], 3, "rows.jsonl line 1: the right answer has no match for --regex #4"),
        (["BUNDLE", "--format", "alpaca", "--data", "ROWS"], 3, "rows.jsonl line 1: instruction is absent"),
    ],
)
def test_mistakes_are_one_line(arguments: Sequence[str], code: int, mention: str, bundle32: Path, rows: Path) -> None:
    named = {"BUNDLE": bundle32, "ROWS": rows}
    found = edgelora("eval", *(named.get(argument, argument) for argument in arguments))
    assert (found.returncode, found.stdout) == (code, "")
    assert mention in found.stderr and "Traceback" not in found.stderr


def test_plain_text_has_a_perplexity_alone(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("the cat sat on the mat\n\na day in the sun\n")
    texts = read_rows(tmp_path / "book.txt")
    found = evaluate(runtime, texts, variant="base")
    assert (found.rows, found.exact_match, found.slot_f1) == (2, None, None)
    assert found.perplexity > 1
    with pytest.raises(InputError, match="paragraph 1: plain text has no prompt by which auto"):
        evaluate(runtime, texts, variant="auto")


@pytest.mark.parametrize("quant", ["nf4", "int4"])
def test_adapters_on_the_base_as_training_held_it(quant: str, rows: Path, tmp_path: Path) -> None:
    """Against PEFT on the same base."""
    import torch
    from peft import PeftModel

    base, examples = tmp_path / "base", read_rows(rows)
    make_base(base, intermediate_size=128)  # bitsandbytes reads one token at a time in blocks of 64 inputs
    paths = {}
    for seed, name in enumerate(("plain", "other")):
        make_adapter(base, tmp_path / name, seed=seed)
        paths[name] = str(tmp_path / name)
    found = evaluate_adapters(str(base), paths, examples, quant=quant, max_tokens=2)
    assert found["plain"].loss != pytest.approx(found["other"].loss, rel=1e-3)
    for name in paths:
        loaded, tokenizer = load_base(Base.find(str(base)), quant)
        model: Any = PeftModel.from_pretrained(loaded, paths[name]).eval()
        nats, count = 0.0, 0
        for row in examples:
            ids, start = RowEncoder(tokenizer).whole(row)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].float()
            nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum"))
            count += len(ids) - start
        assert found[name].loss == pytest.approx(nats / count, rel=1e-4)


def test_a_pattern_that_is_none_is_a_usage_error(runtime: Runtime, rows: Path) -> None:
    with pytest.raises(UsageError, match=r"--regex \[: not a regular expression"):
        evaluate(runtime, read_rows(rows), variant="base", measures=Measures(regex="["))
