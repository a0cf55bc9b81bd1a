"""Providers by name: a missing one names what to install, and "auto" makes a choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnxruntime as ort
import pytest
from onnx import parser, save

from edgelora_runtime import Runtime
from edgelora_runtime.bundle.manifest import ModelEntry
from edgelora_runtime.errors import IntegrityError, UsageError
from edgelora_runtime.session.model import Model
from edgelora_runtime.session.providers import CPU, find_provider

if TYPE_CHECKING:
    from pathlib import Path

NO_CUDA = "CUDAExecutionProvider" not in ort.get_available_providers()
NO_WEBGPU = "WebGpuExecutionProvider" not in ort.get_available_providers()


@pytest.mark.skipif(not NO_CUDA, reason="onnxruntime-gpu is installed")
def test_a_missing_cuda_says_what_to_install() -> None:
    with pytest.raises(UsageError, match=r"pip install 'onnxruntime-gpu\[cuda,cudnn\]'"):
        find_provider("cuda", architecture="llama", gpu_graphs=True)


@pytest.mark.skipif(not NO_WEBGPU, reason="onnxruntime-webgpu is installed")
def test_a_missing_webgpu_says_what_to_install() -> None:
    with pytest.raises(UsageError, match="onnxruntime-ep-webgpu"):
        find_provider("webgpu", architecture="llama", gpu_graphs=True)


def test_webgpu_is_refused_for_what_it_computes_wrongly() -> None:
    with pytest.raises(UsageError, match="leaves out the soft cap of gemma2's attention"):
        find_provider("webgpu", architecture="gemma2", gpu_graphs=True)


def test_auto_needs_graphs_for_a_gpu() -> None:
    assert find_provider("auto", architecture="llama", gpu_graphs=False) == CPU


@pytest.mark.skipif(not (NO_CUDA and NO_WEBGPU), reason="there may be a GPU")
def test_auto_without_a_gpu_is_the_cpu() -> None:
    assert find_provider("auto", architecture="llama", gpu_graphs=True) == CPU


def test_a_bundle_without_gpu_graphs(bundle32: Path) -> None:
    with pytest.raises(UsageError, match=r'no gpu graphs; export it with targets = \["cpu", "gpu"\]'):
        Runtime(bundle32, provider="cpu", target="gpu")
    with Runtime(bundle32) as runtime:
        assert runtime.provider == "cpu"


def test_a_provider_that_this_machine_lacks_is_named(tmp_path: Path) -> None:
    """onnxruntime alone would silently fall back to the CPU."""
    graph = write_graph(tmp_path, "float")
    absent = next(name for name in ort.get_all_providers() if name not in ort.get_available_providers())
    provider = type(CPU)("other", "cpu", absent, "cpu")
    with pytest.warns(UserWarning, match=absent), pytest.raises(UsageError, match="provider 'other' does not start here"):
        Model.open(graph, ENTRY, threads=1, provider=provider)


@pytest.mark.parametrize("kind", ["float", "float16"])
def test_the_cache_has_the_type_of_the_graph(kind: str, tmp_path: Path) -> None:
    model = Model.open(write_graph(tmp_path, kind), ENTRY, threads=1)
    assert str(model.float_type) == {"float": "float32", "float16": "float16"}[kind]


def test_a_cache_of_another_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"KV cache of tensor\(double\); it should be float32 or float16"):
        Model.open(write_graph(tmp_path, "double"), ENTRY, threads=1)


ENTRY = ModelEntry("hand-made", 8, 1, 2, 4, 300, 64)


def write_graph(folder: Path, kind: str) -> Path:
    """A graph with a decoder's inputs and outputs and a cache of some type; its logits are zeros."""
    model = parser.parse_model(f"""
<ir_version: 10, opset_import: ["": 18]>
decoder (int64[1, S] input_ids, int64[1, T] attention_mask, int64[1] logits_to_keep,
         {kind}[1, 2, M, 4] past_key_values_0_key, {kind}[1, 2, M, 4] past_key_values_0_value)
     => (float[1, kept, 300] logits, {kind}[1, 2, M, 4] present_0_key, {kind}[1, 2, M, 4] present_0_value)
<int64[1] logits_to_keep = {{0}}, float zero = {{0.0}}, int64[1] width = {{300}}>
{{
    read = Shape (input_ids)
    shape = Concat <axis = 0> (read, width)
    logits = Expand (zero, shape)
    present_0_key = Identity (past_key_values_0_key)
    present_0_value = Identity (past_key_values_0_value)
}}
""")
    for value in (*model.graph.input, *model.graph.output):
        value.name = dotted(value.name)
    for node in model.graph.node:
        node.input[:] = [dotted(name) for name in node.input]
        node.output[:] = [dotted(name) for name in node.output]
    save(model, folder / "graph.onnx")
    return folder / "graph.onnx"


def dotted(name: str) -> str:
    """Adds dots to names, which the text format of graphs does not allow."""
    return name.replace("_0_", ".0.")
