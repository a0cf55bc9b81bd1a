"""Checks that adapters share a base and fit its shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelora.adapters.folder import Adapter, Provenance
    from edgelora_export.decoder.description import Decoder


def check_same_base(adapters: Mapping[str, Adapter], base_sha256: str | None = None) -> None:
    """Raises InputError for adapters of different bases, or of another base than the given one.

    The error lists the mismatches. An adapter without edgelora.json does not record its base's weights, so only its shapes are
    compared.
    """
    known = {name: adapter.provenance for name, adapter in adapters.items() if adapter.provenance is not None}
    wrong: list[str] = []
    if base_sha256 is None and known:
        first, origin = next(iter(known.items()))
        wrong += [
            f"{name} was trained on {_name_base(item)}, {first} on {_name_base(origin)}"
            for name, item in known.items()
            if item.base_sha256 != origin.base_sha256
        ]
    elif base_sha256 is not None:
        wrong += [
            f"{name} was trained on {_name_base(item)}, this base is {base_sha256[:12]}"
            for name, item in known.items()
            if item.base_sha256 != base_sha256
        ]
    shapes: dict[str, tuple[str, tuple[int, int]]] = {}
    for name, adapter in adapters.items():
        for module, (rows, columns, _) in adapter.shapes.items():
            other, shape = shapes.setdefault(module, (name, (rows, columns)))
            if shape != (rows, columns):
                wrong.append(f"{module} is {rows}x{columns} in {name}, {shape[0]}x{shape[1]} in {other}")
    if wrong:
        shown = "; ".join(wrong[:6]) + (f"; and {len(wrong) - 6} more" if len(wrong) > 6 else "")
        raise InputError(f"adapters of another base do not mix: {shown}")


def _name_base(provenance: Provenance) -> str:
    return f"{provenance.base_name} ({provenance.base_sha256[:12]})"


def check_shapes(adapters: Mapping[str, Adapter], decoder: Decoder) -> None:
    """Raises InputError for adapters whose matrices do not fit the base."""
    fitting = {part.module: (part.out_features, part.in_features) for linear in decoder.linears for part in linear.parts}
    for tensor in (decoder.embedding, decoder.head):
        fitting[tensor.removesuffix(".weight")] = (decoder.vocab_size, decoder.hidden_size)
    compare_shapes(adapters, fitting)


def compare_shapes(adapters: Mapping[str, Adapter], fitting: Mapping[str, tuple[int, int]]) -> None:
    """Raises InputError for adapters whose shapes differ from `fitting`: (N, K) by module."""
    wrong = [
        f"{module} is {rows}x{columns} in {name}, {fitting[module][0]}x{fitting[module][1]} in the base"
        for name, adapter in adapters.items()
        for module, (rows, columns, _) in adapter.shapes.items()
        if fitting.get(module, (rows, columns)) != (rows, columns)
    ]
    if wrong:
        shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise InputError(f"adapters of another base: {shown}")
