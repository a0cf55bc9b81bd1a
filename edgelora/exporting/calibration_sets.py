"""Calibration sets of a recipe's variants, gathered once per set of adapters."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from edgelora.adapters.folder import find_template_options
from edgelora.data.calibration import GENERAL_SHARE, find_training_data, gather_calibration
from edgelora.data.encode_rows import RowEncoder
from edgelora.in_torch.train import load_tokenizer as load_base_tokenizer
from edgelora_runtime.bundle.tokenizer import TOKENIZER, load_tokenizer
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from tokenizers import Tokenizer as RustTokenizer

    from edgelora.adapters.folder import Adapter
    from edgelora.data.chats import Chat
    from edgelora_export.base.base import Base
    from edgelora_export.decoder.description import Decoder
    from edgelora_export.plan.calibration import Calibration


class CalibrationSets:
    """Calibration sets by the adapters that they are for.

    general: the user's file, None without one. own_text: whether to add the general text that comes with edgelora.
    """

    def __init__(
        self, base: Base, decoder: Decoder, adapters: Mapping[str, Adapter], *, general: Path | None, own_text: bool
    ) -> None:
        self._base, self._adapters, self._general, self._own_text = base, adapters, general, own_text
        self._widest = max(linear.columns for linear in decoder.linears)
        self._sets: dict[frozenset[str], Calibration] = {}

    def of(self, names: Iterable[str]) -> Calibration:
        """The set for a mix of these adapters."""
        key = frozenset(names)
        if key not in self._sets:
            found = [find_training_data(adapter) for name, adapter in self._adapters.items() if name in key]
            trained_on = [path for path in found if path is not None]
            files = [*trained_on, *([self._general] if self._general else [])]
            share = 0.0 if not self._own_text else GENERAL_SHARE if trained_on else 1.0
            self._sets[key] = gather_calibration(files, self.encode, widest=self._widest, general_share=share)
        return self._sets[key]

    def encode(self, item: str | Chat) -> list[int]:
        """Encodes a text or a conversation. Raises InputError if the base has no tokenizer.json, or no template for messages."""
        return list(self._tokenizer.encode(item).ids) if isinstance(item, str) else self._encode_chat(item)

    @cached_property
    def _encode_chat(self) -> RowEncoder:
        return RowEncoder(load_base_tokenizer(self._base), find_template_options(self._adapters))

    @cached_property
    def _tokenizer(self) -> RustTokenizer:
        if TOKENIZER not in self._base.texts:
            raise InputError(f"base {self._base.path} has no {TOKENIZER}; save its fast tokenizer there (save_pretrained does)")
        return load_tokenizer(self._base.texts[TOKENIZER])
