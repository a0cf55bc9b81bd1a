"""Traces decoders that have no native graph: Optimum runs them in torch and records their computation."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgelora_export.architectures import native_types
from edgelora_export.traced.graph import BufferSizes, prepare_traced, read_sizes
from edgelora_export.weights.torch_model import first_line, load_model, quiet_libraries
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from edgelora_export.base.base import Base

    Floats = NDArray[np.float32]

_TASK = "text-generation-with-past"
_UNBOUNDED_CONTEXT = 2048  # tokens, for models that have no position table and state no length


@dataclass(frozen=True)
class TracedDecoder:
    """A decoder as Optimum traced it. Large tensors are mapped from a folder that lives as long as trace_decoder's block.

    modules: names of the linear layers and embeddings that hold a weight (N, K), by its digest. The graph names many of its
    tensors differently. embedding: the digest of the token embedding. linears: the names that are linear layers. context_length:
    in tokens.
    """

    graph: ir.Model
    modules: dict[str, list[str]]
    linears: frozenset[str]
    embedding: str
    architecture: str
    hidden_size: int
    sizes: BufferSizes
    context_length: int


@contextlib.contextmanager
def trace_decoder(base: Base, context_length: int | None = None) -> Iterator[TracedDecoder]:
    """Loads a base in float32 and traces it with Optimum, which takes the size of the model in memory and on disk.

    context_length: positions that the bundle can hold, None for the model's own.
    Raises InputError if Optimum is not installed, or does not know the model.
    """
    architecture = str(base.config.get("model_type"))
    if not _is_installed():
        raise InputError(
            f"model_type {architecture!r} has no native graph (these have one: {', '.join(native_types())}), and optimum, which "
            "exports other models, is not installed; run: pip install 'edgelora[optimum]', in an environment of its own, because "
            "it needs an older transformers than edgelora[train]"
        )
    with tempfile.TemporaryDirectory(prefix="edgelora-") as folder:
        with quiet_libraries():
            model = load_model(base)
            longest = _longest_context(model.config)
            if context_length is not None and not 0 < context_length <= longest:
                raise InputError(f"context_length = {context_length}: the model has positions 1 to {longest}")
            _write_graph(model, Path(folder), architecture)
            modules, linears = _digest_weights(model)
            embedding = digest(_to_numpy(model.get_input_embeddings().weight))
            hidden_size = int(model.config.hidden_size)
            del model
        graph = prepare_traced(ir.load(Path(folder) / "model.onnx"))
        yield TracedDecoder(
            graph,
            modules,
            linears,
            embedding,
            architecture,
            hidden_size,
            read_sizes(graph.graph, architecture),
            context_length or longest,
        )


def digest(weight: Floats) -> str:
    """Hashes a matrix by its shape and content."""
    values = np.ascontiguousarray(weight, np.float32)
    return hashlib.sha256(f"{values.shape}".encode() + values.tobytes()).hexdigest()


def _is_installed() -> bool:
    try:
        return find_spec("optimum.exporters.onnx") is not None
    except ModuleNotFoundError:
        return False


def _write_graph(model: Any, folder: Path, architecture: str) -> None:
    try:
        from optimum.exporters.onnx import onnx_export_from_model

        # Post-processing only merges tied weights, and blobs share equal weights anyway.
        onnx_export_from_model(model, folder, task=_TASK, do_validation=False, no_post_process=True)
    except Exception as error:  # Optimum lets the errors of torch, onnx and its registries through
        raise InputError(f"Optimum cannot export model_type {architecture!r} as {_TASK} ({first_line(error)})") from error


def _digest_weights(model: Any) -> tuple[dict[str, list[str]], frozenset[str]]:
    """Finds the modules that hold each matrix, and the names that are linear layers. See TracedDecoder."""
    import torch
    from transformers.pytorch_utils import Conv1D

    modules: dict[str, list[str]] = {}
    linears = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding | Conv1D):
            weight = _to_numpy(module.weight)
            # Conv1D, GPT-2's linear layer, holds its weight as (K, N).
            modules.setdefault(digest(weight.T if isinstance(module, Conv1D) else weight), []).append(name)
            if not isinstance(module, torch.nn.Embedding):
                linears.add(name)
    return modules, frozenset(linears)


def _to_numpy(parameter: Any) -> Floats:
    values: Floats = parameter.detach().numpy()
    return values


def _longest_context(config: Any) -> int:
    for key in ("max_position_embeddings", "n_positions", "seq_length"):
        if isinstance(length := getattr(config, key, None), int):
            return length
    return _UNBOUNDED_CONTEXT
