"""What a user writes for an export or a mix: recipes and weights in TOML, mergekit's YAML, and the settings of a training."""

from __future__ import annotations

import json
import tomllib
from typing import TYPE_CHECKING

from edgelora.composing.mergekit_config import read_mergekit
from edgelora.exporting.recipe import parse_recipe, read_recipe
from edgelora.mix.weights import read_weights
from tests.attacks import recipes
from tests.fuzz.harness import Harness
from tests.fuzz.mutations import mutate_bytes, mutate_json, mutate_text

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

RECIPE, VALUE, WEIGHTS, MERGEKIT = b"rvwm"  # the first byte of an input
LONGEST = 4096  # bytes of a seed
GOOD = """base = "base"
default = "v"
targets = ["cpu", "gpu"]
context_length = 512
merge_base = "auto"
end_tokens = ["</s>", 2]
draft_tables = true
[adapters]
a = "a"
b = { path = "b", trained_on = "nf4" }
[quantization]
bits = 4
block_size = 32
symmetric = true
method = "gptq"
int8 = ["lm_head"]
[gate]
[router]
variants = ["v"]
fallback = "v"
threshold = 0.5
data = { v = ["x.jsonl"] }
[variants.base]
mix = {}
[variants.v]
mix = { a = 1.0, b = { "*" = 0.5 } }
method = "ties"
density = 0.3
[variants.v-live]
mix = { a = 1.0 }
kind = "live"
"""
BY_MODULE = '[weights]\na = 1.0\n[weights.b]\n"model.layers.0.*" = 0.2\n'
MERGE = """merge_method: ties
base_model: base
models:
  - model: base+adapters/a
    parameters: {weight: [0.1, 0.9], density: 0.5}
  - model: base+adapters/b
    parameters:
      weight:
        - {filter: mlp, value: 0.5}
        - value: 1
parameters: {normalize: true, lambda: 1.0, int8_mask: false}
dtype: float32
tokenizer_source: base
"""
WORDS = (
    *(
        "\n[variants.x]\n",
        "mix = { a = 1 }\n",
        "kind = ",
        '"live"',
        "seed = ",
        "density = ",
        "method = ",
        '"dare_ties"',
        "[[",
        "]]",
    ),
    *(
        "nan",
        "inf",
        "1979-05-27T07:32:00Z",
        "07:32:00",
        "'''",
        '"""',
        "\\u0000",
        "\\U0010FFFF",
        "0x",
        "_",
        "a.b.c",
        "{",
        "}",
        "= {",
    ),
    *(
        "- ",
        ": ",
        "&a ",
        "*a",
        "<<: ",
        "!!python/object:os.system ",
        "!!binary ",
        "!!timestamp ",
        "? ",
        "|\n",
        "2001-99-99",
        "---\n",
    ),
    *("slices:", "merge_method: ", "models: ", "weight: ", "filter: ", "0o7", "1_0", "1:20", "~", "[*a, *a]", "\t"),
)


def mutate(raw: bytes, chance: Random) -> bytes:
    kind, rest = raw[:1], raw[1:]
    if kind == bytes([VALUE]) or (kind == bytes([MERGEKIT]) and rest.startswith(b"{")):  # JSON is YAML
        return kind + mutate_json(rest, chance, WORDS)
    if chance.randrange(12) == 0:
        return mutate_bytes(raw, chance)
    return kind + mutate_text(rest.decode(errors="replace"), chance, WORDS).encode(errors="replace")


def build(bundle: Path, folder: Path) -> Harness:
    import yaml

    path = folder / "recipe.toml"

    def use(raw: bytes) -> None:
        kind, rest = raw[:1], raw[1:]
        if kind == bytes([VALUE]):
            parse_recipe(read_object(rest), folder)
            return
        path.write_bytes(rest)
        read = {bytes([RECIPE]): read_recipe, bytes([WEIGHTS]): read_weights, bytes([MERGEKIT]): read_mergekit}.get(
            kind, read_recipe
        )
        read(path)

    attacks = [text if isinstance(text, bytes) else text.encode() for text in recipes.RECIPES.values()]
    texts = [GOOD.encode(), *(text for text in attacks if len(text) <= LONGEST)]
    seeds = [
        *(bytes([RECIPE]) + text for text in texts),
        bytes([VALUE]) + json.dumps(tomllib.loads(GOOD)).encode(),
        bytes([WEIGHTS]) + BY_MODULE.encode(),
        bytes([MERGEKIT]) + MERGE.encode(),
        bytes([MERGEKIT]) + json.dumps(yaml.safe_load(MERGE)).encode(),
    ]
    return Harness(seeds, mutate, use, limit=LONGEST)


def read_object(raw: bytes) -> dict[str, object]:
    """The object that JSON text holds, {} for anything else."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
