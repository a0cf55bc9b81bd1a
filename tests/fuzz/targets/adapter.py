"""An adapter's folder: its configuration, edgelora.json, and its tensors, as PEFT or mlx-lm write them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save

from edgelora.adapters.folder import Adapter
from edgelora.adapters.mlx_folder import MLX_WEIGHTS
from edgelora_runtime import EdgeloraError
from tests.attacks.adapters import CONFIG, GOOD, KEY, MODULE, PROVENANCE, WEIGHTS, tensors
from tests.fuzz.harness import Harness, join_parts, split_parts
from tests.fuzz.mutations import mutate_json, mutate_safetensors

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

LARGEST = 1 << 22  # entries of a change that is computed: factors of a few kilobytes may stand for gigabytes
ORIGIN = dict.fromkeys(("base_name", "base_sha256", "base_quantization", "data_sha256", "init"), "nf4") | dict.fromkeys(
    ("data_rows", "seed", "rank", "alpha", "steps", "learning_rate"), 2
)
FULL = GOOD | {
    "rank_pattern": {"q_proj": 2, "^model.layers.[0-9]+.mlp": 4},
    "alpha_pattern": {"layers.0.*": 8, "(k|v)_proj": 3},
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": {"embed_tokens": [1, 2]},
    "bias": "lora_only",
    "use_dora": True,
    "use_rslora": True,
    "lora_bias": True,
}
MLX = {
    "fine_tune_type": "lora",
    "num_layers": 1,
    "model": "x",
    "lora_parameters": {"rank": 2, "scale": 2.0, "keys": ["self_attn.q_proj"]},
}
WORDS = (
    *(
        "LORA",
        "pissa",
        "olora",
        "loftq",
        "gaussian",
        "eva",
        "all",
        "lora_only",
        "dora",
        "full",
        "all-linear",
        "(a+)+",
        "a{1,}",
        "[",
        "\\1",
    ),
    *(
        "use_dora",
        "lora_bias",
        "alpha_pattern",
        "rank_pattern",
        "modules_to_save",
        "trainable_token_indices",
        "layer_replication",
    ),
    *(
        "F64",
        "F32",
        "F16",
        "BF16",
        "F8_E4M3",
        "I64",
        "BOOL",
        "dtype",
        "shape",
        "data_offsets",
        "__metadata__",
        MODULE,
        f"{KEY}A.weight",
    ),
    *(f"{KEY}B.bias", f"base_model.model.{MODULE}.weight", f"base_model.model.{MODULE}.base_layer.bias", "lm_head.weight"),
    *("base_model.model.model.embed_tokens.lora_embedding_A", "base_model.model.model.embed_tokens.trainable_tokens_delta"),
    *(
        f"base_model.model.{MODULE}.lora_magnitude_vector.weight",
        f"{KEY}A.default.weight",
        f"base_model.model.{MODULE}.modules_to_save.x.weight",
    ),
)


def build(bundle: Path, folder: Path) -> Harness:
    def use(raw: bytes) -> None:
        config, origin, weights = split_parts(raw, 3)
        (folder / CONFIG).write_bytes(config)
        (folder / PROVENANCE).unlink(missing_ok=True)
        if origin:
            (folder / PROVENANCE).write_bytes(origin)
        for name in (WEIGHTS, MLX_WEIGHTS):
            (folder / name).write_bytes(weights)
        read_all(Adapter.open(folder))

    return Harness(list_seeds(), mutate, use, limit=1 << 13)


def read_all(adapter: Adapter) -> None:
    """Reads what compose and export read. An error of edgelora's about one module keeps none of the others from being read."""
    _ = adapter.rank, adapter.ties_vocab, adapter.notes, adapter.vocab_size, adapter.sha256
    for module, (rows, columns, _) in adapter.shapes.items():
        if rows * columns > LARGEST:
            continue
        try:
            weight = np.ones((rows or 4, columns), np.float32) if adapter.why_not_low_rank(module) else None
            assert np.isfinite(adapter.dense(module, weight)).all(), f"{module} has a change that is not finite"
        except EdgeloraError:
            pass
    for module in adapter.biased:
        adapter.bias(module, None)


def list_seeds() -> list[bytes]:
    good, origin = json.dumps(GOOD).encode(), json.dumps(ORIGIN).encode()
    shape = np.ones((8, 8), np.float32)
    start = f"base_model.model.{MODULE}"
    full = {
        **{name: tensor.astype(np.float16) for name, tensor in tensors().items()},
        f"{start}.lora_magnitude_vector.weight": np.ones(8, np.float32),
        f"{KEY}B.bias": np.ones(8, np.float32),
        f"{start}.base_layer.bias": np.ones(8, np.float32),
        "base_model.model.lm_head.weight": shape,
        "base_model.model.model.embed_tokens.trainable_tokens_delta": np.ones((2, 8), np.float32),
    }
    embedding = {
        "base_model.model.model.embed_tokens.lora_embedding_A": np.ones((2, 8), np.float32),
        "base_model.model.model.embed_tokens.lora_embedding_B": np.ones((8, 2), np.float32),
    }
    mlx = {f"{MODULE}.lora_a": np.ones((8, 2), np.float32), f"{MODULE}.lora_b": np.ones((2, 8), np.float32)}
    return [
        join_parts(good, b"", save(tensors())),
        join_parts(good, origin, save(tensors())),
        join_parts(json.dumps(FULL).encode(), origin, save(full)),
        join_parts(good, b"", save(embedding)),
        join_parts(json.dumps(GOOD | {"init_lora_weights": "pissa"}).encode(), b"", save(tensors())),
        join_parts(json.dumps(MLX).encode(), b"", save(mlx)),
    ]


def mutate(raw: bytes, chance: Random) -> bytes:
    config, origin, weights = split_parts(raw, 3)
    match chance.randrange(7):
        case 0 | 1 | 2:
            config = mutate_json(config, chance, WORDS)
        case 3:
            origin = mutate_json(origin or b"{}", chance, WORDS)
        case _:
            weights = mutate_safetensors(weights, chance, lambda header: mutate_json(header, chance, WORDS))
    return join_parts(config, origin, weights)
