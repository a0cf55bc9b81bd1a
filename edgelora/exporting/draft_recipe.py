"""`edgelora init`: finds the adapters below a folder and their base, and drafts a recipe with comments."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.formatting import name_path
from edgelora_runtime.bundle.manifest import MANIFEST, check_variant_name
from edgelora_runtime.errors import EdgeloraError, InputError, make_printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from edgelora.adapters.folder import Adapter

DEPTH = 3  # folders below the first that are looked into
_CONFIG, _ADAPTER_CONFIG = "config.json", "adapter_config.json"
_BARE, _MIXED, _LIVE = "base", "mixed", "all-live"  # variants beside those of single adapters
_IGNORED = {"node_modules", "__pycache__", "venv", "site-packages"}


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter below the folder.

    path: relative to the recipe. base: what it says of its base, None if it says nothing. summary: one line about it.
    """

    name: str
    path: str
    base: str | None
    summary: str


@dataclass(frozen=True)
class Draft:
    """A drafted recipe.

    base: None if nothing tells. left_out: adapters of other bases, which a recipe of this base cannot hold. notes: what was
    found and cannot be used, and what to fill in.
    """

    text: str
    base: str | None
    adapters: tuple[FoundAdapter, ...]
    left_out: tuple[FoundAdapter, ...]
    notes: tuple[str, ...]


def draft_recipe(folder: Path, recipe: Path) -> Draft:
    """Drafts a recipe of the adapters below a folder.

    recipe: the file that it is for; its paths are relative to that file's folder. The base is the one that most adapters name, or
    else the only model below the folder. Raises InputError if there is no adapter.
    """
    found, models, notes = _look_into(folder, recipe.parent)
    if not found:
        raise InputError(
            f"no adapter in {folder.resolve()} or {DEPTH} folders below; train one with edgelora train, or go to where they are"
            + (f" ({'; '.join(notes)})" if notes else "")
        )
    said = Counter(adapter.base for adapter in found if adapter.base is not None)
    base = said.most_common(1)[0][0] if said else None
    if base is None and len(models) == 1:
        base = models[0]
        notes.append(f"no adapter names its base; {base} is the only model here, so it is taken")
    kept = tuple(adapter for adapter in found if adapter.base in (None, base))
    left_out = tuple(adapter for adapter in found if adapter not in kept)
    if base is None:
        notes.append("no adapter names its base; fill it in" + (f": {' or '.join(models)}" if models else ""))
    notes += [f"{adapter.name} is left out, as its base is {make_printable(str(adapter.base))}" for adapter in left_out]
    return Draft(_write_text(base, kept, left_out), base, kept, left_out, tuple(notes))


def _look_into(folder: Path, origin: Path) -> tuple[list[FoundAdapter], list[str], list[str]]:
    """Returns the adapters and the models below a folder, and a note for each that cannot be used."""
    found: dict[str, FoundAdapter] = {}
    models: list[str] = []
    notes: list[str] = []
    for path in _list_places(folder, DEPTH):
        shown = _show_path(path, origin)
        if _is_model(path):
            models.append(shown)
            continue
        try:
            adapter = _open_adapter(path)
        except EdgeloraError as error:
            notes.append(f"{shown} is left out: {error}")
            continue
        name = _name(path, found)
        found[name] = FoundAdapter(name, shown, _find_base(adapter, origin), _summarize(adapter))
    return [*found.values()], models, notes


def _list_places(folder: Path, depth: int) -> Iterator[Path]:
    """Lists what may be an adapter or a model: folders with a config, and GGUF files. Looks into no bundle and no adapter."""
    try:
        children = sorted(folder.iterdir())
    except OSError:
        return
    names = {child.name for child in children}
    if MANIFEST in names:
        return
    if names & {_CONFIG, _ADAPTER_CONFIG}:
        yield folder
        return
    for child in children:
        if child.suffix == ".gguf" and child.is_file():
            yield child
        elif depth and not child.is_symlink() and child.is_dir() and child.name[0] != "." and child.name not in _IGNORED:
            yield from _list_places(child, depth - 1)


def _is_model(path: Path) -> bool:
    if path.is_dir():
        return not (path / _ADAPTER_CONFIG).is_file()
    from edgelora_export.base.gguf.header import read_header

    try:
        return str(read_header(path).metadata.get("general.type", "model")) == "model"
    except InputError:
        return False  # opening it as an adapter says what is wrong


def _open_adapter(path: Path) -> Adapter:
    from edgelora.adapters.folder import Adapter

    return Adapter.open(path)


def _find_base(adapter: Adapter, origin: Path) -> str | None:
    """Returns the base that an adapter's config names, or else its edgelora.json."""
    said = adapter.config.get("base_model_name_or_path")
    if not isinstance(said, str) or not said:
        said = adapter.provenance.base_name if adapter.provenance is not None else None
    if not said or not said.isprintable():
        return None
    return _show_path(Path(said), origin) if Path(said).exists() else said


def _summarize(adapter: Adapter) -> str:
    held = f", trained on {adapter.trained_on}" if adapter.trained_on else ""
    return f"{adapter.source.form}, rank {adapter.rank}{held}"


def _name(path: Path, taken: Mapping[str, FoundAdapter]) -> str:
    """A name that a recipe can hold: the path's last part, with the part before it or a number if that name is taken."""
    name = name_path(path)
    if check_variant_name(name):
        name = f"adapter-{name}"[:64].rstrip("-.")
    used = {*taken, _BARE, _MIXED, _LIVE}
    if name in used:
        name = f"{name_path(path.resolve().parent)}-{name}"[:60].lstrip("-")
    return next(each for each in (name, *(f"{name}-{number}" for number in range(2, 1000))) if each not in used)


def _show_path(path: Path, origin: Path) -> str:
    """A path as the recipe gives it: relative to the recipe if it lies below, otherwise absolute."""
    absolute, start = path.resolve(), origin.resolve()
    return absolute.relative_to(start).as_posix() if absolute.is_relative_to(start) else os.fspath(absolute)


def _write_text(base: str | None, adapters: tuple[FoundAdapter, ...], left_out: tuple[FoundAdapter, ...]) -> str:
    from edgelora_export.bundle.gate import POLICIES, Gate
    from edgelora_export.plan.variants import Quantization

    grid, gate = Quantization(), Gate()
    names = [adapter.name for adapter in adapters]
    lines = [
        "# A recipe: edgelora export compiles it into a bundle. Paths are relative to this file.",
        "",
        f"base = {_quote(base)}" if base else 'base = "fill this in: a folder, a GGUF file or a hub id"',
        f"# default = {_quote(names[0])}  # the variant that a runtime starts with; the first one below if left out",
        '# merge_base = "auto"  # what mixes are merged into: "float", "trained" (as training held it), or the better one',
        "",
        "[adapters]",
        *(f"{_key(adapter.name)} = {_quote(adapter.path)}  # {make_printable(adapter.summary)}" for adapter in adapters),
        *(f"# {_key(each.name)} = {_quote(each.path)}  # of another base, {make_printable(str(each.base))}" for each in left_out),
        "",
        "[quantization]",
        f"bits = {grid.bits}  # or 8, or 32 for float32",
        f"block_size = {grid.block_size}  # weights that share a scale",
        f'method = "{grid.method}"  # or "rtn": rounding to nearest, which is faster and less exact',
        "",
        "[gate]  # each variant must keep what its adapters do",
        f'policy = "{gate.policy}"  # one of {", ".join(POLICIES)}',
        f"retention = {gate.retention}  # the least share of the adapters' effect that must survive",
        f"answers = {gate.answers}  # the least share of the answers that the adapters write that must stay the same",
        "",
        f"[variants.{_BARE}]  # the bare base",
        "mix = {}",
    ]
    for name in names:
        lines += ["", f"[variants.{_key(name)}]", f"mix = {{ {_key(name)} = 1.0 }}"]
    if len(names) > 1:
        mix = ", ".join(f"{_key(name)} = {round(1 / len(names), 2)}" for name in names)
        lines += ["", "# A mix of all; edgelora compose report says whether they go together.", f"# [variants.{_MIXED}]"]
        lines += [f"# mix = {{ {mix} }}", '# method = "ties"', "# density = 0.3"]
    lines += [
        "",
        "# Weights that a request chooses: A and B stay apart from the base, which costs some speed.",
        f"# [variants.{_LIVE}]",
    ]
    lines += [f"# mix = {{ {', '.join(f'{_key(name)} = 1.0' for name in names)} }}", '# kind = "live"']
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    """A key of TOML. A dot in a bare key would begin a table."""
    return _quote(name) if "." in name else name


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
