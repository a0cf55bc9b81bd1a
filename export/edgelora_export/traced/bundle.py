"""Builds a bundle from a traced decoder: each distinct weight is stored once, and each variant gets a rewritten graph."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgelora_export.bundle.entries import describe_base, describe_files, describe_quantization
from edgelora_export.bundle.plan import check_names
from edgelora_export.bundle.texts import read_bundle_texts
from edgelora_export.graph.nodes import list_blobs, pack_graph
from edgelora_export.plan.targets import CPU
from edgelora_export.traced.graph import find_lookups, find_products, rewrite_graph
from edgelora_export.traced.optimum import digest
from edgelora_export.weights.publish import staged_folder, write_file
from edgelora_export.weights.stored import StoredWeights, store_rounded
from edgelora_runtime._version import __version__
from edgelora_runtime.bundle.manifest import MANIFEST, GraphEntry, Manifest, ModelEntry, VariantEntry
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from edgelora_export.base.base import Base
    from edgelora_export.bundle.texts import BundleTexts
    from edgelora_export.plan.variants import PackedRouter, Quantization, Variant
    from edgelora_export.traced.graph import Matrix
    from edgelora_export.traced.optimum import TracedDecoder
    from edgelora_runtime.bundle.manifest import AdapterEntry


_PREFIX = "matrix/"


@dataclass(frozen=True)
class TracedPlan:
    """The input of build_traced_bundle, with fields as in BundlePlan. Raises InputError for options of native graphs."""

    base: Base
    variants: tuple[Variant, ...]
    quantization: Quantization
    adapters: Mapping[str, AdapterEntry] = field(default_factory=dict)
    default: str | None = None
    router: PackedRouter | None = None
    texts: BundleTexts = None  # type: ignore[assignment]  # None only until __post_init__

    def __post_init__(self) -> None:
        if self.texts is None:
            object.__setattr__(self, "texts", read_bundle_texts(self.base, find_vocab_size(self.base)))
        check_names(self.variants)
        if live := [variant.name for variant in self.variants if variant.live is not None]:
            raise InputError(
                f"variants {', '.join(live)} are live: graphs traced by Optimum have no inputs for adapters; use kind = 'merged'"
            )
        if self.quantization.method not in ("rtn", "none"):
            raise InputError(f"quantization method {self.quantization.method!r} is for native graphs; for this base use rtn")


def find_vocab_size(base: Base) -> int:
    """Returns the tokens of a base that has no native graph, or a number above any where config.json leaves it to the class."""
    size = base.config.get("vocab_size")
    return size if isinstance(size, int) else sys.maxsize


class TracedMatrices:
    """The matrices of a traced decoder that products multiply by, and the modules that own them.

    names: the matrix's name in the bundle, by initializer. It is a prefix that no name in the graph has and the name of the first
    owner in the checkpoint, so that tied matrices are one. shapes: (N, K) by module, for the linear layers that a delta can
    change. embedding: the initializer in which tokens are looked up, None if the graph does that in another way.
    Iterates over (owner, matrix).
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
            # Equal weights are one tensor in a traced graph, so a shared tensor cannot be assigned to one module.
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
    plan: TracedPlan,
    traced: TracedDecoder,
    matrices: TracedMatrices,
    output: Path,
    *,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Manifest:
    """Builds and publishes the bundle in one step, as build_bundle does, from a graph that Optimum traced.

    Raises InputError for modules that cannot be changed, ResourceError for a full disk.
    """
    for variant in plan.variants:
        if variant.delta is not None and (
            variant.delta.biased or variant.delta.vocab_size not in (None, traced.sizes.vocab_size)
        ):
            changed = "biases" if variant.delta.biased else "the size of the vocabulary"
            raise InputError(
                f"variant {variant.name} changes {changed}, but a {traced.architecture} is exported through Optimum, which "
                "traces the base's own; use a base with a native graph"
            )
        if variant.delta is not None and (unknown := sorted(variant.delta.modules - matrices.shapes.keys())):
            shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
            raise InputError(
                f"variant {variant.name} changes {shown}, which are no linear layers with weights of their own in this "
                f"{traced.architecture}"
            )
    with staged_folder(output, marker=MANIFEST) as folder:
        plan.texts.write(folder)
        if plan.router is not None:
            write_file(folder / plan.router.entry.file, [plan.router.content])
        stored = _store_weights(matrices, plan, folder, on_progress)
        graphs = {}
        for variant in plan.variants:
            model = rewrite_graph(traced.graph, matrices.names, matrices.embedding, stored[variant.name], folder, traced.sizes)
            file = f"{variant.name}.{CPU.name}.onnx"
            write_file(folder / file, [pack_graph(model)])
            graphs[variant.name] = GraphEntry(file, list_blobs(model))
        manifest = Manifest(
            created_by=f"edgelora {__version__}",
            default_variant=plan.variants[0].name if plan.default is None else plan.default,
            base=describe_base(plan.base),
            model=_describe_model(traced, plan.texts.base.end_tokens),
            quantization=describe_quantization(plan.quantization),
            adapters=dict(plan.adapters),
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
                    texts=plan.texts.describe(variant.mix),
                )
                for variant in plan.variants
            },
            files=describe_files(folder),
            router=None if plan.router is None else plan.router.entry,
        )
        write_file(folder / MANIFEST, [manifest.dump()])
    return manifest


def _describe_model(traced: TracedDecoder, end_tokens: tuple[int, ...]) -> ModelEntry:
    return ModelEntry(
        architecture=traced.architecture,
        hidden_size=traced.hidden_size,
        layers=traced.sizes.layers,
        kv_heads=traced.sizes.kv_heads,
        head_size=traced.sizes.head_size,
        vocab_size=traced.sizes.vocab_size,
        context_length=traced.context_length,
        eos_token_ids=end_tokens,
        cache="growing",
    )


def _store_weights(
    matrices: TracedMatrices, plan: TracedPlan, folder: Path, on_progress: Callable[[int, int, str], None]
) -> dict[str, StoredWeights]:
    """Stores the weights of each variant: the base's, with ΔW added if the variant has one."""
    stored = {variant.name: StoredWeights() for variant in plan.variants}
    for done, (name, matrix) in enumerate(matrices):
        on_progress(done, len(matrices), name)
        weight, grid = matrix.read(), plan.quantization.grid(name)
        bare: StoredWeights | None = None
        for variant in plan.variants:
            if variant.delta is not None and name in variant.delta.modules:
                merged = weight + variant.delta.dense(name, weight)
                stored[variant.name].update(store_rounded(folder, _PREFIX + name, merged, grid))
            else:
                bare = bare or store_rounded(folder, _PREFIX + name, weight, grid)
                stored[variant.name].update(bare)
    on_progress(len(matrices), len(matrices), "graphs")
    return stored
