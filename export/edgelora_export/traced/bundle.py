"""Builds a bundle from a traced decoder: each distinct weight stored once, one rewritten graph per variant."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelora_export.bundle.builder import check_names, copy_texts
from edgelora_export.bundle.draft import describe_base, describe_file, end_tokens
from edgelora_export.graph.nodes import mapped_blobs, pack_graph
from edgelora_export.plan.targets import CPU
from edgelora_export.traced.graph import find_lookups, find_products, rewrite_graph
from edgelora_export.traced.optimum import digest
from edgelora_export.weights.publish import staged_folder, write_file
from edgelora_export.weights.store import Weights, store_rounded
from edgelora_runtime._version import __version__
from edgelora_runtime.bundle.manifest import MANIFEST, GraphEntry, Manifest, ModelEntry, QuantizationEntry, VariantEntry
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from edgelora_export.plan.variants import PackedRouter, Quantization, Variant
    from edgelora_export.traced.graph import Matrix
    from edgelora_export.traced.optimum import TracedDecoder
    from edgelora_export.weights.base import Base
    from edgelora_runtime.bundle.manifest import AdapterEntry


_PREFIX = "matrix/"


def check_traceable(variants: Sequence[Variant], quantization: Quantization) -> None:
    """Refuses, before any work is done, what a traced graph cannot be made to do."""
    check_names(variants)
    if live := [variant.name for variant in variants if variant.live is not None]:
        raise InputError(
            f"variants {', '.join(live)} are live: a graph that Optimum traced has no inputs for adapters; use kind = 'merged'"
        )
    if quantization.method not in ("rtn", "none"):
        raise InputError(f"quantization method {quantization.method!r} is for native graphs; for this base use rtn")


class TracedMatrices:
    """The matrices of a traced decoder that products multiply by, and whose they are.

    names: by initializer, the name that the matrix has in the bundle: of its first owner in the checkpoint, so that tied
    ones are one, behind a prefix that no name in the graph has. shapes: (N, K) by module, for the linear layers that a delta
    can change. embedding: the initializer that the tokens look up, None if the graph does that in another way. Iterates over
    (owner, matrix).
    """

    def __init__(self, traced: TracedDecoder) -> None:
        self.names: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        self.embedding: str | None = None
        self._matrices: dict[str, Matrix] = {}
        for index, (_, matrix) in enumerate(find_products(traced.graph.graph)):
            values = matrix.read()
            owners = traced.modules.get(digest(values), [])
            name = owners[0] if owners else f"products.{index}"
            self._add(matrix, name)
            # Equal weights are one tensor in a traced graph: which product is whose cannot be told.
            if len(owners) == 1 and owners[0] in traced.linears:
                self.shapes[name] = (values.shape[0], values.shape[1])
        for _, matrix in find_lookups(traced.graph.graph):
            if not matrix.transposed and digest(matrix.read()) == traced.embedding:
                self.embedding = matrix.initializer.name
                self._add(matrix, traced.modules[traced.embedding][0])

    def _add(self, matrix: Matrix, name: str) -> None:
        self.names[str(matrix.initializer.name)] = _PREFIX + name
        self._matrices.setdefault(name, matrix)

    def __iter__(self) -> Iterator[tuple[str, Matrix]]:
        return iter(self._matrices.items())

    def __len__(self) -> int:
        return len(self._matrices)


def build_traced_bundle(
    base: Base,
    traced: TracedDecoder,
    matrices: TracedMatrices,
    variants: Sequence[Variant],
    output: Path,
    *,
    quantization: Quantization,
    adapters: Mapping[str, AdapterEntry],
    default_variant: str | None = None,
    router: PackedRouter | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Manifest:
    """Writes the bundle folder in one step, as build_bundle does, from a graph that Optimum traced.

    Raises InputError for variants and modules that cannot be built, ResourceError for a full disk.
    """
    check_traceable(variants, quantization)
    for variant in variants:
        if variant.delta is not None and (unknown := sorted(variant.delta.modules - matrices.shapes.keys())):
            shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
            raise InputError(
                f"variant {variant.name} changes {shown}, which are no linear layers with weights of their own in this "
                f"{traced.architecture}"
            )
    with staged_folder(output, marker=MANIFEST) as folder:
        copy_texts(base, folder)
        if router is not None:
            write_file(folder / router.entry.file, [router.content])
        stored = _store_weights(matrices, variants, folder, quantization, on_progress)
        graphs = {}
        for variant in variants:
            model = rewrite_graph(traced.graph, matrices.names, matrices.embedding, stored[variant.name], folder, traced.sizes)
            file = f"{variant.name}.{CPU.name}.onnx"
            write_file(folder / file, [pack_graph(model)])
            graphs[variant.name] = GraphEntry(file, mapped_blobs(model))
        manifest = Manifest(
            created_by=f"edgelora {__version__}",
            default_variant=variants[0].name if default_variant is None else default_variant,
            base=describe_base(base),
            model=ModelEntry(
                architecture=traced.architecture,
                hidden_size=traced.hidden_size,
                layers=traced.sizes.layers,
                kv_heads=traced.sizes.kv_heads,
                head_size=traced.sizes.head_size,
                vocab_size=traced.sizes.vocab_size,
                context_length=traced.context_length,
                eos_token_ids=end_tokens(base),
                cache="growing",
            ),
            quantization=QuantizationEntry(
                quantization.bits, quantization.block_size, quantization.symmetric, quantization.method
            ),
            adapters=dict(adapters),
            live_slots=(),
            variants={
                variant.name: VariantEntry(
                    "merged",
                    dict(variant.mix),
                    variant.method,
                    {CPU.name: graphs[variant.name]},
                    weights={name: dict(by_pattern) for name, by_pattern in variant.weights.items()},
                    density=variant.density,
                    seed=variant.seed,
                )
                for variant in variants
            },
            files={path.name: describe_file(path) for path in sorted(folder.iterdir())},
            router=None if router is None else router.entry,
        )
        write_file(folder / MANIFEST, [manifest.dump()])
    return manifest


def _store_weights(
    matrices: TracedMatrices,
    variants: Sequence[Variant],
    folder: Path,
    quantization: Quantization,
    on_progress: Callable[[int, int, str], None],
) -> dict[str, Weights]:
    """The weights of each variant: the base's, with ΔW added where the variant has one."""
    stored = {variant.name: Weights() for variant in variants}
    for done, (name, matrix) in enumerate(matrices):
        on_progress(done, len(matrices), name)
        weight, grid = matrix.read(), quantization.grid(name)
        bare: Weights | None = None
        for variant in variants:
            if variant.delta is not None and name in variant.delta.modules:
                stored[variant.name].take(store_rounded(folder, _PREFIX + name, weight + variant.delta.dense(name, weight), grid))
            else:
                bare = bare or store_rounded(folder, _PREFIX + name, weight, grid)
                stored[variant.name].take(bare)
    on_progress(len(matrices), len(matrices), "graphs")
    return stored
