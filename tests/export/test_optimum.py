"""Decoders without a native graph, exported by the `optimum` extra in an environment of its own and run by this one's runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers

from edgelora_runtime import Bundle, Runtime
from edgelora_runtime.model import Model
from tests.tiny import make_tokenizer, random_tokens, torch_logits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 2e-3
GRAPH_LIMIT = 1 << 20  # bytes

COMMON = {"vocab_size": 300, "initializer_range": 0.15, "init_std": 0.15, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
NEOX = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
NEOX["max_position_embeddings"] = 256
OPT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 64}
OPT["max_position_embeddings"] = 256
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "opt": ("OPT", OPT),
    "opt, projected embedding": ("OPT", {**OPT, "word_embed_proj_dim": 48, "do_layer_norm_before": False}),
    "bloom": ("Bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("GPTNeoX", NEOX),
    "gpt_neox, parallel off, tied": ("GPTNeoX", {**NEOX, "use_parallel_residual": False, "tie_word_embeddings": True}),
}


def optimum_python() -> Path:
    """The interpreter of the environment that `make test-optimum` sets up."""
    folder = ROOT / ".venv-optimum" / ("Scripts" if sys.platform == "win32" else "bin")
    python = Path(os.environ.get("EDGELORA_OPTIMUM_PYTHON") or folder / "python")
    if not python.exists():
        pytest.skip("no environment with edgelora[optimum]; run: make test-optimum")
    return python


def run_export(recipe: Path, output: Path) -> dict[str, Any]:
    """What `edgelora export --json` prints in the other environment."""
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    command = [optimum_python(), "-m", "edgelora", "export", recipe, "--output", output, "--json"]
    environment = {**os.environ, "PYTHONPATH": path, "EDGELORA_DEBUG": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return {**printed, "code": done.returncode}


def export_variants(base: Path, variants: str = "[variants.base]\nmix = {}\n", *, head: str = "", bits: int = 4) -> Path:
    """A bundle beside the base."""
    recipe, output = base.parent / f"recipe{bits}.toml", base.parent / f"bundle{bits}"
    recipe.write_text(f'base = "{base.name}"\n[quantization]\nbits = {bits}\n{head}{variants}', encoding="utf-8")
    printed = run_export(recipe, output)
    assert printed["code"] == 0, printed
    return output


def make_base(folder: Path, kind: str, settings: dict[str, Any]) -> Any:
    """Saves a random model with its tokenizer, and returns it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **settings})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():  # transformers starts biases at 0 and norms at 1, which would hide their absence
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
            elif "norm" in name or "ln_" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def read_stepwise(bundle: Path, tokens: list[int], prefix: int) -> Floats:
    """Logits (T - prefix + 1, V), all but a prefix read token by token through the growing cache."""
    opened = Bundle.open(bundle)
    model = Model(bundle / "base.cpu.onnx", opened.manifest.model, threads=1)
    cache = model.new_cache()
    rows = [model.read(cache, tokens[:prefix])[0].copy()]
    rows += [model.read(cache, [token])[0].copy() for token in tokens[prefix:]]
    return np.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), MODELS.values(), ids=MODELS.keys())
def test_export_gives_transformers_logits(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = make_base(tmp_path / "base", kind, settings)
    tokens = random_tokens(40)
    expected = torch_logits(theirs, tokens)
    assert expected.std() > 0.1, "logits that hardly differ would make any comparison pass"
    float32 = export_variants(tmp_path / "base", bits=32)
    with Runtime(float32, threads=1) as runtime:
        assert np.abs(runtime.logits(tokens) - expected).max() <= TOLERANCE
        assert np.abs(runtime.logits(tokens[:1]) - expected[:1]).max() <= TOLERANCE
    assert np.abs(read_stepwise(float32, tokens, 5) - expected[4:]).max() <= TOLERANCE
