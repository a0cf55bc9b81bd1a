"""The loader of a bundle's graphs, as whole sessions or shared stages.

Stages open in parallel.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from edgelora_runtime.errors import IntegrityError
from edgelora_runtime.residency.memory import reuse_freed_memory
from edgelora_runtime.session.factors import FACTORS
from edgelora_runtime.session.fair_lock import StepLock
from edgelora_runtime.session.model import Model
from edgelora_runtime.session.row_steps import KEEP
from edgelora_runtime.session.stage import Stage, Stages, open_stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from edgelora_runtime.bundle.folder import Bundle
    from edgelora_runtime.bundle.manifest import GraphEntry, Manifest, StageEntry
    from edgelora_runtime.residency.packed_cache import PackedCache
    from edgelora_runtime.session.kernels import Kernels
    from edgelora_runtime.session.providers import Provider

_SPIN_BELOW = 32 << 20  # bytes of weights; a step over more takes much longer than waking a thread (docs/log.md)


class Loader:
    """A loader of a bundle's graphs. Models share the stages that are open.

    kernels: edgelora's kernels, which read blobs in their stored form. Nothing is packed, so graphs are loaded whole and
    packed_cache is not used. whole: loads graphs whole in any case. spin_below: bytes of weights of a graph below which its
    threads spin between steps.
    open_stage: opens one. See session/stage.py. blobs: for each graph, the bytes of its blobs. sizes: for each graph, the bytes
    of weights that its stages pack. A graph without stages is its own only stage.
    """

    def __init__(
        self,
        bundle: Bundle,
        graphs: Iterable[GraphEntry],
        provider: Provider,
        *,
        threads: int | None,
        kernels: Kernels | None,
        packed_cache: PackedCache | None,
        whole: bool,
        spin_below: int = _SPIN_BELOW,
        open_stage: Callable[..., Stage] = open_stage,
    ) -> None:
        self._bundle = bundle
        self._provider = provider
        self._threads = threads
        self._kernels = kernels
        self._packed_cache = packed_cache if kernels is None else None
        self._spin_below = spin_below
        self._open_stage = open_stage
        self._step_lock = StepLock()
        self._chains: dict[str, Sequence[StageEntry]] = {
            graph.file: (graph,) if whole or kernels is not None or not graph.stages else graph.stages for graph in graphs
        }
        self._entries = {stage.file: stage for stages in self._chains.values() for stage in stages}
        self._stages = Stages(self._open)
        self.blobs = {graph.file: bundle.manifest.blob_bytes(graph) for graph in graphs}
        self.sizes = {graph: _count_packed(bundle.manifest, stages) for graph, stages in self._chains.items()}

    def load(self, graph: str) -> Model:
        """Loads the model of a graph.

        Stages that are not open yet open in parallel, the largest first.
        """
        largest_first = sorted(self.sizes[graph], key=lambda file: -self.sizes[graph][file])
        keep_freed = contextlib.nullcontext() if self._packed_cache is None else reuse_freed_memory()
        with ThreadPoolExecutor(self._threads or os.cpu_count(), "edgelora-load") as pool, keep_freed:
            opening = {file: pool.submit(self._stages.get, file) for file in largest_first}
            found = {file: future.result() for file, future in opening.items()}
        for stage, _ in found.values():
            if stage.takes_packed:
                _check_slots(stage, self._bundle.manifest, graph)
        opened = {blob for file, (_, is_new) in found.items() if is_new for blob in self._entries[file].blobs}
        return Model(
            [found[stage.file][0] for stage in self._chains[graph]],
            self._bundle.manifest.find_model(graph),
            name=graph,
            provider=self._provider,
            step_lock=self._step_lock,
            opened=sum(self.blobs[graph][blob] for blob in opened),
        )

    def is_mapped(self, file: str) -> bool:
        """True if the weights that a stage reads are mapped, or would be if it were open."""
        stage = self._stages.find(file)
        if stage is not None:
            return stage.mapped
        if self._kernels is not None:
            return True
        return self._packed_cache is not None and self._packed_cache.find(self._bundle, self._entries[file]) is not None

    def _open(self, file: str) -> Stage:
        self._bundle.read(file)  # checks the hash; opening the bundle checked the sizes of the blobs that the graph names
        entry, packed = self._entries[file], None
        if self._packed_cache is not None:
            packed = self._packed_cache.find(self._bundle, entry) or self._packed_cache.write(self._bundle, entry)
        open_here = partial(
            self._open_stage,
            threads=self._threads,
            provider=self._provider,
            spin=self._count_bytes(file) < self._spin_below,
            whole=file in self._chains,  # the file of a whole graph
            kernels=self._kernels,
        )
        if packed is not None:
            with contextlib.suppress(IntegrityError):  # another process may just have deleted it to make room
                return open_here(packed, packed=True)
        return open_here(self._bundle.path(file))

    def _count_bytes(self, file: str) -> int:
        """Returns the bytes of the largest graph that a stage belongs to."""
        return max(sum(self.blobs[graph].values()) for graph, sizes in self.sizes.items() if file in sizes)


def _check_slots(stage: Stage, manifest: Manifest, graph: str) -> None:
    """Refuses a graph whose live inputs differ from the manifest's slots.

    Their order counts, since kernels find factors by position.
    """
    slots = [name for slots in manifest.live_slots for name in (slots.a, *slots.b)]
    names = [value.name for value in stage.session.get_overridable_initializers()]
    if slots != [name for name in names if name not in (FACTORS, KEEP)]:
        raise IntegrityError(f"the live inputs of {graph} are not those of live_slots in the same order; export the bundle again")


def _count_packed(manifest: Manifest, stages: Sequence[StageEntry]) -> dict[str, int]:
    """Returns an upper bound of the bytes of weights that each stage packs.

    No stage packs what several of them map, such as norms and rotary tables, except a tied embedding: the head, the last stage,
    packs that.
    """
    mapped = Counter(blob for stage in stages for blob in stage.blobs)
    return {
        stage.file: sum(manifest.files[blob].size for blob in stage.blobs if mapped[blob] == 1 or stage is stages[-1])
        for stage in stages
    }
