"""Cached prompts on disk: a safetensors file of keys and values.

The file also holds the hashes of the graphs and adapters that they belong to.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from edgelora_runtime.bundle.choice import Choice
from edgelora_runtime.errors import InputError
from edgelora_runtime.residency.prompt_cache import SavedPrompt
from edgelora_runtime.residency.whole_file import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgelora_runtime.bundle.folder import Bundle
    from edgelora_runtime.bundle.manifest import Manifest
    from edgelora_runtime.session.kv_cache import Floats

_FORMAT = "edgelora prompts 1"


def write_prompts(path: Path, bundle: Bundle, prompts: Sequence[SavedPrompt]) -> int:
    """Writes prompts to a file atomically. Returns their number.

    Raises UsageError for a path that is no plain file, ResourceError if the file cannot be written. Tensors are
    {number}.{layer}.key and .value, (kv_heads, tokens, head_size). For each number, the metadata lists the SHA-256 of the graph
    (which names its weights by hash), the SHA-256 and weight of each live adapter, and the tokens. The metadata also holds a
    SHA-256 of all that, by which read_prompts() notices damage.
    """
    files = bundle.manifest.files
    entries = [
        {
            "graph": files[prompt.choice.graph].sha256,
            "live": None if prompt.choice.live is None else _hash_adapters(bundle.manifest, prompt.choice.live),
            "tokens": prompt.tokens,
        }
        for prompt in prompts
    ]
    tensors = {f"{number}.{name}": array for number, prompt in enumerate(prompts) for name, array in prompt.state.items()}
    said = json.dumps(entries)
    write_whole(path, save(tensors, {"format": _FORMAT, "prompts": said, "sha256": hash_prompts(said, tensors)}))
    return len(prompts)


def read_prompts(path: Path, bundle: Bundle, target: str) -> list[SavedPrompt]:
    """Reads the prompts of a file.

    Leaves out those whose graph or live adapters the bundle does not have, byte for byte. Raises InputError for another kind of
    file, for one that was damaged, and for keys and values that do not fit the model.
    """
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise InputError(f"{path} holds no cached prompts of this version; make it with Runtime.save_prompts()")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        if hash_prompts(metadata["prompts"], tensors) != metadata["sha256"]:
            raise InputError(f"{path} was damaged; make it again with Runtime.save_prompts()")
        entries = json.loads(metadata["prompts"])
        if not isinstance(entries, list):
            raise ValueError("its prompts are no list")
        found, names = [], _names(bundle.manifest)
        for number, entry in enumerate(entries):
            choice = _find_choice(bundle.manifest, target, entry)
            if choice is not None:
                state = {name: tensors[f"{number}.{name}"] for name in names}
                found.append(_check(SavedPrompt(choice, tuple(entry["tokens"]), state), bundle.manifest, target))
        return found
    except InputError:  # which is a ValueError, too
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a file of cached prompts ({error})") from error


def hash_prompts(entries: str, tensors: Mapping[str, Floats]) -> str:
    """Returns the SHA-256 of a file's prompts, as JSON, and of its tensors, in hex."""
    digest = hashlib.sha256(entries.encode())
    for name, array in sorted(tensors.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _names(manifest: Manifest) -> list[str]:
    return [f"{layer}.{kind}" for layer in range(manifest.model.layers) for kind in ("key", "value")]


def _hash_adapters(manifest: Manifest, live: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    return [(_adapter_hash(manifest, name), weight) for name, weight in live]


def _adapter_hash(manifest: Manifest, name: str) -> str:
    file = manifest.adapters[name].file
    assert file is not None  # it is an adapter of a live mix
    return manifest.files[file].sha256


def _find_choice(manifest: Manifest, target: str, entry: Mapping[str, Any]) -> Choice | None:
    """Returns the choice for the graph and adapters that an entry names by hash.

    Returns None if this bundle lacks any of them.
    """
    graphs = {variant.graphs[target].file: name for name, variant in reversed(manifest.variants.items())}
    graph = next((graph for graph in graphs if manifest.files[graph].sha256 == entry["graph"]), None)
    if graph is None:
        return None
    if entry["live"] is None:
        return Choice(graphs[graph], graph, None)
    names = {_adapter_hash(manifest, name): name for name, adapter in manifest.adapters.items() if adapter.file is not None}
    if any(digest not in names for digest, _ in entry["live"]):
        return None
    return Choice(graphs[graph], graph, tuple(sorted((names[digest], float(weight)) for digest, weight in entry["live"])))


def _check(prompt: SavedPrompt, manifest: Manifest, target: str) -> SavedPrompt:
    """Refuses a prompt that a KV cache of this model could not hold."""
    model, tokens = manifest.find_model(prompt.choice.graph), prompt.tokens
    shape, kind = (model.kv_heads, len(tokens), model.head_size), np.dtype(np.float32 if target == "cpu" else np.float16)
    if not 0 < len(tokens) <= model.context_length:
        raise ValueError(f"{len(tokens)} tokens in a context of {model.context_length}")
    if any(not isinstance(token, int) or not 0 <= token < model.vocab_size for token in tokens):
        raise ValueError(f"a token outside the vocabulary of {model.vocab_size}")
    if wrong := [name for name, array in prompt.state.items() if (array.shape, array.dtype) != (shape, kind)]:
        raise ValueError(f"{wrong[0]} is not {kind} of shape {shape}")
    if wrong := [name for name, array in prompt.state.items() if not np.isfinite(array).all()]:
        raise ValueError(f"{wrong[0]} holds NaN or infinity")
    return prompt
