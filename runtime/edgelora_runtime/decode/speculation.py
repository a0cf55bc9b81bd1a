"""Speculation: whether a request reads draft tokens along, and the reader that does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelora_runtime.bundle.draft_table import TABLE_LIMIT, DraftTable
from edgelora_runtime.decode.drafter import AcceptanceStatistics, Drafter
from edgelora_runtime.decode.reader import Reader, SpeculatingReader
from edgelora_runtime.session.step_costs import MIN_ROWS, StepCosts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgelora_runtime.bundle.choice import Choice
    from edgelora_runtime.bundle.folder import Bundle
    from edgelora_runtime.decode.reader import EstimateCosts
    from edgelora_runtime.decode.request import Request


class DraftTables:
    """A bundle's draft tables, each read the first time it is needed."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._tables: dict[tuple[str, int], DraftTable] = {}  # by file and number of tokens

    def load(self, adapters: Sequence[str], vocab_size: int) -> list[DraftTable]:
        """Returns the tables of those adapters that have one, with only the tokens that a model of vocab_size can read."""
        files = [self._bundle.manifest.adapters[name].draft_table for name in adapters]
        return [self._load_file(file, vocab_size) for file in files if file is not None]

    def clear(self) -> None:
        """Frees the tables. A later request reads them again."""
        self._tables.clear()

    def _load_file(self, file: str, vocab_size: int) -> DraftTable:
        table = self._tables.get((file, vocab_size))
        if table is None:
            raw, manifest = self._bundle.read(file, limit=TABLE_LIMIT), self._bundle.manifest
            largest = max([manifest.model.vocab_size, *(each.vocab_size or 0 for each in manifest.variants.values())])
            table = self._tables[file, vocab_size] = DraftTable.read(raw, file, largest).limit(vocab_size)
        return table


class Speculation:
    """The readers of a bundle's requests, and a record of drafting for each variant and mix.

    tables, make_drafter: the source of draft tokens. estimate: the function that estimates the costs of steps.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        tables: DraftTables | None = None,
        make_drafter: Callable[..., Drafter] = Drafter,
        estimate: EstimateCosts = StepCosts.estimate,
    ) -> None:
        self._bundle = bundle
        self._tables = DraftTables(bundle) if tables is None else tables
        self._make_drafter = make_drafter
        self._estimate = estimate
        self._statistics: dict[tuple[str, ...], AcceptanceStatistics] = {}  # by graph and adapters, whatever their weights

    def open_reader(self, mode: str, choice: Choice, request: Request, plain: Reader) -> Reader:
        """Opens the reader of a request: the plain one, or one that speculates in its place.

        mode: the option `speculation`.
        """
        if mode == "off" or self._bundle.manifest.model.cache == "growing":  # growing caches have no room for draft tokens
            return plain
        adapters = self._find_adapters(choice)
        statistics = self._statistics.setdefault((choice.graph, *adapters), AcceptanceStatistics())
        if mode == "auto" and (plain.model.costs.plain is None or not statistics.recommend()):
            return plain
        tables = self._tables.load(adapters, self._bundle.manifest.find_model(choice.graph).vocab_size)
        drafter = self._make_drafter(request.prompt, tables, statistics, request.end_tokens)
        min_rows = 1 if mode == "auto" else MIN_ROWS
        return SpeculatingReader(plain, drafter, statistics, min_rows=min_rows, estimate=self._estimate)

    def clear(self) -> None:
        """Frees the tables. A later request reads them again."""
        self._tables.clear()

    def _find_adapters(self, choice: Choice) -> list[str]:
        """Returns the adapters that a variant or mix adds, without those that it subtracts."""
        manifest = self._bundle.manifest
        weights = manifest.variants[choice.label].mix if choice.live is None else dict(choice.live)
        return [name for name, weight in weights.items() if weight >= 0 and name in manifest.adapters]
