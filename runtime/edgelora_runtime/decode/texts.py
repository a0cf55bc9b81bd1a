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
    """The text side of variants. model: the bundle's, with the end tokens of these variants."""

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
        self.own = self._read(None)
        self._read_so_far: dict[TextsEntry | None, Texts] = {None: self.own}

    def of(self, choice: Choice) -> Texts:
        """Returns the text side of a variant or mix."""
        with self._lock:
            found = self._read_so_far.get(choice.texts)
            if found is None:
                found = self._read_so_far[choice.texts] = self._read(choice.texts)
            return found

    def clear(self) -> None:
        """Frees what grammars hold. A later call makes it again."""
        with self._lock:
            for texts in self._read_so_far.values():
                texts.grammars.clear()

    def _read(self, entry: TextsEntry | None) -> Texts:
        tokenizer = Tokenizer(self._bundle, entry)
        model = self._bundle.manifest.model
        if entry is not None:
            model = replace(model, eos_token_ids=entry.eos_token_ids)
        return Texts(tokenizer, model, Grammars(tokenizer, model))
