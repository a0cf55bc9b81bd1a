"""`edgelora inspect` says in which ways a variant's vocabulary is not the base's, and `bench` measures such a bundle."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from edgelora_export.base.base import Base
from edgelora_export.plan.variants import Quantization, Variant
from tests.edgelora.cli.test_cli import start
from tests.tiny import build_variants, make_base, make_tokenizer
from tests.trained_changes import train_somewhat

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied base with a variant that has a head of its own, and one of fewer tokens."""
    folder = tmp_path_factory.mktemp("vocabularies")
    make_base(folder / "base", tie_word_embeddings=True)
    settings = {"head": {"target_modules": ["q_proj", "lm_head"]}, "fewer": {"rows": 280}}
    variants = [
        Variant(name, {name: 1.0}, delta=train_somewhat(folder / "base", folder / name, **each).change)  # type: ignore[arg-type]
        for name, each in settings.items()
    ]
    grid = Quantization(method="rtn")
    build_variants(Base.open(folder / "base"), [Variant("base"), *variants], folder / "bundle", quantization=grid)
    return folder / "bundle"


def test_inspect_says_what_is_its_own(bundle: Path) -> None:
    done = start("inspect", bundle)
    assert done.returncode == 0, done.stderr
    assert "head: own head\n" in done.stdout
    assert "fewer: vocabulary 280, own embedding and head\n" in done.stdout
    assert "base: " not in done.stdout.partition("\n")[2]
    described = {item["name"]: item for item in json.loads(start("inspect", bundle, "--json").stdout)["variants"]}
    assert (described["base"]["vocab_size"], described["base"]["own_vocab"]) == (None, [])
    assert (described["head"]["vocab_size"], described["head"]["own_vocab"]) == (None, ["head"])
    assert (described["fewer"]["vocab_size"], described["fewer"]["own_vocab"]) == (280, ["embedding", "head"])


def test_bench_takes_prompts_that_every_variant_can_read(bundle: Path) -> None:
    done = start("bench", bundle, "--prompt", 64, "--tokens", 2, "--rounds", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["variants"]) == {"base", "head", "fewer"}


def test_a_token_outside_a_variants_vocabulary_is_one_line(bundle: Path) -> None:
    """The base's tokenizer has 300 tokens, of which this variant reads 280."""
    text = make_tokenizer().decode([295])
    assert make_tokenizer().encode(text) == [295]
    done = start("run", bundle, "--variant", "fewer", "--prompt", text)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "token 295 is outside the vocabulary of 280" in done.stderr
    assert start("run", bundle, "--variant", "head", "--prompt", text, "--max-tokens", 2).returncode == 0
