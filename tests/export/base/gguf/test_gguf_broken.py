"""Broken, cut and hostile GGUF files, and models that edgelora does not build, are refused in one line."""

from __future__ import annotations

import builtins
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_export.base.gguf.header import read_header
from edgelora_runtime.errors import InputError, MissingExtraError
from tests.gguf_files import add_byte_level, write_gguf
from tests.tiny import make_base

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in Q8_0."""
    folder = tmp_path_factory.mktemp("gguf")
    make_base(folder / "base")
    return write_gguf(folder / "base", folder / "model.gguf", kind=GGMLQuantizationType.Q8_0)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("broken") / "broken.gguf"


def read_all(path: Path) -> None:
    """Everything that a verb reads of a base."""
    base = Base.open(path)
    read_decoder(base.config)
    for name in base.tensors.files:
        base.tensor(name)
    for name in base.texts:
        assert base.texts[name]


def refuse(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_all(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_the_header_is_what_the_gguf_package_reads(model: Path) -> None:
    header, theirs = read_header(model), GGUFReader(model)
    for key, field in theirs.fields.items():
        if key.startswith("GGUF."):
            continue
        ours = header.metadata[key]
        expected = field.contents()
        assert (
            np.allclose(ours, expected)
            if isinstance(ours, float)
            else list(ours) == expected
            if isinstance(ours, np.ndarray)
            else ours == expected
        ), key
    assert {(tensor.name, tuple(tensor.shape.tolist()[::-1]), tensor.data_offset) for tensor in theirs.tensors} == {
        (name, place.shape, place.offset) for name, place in header.tensors.items()
    }


@given(data=st.data())
def test_flipped_bytes_never_end_in_anything_but_an_input_error(model: Path, scratch: Path, data: st.DataObject) -> None:
    content = bytearray(model.read_bytes())
    header = read_header(model)
    end = min(place.offset for place in header.tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    scratch.write_bytes(content)
    try:
        read_all(scratch)
    except InputError as error:
        assert "\n" not in str(error)


@given(share=st.floats(0, 0.999))
def test_a_file_that_was_cut_is_refused(model: Path, scratch: Path, share: float) -> None:
    content = model.read_bytes()
    scratch.write_bytes(content[: int(len(content) * share)])
    assert "ends" in refuse(scratch)


@pytest.mark.parametrize(
    ("position", "count", "said"),
    [
        (8, 1 << 60, "claims 1152921504606846976 tensors"),
        (16, 1 << 60, "values"),
        (16, 1 << 20, "not a whole GGUF file"),
        (24, 1 << 61, "text"),
    ],
)
def test_counts_are_bounded(model: Path, tmp_path: Path, position: int, count: int, said: str) -> None:
    content = bytearray(model.read_bytes())
    content[position : position + 8] = struct.pack("<Q", count)
    (tmp_path / "broken.gguf").write_bytes(content)
    assert said in refuse(tmp_path / "broken.gguf")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "ends 4 bytes early"), (b"PK\x03\x04" * 9, "not a GGUF file"), (b"GGUF\0\0\0\3" + b"\0" * 16, "big-endian")],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)
    assert said in refuse(tmp_path / "broken.gguf")


def test_a_file_cut_after_it_was_opened_is_refused(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(model.read_bytes())
    base = Base.open(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match="was cut after it was opened"):
        for name in base.tensors.files:
            base.tensor(name)


CHANGES: dict[str, tuple[Callable[[GGUFWriter], None], str]] = {
    "an adapter": (lambda writer: writer.add_type("adapter"), "is 'adapter'; a base must be a whole model"),
    "experts": (lambda writer: writer.add_expert_count(8), "llama.expert_count in"),
    "other heads per layer": (lambda writer: _replace(writer, "llama.attention.head_count_kv", [2, 1]), "differs from layer"),
    "a text for a number": (lambda writer: _replace(writer, "llama.block_count", "two"), "is no number from 1 on"),
    "partly rotary": (lambda writer: writer.add_rope_dimension_count(8), "which only phi3 has"),
    "unknown scaling": (lambda writer: writer.add_string("llama.rope.scaling.type", "ntk"), "supported: linear, longrope"),
    "a tensor of another model": (
        lambda writer: writer.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, np.float32)),
        "blk.0.attn_sinks.weight: a llama model",
    ),
    "an unknown pre-tokenizer": (lambda writer: _replace(writer, "tokenizer.ggml.pre", "grok-2"), "'grok-2', which edgelora"),
    "WordPiece": (lambda writer: _replace(writer, "tokenizer.ggml.model", "bert"), "is 'bert'; supported"),
    "an end outside the vocabulary": (lambda writer: _replace(writer, "tokenizer.ggml.eos_token_id", 300), "has 300 tokens"),
    "no epsilon": (lambda writer: _drop(writer, "llama.attention.layer_norm_rms_epsilon"), "is missing; convert the model"),
}


def _drop(writer: GGUFWriter, key: str) -> None:
    del writer.kv_data[0][key]


def _replace(writer: GGUFWriter, key: str, value: Any) -> None:
    _drop(writer, key)
    add: Any = {int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[type(value)]
    add(key, value)


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES.keys())
def test_models_that_cannot_be_read_are_named(
    model: Path, tmp_path: Path, change: Callable[[GGUFWriter], None], said: str
) -> None:
    assert said in refuse(write_gguf(model.parent / "base", tmp_path / "model.gguf", change=change))


def test_an_unknown_architecture_is_named_by_the_command_line(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "recipe.toml").write_text('base = "model.gguf"\n[variants.base]\nmix = {}\n', encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))}
    done = subprocess.run(
        [sys.executable, "-m", "edgelora", "export", "recipe.toml", "--output", "bundle"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == InputError.exit_code
    assert "'mamba', which edgelora does not read from GGUF" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bundle").exists()


def test_a_missing_part_is_named(model: Path, tmp_path: Path) -> None:
    write_gguf(model.parent / "base", tmp_path / "model.gguf", split_max_tensors=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    parts[1].unlink()
    assert f"lacks {parts[1].name}" in refuse(parts[0])


def test_without_the_gguf_package_its_extra_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return plain(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"edgelora\[gguf\]"):
        Base.open(model)


def test_broken_merges_are_refused(model: Path, tmp_path: Path) -> None:
    def add(writer: GGUFWriter, folder: Path) -> None:
        add_byte_level(writer, folder)
        _drop(writer, "tokenizer.ggml.merges")
        writer.add_token_merges(["a nowhere"])

    path = write_gguf(model.parent / "base", tmp_path / "model.gguf", vocabulary=add)
    assert "the tokenizer in" in refuse(path)
