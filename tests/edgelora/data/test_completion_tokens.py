"""Training sees the tokens that a bundle reads: those of the prompt alone, then the completion's, then one end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer, processors

from edgelora.data.completion_tokens import encode_apart
from edgelora.data.encode_rows import RowEncoder
from edgelora.data.rows import Row
from edgelora_export.base.texts import TextsOfFolder
from edgelora_export.base.tokenizer import read_tokenizer
from tests.export.texts.test_parity import write_texts
from tests.made_tokenizers import KINDS

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [
    Row("question: how many?", " answer: nine."),
    Row("question: how many? ", "nine"),  # the space and the word would be one token
    Row("one two thr", "ee four"),
    Row("the c", "at sat on the mat"),
    Row("lines\n", "\nand    more"),
    Row("Größe → ", "naïve café 日本語 🙂"),
    Row("<s>the cat", " sat"),  # rendered with a chat template
    Row("<|user|>how many?<|end|>\n<|assistant|>", "nine<|end|>"),
    Row("a", "</s>"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_training_sees_the_prompt_as_a_bundle_encodes_it(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "base")
    bundle = write_texts(tmp_path / "base", tmp_path / "bundle")
    tokenizer = read_tokenizer(TextsOfFolder(tmp_path / "base"), "base")
    for row in ROWS:
        taught = RowEncoder(tokenizer).learn(row)
        ids, start = list(taught.tokens), taught.learned.index(True)
        assert isinstance(row.prompt, str)
        assert ids[:start] == bundle.encode_prompt(row.prompt)
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1 + (row.prompt + row.completion)[:-5].count(tokenizer.eos_token)
        assert taught.learned == (False,) * start + (True,) * (len(ids) - start)
        assert ids.count(tokenizer.bos_token_id) <= 1
        plain = tokenizer(row.prompt + row.completion)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode(plain, skip_special_tokens=True)


def test_a_shared_token_is_split_at_the_prompts_end(tmp_path: Path) -> None:
    KINDS["byte-level"](tmp_path)
    tokenizer = read_tokenizer(TextsOfFolder(tmp_path), "base")
    ids, start = encode_apart(tokenizer, "the ", "cat")
    assert tokenizer("the ")["input_ids"] == ids[:start]
    assert tokenizer("the cat")["input_ids"] != ids  # "Ġcat" is one token
    assert tokenizer.decode(ids) == "the cat"


def test_a_tokenizer_that_ends_every_text_leaves_one_end_after_the_completion(tmp_path: Path) -> None:
    KINDS["llama"](tmp_path)
    stored = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stored.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    stored.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(TextsOfFolder(tmp_path), "base")
    prompt = tokenizer("the cat")["input_ids"]
    assert prompt[-1] == tokenizer.eos_token_id
    ids = list(RowEncoder(tokenizer).learn(Row("the cat", " sat")).tokens)
    assert ids[: len(prompt)] == prompt
    assert ids[len(prompt) :].count(tokenizer.eos_token_id) == 1
