"""Whether a request's steps read guesses along, and what the guesses are made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelora_runtime.draft_table import TABLE_LIMIT, DraftTable
from edgelora_runtime.drafting import Drafter, HitRates
from edgelora_runtime.reader import Reader, SpeculatingReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora_runtime.bundle import Bundle
    from edgelora_runtime.cache import KVCache
    from edgelora_runtime.choice import Choice
    from edgelora_runtime.generation import Request
    from edgelora_runtime.live import LoraInputs
    from edgelora_runtime.model import Model

SPECULATIONS = ("auto", "on", "off")


class Speculation:
    """A bundle's draft tables, read when they are first asked for, and how guesses did for each variant and mix so far."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._tables: dict[str, DraftTable] = {}  # by file
        self._rates: dict[Choice, HitRates] = {}

    def open_reader(
        self, mode: str, choice: Choice, request: Request, model: Model, cache: KVCache, live: LoraInputs | None
    ) -> Reader:
        """How a request reads: mode is one of SPECULATIONS, as in Runtime.stream(). Caches that grow have no room for guesses."""
        if mode == "off" or self._bundle.manifest.model.cache == "growing":
            return Reader(model, cache, live)
        agrees = model.splits_exactly(live)
        if mode == "auto" and not agrees:
            return Reader(model, cache, live)
        rates = self._rates.setdefault(choice, HitRates())
        drafter = Drafter(request.prompt, self._find_tables(choice), rates, request.end_tokens)
        return SpeculatingReader(model, cache, live, drafter, rates, least_rows=1 if agrees else 2)

    def clear(self) -> None:
        """Frees the tables; a later request reads them again."""
        self._tables.clear()

    def _find_tables(self, choice: Choice) -> Sequence[DraftTable]:
        """Those of the adapters that a variant or mix is made of."""
        manifest = self._bundle.manifest
        weights = manifest.variants[choice.label].mix if choice.live is None else dict(choice.live)
        files = [manifest.adapters[name].drafts for name in weights if name in manifest.adapters]
        return [self._load_table(file) for file in files if file is not None]

    def _load_table(self, file: str) -> DraftTable:
        table = self._tables.get(file)
        if table is None:
            raw = self._bundle.read(file, limit=TABLE_LIMIT)
            table = self._tables[file] = DraftTable.read(raw, file, self._bundle.manifest.model.vocab_size)
        return table
