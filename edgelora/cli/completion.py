"""What the shell completes beyond the names of verbs and options: the variants and live adapters of a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer  # noqa: TC002  (typer reads the annotations)

from edgelora_runtime.errors import EdgeloraError

if TYPE_CHECKING:
    from edgelora_runtime.bundle.manifest import Manifest


def complete_variants(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Returns the bundle's variants that begin so, each with its mix, and auto if the bundle has a router."""
    manifest = _read_manifest(context)
    if manifest is None:
        return []
    found = {
        name: " + ".join(f"{weight:g} {adapter}" for adapter, weight in entry.mix.items()) or "the bare base"
        for name, entry in manifest.variants.items()
    }
    if manifest.router is not None:
        found["auto"] = "the router's choice for each prompt"
    return [(name, said) for name, said in found.items() if name.startswith(incomplete)]


def complete_mix(context: typer.Context, incomplete: str) -> list[str]:
    """Returns the bundle's live adapters that begin so, each with the sign that its weight follows."""
    manifest = _read_manifest(context)
    live = [] if manifest is None else [name for name, entry in manifest.adapters.items() if entry.file is not None]
    return [f"{name}=" for name in live if name.startswith(incomplete)]


def _read_manifest(context: typer.Context) -> Manifest | None:
    """Reads the manifest of the bundle on the command line. Returns None if there is none that can be read."""
    from edgelora_runtime import Bundle

    # An option that still lacks its value ends the parsing, and leaves the arguments before it unnamed.
    bundle = context.params.get("bundle") or next(iter(context.args), None)
    try:
        return None if bundle is None else Bundle.open(bundle).manifest
    except (EdgeloraError, OSError):
        return None
