"""Makes models of a bundle's graphs: as one session, or of stages that graphs share and that are opened side by side."""

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
from edgelora_runtime.session.fair_lock import FairLock
from edgelora_runtime.session.model import KEEP, Model
from edgelora_runtime.session.stage import Stage, Stages, open_stage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from edgelora_runtime.bundle.folder import Bundle
    from edgelora_runtime.bundle.manifest import GraphEntry, Manifest, StageEntry
    from edgelora_runtime.residency.packed_cache import PackedCache
    from edgelora_runtime.session.kernels import Kernels
    from edgelora_runtime.session.providers import Provider

_SPIN_BELOW = 32 << 20  # bytes of weights; what reads more takes much longer than waking a thread (docs/log.md)


class Loader:
    """Loads the graphs of a bundle; a stage that a loaded model has open is not opened again.

    kernels: own kernels, which read blobs as they are: nothing is packed, so graphs are loaded whole, and packed_cache is not
    asked. whole: leaves stages alone in any case. blobs: of each graph its blobs with their bytes. sizes: of each graph its
    stages with the bytes of weights that they pack; a graph without stages is one.
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
    ) -> None:
        self._bundle = bundle
        self._provider = provider
        self._threads = threads
        self._kernels = kernels
        self._packed_cache = packed_cache if kernels is None else None
        self._turns = FairLock()
        self._chains: dict[str, Sequence[StageEntry]] = {
            graph.file: (graph,) if whole or kernels is not None or not graph.stages else graph.stages for graph in graphs
        }
        self._entries = {stage.file: stage for stages in self._chains.values() for stage in stages}
        self._stages = Stages(self._open)
        self.blobs = {graph.file: bundle.manifest.blob_bytes(graph) for graph in graphs}
        self.sizes = {graph: _count_packed(bundle.manifest, stages) for graph, stages in self._chains.items()}

    def load(self, graph: str) -> Model:
        """A model of a graph. Its stages that are not open yet are opened on all threads, the largest first."""
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
            self._bundle.manifest.model,
            name=graph,
            provider=self._provider,
            turns=self._turns,
            opened=sum(self.blobs[graph][blob] for blob in opened),
        )

    def is_mapped(self, file: str) -> bool:
        """Whether the weights that a stage reads are mapped, or would be once it is open."""
        stage = self._stages.find(file)
        if stage is not None:
            return stage.mapped
        if self._kernels is not None:
            return True
        return self._packed_cache is not None and self._packed_cache.find(self._bundle, self._entries[file]) is not None

    def _open(self, file: str) -> Stage:
        self._bundle.read(file)  # checks the hash; the graph names the blobs, whose sizes were checked on opening
        entry, packed = self._entries[file], None
        if self._packed_cache is not None:
            packed = self._packed_cache.find(self._bundle, entry) or self._packed_cache.write(self._bundle, entry)
        open_here = partial(
            open_stage,
            threads=self._threads,
            provider=self._provider,
            spin=self._count_bytes(file) < _SPIN_BELOW,
            alone=file in self._chains,  # by its name it is a graph's own
            kernels=self._kernels,
        )
        if packed is not None:
            with contextlib.suppress(IntegrityError):  # another process may have just deleted it to make room
                return open_here(packed, packed=True)
        return open_here(self._bundle.path(file))

    def _count_bytes(self, file: str) -> int:
        """Bytes of the largest graph that a stage belongs to."""
        return max(sum(self.blobs[graph].values()) for graph, sizes in self.sizes.items() if file in sizes)


def _check_slots(stage: Stage, manifest: Manifest, graph: str) -> None:
    """Refuses a graph whose live inputs are not the manifest's slots in their order: packed factors are found by their place."""
    slots = [name for slots in manifest.live_slots for name in (slots.a, *slots.b)]
    names = [value.name for value in stage.session.get_overridable_initializers()]
    if slots != [name for name in names if name not in (FACTORS, KEEP)]:
        raise IntegrityError(f"the live inputs of {graph} are not those of live_slots, in their order; export the bundle again")


def _count_packed(manifest: Manifest, stages: Sequence[StageEntry]) -> dict[str, int]:
    """Bytes of weights that each stage packs, at the most.

    What several stages map, norms and rotary tables, is packed by none; but a tied embedding is, for the head, which comes last.
    """
    mapped = Counter(blob for stage in stages for blob in stage.blobs)
    return {
        stage.file: sum(manifest.files[blob].size for blob in stage.blobs if mapped[blob] == 1 or stage is stages[-1])
        for stage in stages
    }
