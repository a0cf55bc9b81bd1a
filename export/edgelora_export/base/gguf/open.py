"""Opens a GGUF file, or all parts of a split one, as the config, the tensors and the texts of a base."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from edgelora_export.base.gguf.config import read_architecture, read_config
from edgelora_export.base.gguf.header import Header, read_header
from edgelora_export.base.gguf.names import find_sources
from edgelora_export.base.gguf.tensors import GgufTensors
from edgelora_export.base.gguf.texts import TextsOfGguf
from edgelora_export.base.gguf.values import Values
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SUFFIX = ".gguf"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def open_gguf(path: Path) -> tuple[dict[str, Any], GgufTensors, Mapping[str, bytes]]:
    """Opens a file of llama.cpp: returns its config, its tensors and its texts.

    Raises InputError if it is broken, or a model that edgelora does not build, and MissingExtraError without the gguf package.
    """
    header = _read_parts(path)
    config = read_config(path, header)
    sources = find_sources(header, read_architecture(path, header), config["num_attention_heads"], config["num_key_value_heads"])
    texts = TextsOfGguf(path, header.metadata, config)
    return config, GgufTensors(sources), texts


def _read_parts(path: Path) -> Header:
    """Reads the header of a file, or of all parts of a split one, whose first part holds the metadata."""
    header = read_header(path)
    count = Values(path, header.metadata, "split.").integer("count", 0, least=0)
    if count < 2:
        return header
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise InputError(f"{path} is one of {count} parts; its name must end in -00001-of-{count:05}.gguf, as llama.cpp gave it")
    paths = [path.with_name(f"{match[1]}-{part:05}-of-{match[3]}.gguf") for part in range(1, count + 1)]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise InputError(f"base {path} lacks {', '.join(missing)}; download all {count} parts into one folder")
    parts = [read_header(part) for part in paths]
    tensors = {name: place for part in parts for name, place in part.tensors.items()}
    if len(tensors) < sum(len(part.tensors) for part in parts):
        raise InputError(f"a tensor stands in two parts of {path}; download the parts again")
    return Header(parts[0].metadata, tensors)
