"""The text side of each variant: its tokenizer with its chat template, its end tokens, and its grammars."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgelora_runtime.bundle.tokenizer import Tokenizer
from edgelora_runtime.decode.grammar import Grammars

if TYPE_CHECKING:
    from edgelora_runtime.bundle.choice import Choice
    from edgelora_runtime.bundle.folder import Bundle
    from edgelora_runtime.bundle.manifest import ModelEntry, TextsEntry


@dataclass(frozen=True)
class Texts:
    """The text side of variants. model: the bundle's, with the vocabulary and the end tokens of these variants."""

    tokenizer: Tokenizer
    model: ModelEntry
    grammars: Grammars


class TextSides:
    """The text sides of a bundle: its own, and those that adapters brought. Safe to call from many threads.

    own: the bundle's own text side, read at once. Each other one is read when the first request needs it.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._lock = threading.Lock()
        self.own = _make_texts(Tokenizer(bundle), bundle.manifest.model)
        self._tokenizers: dict[TextsEntry | None, Tokenizer] = {None: self.own.tokenizer}
        self._read_so_far: dict[tuple[TextsEntry | None, ModelEntry], Texts] = {(None, self.own.model): self.own}

    def of(self, choice: Choice) -> Texts:
        """Returns the text side of a variant or mix."""
        entry, model = choice.texts, self._bundle.manifest.find_model(choice.graph)
        with self._lock:
            if (entry, model) not in self._read_so_far:
                self._read_so_far[entry, model] = self._read(entry, model)
            return self._read_so_far[entry, model]

    def clear(self) -> None:
        """Frees what grammars hold. A later call makes it again."""
        with self._lock:
            for texts in self._read_so_far.values():
                texts.grammars.clear()

    def _read(self, entry: TextsEntry | None, model: ModelEntry) -> Texts:
        if entry not in self._tokenizers:
            self._tokenizers[entry] = Tokenizer(self._bundle, entry)
        ends = model if entry is None else replace(model, eos_token_ids=entry.eos_token_ids)
        return _make_texts(self._tokenizers[entry], ends)


def _make_texts(tokenizer: Tokenizer, model: ModelEntry) -> Texts:
    return Texts(tokenizer, model, Grammars(tokenizer, model))
