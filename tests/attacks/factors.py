"""Attacks by what is added to a model at run time: live factors, weights of a mix, draft tables, and files of prompts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load, save

from edgelora_runtime import Bundle
from edgelora_runtime.residency.prompt_file import hash_prompts
from tests.attacks.attack import Attack, Copy, make_copy, use_bundle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    Tensors = dict[str, NDArray[Any]]

FORMAT = "edgelora prompts 1"


def safetensors(header: Any, data: bytes = b"", *, size: int | None = None) -> bytes:
    """A safetensors file with any header."""
    packed = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(packed) if size is None else size).to_bytes(8, "little") + packed + data


def entry(kind: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, stop]}


def factors(change: Callable[[Tensors], Tensors | bytes]) -> Callable[[Copy], None]:
    """A change of the first live adapter's file."""

    def apply(copy: Copy) -> None:
        file = next(entry["file"] for entry in copy.read_manifest()["adapters"].values() if entry["file"])
        changed = change(load((copy.folder / file).read_bytes()))
        copy.replace(file, changed if isinstance(changed, bytes) else save(changed))

    return apply


def first(value: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[Tensors], Tensors]:
    """A change of the first tensor."""
    return lambda tensors: {**tensors, min(tensors): value(tensors[min(tensors)])}


def spoil(number: float) -> Callable[[Tensors], Tensors]:
    def change(values: NDArray[Any]) -> NDArray[Any]:
        spoiled = values.copy()
        spoiled.flat[-1] = number
        return spoiled

    return first(change)


FACTORS: dict[str, Callable[[Tensors], Tensors | bytes]] = {
    "NaN": spoil(float("nan")),
    "infinity": spoil(float("inf")),
    "minus infinity": spoil(float("-inf")),
    "float32": first(lambda values: values.astype(np.float32)),
    "bytes": first(lambda values: values.view(np.uint8)),
    "bfloat16": lambda tensors: safetensors({min(tensors): entry("BF16", [2, 2], 0, 8)}, bytes(8)),
    "8-bit floats": lambda tensors: safetensors({min(tensors): entry("F8_E4M3", [2, 2], 0, 4)}, bytes(4)),
    "4-bit floats": lambda tensors: safetensors({min(tensors): entry("F4", [2, 2], 0, 2)}, bytes(2)),
    "a type that is none": lambda tensors: safetensors({min(tensors): entry("EVIL\x1b", [2, 2], 0, 4)}, bytes(4)),
    "three dimensions": first(lambda values: values[None]),
    "other columns": first(lambda values: values[:, :-1]),
    "no A": lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith("lora_A")},
    "unequal ranks": first(lambda values: np.concatenate([values, values])),
    "no tensor": lambda tensors: {},
    "modules that no slot has": lambda tensors: {f"evil.{name}": tensor for name, tensor in tensors.items()},
    "one module that no slot has": lambda tensors: {
        **tensors,
        **{f"x\x1b\n.lora_{kind}": np.zeros((1, 1), np.float16) for kind in "AB"},
    },
    "empty": lambda tensors: b"",
    "a header past the end": lambda tensors: safetensors({}, size=1 << 40),
    "a header of a hundred thousand brackets": lambda tensors: safetensors(b"[" * 100_000),
    "a header that is a list": lambda tensors: safetensors([]),
    "a tensor past the end": lambda tensors: safetensors({min(tensors): entry("F16", [1 << 20, 1 << 20], 0, 1 << 41)}),
    "a tensor of 2^62 by 2^62": lambda tensors: safetensors({min(tensors): entry("F16", [1 << 62, 1 << 62], 0, 8)}, bytes(8)),
    "a tensor that ends before it starts": lambda tensors: safetensors({min(tensors): entry("F16", [2, 2], 8, 0)}, bytes(8)),
    "tensors that overlap": lambda tensors: safetensors({name: entry("F16", [2, 2], 0, 8) for name in sorted(tensors)}, bytes(8)),
    "a tensor's name of a megabyte": lambda tensors: safetensors({"x" * 1_000_000: entry("F32", [1, 1], 0, 4)}, bytes(4)),
    "pickled": lambda tensors: b"\x80\x04cposix\nsystem\n(Vtrue\ntR.",
}
MIXES: dict[str, Any] = {
    "1e30": 1e30,
    "-1e30": -1e30,
    "3e38": 3e38,
    "1e39": 1e39,
    "1e308": 1e308,
    "10^400": 10**400,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "text": "1",
    "None": None,
    "a list": [1.0],
}


def mix(weight: Any) -> Callable[[Path], None]:
    def generate(folder: Path) -> None:
        from edgelora_runtime import Runtime

        with Runtime(folder / "bundle", threads=1) as runtime:
            name = next(name for name, entry in runtime.adapters.items() if entry.file is not None)
            runtime.generate("the cat", mix={name: weight}, max_tokens=2)

    return generate


def prompts(content: bytes | None = None, **changes: Any) -> Callable[[Path], None]:
    """Writes a file of prompts: of these bytes, or as save_prompts() does with changes of its entry or of its tensors."""

    def change(copy: Copy) -> None:
        path = copy.folder.parent / "prompts.safetensors"
        if content is not None:
            path.write_bytes(content)
            return
        manifest = Bundle.open(copy.folder).manifest
        model, variant = manifest.model, manifest.variants[manifest.default_variant]
        count = changes.get("count", 3)
        shape = (model.kv_heads, count, model.head_size)
        tensors = {
            f"0.{layer}.{kind}": np.full(shape, changes.get("fill", 0.5), changes.get("dtype", np.float32))
            for layer in range(model.layers)
            for kind in ("key", "value")
        }
        entry = {"graph": manifest.files[variant.graphs["cpu"].file].sha256, "live": None, "tokens": [5] * count}
        entry |= changes.get("entry", {})
        tensors = changes.get("tensors", lambda given: given)(tensors)
        said = changes.get("said", json.dumps([entry]))
        metadata = {"format": FORMAT, "prompts": said, "sha256": hash_prompts(said, tensors)}
        path.write_bytes(save(tensors, metadata | changes.get("metadata", {})))

    return lambda folder: change(Copy(SOURCE["bundle"], folder / "bundle"))


def load_prompts(folder: Path) -> None:
    from edgelora_runtime import Runtime

    with Runtime(folder / "bundle", threads=1) as runtime:
        runtime.load_prompts(folder / "prompts.safetensors")


SOURCE: dict[str, Path] = {}
PROMPTS: dict[str, Callable[[Path], None]] = {
    "empty": prompts(b""),
    "text": prompts(b"hello" * 100),
    "a header past the end": prompts(safetensors({}, size=1 << 62)),
    "another format": prompts(metadata={"format": "other\x1b"}),
    "no checksum": prompts(metadata={"sha256": ""}),
    "another checksum": prompts(metadata={"sha256": "0" * 64}),
    "no list of prompts": prompts(said="{}"),
    "a list of prompts that is deep": prompts(said="[" * 100_000),
    "prompts that are numbers": prompts(said="[1, 2]"),
    "a prompt without a graph": prompts(said="[{}]"),
    "tokens as text": prompts(entry={"tokens": "abc"}),
    "no tokens": prompts(entry={"tokens": []}),
    "a token past the vocabulary": prompts(entry={"tokens": [1 << 40] * 3}),
    "a token below zero": prompts(entry={"tokens": [-1] * 3}),
    "more tokens than keys": prompts(entry={"tokens": [5] * 4}),
    "live as a number": prompts(entry={"live": 1}),
    "live with a weight as text": prompts(entry={"live": [["x", "y", "z"]]}),
    "NaN": prompts(fill=float("nan")),
    "infinity": prompts(fill=float("inf")),
    "whole numbers": prompts(dtype=np.int64),
    "float16 for a float32 graph": prompts(dtype=np.float16),
    "other shapes": prompts(tensors=lambda given: {name: tensor[:, :, :-1].copy() for name, tensor in given.items()}),
    "a layer that is absent": prompts(tensors=lambda given: dict(list(given.items())[1:])),
}


def list_attacks(bundle: Path) -> Iterator[Attack]:
    SOURCE["bundle"] = bundle
    for name, write in PROMPTS.items():
        yield Attack("prompt file", name, write, load_prompts)
    if Bundle.open(bundle).manifest.live_graph("cpu") is None:
        return
    for name, change in FACTORS.items():
        yield Attack("live factors", name, make_copy(bundle, factors(change)), use_bundle)
    for name, weight in MIXES.items():
        yield Attack("mix", name, make_copy(bundle, lambda copy: None), mix(weight))
