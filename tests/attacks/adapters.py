"""Attacks by an adapter's folder: its configuration, its tensors, and what lies beside them."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save

from tests.attacks.attack import Attack
from tests.attacks.factors import entry, safetensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CONFIG, WEIGHTS, PROVENANCE = "adapter_config.json", "adapter_model.safetensors", "edgelora.json"
MODULE = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{MODULE}.lora_"
GOOD: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}


def tensors(rank: int = 2, size: int = 8, kind: Any = np.float32) -> dict[str, Any]:
    return {f"{KEY}A.weight": np.ones((rank, size), kind), f"{KEY}B.weight": np.ones((size, rank), kind)}


def write(folder: Path, config: Any = None, weights: Any = None) -> Path:
    """Writes an adapter. config: an object or bytes. weights: tensors or bytes."""
    adapter = folder / "adapter"
    adapter.mkdir()
    config = GOOD if config is None else config
    weights = tensors() if weights is None else weights
    (adapter / CONFIG).write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    (adapter / WEIGHTS).write_bytes(weights if isinstance(weights, bytes) else save(weights))
    return adapter


def configured(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: write(folder, {**GOOD, **changes})


def raw_config(raw: bytes) -> Callable[[Path], object]:
    return lambda folder: write(folder, raw)


def weighted(weights: Any) -> Callable[[Path], object]:
    return lambda folder: write(folder, weights=weights)


def spoiled(number: float, kind: str = "A") -> Callable[[Path], object]:
    found = tensors()
    found[f"{KEY}{kind}.weight"][0, 0] = number
    return weighted(found)


def beside(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    """A change of one file of a good adapter."""

    def make(folder: Path) -> None:
        path = write(folder) / name
        path.unlink(missing_ok=True)
        change(path)

    return make


def provenance(raw: bytes) -> Callable[[Path], object]:
    return beside(PROVENANCE, lambda path: path.write_bytes(raw))


def text_of_digits(folder: Path) -> None:
    raw = json.dumps(GOOD).replace('"lora_alpha": 4', '"lora_alpha": ' + "9" * 400)
    write(folder, raw.encode())


LINKS: dict[str, Callable[[Path], object]] = {
    "configuration as a pipe": beside(CONFIG, lambda path: os.mkfifo(path)),
    "configuration as an endless device": beside(CONFIG, lambda path: path.symlink_to("/dev/zero")),
    "configuration as a folder": beside(CONFIG, lambda path: path.mkdir()),
    "weights as a pipe": beside(WEIGHTS, lambda path: os.mkfifo(path)),
    "weights as an endless device": beside(WEIGHTS, lambda path: path.symlink_to("/dev/zero")),
    "weights as a folder": beside(WEIGHTS, lambda path: path.mkdir()),
}
ADAPTERS: dict[str, Callable[[Path], object]] = {
    "no configuration": beside(CONFIG, lambda path: None),
    "no weights": beside(WEIGHTS, lambda path: None),
    "pickled weights": beside(
        WEIGHTS, lambda path: path.with_name("adapter_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
    ),
    "configuration that is empty": raw_config(b""),
    "configuration that is a list": raw_config(b"[]"),
    "configuration that is not UTF-8": raw_config(b"\xff\xfe"),
    "configuration that is deep": raw_config(b'{"a":' * 100_000),
    "configuration of 100 MiB": raw_config(b" " * (100 << 20)),
    "another kind of adapter": configured(peft_type="EVIL\x1b[2J"),
    "alpha as text": configured(lora_alpha="1e400"),
    "alpha of 400 digits": text_of_digits,
    "alpha of 1e300": configured(lora_alpha=1e300),
    "alpha of NaN": configured(lora_alpha=float("nan")),
    "alpha that is true": configured(lora_alpha=True),
    "no alpha": configured(lora_alpha=None),
    "rank 0": configured(r=0),
    "a rank as text": configured(r="2"),
    "a pattern that takes exponential time": configured(alpha_pattern={"(a+)+$": 3}),
    "a pattern that is broken": configured(alpha_pattern={"(((": 3}),
    "a pattern of control characters": configured(alpha_pattern={"(\x1b[2J": 3}),
    "a pattern of a megabyte": configured(alpha_pattern={"a" * 1_000_000: 3}),
    "an exponential pattern behind a backslash": configured(alpha_pattern={r"(a+|\\)+x": 3}),
    "an exponential pattern with spaces": configured(alpha_pattern={"(?x:(a+) +x)": 3}),
    "an exponential pattern of options": configured(alpha_pattern={"a?" * 100 + "[^a]": 3}),
    "modules to save as a number": configured(modules_to_save=1.5),
    "a pattern of many repeats": configured(alpha_pattern={".*.*.*.*.*.*.*x": 3}),
    "a pattern with a weight as text": configured(alpha_pattern={"q_proj": "1"}),
    "a pattern of 1e300": configured(alpha_pattern={"q_proj": 1e300}),
    "patterns as a list": configured(alpha_pattern=[1]),
    "a pattern of 400 digits": configured(alpha_pattern={"q_proj": 10**400}),
    "layers twice": configured(layer_replication=[[0, 1]]),
    "biases of another kind": configured(bias="evil\n"),
    "an init that changes the base": configured(init_lora_weights="loftq"),
    "NaN in A": spoiled(float("nan")),
    "NaN in B": spoiled(float("nan"), "B"),
    "infinity in A": spoiled(float("inf")),
    "no tensor": weighted({}),
    "tensors of another model": weighted({"evil\x1b[2J\n.weight": np.ones((2, 2), np.float32)}),
    "A without B": weighted({f"{KEY}A.weight": np.ones((2, 8), np.float32)}),
    "unequal ranks": weighted({**tensors(), f"{KEY}B.weight": np.ones((8, 3), np.float32)}),
    "three dimensions": weighted({name: each[None] for name, each in tensors().items()}),
    "no dimension": weighted({name: np.array(1.0, np.float32) for name in tensors()}),
    "no rank": weighted(tensors(rank=0)),
    "a change past infinity": lambda folder: write(
        folder, {**GOOD, "lora_alpha": 3e38}, {name: each * 1e3 for name, each in tensors().items()}
    ),
    "whole numbers": weighted(tensors(kind=np.int64)),
    "8-bit floats that are NaN": weighted(
        safetensors(
            {f"{KEY}A.weight": entry("F8_E4M3", [2, 8], 0, 16), f"{KEY}B.weight": entry("F8_E4M3", [8, 2], 16, 32)}, b"\x7f" * 32
        )
    ),
    "4-bit floats": weighted(
        safetensors({f"{KEY}A.weight": entry("F4", [2, 8], 0, 8), f"{KEY}B.weight": entry("F4", [8, 2], 8, 16)}, bytes(16))
    ),
    "weights that are empty": weighted(b""),
    "weights with a header past the end": weighted(safetensors({}, size=1 << 40)),
    "weights of 2^62 by 2^62": weighted(safetensors({f"{KEY}A.weight": entry("F32", [1 << 62, 1 << 62], 0, 8)}, bytes(8))),
    "a tensor's name of a megabyte": weighted({f"base_model.model.{'x' * 1_000_000}.lora_A.weight": np.ones((1, 1), np.float32)}),
    "a module's name of 10,000 characters": lambda folder: write(
        folder,
        {**GOOD, "alpha_pattern": {"q": 1}},
        {name.replace("q_proj", "q" * 10_000): each for name, each in tensors().items()},
    ),
    "provenance that is a list": provenance(b"[]"),
    "provenance that is deep": provenance(b'{"a":' * 100_000),
    "provenance of numbers": provenance(
        json.dumps(dict.fromkeys(("base", "base_sha256", "base_quantization", "data_sha256", "init"), 7)).encode()
    ),
}


def open_adapter(folder: Path) -> None:
    """Opens an adapter and computes the change of each module, as compose and export do."""
    from edgelora.adapters.folder import Adapter

    adapter = Adapter.open(folder / "adapter")
    for module in adapter.modules:
        adapter.dense(module)


def list_attacks(bundle: Path) -> Iterator[Attack]:
    for name, make in {**ADAPTERS, **(LINKS if sys.platform != "win32" else {})}.items():
        yield Attack("adapter", name, make, open_adapter)
