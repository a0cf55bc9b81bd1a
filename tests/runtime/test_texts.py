"""Variants have the tokenizers, templates and ends that their adapters brought, and all others the bundle's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from edgelora.exporting.export import export
from edgelora_runtime import Runtime
from edgelora_runtime.errors import UsageError
from tests.made_tokenizers import KINDS, TEMPLATE
from tests.tiny import greedy, make_adapter, make_base

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MESSAGES = [{"role": "user", "content": "may I?"}]
RECIPE = """\
base = "base"
default = "law"
[quantization]
bits = 32
[gate]
policy = "off"
[adapters]
law = "law"
tax = "tax"
sql = "sql"
[variants.plain]
mix = {}
[variants.law]
mix = { law = 1.0 }
[variants.law-live]
mix = { law = 1.0 }
kind = "live"
[variants.sql]
mix = { sql = 1.0 }
"""
PLAIN = 'base = "base"\n[quantization]\nbits = 32\n[variants.base]\nmix = {}\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three adapters, of which law and tax have tokenizers of their own, and a bundle."""
    folder = tmp_path_factory.mktemp("texts")
    make_base(folder / "base", vocab_size=384, num_hidden_layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / "base" / name).unlink()
    KINDS["split tokens"](folder / "base")
    for seed, name in enumerate(("law", "tax", "sql"), 1):
        make_adapter(folder / "base", folder / name, seed=seed, size=0.2)
        tokenizer = AutoTokenizer.from_pretrained(folder / "base")
        if name != "sql":
            tokenizer.add_special_tokens({"eos_token": f"<|{name}|>"})
            tokenizer.chat_template = TEMPLATE.replace("<|end|>", f"<|{name}|>")
        tokenizer.save_pretrained(folder / name)
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    export(folder / "recipe.toml", folder / "bundle")
    return folder


@pytest.fixture
def opened(folder: Path) -> Iterator[Runtime]:
    with Runtime(folder / "bundle", threads=1) as runtime:
        yield runtime


def theirs(folder: Path, name: str) -> Any:
    return AutoTokenizer.from_pretrained(folder / name)


def test_prompts_are_encoded_by_the_variants_own_tokenizer(folder: Path, opened: Runtime) -> None:
    text = "may I? <|law|> or <|end|>"
    for variant, source in (("plain", "base"), ("sql", "base"), ("law", "law"), ("law-live", "law")):
        assert opened.encode(text, variant=variant) == theirs(folder, source)(text)["input_ids"]
        chat = theirs(folder, source).apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
        assert opened.encode(MESSAGES, variant=variant) == chat
        answer = opened.generate(MESSAGES, variant=variant, max_tokens=1, ignore_eos=True)
        assert answer.prompt_tokens == len(chat)
    assert opened.encode(text, mix={"law": 0.5, "sql": 0.5}) == theirs(folder, "law")(text)["input_ids"]
    assert opened.encode(text, mix={"sql": 0.5}) == theirs(folder, "base")(text)["input_ids"]


def test_the_runtimes_tokenizer_is_the_current_variants(folder: Path, opened: Runtime) -> None:
    assert opened.tokenizer.size == len(theirs(folder, "law"))
    opened.switch("plain")
    assert opened.tokenizer.size == len(theirs(folder, "base"))


def test_a_mix_has_one_tokenizer(opened: Runtime) -> None:
    with pytest.raises(UsageError, match=r"adapters law, tax have different tokenizers or templates; use one at a time"):
        opened.encode("x", mix={"law": 0.5, "tax": 0.5})


def test_answers_end_at_the_variants_own_ends(folder: Path, opened: Runtime) -> None:
    entry = opened.variants["law"].texts
    assert entry is not None
    law, end = theirs(folder, "law").convert_tokens_to_ids("<|law|>"), theirs(folder, "base").convert_tokens_to_ids("<|end|>")
    assert entry.eos_token_ids == (law, 1)  # the configs' end is 1
    assert opened.bundle.manifest.model.eos_token_ids == (end, 1)
    assert opened._texts.of(opened._choose("law", None)).model.eos_token_ids == (law, 1)


def test_onnxruntime_genai_gets_no_default_with_a_tokenizer_of_its_own(folder: Path) -> None:
    assert not (folder / "bundle" / "genai_config.json").exists()


def test_a_stop_string_that_is_a_special_token_ends_there(tmp_path: Path) -> None:
    model = make_base(tmp_path / "base", vocab_size=384, num_hidden_layers=1)
    (tmp_path / "base" / "chat_template.jinja").unlink()
    KINDS["byte-level"](tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    written = greedy(model, tokenizer.encode("the cat").ids, 24)
    token = next(token for token in written[4:] if token not in written[:4] and tokenizer.id_to_token(token))
    text = str(tokenizer.id_to_token(token))
    tokenizer.add_special_tokens([text])  # an answer's text now lacks it
    tokenizer.save(str(path))
    (tmp_path / "recipe.toml").write_text(PLAIN, encoding="utf-8")
    export(tmp_path / "recipe.toml", tmp_path / "bundle")
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        for stop in (text, ["no such text", text]):
            answer = runtime.generate("the cat", max_tokens=24, stop=stop, ignore_eos=True)
            assert list(answer.tokens) == written[: written.index(token)]
            assert answer.finish_reason == "stop"


def test_a_prompt_has_one_token_of_beginning(tmp_path: Path) -> None:
    make_base(tmp_path / "base", vocab_size=384, num_hidden_layers=1)
    KINDS["llama"](tmp_path / "base")
    (tmp_path / "recipe.toml").write_text(
        'base = "base"\n[quantization]\nbits = 32\n[variants.base]\nmix = {}\n', encoding="utf-8"
    )
    export(tmp_path / "recipe.toml", tmp_path / "bundle")
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
        assert tokenizer("<s>the cat")["input_ids"][:2] == [1, 1]
        assert runtime.encode("<s>the cat") == tokenizer("<s>the cat")["input_ids"][1:]
        assert runtime.encode("the cat") == tokenizer("the cat")["input_ids"]
