"""Model names: a variant, the router's choice, or a live mix, in one of several bundles."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora_runtime.bundle.choice import choose_mix
from edgelora_runtime.bundle.router import AUTO
from edgelora_runtime.errors import UsageError, suggest_name
from edgelora_runtime.serve.failures import RequestFailed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgelora_runtime.bundle.manifest import Manifest

_PART = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(:(?P<weight>[+-]?[0-9]*\.?[0-9]+([eE]-?[0-9]+)?))?")


@dataclass(frozen=True)
class ModelChoice:
    """The bundle and the variant or mix that a model's name stands for.

    name: as the client wrote it. variant: may be "auto", and is None with a mix.
    """

    name: str
    bundle: str
    variant: str | None
    mix: Mapping[str, float] | None = None

    @property
    def key(self) -> str:
        """The same text for names that run on the same variant or mix."""
        if self.mix is None:
            return f"{self.bundle}/{self.variant}"
        return f"{self.bundle}/" + "+".join(f"{name}:{weight!r}" for name, weight in sorted(self.mix.items()) if weight)


class ModelNames:
    """The names that a server answers to: those of its bundles' variants, "auto", and mixes such as sql:0.7+medical:0.3.

    With several bundles, a name starts with its bundle's and a slash. With one, that is optional.
    """

    def __init__(self, manifests: Mapping[str, Manifest]) -> None:
        self._manifests = manifests

    @property
    def listed(self) -> list[ModelChoice]:
        """All variants, and "auto" where there is a router, in the bundles' order."""
        return [
            ModelChoice(self.write(bundle, variant), bundle, variant)
            for bundle, manifest in self._manifests.items()
            for variant in (*manifest.variants, *((AUTO,) if manifest.router is not None else ()))
        ]

    def write(self, bundle: str, variant: str) -> str:
        """Returns the name of a variant, with its bundle's only where there are several."""
        return variant if len(self._manifests) == 1 else f"{bundle}/{variant}"

    def find(self, name: str, lora: Sequence[tuple[int | str, float]] | None = None) -> ModelChoice:
        """Returns what a name stands for.

        lora: numbers or names of live adapters with weights, which then make the mix. The name is then a live variant's.
        Raises RequestFailed, with 404 for a name that nothing has. No other model runs in its place.
        """
        bundle, rest = self._split(name)
        manifest = self._manifests[bundle]
        if lora is not None:
            return ModelChoice(name, bundle, None, self._check_mix(manifest, self._weigh(manifest, rest, lora), "lora"))
        if rest in manifest.variants or (rest == AUTO and manifest.router is not None):
            return ModelChoice(name, bundle, rest)
        parts = [_PART.fullmatch(part) for part in re.split(r"\+(?=[A-Za-z0-9])", rest)]
        if all(parts) and (len(parts) > 1 or ":" in rest):
            pairs = [(part["name"], float(part["weight"] or 1)) for part in parts if part is not None]
            return ModelChoice(name, bundle, None, self._read_pairs(manifest, pairs, name))
        raise self._refuse(name, "this bundle has no router" if rest == AUTO else None)

    def _split(self, name: str) -> tuple[str, str]:
        bundle, slash, rest = name.partition("/")
        if slash and bundle in self._manifests:
            return bundle, rest
        if len(self._manifests) == 1 and not slash:
            return next(iter(self._manifests)), name
        raise self._refuse(name)

    def _read_pairs(self, manifest: Manifest, pairs: Sequence[tuple[str, float]], name: str) -> Mapping[str, float]:
        mix = dict(pairs)
        if len(mix) < len(pairs):
            raise RequestFailed(400, f"model {name!r} names an adapter twice; give each once", param="model")
        known = [each for each, entry in manifest.adapters.items() if entry.file is not None]
        if unknown := [each for each in mix if each not in known]:
            raise self._refuse(name, f"no live adapter {', '.join(unknown)}; there is {', '.join(known) or 'none'}")
        return self._check_mix(manifest, mix, "model")

    def _weigh(self, manifest: Manifest, variant: str, lora: Sequence[tuple[int | str, float]]) -> dict[str, float]:
        """Returns the mix of llama.cpp's `lora`, whose adapters that it leaves out weigh 0."""
        entry = manifest.variants.get(variant)
        if entry is None:
            raise self._refuse(variant)
        if entry.kind != "live":
            raise RequestFailed(400, f"lora: model {variant!r} is merged; name a live variant to mix on", param="lora")
        adapters = list_live_adapters(manifest)
        mix: dict[str, float] = {}
        for id_, scale in lora:
            name = adapters[id_] if isinstance(id_, int) and 0 <= id_ < len(adapters) else id_
            if name not in adapters:
                there = ", ".join(f"{number} {each}" for number, each in enumerate(adapters))
                raise RequestFailed(400, f"lora: no adapter {id_!r}; there is {there}", param="lora")
            if name in mix:
                raise RequestFailed(400, f"lora: adapter {id_!r} is given twice", param="lora")
            mix[str(name)] = scale
        return mix

    def _check_mix(self, manifest: Manifest, mix: Mapping[str, float], param: str) -> Mapping[str, float]:
        try:
            choose_mix(manifest, "cpu", mix)
        except UsageError as error:
            raise RequestFailed(400, str(error), param=param) from None
        return mix

    def _refuse(self, name: str, reason: str | None = None) -> RequestFailed:
        names = [choice.name for choice in self.listed]
        said = f"; {reason}" if reason else suggest_name([name], names) or f"; there is {', '.join(names[:20])}"
        return RequestFailed(404, f"no model {name[:100]!r}{said}", param="model", code="model_not_found")


def list_live_adapters(manifest: Manifest) -> list[str]:
    """Returns the adapters that can be mixed at request time. Their places are the ids of llama.cpp's `lora`."""
    return [name for name, entry in manifest.adapters.items() if entry.file is not None]
