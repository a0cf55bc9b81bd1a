"""stories260K, a trained model from another project: after export it writes the exact text that its authors publish."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgelora_runtime import Runtime
from tests.llama2c import BOS, Vocabulary, convert
from tests.tiny import export_base, load_base, torch_logits

if TYPE_CHECKING:
    from pathlib import Path

WINDOW = 256  # tokens of each story that count for the perplexity


@pytest.fixture(scope="module")
def stories(models_folder: Path) -> Path:
    return models_folder / "stories260K"


@pytest.fixture(scope="module")
def base(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stories") / "base"
    convert(stories / "stories260K.bin", folder)
    return folder


@pytest.fixture(scope="module")
def vocabulary(stories: Path) -> Vocabulary:
    return Vocabulary.read(stories / "tok512.bin", 512)


@pytest.fixture(scope="module")
def float_bundle(base: Path) -> Path:
    export_base(base, base.parent / "bundle32")
    return base.parent / "bundle32"


def printed_text(stories: Path) -> str:
    """The text that stories260K.md shows for the command with -t 0.0."""
    match = re.search(
        r"^\$ \./run \S+ -z \S+ -t 0\.0\n(.*?)\n```$", (stories / "stories260K.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert match is not None
    return match[1]


def test_greedy_text_is_the_published_one(stories: Path, float_bundle: Path, vocabulary: Vocabulary) -> None:
    """run.c makes 256 steps by default; the first reads <s>."""
    expected = printed_text(stories)
    assert len(expected) > 500
    with Runtime(float_bundle, threads=1) as runtime:
        written = runtime.generate([BOS], max_tokens=256)
    assert vocabulary.decode(list(written.tokens)).rstrip() == expected


def test_vocabulary_reads_what_it_writes(vocabulary: Vocabulary, stories: Path) -> None:
    for text in (printed_text(stories), "naïve 日本 🙂", ""):
        assert vocabulary.decode(vocabulary.encode(text)[1:]) == text


def test_logits_are_transformers_logits(base: Path, float_bundle: Path, vocabulary: Vocabulary, stories: Path) -> None:
    """The graph pads the head size from 8 to 16, and the MLP's width, 172, is no multiple of the block size."""
    tokens = vocabulary.encode(printed_text(stories))
    with Runtime(float_bundle, threads=1) as runtime:
        assert np.abs(runtime.logits(tokens) - torch_logits(load_base(base), tokens)).max() <= 1e-3


def perplexity(runtime: Runtime, stories: list[list[int]]) -> float:
    """Perplexity over the stories' first WINDOW tokens; each story starts with <s>."""
    nats, count = 0.0, 0
    for story in stories:
        logits = runtime.logits(story[:-1]).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(len(story) - 1), story[1:]] - np.log(np.exp(logits).sum(axis=1))
        nats, count = nats - chosen.sum(), count + len(chosen)
    return math.exp(nats / count)


@pytest.fixture(scope="module")
def slice_of_stories(data_folder: Path, vocabulary: Vocabulary) -> list[list[int]]:
    """Tokens of the first stories. A blank line separates paragraphs of a story; a plain line break separates stories."""
    with (data_folder / "stories.txt").open(encoding="utf-8") as file:
        texts = re.split(r"(?<!\n)\n(?!\n)", file.read(30_000))[:-1]
    return [vocabulary.encode(text)[: WINDOW + 1] for text in texts]


@pytest.mark.parametrize(
    ("bits", "block_size", "symmetric", "bound"), [(4, 32, True, 1.25), (4, 32, False, 1.25), (8, 32, True, 1.01)]
)
def test_perplexity_of_the_quantized_model(
    bits: int,
    block_size: int,
    symmetric: bool,
    bound: float,
    base: Path,
    float_bundle: Path,
    slice_of_stories: list[list[int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A model this small loses more to int4 than a large one; a broken grid would lose everything (perplexity 512)."""
    export_base(base, tmp_path / "bundle", bits=bits, block_size=block_size, symmetric=symmetric)
    with Runtime(float_bundle) as exact, Runtime(tmp_path / "bundle") as quantized:
        full, reduced = perplexity(exact, slice_of_stories), perplexity(quantized, slice_of_stories)
    with capsys.disabled():
        grid = f"int{bits}, block {block_size}, {'symmetric' if symmetric else 'asymmetric'}"
        count = sum(map(len, slice_of_stories)) - len(slice_of_stories)
        print(f"\nstories260K on {count} tokens of stories.txt: perplexity {full:.3f} in float32, {reduced:.3f} in {grid}")
    assert full < 12, "the authors report a validation loss of 1.2968, perplexity 3.7, on similar text; this text is lower case"
    assert full * 0.99 < reduced < full * bound
