"""Which model each engine runs in a comparison with a bundle's variant: given ones, or those that the bundle leads to."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora_runtime.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edgelora_runtime import Bundle

OURS, GENAI, LLAMA_CPP = "edgelora", "onnxruntime-genai", "llama.cpp"
PACKAGES = {GENAI: "onnxruntime-genai", LLAMA_CPP: "llama-cpp-python"}  # on PyPI
_MODULES = {GENAI: "onnxruntime_genai", LLAMA_CPP: "llama_cpp"}
_GENAI_CONFIG, _GGUF = "genai_config.json", ".gguf"
_PROBE = "import importlib.util, sys; print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name)))"


@dataclass(frozen=True)
class PeerModel:
    """A model and the engine that runs it.

    path: a GGUF file, or a folder with genai_config.json. files: what the engine reads of it. options: the engine's own, as
    engines.py takes them. note: what it is to the variant that it is compared with.
    """

    engine: str
    path: Path
    files: tuple[Path, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def find_installed(python: str) -> set[str]:
    """Finds the peers whose packages an interpreter has. Raises UsageError for what is no interpreter."""
    try:
        command = [python, "-c", _PROBE, *_MODULES.values()]
        done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603  (the user names the interpreter)
    except OSError as error:
        raise UsageError(f"--peers-python {python} cannot be run ({error.strerror}); give a Python interpreter") from None
    if done.returncode != 0:
        raise UsageError(f"--peers-python {python} ends with status {done.returncode}; give a Python interpreter")
    found = done.stdout.split()
    return {engine for engine, module in _MODULES.items() if module in found}


def explain_absence(engine: str) -> str:
    """Returns what to do about a peer that is not installed."""
    return f"not installed; pip install {PACKAGES[engine]}, or give the interpreter that has it with --peers-python"


def find_models(bundle: Bundle, variant: str, given: Sequence[Path]) -> tuple[dict[str, PeerModel], dict[str, str]]:
    """Finds the models to compare a variant with, by the engine's name, or by that and the model's where an engine has several.

    given: paths that the user names. An engine without one runs what the bundle leads to: the variant's own graph in
    onnxruntime-genai, and the base's file in llama.cpp. Also returns what to do for engines that are left without a model.
    Raises InputError for a path that is no model.
    """
    models = [_read_model(path) for path in given]
    missing: dict[str, str] = {}
    for engine, find in ((GENAI, _find_same_graph), (LLAMA_CPP, _find_base_file)):
        if all(model.engine != engine for model in models):
            found = find(bundle, variant)
            if isinstance(found, PeerModel):
                models.append(found)
            else:
                missing[engine] = found
    engines = [model.engine for model in models]
    names = [
        model.engine if engines.count(model.engine) == 1 else f"{model.engine}, {model.path.resolve().name}" for model in models
    ]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two models are named {'; '.join(twice)}; give one of them, or rename it")
    return dict(zip(names, models, strict=True)), missing


def read_once(files: Iterable[Path]) -> None:
    """Reads files into the system's page cache, so that no engine's loading time depends on who read them last."""
    for path in files:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def list_files(path: Path) -> tuple[Path, ...]:
    """Lists the files of a model: itself, or those of its folder."""
    return (path,) if path.is_file() else tuple(each for each in sorted(path.iterdir()) if each.is_file())


def _read_model(path: Path) -> PeerModel:
    if path.is_file() and path.suffix.lower() == _GGUF:
        return PeerModel(LLAMA_CPP, path, (path,), note="given with --peer-model")
    if (path / _GENAI_CONFIG).is_file():
        return PeerModel(GENAI, path, list_files(path), note="given with --peer-model")
    absent = "is no model" if path.exists() else "does not exist"
    raise InputError(f"--peer-model {path} {absent}; give a {_GGUF} file, or a folder with {_GENAI_CONFIG}")


def _find_same_graph(bundle: Bundle, variant: str) -> PeerModel | str:
    """Finds the variant's own graph for onnxruntime-genai, which binds no factors and knows one tokenizer and vocabulary."""
    manifest, entry = bundle.manifest, bundle.manifest.variants[variant]
    instead = "give its model with --peer-model FOLDER"
    if not (bundle.folder / _GENAI_CONFIG).is_file():
        return f"the bundle has no {_GENAI_CONFIG} for it; {instead}"
    if entry.kind == "live":
        return f"it would run {variant} without its live adapters; {instead}"
    graph = entry.graphs["cpu"]
    if manifest.find_model(graph.file).vocab_size != manifest.model.vocab_size:
        return f"it cannot run {variant}, whose vocabulary is not the bundle's; {instead}"
    files = tuple(bundle.folder / name for name in sorted({graph.file, *graph.blobs}))
    return PeerModel(GENAI, bundle.folder, files, {"graph": graph.file}, f"the graph of {variant} itself")


def _find_base_file(bundle: Bundle, variant: str) -> PeerModel | str:  # noqa: ARG001  (the same for all variants)
    """Finds the GGUF file that a bundle was made from, by its name, beside the bundle and in the current folder."""
    name = bundle.manifest.base.name
    if not name.lower().endswith(_GGUF) or Path(name).name != name:
        return f"no model; give the base in its format with --peer-model FILE{_GGUF}"
    places = [bundle.folder.resolve().parent / name, Path.cwd() / name]
    if (path := next((each for each in places if each.is_file()), None)) is None:
        return f"no model; {name}, which the bundle was made from, is not beside it: give it with --peer-model"
    return PeerModel(LLAMA_CPP, path, (path,), note="the file that the bundle was made from, by its name, without adapters")
