"""Calibration sets of a recipe's variants, gathered once per set of adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelora.adapters.folder import find_template_options
from edgelora.data.calibration import GENERAL_SHARE, find_training_data, gather_calibration
from edgelora.data.encode_rows import RowEncoder

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from edgelora.adapters.folder import Adapter
    from edgelora_export.bundle.texts import BundleTexts, Texts
    from edgelora_export.decoder.description import Decoder
    from edgelora_export.plan.calibration import Calibration


class CalibrationSets:
    """Calibration sets by the adapters that they are for, in tokens of the tokenizer that a variant of these adapters has.

    general: the user's file, None without one. own_text: whether to add the general text that comes with edgelora.
    """

    def __init__(
        self, texts: BundleTexts, decoder: Decoder, adapters: Mapping[str, Adapter], *, general: Path | None, own_text: bool
    ) -> None:
        self._texts, self._adapters, self._general, self._own_text = texts, adapters, general, own_text
        self._widest = max(linear.columns for linear in decoder.linears)
        self._sets: dict[tuple[frozenset[str], str], Calibration] = {}

    def of(self, names: Iterable[str]) -> Calibration:
        """The set for a mix of these adapters."""
        key = frozenset(names)
        return self._gather(key, self._texts.find(sorted(key)))

    def of_all(self) -> Calibration:
        """The set for the bare base: the data of all adapters, in tokens of the base's own tokenizer."""
        return self._gather(frozenset(self._adapters), self._texts.base)

    def _gather(self, names: frozenset[str], texts: Texts) -> Calibration:
        key = names, texts.owner
        if key not in self._sets:
            found = [find_training_data(adapter) for name, adapter in self._adapters.items() if name in names]
            trained_on = [path for path in found if path is not None]
            files = [*trained_on, *([self._general] if self._general else [])]
            encode = RowEncoder(texts.tokenizer, find_template_options(self._adapters))
            share = 0.0 if not self._own_text else GENERAL_SHARE if trained_on else 1.0
            self._sets[key] = gather_calibration(files, encode, widest=self._widest, general_share=share)
        return self._sets[key]
