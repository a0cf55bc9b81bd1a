"""Other programs can open bundles, and generate the same greedy tokens as our runtime."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import onnx
import pytest

from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora_export.plan.variants import Quantization
from edgelora_runtime import Runtime
from tests.environments import peer_python, run_peer
from tests.export.architectures.test_architectures import SHAPES, make
from tests.tiny import export_base, make_adapter, make_base

if TYPE_CHECKING:
    from pathlib import Path

GENAI = ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0")
OPTIMUM = ("torch==2.13.0", "transformers==4.57.6", "onnxruntime==1.32.0", "optimum-onnx==0.1.0")
PROMPTS = ("the cat", "a day in the sun, and", "one")
COUNT = 24

# Opens the folder with its config, or with another graph's name in place of the config's.
GENAI_SCRIPT = """
import json, sys
import onnxruntime_genai as og
request = json.load(sys.stdin)
config = og.Config(request["folder"])
if request["graph"]:
    config.overlay(json.dumps({"model": {"decoder": {"filename": request["graph"]}}}))
model = og.Model(config)
written = []
for prompt in request["prompts"]:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + request["count"], do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    written.append([int(token) for token in generator.get_sequence(0)[len(prompt):]])
print(json.dumps(written))
"""

# Passes only the graph's name. generate() uses Optimum's own KV cache.
OPTIMUM_SCRIPT = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM
request = json.load(sys.stdin)
model = ORTModelForCausalLM.from_pretrained(request["folder"], file_name=request["graph"], local_files_only=True)
assert model.use_cache
written = []
for prompt in request["prompts"]:
    ids = torch.tensor([prompt])
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=request["count"], do_sample=False)
    written.append(whole[0, len(prompt):].tolist())
print(json.dumps(written))
"""


def export_two(base: Path, adapter: Path, output: Path) -> Path:
    variants = {"base": VariantRecipe({}), "tuned": VariantRecipe({"a": 1.0})}
    export(Recipe(str(base), {"a": adapter}, variants, Quantization(bits=4)), output)
    return output


def our_tokens(bundle: Path, variant: str) -> tuple[list[list[int]], list[list[int]]]:
    """Returns the encoded prompts, and the tokens that our runtime generates after each."""
    with Runtime(bundle, threads=1) as runtime:
        prompts = [runtime.encode(prompt) for prompt in PROMPTS]
        written = [list(runtime.generate(ids, variant=variant, max_tokens=COUNT, temperature=0.0).tokens) for ids in prompts]
    return prompts, written


def until_end(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    return next((tokens[:place] for place, token in enumerate(tokens) if token in ends), tokens)


def check_peer(bundle: Path, python: Path, script: str, graphs: dict[str, str | None]) -> None:
    """Checks that a peer generates our tokens. graphs: the graph that the peer opens, per variant."""
    ends = tuple(json.loads((bundle / "bundle.json").read_bytes())["model"]["eos_token_ids"])
    seen = []
    for variant, graph in graphs.items():
        prompts, ours = our_tokens(bundle, variant)
        request = {"folder": str(bundle), "graph": graph, "prompts": prompts, "count": COUNT}
        theirs = [until_end(tokens, ends) for tokens in run_peer(python, script, request)]
        assert theirs == ours
        seen.append(ours)
    assert seen[0] != seen[1], "the adapter should matter"


def check_genai(bundle: Path) -> None:
    check_peer(bundle, peer_python("genai", GENAI), GENAI_SCRIPT, {"base": None, "tuned": "tuned.cpu.onnx"})


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True, "head_dim": 20}], ids=["plain", "tied, padded heads"])
@pytest.mark.slow
def test_onnxruntime_genai_writes_our_tokens(shape: dict[str, Any], tmp_path: Path) -> None:
    make_base(tmp_path / "base", **shape)
    make_adapter(tmp_path / "base", tmp_path / "adapter", size=0.2)
    check_genai(export_two(tmp_path / "base", tmp_path / "adapter", tmp_path / "bundle"))


@pytest.mark.slow
def test_onnxruntime_genai_writes_our_tokens_on_a_real_base(models_folder: Path, tmp_path: Path) -> None:
    make_adapter(models_folder / "pocket", tmp_path / "adapter")
    check_genai(export_two(models_folder / "pocket", tmp_path / "adapter", tmp_path / "bundle"))


@pytest.mark.parametrize("name", [name for name in SHAPES if "," not in name])
@pytest.mark.slow
def test_onnxruntime_genai_knows_every_architecture(name: str, tmp_path: Path) -> None:
    config_class, settings = SHAPES[name]
    make(tmp_path / "base", config_class, settings)
    bundle = tmp_path / "bundle"
    export_base(tmp_path / "base", bundle)
    prompts, ours = our_tokens(bundle, "base")
    request = {"folder": str(bundle), "graph": None, "prompts": prompts, "count": COUNT}
    assert [until_end(tokens, (1,)) for tokens in run_peer(peer_python("genai", GENAI), GENAI_SCRIPT, request)] == ours


@pytest.mark.slow
def test_optimum_writes_our_tokens(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "base", tmp_path / "adapter", size=0.2)
    bundle = export_two(tmp_path / "base", tmp_path / "adapter", tmp_path / "bundle")
    graphs: dict[str, str | None] = {"base": "base.cpu.onnx", "tuned": "tuned.cpu.onnx"}
    check_peer(bundle, peer_python("optimum", OPTIMUM), OPTIMUM_SCRIPT, graphs)


def test_genai_config_names_what_the_graph_has(bundle4: Path) -> None:
    config = json.loads((bundle4 / "genai_config.json").read_bytes())
    decoder = config["model"]["decoder"]
    graph = onnx.load(bundle4 / decoder["filename"], load_external_data=False).graph
    names = {key: {value.name: value for value in getattr(graph, key[:-1])} for key in ("inputs", "outputs")}
    for key in ("inputs", "outputs"):
        formats = decoder[key].values()
        named = {form % index if "%d" in form else form for form in formats for index in range(decoder["num_hidden_layers"])}
        assert named == names[key].keys() - {"logits_to_keep", "hidden_states"}  # neither need be known
    cache = names["inputs"]["past_key_values.0.key"].type.tensor_type.shape.dim
    assert (cache[1].dim_value, cache[3].dim_value) == (decoder["num_key_value_heads"], decoder["head_size"])
    model = config["model"]
    assert (model["type"], model["vocab_size"], model["bos_token_id"], model["eos_token_id"]) == ("llama", 300, 0, [1])
    assert "genai_config.json" in json.loads((bundle4 / "bundle.json").read_bytes())["files"]


def test_no_genai_config_where_the_default_is_live(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    """onnxruntime-genai would open the bundle and silently run the bare base."""
    variants = {"alive": VariantRecipe({"a": 1.0}, kind="live"), "base": VariantRecipe({})}
    export(Recipe(str(tiny_base), {"a": tiny_adapters["plain"]}, variants, Quantization(bits=32)), tmp_path / "bundle")
    assert not (tmp_path / "bundle" / "genai_config.json").exists()
