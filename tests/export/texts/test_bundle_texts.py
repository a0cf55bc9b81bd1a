"""The text side of a bundle is what transformers makes of the files, or is refused in one line before any weight is read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import pytest
from transformers import AutoTokenizer

from edgelora_export.base.base import Base
from edgelora_export.base.texts import TextsOfFolder
from edgelora_export.base.tokenizer import load_tokenizer
from edgelora_export.bundle.texts import read_bundle_texts
from edgelora_export.texts.packing import pack_tokenizer
from edgelora_export.texts.probes import check_tokenizer
from edgelora_runtime.errors import InputError, IntegrityError
from tests.made_tokenizers import KINDS, TEMPLATE

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 384


def make_base(folder: Path, kind: str = "byte-level", **config: Any) -> Base:
    KINDS[kind](folder)
    return Base(folder, {"vocab_size": SIZE, **config}, cast("Any", None), TextsOfFolder(folder))


def save_own(base: Base, folder: Path, **changes: Any) -> TextsOfFolder:
    """An adapter's folder with a changed copy of the base's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    tokenizer.add_special_tokens({"eos_token": "<|law|>"})
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return TextsOfFolder(folder)


def test_a_tokenizer_that_does_not_survive_is_an_error_with_the_text(tmp_path: Path) -> None:
    base, other = make_base(tmp_path / "base"), make_base(tmp_path / "other", "metaspace")
    tokenizer = load_tokenizer(base)
    check_tokenizer(tokenizer, pack_tokenizer(tokenizer, "base"), "base x")
    with pytest.raises(IntegrityError, match=r"base x does not survive export: '' has tokens \[\] in transformers and \[1\]"):
        check_tokenizer(tokenizer, pack_tokenizer(load_tokenizer(other), "base"), "base x")


def test_special_tokens_that_are_plain_text_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "split_special_tokens": True}))
    with pytest.raises(InputError, match="has split_special_tokens"):
        read_bundle_texts(base, SIZE)


def test_a_generation_config_that_is_no_object(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(InputError, match=r"generation_config\.json is not a readable JSON object"):
        read_bundle_texts(base, SIZE)


def test_named_templates_are_files_of_their_own(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    (tmp_path / "base" / "additional_chat_templates").mkdir()
    (tmp_path / "base" / "chat_template.jinja").write_text("default")
    (tmp_path / "base" / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    texts = read_bundle_texts(base, SIZE)
    assert texts.base.templates == {"chat_template.jinja": b"default", "chat_template.tool_use.jinja": b"tools"}


def test_a_named_template_that_would_leave_the_folder(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    named = [{"name": "default", "template": "x"}, {"name": "../tools", "template": "x"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    with pytest.raises(InputError, match=r"has a chat template named '../tools'"):
        read_bundle_texts(base, SIZE)


def test_an_adapters_tokens_outside_the_model_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    tokenizer.add_tokens([f"<extra {number}>" for number in range(100)])
    tokenizer.save_pretrained(tmp_path / "law")
    own = {"law": TextsOfFolder(tmp_path / "law")}
    with pytest.raises(
        InputError, match=r"adapter law has 36 tokens outside the model's vocabulary of 384: '<extra 64>' \(384\)"
    ):
        read_bundle_texts(base, SIZE, own)
    assert read_bundle_texts(base, SIZE, own, vocab_sizes={"law": 420}).own["law"].end_tokens == (1,)


def test_an_older_save_without_a_template_keeps_the_bases(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "split tokens")
    texts = read_bundle_texts(base, SIZE, {"law": save_own(base, tmp_path / "law", chat_template=None)})
    assert texts.own["law"].templates == {"chat_template.jinja": TEMPLATE.encode()}
    entry = texts.describe(["law"])
    assert entry is not None
    assert (entry.tokenizer, entry.chat_templates) == ("law.tokenizer.json", ("chat_template.jinja",))
    assert entry.eos_token_ids == (325 + 1, 325)


def test_equal_texts_of_two_adapters_mix(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    own = {name: save_own(base, tmp_path / name) for name in ("law", "sql")}
    texts = read_bundle_texts(base, SIZE, own)
    assert texts.find(["sql", "law"]) is texts.own["sql"]
    assert texts.find(["other"]) is texts.base


def test_ends_of_the_recipe_hold_for_every_text_side(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    own = {"law": save_own(base, tmp_path / "law")}
    texts = read_bundle_texts(base, SIZE, own, end_tokens=["<s>"])
    assert texts.base.end_tokens == texts.own["law"].end_tokens == (0,)
    with pytest.raises(InputError, match=r"end_tokens names '<\|law\|>'"):
        read_bundle_texts(base, SIZE, own, end_tokens=["<|law|>"])
