"""Decoders without a native graph: exported in the `optimum` extra's own environment, run by the runtime in this one."""

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

from edgelora.exporting.export import export
from edgelora.in_torch.train import _round_to_int4, train
from edgelora.in_torch.train_config import TrainConfig
from edgelora_export.quantize.int4 import quantize_rtn
from edgelora_runtime import Bundle, InputError, Runtime
from edgelora_runtime.session.model import Model
from tests.tiny import make_tokenizer, random_tokens, torch_logits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

ROOT = Path(__file__).resolve().parents[3]
TOLERANCE = 1e-4
GRAPH_LIMIT = 1 << 20  # bytes

COMMON = {"vocab_size": 300, "initializer_range": 0.15, "init_std": 0.15, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
NEOX = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
NEOX["max_position_embeddings"] = 256
OPT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 64}
OPT["max_position_embeddings"] = 256
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (transformers.GPT2Config, GPT2),
    "opt": (transformers.OPTConfig, OPT),
    "opt, projected embedding": (transformers.OPTConfig, {**OPT, "word_embed_proj_dim": 48, "do_layer_norm_before": False}),
    "bloom": (transformers.BloomConfig, {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "gpt_neox": (transformers.GPTNeoXConfig, NEOX),
    "gpt_neox, parallel off, tied": (
        transformers.GPTNeoXConfig,
        {**NEOX, "use_parallel_residual": False, "tie_word_embeddings": True},
    ),
}


def optimum_python() -> Path:
    """The interpreter of the environment that `make test-optimum` sets up."""
    folder = ROOT / ".venv-optimum" / ("Scripts" if sys.platform == "win32" else "bin")
    python = Path(os.environ.get("EDGELORA_OPTIMUM_PYTHON") or folder / "python")
    if not python.exists():
        pytest.skip("no environment with edgelora[optimum]; run: make test-optimum")
    return python


def run_export(recipe: Path, output: Path) -> dict[str, Any]:
    """The output of `edgelora export --json` in the other environment, with the exit code."""
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    command = [str(optimum_python()), "-m", "edgelora", "export", str(recipe), "--output", str(output), "--json"]
    environment = {**os.environ, "PYTHONPATH": path, "EDGELORA_DEBUG": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return {**printed, "code": done.returncode}


def write_recipe(base: Path, tables: str = "", *, bits: int = 4) -> Path:
    """Writes a recipe beside the base, with the bare base as a variant."""
    recipe = base.parent / f"recipe{bits}.toml"
    text = f'base = "{base.name}"\n[quantization]\nbits = {bits}\n[variants.base]\nmix = {{}}\n{tables}'
    recipe.write_text(text, encoding="utf-8")
    return recipe


def export_bundle(base: Path, tables: str = "", *, bits: int = 4) -> Path:
    """Exports a bundle beside the base, in the other environment."""
    recipe, output = write_recipe(base, tables, bits=bits), base.parent / f"bundle{bits}"
    printed = run_export(recipe, output)
    assert printed["code"] == 0, printed
    return output


def make_base(folder: Path, kind: Any, settings: dict[str, Any]) -> Any:
    """Saves a random model with its tokenizer; returns the model."""
    torch.manual_seed(0)
    untyped: Any = transformers.AutoModelForCausalLM
    model = untyped.from_config(kind(**{**COMMON, **settings}), dtype=torch.float32).eval()
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
    """Logits (T - prefix + 1, V): the prefix is read at once, the rest token by token through the growing cache."""
    opened = Bundle.open(bundle)
    model = Model.open(bundle / "base.cpu.onnx", opened.manifest.model, threads=1)
    cache = model.new_cache()
    rows = [model.read(cache, tokens[:prefix])[0].copy()]
    rows += [model.read(cache, [token])[0].copy() for token in tokens[prefix:]]
    return np.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), MODELS.values(), ids=MODELS.keys())
def test_export_gives_transformers_logits(kind: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = make_base(tmp_path / "base", kind, settings)
    tokens = random_tokens(40)
    expected = torch_logits(theirs, tokens)
    assert expected.std() > 0.1, "logits that hardly differ would make any comparison pass"
    float32 = export_bundle(tmp_path / "base", bits=32)
    with Runtime(float32, threads=1) as runtime:
        assert np.abs(runtime.logits(tokens) - expected).max() <= TOLERANCE
        assert np.abs(runtime.logits(tokens[:1]) - expected[:1]).max() <= TOLERANCE
    assert np.abs(read_stepwise(float32, tokens, 5) - expected[4:]).max() <= TOLERANCE


def round_weights(model: Any) -> None:
    """Rounds a torch model's linear weights and token embedding to the int4 grid, in place."""
    embedding = model.get_input_embeddings()
    transposed = transformers.pytorch_utils.Conv1D
    with torch.no_grad():
        for module in {id(m.weight): m for m in model.modules() if hasattr(m, "weight")}.values():
            if module is embedding or isinstance(module, torch.nn.Linear | transposed):
                weight = module.weight.T if isinstance(module, transposed) else module.weight
                weight.copy_(torch.from_numpy(quantize_rtn(weight.numpy().copy()).dequantize()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "gpt_neox"])
def test_int4_export_gives_the_logits_of_the_rounded_weights(name: str, tmp_path: Path) -> None:
    theirs = make_base(tmp_path / "base", *MODELS[name])
    tokens = random_tokens(40)
    exact = torch_logits(theirs, tokens)
    round_weights(theirs)
    expected = torch_logits(theirs, tokens)
    bundle = export_bundle(tmp_path / "base")
    with Runtime(bundle, threads=1) as runtime:
        found = runtime.logits(tokens)
        assert runtime.generate("the cat", max_tokens=5).tokens
    # The rounding of activations to int8 remains.
    assert np.abs(found - expected).mean() < 0.03 * expected.std()
    assert np.abs(found - expected).mean() < 0.2 * np.abs(exact - expected).mean()
    assert (bundle / "base.cpu.onnx").stat().st_size < GRAPH_LIMIT


def test_training_on_int4_rounds_transposed_layers_as_export_does(tmp_path: Path) -> None:
    ours, expected = (make_base(tmp_path / "base", *MODELS["gpt2"]) for _ in range(2))
    _round_to_int4(ours)
    round_weights(expected)
    for (name, found), (_, wanted) in zip(ours.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(found, wanted), name


ANSWERS = {"the cat": " sat on the mat", "a day": " in the sun", "one two": " three four", "and the": " moon"}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny GPT-2, and an adapter trained on four answers, over the int4 grid that export writes."""
    folder = tmp_path_factory.mktemp("gpt2")
    make_base(folder / "base", *MODELS["gpt2"])
    data = folder / "rows.jsonl"
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in ANSWERS.items()]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    config = TrainConfig(str(folder / "base"), data, folder / "adapter", quant="int4", lr=5e-3, max_steps=120, batch_size=4)
    assert train(config).train_loss < 1.5
    return folder / "base", folder / "adapter"


@pytest.mark.slow
def test_gpt2_adapter_is_trained_exported_and_answers(taught: tuple[Path, Path]) -> None:
    base, adapter = taught
    tables = f'[variants.taught]\nmix = {{ a = 1.0 }}\n[variants.half]\nmix = {{ a = 0.5 }}\n[adapters]\na = "{adapter.name}"\n'
    bundle = export_bundle(base, tables)
    with Runtime(bundle, threads=1) as runtime:
        for prompt, answer in ANSWERS.items():
            found = runtime.generate(prompt, variant="taught", max_tokens=20)
            assert (found.text, found.finish_reason) == (answer, "stop")
            assert runtime.generate(prompt, variant="base", max_tokens=20).text != answer
    manifest = Bundle.open(bundle).manifest
    base_blobs, taught_blobs = (set(manifest.variants[name].graphs["cpu"].blobs) for name in ("base", "taught"))
    assert len(base_blobs & taught_blobs) == 2  # the embedding, which is also the head; norms, biases and positions


@pytest.mark.slow
def test_float32_export_of_a_gpt2_adapter_gives_pefts_logits(taught: tuple[Path, Path]) -> None:
    from peft import PeftModel

    base, adapter = taught
    bundle = export_bundle(base, f'[variants.taught]\nmix = {{ a = 1.0 }}\n[adapters]\na = "{adapter.name}"\n', bits=32)
    model: Any = transformers.AutoModelForCausalLM
    theirs = PeftModel.from_pretrained(model.from_pretrained(base, dtype=torch.float32), str(adapter)).eval()
    tokens = random_tokens(30, seed=4)
    with Runtime(bundle, threads=1) as runtime:
        assert np.abs(runtime.logits(tokens, variant="taught") - torch_logits(theirs, tokens)).max() <= TOLERANCE
        assert np.abs(runtime.logits(tokens, variant="base") - torch_logits(theirs, tokens)).max() > 0.1


@pytest.mark.slow
def test_what_optimum_does_not_know_is_refused_in_one_line(tmp_path: Path) -> None:
    make_base(tmp_path / "base", *MODELS["gpt2"])
    config = json.loads((tmp_path / "base" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "model_type": "abacus"}), encoding="utf-8")
    printed = run_export(write_recipe(tmp_path / "base"), tmp_path / "bundle")
    assert printed["code"] == 3
    assert "'abacus' is no language model that transformers" in printed["error"]
    assert not (tmp_path / "bundle").exists()


def test_without_optimum_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optimum", None)
    make_base(tmp_path / "base", *MODELS["gpt2"])
    with pytest.raises(
        InputError, match=r"model_type 'gpt2' .*optimum.* is not installed; run: pip install 'edgelora\[optimum\]'"
    ):
        export(write_recipe(tmp_path / "base"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_live_variants_are_refused_before_anything_is_traced(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = make_base(tmp_path / "base", *MODELS["gpt2"])
    lora = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(str(tmp_path / "adapter"))
    recipe = write_recipe(tmp_path / "base", '[variants.now]\nmix = { a = 1.0 }\nkind = "live"\n[adapters]\na = "adapter"\n')
    with pytest.raises(InputError, match=r"variants now are live: .* use kind = 'merged'"):
        export(recipe, tmp_path / "bundle")
