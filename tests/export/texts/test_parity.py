"""A bundle makes the tokens of transformers' AutoTokenizer: 500 texts for each kind of tokenizer that models have."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, cast

import pytest
from transformers import AutoTokenizer

from edgelora_export.base.base import Base
from edgelora_export.base.texts import TextsOfFolder
from edgelora_export.bundle.texts import read_bundle_texts
from edgelora_runtime.bundle.tokenizer import Tokenizer
from tests.made_tokenizers import KINDS, make_texts

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = 500


class Files:
    """What a Tokenizer asks of a bundle."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.manifest = self
        self.files = [path.name for path in folder.iterdir()]

    def has(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str, *, limit: int = 1 << 26) -> bytes:
        raw = (self._folder / name).read_bytes()
        assert len(raw) <= limit
        return raw


def write_texts(source: Path, folder: Path, vocab_size: int = 1 << 20) -> Tokenizer:
    """The tokenizer of a bundle whose base has these files."""
    folder.mkdir()
    base = Base(source, {"vocab_size": vocab_size}, cast("Any", None), TextsOfFolder(source))
    read_bundle_texts(base, vocab_size).write(folder)
    return Tokenizer(cast("Any", Files(folder)))


@pytest.mark.parametrize("kind", [*KINDS, "gpt2", "phi3"])
def test_tokens_of_500_texts_are_those_of_transformers(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = tmp_path / "base"
    if kind in KINDS:
        KINDS[kind](source)
    else:
        shutil.copytree(request.getfixturevalue("tokenizers_folder") / kind, source)
    ours, theirs = write_texts(source, tmp_path / "bundle"), AutoTokenizer.from_pretrained(source)
    texts = [*make_texts(TEXTS)]
    assert len(set(texts)) > TEXTS * 0.9
    wrong = [text for text in texts if ours.encode(text) != theirs(text)["input_ids"]]
    assert wrong == []
    tokens = [theirs(text)["input_ids"] for text in texts]
    assert [ours.decode(ids) for ids in tokens] == [theirs.decode(ids, skip_special_tokens=True) for ids in tokens]
