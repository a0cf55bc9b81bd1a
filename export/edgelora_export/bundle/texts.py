"""The texts of a bundle: the base's tokenizer, chat templates and end tokens, and those of adapters that bring others."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgelora_export.base.tokenizer import VOCABULARIES, encode_prompt, read_tokenizer
from edgelora_export.texts.ends import find_end_tokens, resolve_end_tokens
from edgelora_export.texts.packing import pack_tokenizer, read_special_tokens, read_templates
from edgelora_export.texts.probes import check_tokenizer
from edgelora_export.weights.publish import write_file
from edgelora_runtime.bundle.manifest import TextsEntry
from edgelora_runtime.bundle.tokenizer import TOKENIZER, TOKENIZER_CONFIG
from edgelora_runtime.errors import InputError
from edgelora_runtime.residency.memory import return_freed_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from edgelora_export.base.base import Base

_CONFIG, _GENERATION_CONFIG = "config.json", "generation_config.json"
_UNWRITTEN_ROLES = ("pad_token", "unk_token")  # no prompt of a byte-level or byte-fallback tokenizer has them


@dataclass(frozen=True)
class Texts:
    """The text side of a base or of an adapter.

    tokenizer: a PreTrainedTokenizerFast. files: as pack_tokenizer packs them, by name. end_tokens: ids. owner: for errors.
    """

    owner: str
    tokenizer: Any
    files: Mapping[str, bytes]
    end_tokens: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Encodes a plain prompt as the bundle will."""
        return encode_prompt(self.tokenizer, text)

    @property
    def templates(self) -> dict[str, bytes]:
        """The chat templates, by file name."""
        return {name: content for name, content in self.files.items() if name not in (TOKENIZER, TOKENIZER_CONFIG)}


@dataclass(frozen=True)
class BundleTexts:
    """The text sides of a bundle.

    own: by adapter, of those that differ from the base's. configs: the base's config files, which other programs read.
    """

    base: Texts
    own: Mapping[str, Texts] = field(default_factory=dict)
    configs: Mapping[str, bytes] = field(default_factory=dict)

    def find(self, adapters: Iterable[str]) -> Texts:
        """Returns the text side of a mix: that of its adapters that bring one, or the base's.

        Raises InputError for adapters that bring different ones, as one prompt cannot have both.
        """
        chosen = self._find_owner(adapters)
        return self.base if chosen is None else self.own[chosen]

    def describe(self, adapters: Iterable[str]) -> TextsEntry | None:
        """Returns the manifest's entry for a mix, None for the base's texts."""
        chosen = self._find_owner(adapters)
        if chosen is None:
            return None
        texts = self.own[chosen]
        names = self._name_files(chosen)
        templates = tuple(names[name] for name in texts.templates)
        return TextsEntry(names[TOKENIZER], names[TOKENIZER_CONFIG], templates, texts.end_tokens)

    def write(self, folder: Path) -> None:
        """Writes all files into a bundle's folder."""
        for name, content in {**self.base.files, **self.configs}.items():
            write_file(folder / name, [content])
        for adapter, texts in self.own.items():
            for name, stored in self._name_files(adapter).items():
                if stored not in self.base.files:
                    write_file(folder / stored, [texts.files[name]])

    def _find_owner(self, adapters: Iterable[str]) -> str | None:
        bringing = [name for name in adapters if name in self.own]
        chosen = next(iter(bringing), None)
        if other := next((name for name in bringing if not _equal(self.own[name], self.own[bringing[0]])), None):
            raise InputError(
                f"adapters {chosen} and {other} bring different tokenizers, chat templates or end tokens, so one variant cannot "
                "mix them; give each a variant of its own, or remove the tokenizer's files beside one of them"
            )
        return chosen

    def _name_files(self, adapter: str) -> dict[str, str]:
        """Returns the file in the bundle by file of an adapter. Files that equal the base's are the base's."""
        texts, names = self.own[adapter], dict[str, str]()
        same_templates = texts.templates == self.base.templates
        for name, content in texts.files.items():
            same = same_templates if name in texts.templates else content == self.base.files.get(name)
            names[name] = name if same else f"{adapter}.{name}"
        return names


def read_bundle_texts(
    base: Base,
    vocab_size: int,
    adapters: Mapping[str, Mapping[str, bytes]] | None = None,
    *,
    vocab_sizes: Mapping[str, int] | None = None,
    end_tokens: Sequence[str | int] | None = None,
) -> BundleTexts:
    """Reads the text sides of a base and of its adapters, and checks that a bundle makes transformers' tokens from them.

    vocab_size: tokens of the model. adapters: the files beside each adapter's weights, by name. vocab_sizes: of adapters that
    change the model's. end_tokens: token texts or ids that replace those found, None for those found.
    Raises InputError for a tokenizer that cannot be used, IntegrityError if it does not survive the export.
    """
    settings = [read_generation_settings(base), base.config]

    def read(texts: Mapping[str, bytes], owner: str, size: int, parent: Texts | None = None) -> Texts:
        tokenizer = read_tokenizer(texts, owner)
        return_freed_memory()  # reading 262144 tokens leaves several hundred MiB, and so does the check
        files = pack_tokenizer(tokenizer, owner)
        check_tokenizer(tokenizer, files, owner)
        return_freed_memory()
        _check_size(tokenizer, size, owner, tokenizer if parent is None else parent.tokenizer)
        ends = find_end_tokens(tokenizer, settings, size)
        return Texts(owner, tokenizer, files, ends if end_tokens is None else resolve_end_tokens(tokenizer, end_tokens, size))

    found = read(base.texts, f"base {base.path}", vocab_size)
    own = {}
    for name, beside in (adapters or {}).items():
        if files := _add_to_base(base, beside):
            texts = read(files, f"adapter {name}", (vocab_sizes or {}).get(name, vocab_size), found)
            if not texts.templates and found.templates:  # an older save without one
                ends = (*texts.end_tokens, *found.end_tokens) if end_tokens is None else texts.end_tokens
                texts = replace(texts, files={**texts.files, **found.templates}, end_tokens=tuple(dict.fromkeys(ends)))
            if not _equal(texts, found):
                own[name] = texts
    return BundleTexts(found, own, {name: base.texts[name] for name in (_CONFIG, _GENERATION_CONFIG) if name in base.texts})


def read_generation_settings(base: Base) -> dict[str, Any]:
    """Reads the settings in generation_config.json that are not null. Returns {} without the file."""
    text = base.texts.get(_GENERATION_CONFIG, b"{}")
    try:
        settings: dict[str, Any] = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"base {base.path}: {_GENERATION_CONFIG} is not a readable JSON object; mend it or delete it") from error
    return {key: value for key, value in settings.items() if value is not None}


def _add_to_base(base: Base, beside: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns the files that make an adapter's text side, {} for an adapter that brings none.

    A vocabulary beside the weights stands alone. A template or special tokens without one change the base's.
    """
    own = {name: content for name, content in beside.items() if _is_of_tokenizer(name)}
    if not own:
        return {}
    if not any(name in own for name in VOCABULARIES):
        return {**base.texts, **own}
    return {**{name: base.texts[name] for name in (_CONFIG,) if name in base.texts}, **own}


def _is_of_tokenizer(name: str) -> bool:
    named = ("added_tokens.json", "special_tokens_map.json", "merges.txt", TOKENIZER_CONFIG, *VOCABULARIES)
    return name in named or name.startswith(("chat_template", "additional_chat_templates/"))


def _equal(one: Texts, other: Texts) -> bool:
    """True if two text sides do the same. A token that only fills up batches makes no difference."""
    parts = []
    for texts in (one, other):
        roles = {role: token for role, token in read_special_tokens(texts.tokenizer).items() if role != "pad_token"}
        parts.append((texts.files[TOKENIZER], roles, texts.templates, sorted(texts.end_tokens)))
    return parts[0] == parts[1]


def _check_size(tokenizer: Any, vocab_size: int, owner: str, parent: Any) -> None:
    """Raises InputError for tokens outside the model's vocabulary that a prompt can have.

    An added token of the base outside it is let through if no template and no role names it: Gemma 3's text models have one, for
    images, and some classes bring a token to pad with. A runtime refuses a prompt that contains it. parent: the base's tokenizer.
    """
    added = {token.content for token in parent.added_tokens_decoder.values()}
    written = "".join(read_templates(tokenizer).values())
    roles = {token for role, token in read_special_tokens(tokenizer).items() if role not in _UNWRITTEN_ROLES}
    outside = sorted(
        (id_, text)
        for text, id_ in tokenizer.get_vocab().items()
        if id_ >= vocab_size and (text not in added or text in roles or text in written)
    )
    if outside:
        shown = ", ".join(f"{text!r} ({id_})" for id_, text in outside[:3]) + (" …" if len(outside) > 3 else "")
        raise InputError(
            f"the tokenizer of {owner} has {len(outside)} tokens outside the model's vocabulary of {vocab_size}: {shown}; "
            "it belongs to another model, or the model's embedding was not resized"
        )
