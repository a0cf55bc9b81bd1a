"""Whether a request's steps read guesses along, and what the guesses are made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelora_runtime.bundle.draft_table import TABLE_LIMIT, DraftTable
from edgelora_runtime.decode.drafter import Drafter, Experience
from edgelora_runtime.decode.reader import Reader, SpeculatingReader
from edgelora_runtime.session.step_costs import LEAST_ROWS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora_runtime.bundle.choice import Choice
    from edgelora_runtime.bundle.folder import Bundle
    from edgelora_runtime.decode.loop import Request
    from edgelora_runtime.session.factors import LoraInputs
    from edgelora_runtime.session.kv_cache import KVCache
    from edgelora_runtime.session.model import Model


class Speculation:
    """A bundle's draft tables, read when they are first asked for, and how guesses did so far."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._tables: dict[str, DraftTable] = {}  # by file
        self._experiences: dict[tuple[str, ...], Experience] = {}  # by graph and adapters, whatever they weigh

    def open_reader(
        self, mode: str, choice: Choice, request: Request, model: Model, cache: KVCache, live: LoraInputs | None
    ) -> Reader:
        """How a request reads: mode is the option speculation. Caches that grow have no room for guesses."""
        if mode == "off" or self._bundle.manifest.model.cache == "growing":
            return Reader(model, cache, live)
        adapters = self._find_adapters(choice)
        experience = self._experiences.setdefault((choice.graph, *adapters), Experience())
        if mode == "auto" and (model.costs.plain is None or not experience.recommend()):
            return Reader(model, cache, live)
        drafter = Drafter(request.prompt, self._find_tables(adapters), experience, request.end_tokens)
        return SpeculatingReader(model, cache, live, drafter, experience, 1 if mode == "auto" else LEAST_ROWS)

    def clear(self) -> None:
        """Frees the tables; a later request reads them again."""
        self._tables.clear()

    def _find_adapters(self, choice: Choice) -> list[str]:
        """Those that a variant or mix adds, rather than takes away."""
        manifest = self._bundle.manifest
        weights = manifest.variants[choice.label].mix if choice.live is None else dict(choice.live)
        return [name for name, weight in weights.items() if weight >= 0 and name in manifest.adapters]

    def _find_tables(self, adapters: Sequence[str]) -> list[DraftTable]:
        files = [self._bundle.manifest.adapters[name].drafts for name in adapters]
        return [self._load_table(file) for file in files if file is not None]

    def _load_table(self, file: str) -> DraftTable:
        table = self._tables.get(file)
        if table is None:
            raw = self._bundle.read(file, limit=TABLE_LIMIT)
            table = self._tables[file] = DraftTable.read(raw, file, self._bundle.manifest.model.vocab_size)
        return table
