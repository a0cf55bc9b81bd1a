"""Attacks by a recipe for an export."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from tests.attacks.attack import Attack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HEAD = 'base = "base"\n[adapters]\na = "a"\n'
RECIPES: dict[str, str | bytes] = {
    "empty": "",
    "not TOML": "[[[",
    "not UTF-8": b"\xff\xfe",
    "zero bytes": bytes(100),
    "control characters in a key": '"\x1b[2J" = 1\n',
    "a deep table": "a" + ".a" * 20_000 + " = 1\n",
    "a deep list": "a = " + "[" * 50_000,
    "100 MiB": b"#" * (100 << 20),
    "no base": "[variants.base]\nmix = {}\n",
    "a base that is a number": "base = 7\n[variants.base]\nmix = {}\n",
    "no variant": HEAD,
    "a variant that is a number": HEAD + "[variants]\nbase = 7\n",
    "a variant of control characters": HEAD + '[variants."\\u001b[2J"]\nmix = {}\n',
    "a variant in a parent folder": HEAD + '[variants."../x"]\nmix = {}\n',
    "a reserved variant": HEAD + "[variants.auto]\nmix = {}\n",
    "a mix of an absent adapter": HEAD + "[variants.v]\nmix = { nobody = 1.0 }\n",
    "a weight of NaN": HEAD + "[variants.v]\nmix = { a = nan }\n",
    "a weight of infinity": HEAD + "[variants.v]\nmix = { a = inf }\n",
    "a weight of 1e308": HEAD + "[variants.v]\nmix = { a = 1e308 }\n",
    "a weight of 400 digits": HEAD + f"[variants.v]\nmix = {{ a = {'9' * 400} }}\n",
    "a weight of 10,000 digits": HEAD + f"[variants.v]\nmix = {{ a = {'9' * 10_000} }}\n",
    "a weight as text": HEAD + '[variants.v]\nmix = { a = "1" }\n',
    "a weight that is true": HEAD + "[variants.v]\nmix = { a = true }\n",
    "weights by no pattern": HEAD + "[variants.v]\nmix = { a = {} }\n",
    "a weight of NaN by pattern": HEAD + '[variants.v]\nmix = { a = { "*" = nan } }\n',
    "another method": HEAD + '[variants.v]\nmix = { a = 1 }\nmethod = "\\u001b[2J"\n',
    "a density of NaN": HEAD + '[variants.v]\nmix = { a = 1 }\nmethod = "ties"\ndensity = nan\n',
    "a seed below zero": HEAD + '[variants.v]\nmix = { a = 1 }\nmethod = "dare_ties"\nseed = -1\n',
    "an unknown key": HEAD + "[variants.v]\nmix = {}\nevil = 1\n",
    "bits of 10^30": HEAD + "[quantization]\nbits = 1000000000000000000000000000000\n[variants.v]\nmix = {}\n",
    "blocks of zero": HEAD + "[quantization]\nblock_size = 0\n[variants.v]\nmix = {}\n",
    "another target": HEAD.replace("[adapters]", 'targets = ["\\u001b"]\n[adapters]') + "[variants.v]\nmix = {}\n",
    "end tokens that are lists": HEAD.replace("[adapters]", "end_tokens = [[1]]\n[adapters]") + "[variants.v]\nmix = {}\n",
    "a default that is a list": HEAD.replace("[adapters]", "default = [1]\n[adapters]") + "[variants.v]\nmix = {}\n",
    "an adapter that is a number": 'base = "base"\n[adapters]\na = 7\n[variants.v]\nmix = {}\n',
    "an adapter of control characters": 'base = "base"\n[adapters]\n"\\u001b" = "a"\n[variants.v]\nmix = {}\n',
}


def read(folder: Path) -> None:
    from edgelora.exporting.recipe import read_recipe

    read_recipe(folder / "recipe.toml")


def put(raw: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "recipe.toml").write_bytes(raw)


def list_attacks(bundle: Path) -> Iterator[Attack]:
    for name, raw in RECIPES.items():
        yield Attack("recipe", name, put(raw if isinstance(raw, bytes) else raw.encode()), read)
    yield Attack("recipe", "absent", lambda folder: None, read)
    if sys.platform != "win32":
        yield Attack("recipe", "a pipe", lambda folder: os.mkfifo(folder / "recipe.toml"), read)
        yield Attack("recipe", "an endless device", lambda folder: (folder / "recipe.toml").symlink_to("/dev/zero"), read)
    yield Attack("recipe", "a folder", lambda folder: (folder / "recipe.toml").mkdir(), read)
