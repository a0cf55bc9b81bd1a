"""GET /v1/models: the variants, with what their mixes are and what int4 left of them; and llama.cpp's list of live adapters."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

from edgelora_runtime.bundle.router import AUTO
from edgelora_runtime.serve.names import list_live_adapters

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from edgelora_runtime.bundle.manifest import Manifest, VariantEntry
    from edgelora_runtime.serve.names import ModelChoice
    from edgelora_runtime.serve.service import Service


async def list_models(request: Request) -> Response:
    """Lists all models that have a name. Live mixes are models too, but there are too many to list."""
    service: Service = request.app.state.service
    return JSONResponse({"object": "list", "data": [describe_model(service, choice) for choice in service.names.listed]})


async def show_model(request: Request) -> Response:
    """Describes one model, a live mix too."""
    service: Service = request.app.state.service
    return JSONResponse(describe_model(service, service.names.find(request.path_params["model"])))


async def list_adapters(request: Request) -> Response:
    """Lists the live adapters with the ids that `lora` takes, as llama.cpp's server does. A request's own scales count alone."""
    service: Service = request.app.state.service
    return JSONResponse(
        [
            {"id": id_, "path": name, "scale": 0.0, "bundle": bundle}
            for bundle, runtime in service.bundles.items()
            for id_, name in enumerate(list_live_adapters(runtime.bundle.manifest))
        ]
    )


def describe_model(service: Service, choice: ModelChoice) -> dict[str, Any]:
    """Returns OpenAI's model object, with vLLM's root and parent, and what the manifest says of the variant."""
    manifest = service.bundles[choice.bundle].bundle.manifest
    described: dict[str, Any] = {
        "id": choice.name,
        "object": "model",
        "created": service.opened,
        "owned_by": "edgelora",
        "root": manifest.base.name,
        "parent": _find_parent(service, choice, manifest),
        "max_model_len": manifest.model.context_length,
        "bundle": choice.bundle,
    }
    if choice.mix is not None:
        return {**described, "kind": "mix", "mix": dict(choice.mix), "adapters": _describe_adapters(manifest, choice.mix)}
    if choice.variant == AUTO:
        return {**described, "kind": "router", "router": None if manifest.router is None else _describe_router(manifest)}
    assert choice.variant is not None
    return {**described, **_describe_variant(manifest, manifest.variants[choice.variant], choice.variant)}


def _describe_variant(manifest: Manifest, entry: VariantEntry, name: str) -> dict[str, Any]:
    fidelity = None
    if entry.fidelity is not None:
        fidelity = {key: value for key, value in asdict(entry.fidelity).items() if key != "products"}
    return {
        "kind": entry.kind,
        "mix": entry.live if entry.kind == "live" else entry.mix,
        "method": entry.method,
        "default": name == manifest.default_variant,
        "fidelity": fidelity,
        "adapters": _describe_adapters(manifest, entry.mix),
        "live_adapters": list_live_adapters(manifest) if entry.kind == "live" else [],
        "provenance": {
            "created_by": manifest.created_by,
            "base": asdict(manifest.base),
            "merge_base": entry.merge_base,
            "trained_on": entry.trained_on,
            "quantization": asdict(manifest.quantization),
        },
    }


def _describe_adapters(manifest: Manifest, mix: Any) -> dict[str, Any]:
    known = manifest.adapters
    return {name: {"sha256": known[name].sha256, "rank": known[name].rank} for name in mix if name in known}


def _describe_router(manifest: Manifest) -> dict[str, Any]:
    router = manifest.router
    assert router is not None
    return {
        "variants": [each.variant for each in router.classes if each.variant is not None],
        "fallback": router.fallback,
        "accuracy": router.accuracy,
    }


def _find_parent(service: Service, choice: ModelChoice, manifest: Manifest) -> str | None:
    """Returns the variant of the bare base, of which the others are changes, or None where there is none."""
    bare = next((name for name, entry in manifest.variants.items() if not entry.mix), None)
    return None if bare is None or choice.variant in (bare, AUTO) else service.names.write(choice.bundle, bare)
