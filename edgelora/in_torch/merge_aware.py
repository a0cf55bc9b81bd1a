"""Training against the grid that ships: each adapted layer computes with the weight that a merged int4 variant will have.

The forward pass uses Q(W + s·B·A), where Q rounds as export does and W is the float base. Rounding has no useful gradient, so A
and B get the one of the sum itself (the straight-through estimator, Bengio et al., arXiv 1308.3432): dB = s·dYᵀ·(X·Aᵀ) and
dA = s·(dY·B)ᵀ·X, which need no matrix of the weight's size. Layers that are not adapted hold Q(W).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora_export.architectures import native_types, read_decoder
from edgelora_export.quantize.torch_rounding import round_to_int4
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from edgelora_export.base.base import Base
    from edgelora_export.decoder.description import Part

_PREFIX = "base_model.model."  # PEFT's, before the names of the base's own modules


def check_merge_aware(base: Base) -> None:
    """Raises InputError for a base whose export does not keep codes: one without a native graph."""
    if base.config.get("model_type") not in native_types():
        raise InputError(
            f"merge_aware: a {base.config.get('model_type')} is exported through Optimum, which quantizes anew; leave it out"
        )


def hold_merged(model: Any, config: dict[str, Any]) -> None:
    """Makes a PEFT model compute with its merged weights on export's grid, now and after each change of its factors.

    model: over the float base, in float32. config: the base's config.json. Other linear layers and the embedding are rounded in
    place. Raises InputError for adapters other than plain LoRA on linear layers of the blocks.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    parts = {part.module: part for linear in read_decoder(config).linears for part in linear.parts}
    adapted: dict[str, Any] = {
        name.removeprefix(_PREFIX): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }
    _check_layers(adapted, parts)
    inside = {id(child) for layer in adapted.values() for child in layer.modules()}
    done: set[int] = set()  # a tied head shares the embedding's tensor
    for name, module in model.named_modules():
        if id(module) in inside or not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            continue
        weight = module.weight.data
        if weight.data_ptr() not in done:
            weight.copy_(_round(weight.float(), parts.get(name.removeprefix(_PREFIX))))
            done.add(weight.data_ptr())
    for name, layer in adapted.items():
        layer.forward = _MergedForward(layer, parts[name])


class _MergedForward:
    """The forward pass of one adapted layer of PEFT."""

    def __init__(self, layer: Any, part: Part) -> None:
        (self._name,) = layer.lora_A
        self._layer, self._part = layer, part
        self._weight: torch.Tensor | None = None  # of the scale and the factors below
        self._scale: float
        self._a: torch.Tensor
        self._b: torch.Tensor

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ARG002  (PEFT's signature)
        from torch.nn.functional import linear

        layer, name = self._layer, self._name
        a, b = (_round_to_fp16(factors[name].weight) for factors in (layer.lora_A, layer.lora_B))
        y = linear(x, self._merge(a, b), layer.base_layer.bias)
        if layer.disable_adapters:
            return y
        low = linear(linear(x.detach(), a), b * layer.scaling[name])
        return y + (low - low.detach())  # adds 0, with the gradient of the adapter's own path

    def _merge(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Returns Q(W + s·B·A), float32 (N, K), rounded anew only after a change.

        The factors themselves are compared: a fused optimizer changes them without a trace in torch's version counter.
        """
        import torch

        layer = self._layer
        scale = 0.0 if layer.disable_adapters else layer.scaling[self._name]
        if self._weight is not None and scale == self._scale and torch.equal(a, self._a) and torch.equal(b, self._b):
            return self._weight
        weight = layer.base_layer.weight
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            merged = weight.float() + (b.float() * scale) @ a.float() if scale else weight.float()
            self._weight = _round(merged, self._part)
        self._scale, self._a, self._b = scale, a.detach().clone(), b.detach().clone()
        return self._weight


def _round_to_fp16(factor: torch.Tensor) -> torch.Tensor:
    """Rounds a factor to what its file will hold. The gradient passes through."""
    import torch

    return factor + (factor.detach().to(torch.float16).to(factor.dtype) - factor.detach())


def _round(weight: torch.Tensor, part: Part | None) -> torch.Tensor:
    """Rounds a weight (N, K) to export's grid, in the blocks of the graph's layout."""
    import torch

    if part is None or part.columns is None:
        return round_to_int4(weight)
    places = torch.from_numpy(part.find_columns()).to(weight.device)
    with torch.no_grad():
        wide = weight.new_zeros(len(weight), part.graph_columns)
        wide[:, places] = weight
        return round_to_int4(wide)[:, places]


def _check_layers(adapted: Mapping[str, Any], parts: Mapping[str, Part]) -> None:
    """Raises InputError for layers or kinds of adapters whose merged weight is not Q(W + s·B·A)."""
    import torch

    if not adapted:
        raise InputError("merge_aware: the adapter has no layer of LoRA; check its target modules")
    if unknown := sorted(set(adapted) - set(parts)):
        raise InputError(
            f"merge_aware: {', '.join(unknown[:5])} is no linear layer of the decoder's blocks, and others do not ship as "
            "Q(W + ΔW); leave it out of target_modules"
        )
    for name, layer in adapted.items():
        plain = isinstance(layer.base_layer, torch.nn.Linear) and len(layer.lora_A) == 1
        plain = plain and not any(layer.use_dora.values()) and not any(layer.lora_bias.values())
        if not plain:
            raise InputError(f"merge_aware: {name} has another kind of adapter than plain LoRA; train without DoRA and lora_bias")
        if any(getattr(dropout, "p", 0) for dropout in layer.lora_dropout.values()):
            raise InputError("merge_aware: a merged weight has no dropout; use dropout = 0")
