"""Checks that adapters share a base, fit its modules and shapes, and are what a verb can use."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from edgelora.adapters.names import EMBEDDING, HEAD, show_names
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from edgelora.adapters.folder import Adapter, Provenance
    from edgelora_export.decoder.description import Decoder

_IN_LAYER = re.compile(r"(?P<wrapper>.*?)(?P<rest>(?:layers|h|blocks)\.\d+\..+)")


def check_same_base(adapters: Mapping[str, Adapter], base_sha256: str | None = None) -> None:
    """Raises InputError for adapters of different bases, or of another base than the given one.

    The error lists the mismatches. An adapter without edgelora.json does not record its base's weights, so only its shapes and
    the names of its modules are compared.
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
    wrong += [*_compare_each_other(adapters), *_compare_wrappers(adapters)]
    if wrong:
        shown = "; ".join(wrong[:6]) + (f"; and {len(wrong) - 6} more" if len(wrong) > 6 else "")
        raise InputError(f"adapters of another base do not mix: {shown}")


def _name_base(provenance: Provenance) -> str:
    return f"{provenance.base_name} ({provenance.base_sha256[:12]})"


def _compare_each_other(adapters: Mapping[str, Adapter]) -> Iterator[str]:
    shapes: dict[str, tuple[str, tuple[int, int]]] = {}
    for name, adapter in adapters.items():
        for module, (rows, columns, _) in adapter.shapes.items():
            other, shape = shapes.setdefault(module, (name, (rows, columns)))
            if not _fits((rows, columns), shape):
                yield f"{module} is {rows}x{columns} in {name}, {shape[0]}x{shape[1]} in {other}"


def _fits(shape: tuple[int, int], other: tuple[int, int]) -> bool:
    """True if two (N, K) agree. N is 0 where it is not known."""
    return shape[1] == other[1] and (shape[0] == other[0] or 0 in (shape[0], other[0]))


def _compare_wrappers(adapters: Mapping[str, Adapter]) -> Iterator[str]:
    """Finds adapters whose names of one layer's modules differ in what stands before the layer."""
    seen: dict[str, tuple[str, str]] = {}
    told: set[tuple[str, str]] = set()
    for name, adapter in adapters.items():
        for module in sorted(adapter.modules | adapter.biased):
            if found := _IN_LAYER.fullmatch(module):
                other, theirs = seen.setdefault(found["rest"], (name, module))
                if theirs != module and (name, other) not in told:
                    told.add((name, other))
                    yield f"{name} names {module} what {other} names {theirs}"


def check_shapes(adapters: Mapping[str, Adapter], decoder: Decoder) -> None:
    """Raises InputError for adapters whose modules are not in the base, or whose matrices do not fit it.

    Embedding and head may have other rows than the base where the adapter brings them whole.
    """
    fitting = {part.module: (part.out_features, part.in_features) for linear in decoder.linears for part in linear.parts}
    ends = {tensor.removesuffix(".weight") for tensor in (decoder.embedding, decoder.head)} | {HEAD}
    known = fitting.keys() | ends
    for name, adapter in adapters.items():
        modules = adapter.modules | adapter.biased
        if absent := modules - known:
            raise InputError(
                f"adapter {name}: {len(absent)} of its {len(modules)} modules are not in this {decoder.architecture} base: "
                f"{show_names(absent)}; was it trained on another base?"
            )
    for end in ends:
        fitting[end] = (decoder.vocab_size, decoder.hidden_size)
    compare_shapes(adapters, fitting)


def compare_shapes(adapters: Mapping[str, Adapter], fitting: Mapping[str, tuple[int, int]]) -> None:
    """Raises InputError for adapters whose shapes differ from `fitting`: (N, K) by module."""
    wrong = []
    for name, adapter in adapters.items():
        for module, (rows, columns, _) in adapter.shapes.items():
            brought = module in (EMBEDDING, HEAD) and adapter.vocab_size is not None
            expected = fitting.get(module, (rows, columns))
            if not _fits((0 if brought else rows, columns), expected):
                wrong.append(f"{module} is {rows}x{columns} in {name}, {expected[0]}x{expected[1]} in the base")
    if wrong:
        shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise InputError(f"adapters of another base: {shown}")


def list_no_factors(adapter: Adapter, *, embeddings: bool = False) -> list[str]:
    """Lists why an adapter is not a set of factors alone: layers saved whole, DoRA, biases, embeddings.

    embeddings: True allows factors of an embedding.
    """
    reasons = [f"{module} is {reason}" for module in sorted(adapter.modules) if (reason := adapter.why_not_low_rank(module))]
    if not embeddings:
        reasons += [f"{module} is an embedding" for module in sorted(adapter.modules) if adapter.is_embedding(module)]
    if adapter.biased:
        reasons.append(f"it adds to the bias of {show_names(adapter.biased, 1)}")
    return reasons


def check_factors(adapters: Mapping[str, Adapter], advice: str, *, embeddings: bool = False) -> None:
    """Raises InputError for adapters that are more than factors, with the advice. See list_no_factors."""
    wrong = [
        f"{name}: {'; '.join(found[:2])}"
        for name, one in adapters.items()
        if (found := list_no_factors(one, embeddings=embeddings))
    ]
    if wrong:
        raise InputError(f"{'; '.join(wrong[:3])}: {advice}")
