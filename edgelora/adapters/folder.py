"""Adapters: LoRA factors and layers saved whole, read module by module from a PEFT or MLX folder or a GGUF file."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.adapters.coverage import list_gaps
from edgelora.adapters.gguf_file import SUFFIX, is_gguf, open_gguf
from edgelora.adapters.kinds import base_init, initial_product, rescale_rows, unsupported
from edgelora.adapters.mlx_folder import is_mlx, open_mlx
from edgelora.adapters.names import (
    EMBEDDING,
    EMBEDDING_A,
    EMBEDDING_B,
    FACTOR_BIAS,
    HEAD,
    MAGNITUDE,
    SAVED_BIASES,
    TOKENS,
    WHOLE,
    A,
    B,
)
from edgelora.adapters.patterns import find_pattern
from edgelora.adapters.peft_folder import CONFIG as CONFIG  # re-exported
from edgelora.adapters.peft_folder import WEIGHTS as WEIGHTS
from edgelora.adapters.peft_folder import open_peft
from edgelora.adapters.provenance import PROVENANCE as PROVENANCE
from edgelora.adapters.provenance import TRAINED_ON
from edgelora.adapters.provenance import Provenance as Provenance
from edgelora.adapters.provenance import read_provenance as read_provenance
from edgelora.adapters.provenance import write_provenance as write_provenance
from edgelora.adapters.shapes import read_shapes, token_rows
from edgelora_export.base.files import look_up, read_json
from edgelora_export.plan.variants import Delta
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Set

    from numpy.typing import NDArray

    from edgelora.adapters.tensors import AdapterSource

    Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Adapter(Delta):
    """An opened LoRA adapter.

    ΔW is scale · B · A for each target module, or what its kind (DoRA, PiSSA, …) defines.
    Satisfies edgelora_export's LowRank, too, for modules where why_not_low_rank() is empty.
    folder: its folder or GGUF file. shapes: per module (N, K, r), with r = 0 for a layer saved whole, and N = 0 where only the
    rows of some tokens change. trained_on: nf4, int4, none or mixed, the base's form during training, None if nothing tells.
    """

    name: str
    folder: Path
    source: AdapterSource
    shapes: Mapping[str, tuple[int, int, int]]
    trained_on: str | None

    @classmethod
    def open(
        cls,
        folder: Path | str,
        name: str | None = None,
        *,
        base: Mapping[str, Any] | None = None,
        trained_on: str | None = None,
    ) -> Adapter:
        """Opens a PEFT folder, an MLX folder or a GGUF file.

        base: the config of its base, which a GGUF file needs whose rows are ordered by heads. trained_on: nf4, int4 or none, for
        an adapter without edgelora.json. Raises InputError for what is not a LoRA adapter, for kinds whose ΔW does not follow
        from it and the base, and for a trained_on that edgelora.json contradicts.
        """
        folder = Path(folder)
        label = name or (folder.stem if folder.suffix == SUFFIX else folder.name)
        source = _open_source(folder, label, base)
        if reasons := unsupported(source.config):
            raise InputError(f"adapter {label}: {'; '.join(reasons)}")
        held = _find_trained_on(source.provenance, trained_on, label)
        if (init := base_init(source.config)) and held not in (None, "none"):
            raise InputError(
                f"adapter {label}: init_lora_weights is {init!r} on a base held as {held}: what it "
                "subtracts from rounded weights cannot be recomputed exactly; save it converted to plain LoRA "
                "(PEFT's path_initial_model_for_weight_conversion)"
            )
        return cls(label, folder, source, read_shapes(source.tensors, label, source.config), held)

    @property
    def config(self) -> Mapping[str, Any]:
        """Its config, in the keys of PEFT's."""
        return self.source.config

    @property
    def provenance(self) -> Provenance | None:
        """Its edgelora.json, None for an adapter of another tool."""
        return self.source.provenance

    @property
    def modules(self) -> Set[str]:
        return self.shapes.keys()

    @cached_property
    def biased(self) -> Set[str]:
        """Modules to whose bias it adds."""
        return {
            module
            for module, held in self.source.tensors.shapes.items()
            if not held.keys().isdisjoint((FACTOR_BIAS, *SAVED_BIASES))
        }

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding and the head that it brings, None if it saves neither whole."""
        return next((self.shapes[module][0] for module in (EMBEDDING, HEAD) if self._is_whole(module)), None)

    @cached_property
    def ties_vocab(self) -> bool:
        """True if its change of the embedding is the head's too, on a base that ties them.

        PEFT ties them for trainable tokens of the embedding, and where ensure_weight_tying is set. After a resize it saves both,
        which are then equal.
        """
        if self.config.get("ensure_weight_tying"):
            return bool({EMBEDDING, HEAD} & self.modules)
        if EMBEDDING in self.modules and HEAD not in self.modules:
            return TOKENS in self._kinds(EMBEDDING)
        whole = self._is_whole(EMBEDDING) and self._is_whole(HEAD)
        if not whole or self.shapes[EMBEDDING][2] or self.shapes[HEAD][2]:
            return False
        embedding_has_rows, head_has_rows = (TOKENS in self._kinds(module) for module in (EMBEDDING, HEAD))
        if embedding_has_rows != head_has_rows:
            return embedding_has_rows
        if head_has_rows and not np.array_equal(self._tensor(EMBEDDING, TOKENS), self._tensor(HEAD, TOKENS)):
            return False
        return bool(np.array_equal(self._whole(EMBEDDING), self._whole(HEAD)))

    @property
    def rank(self) -> int:
        """The largest rank over the modules."""
        return max(rank for _, _, rank in self.shapes.values())

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What its config names and its file lacks, one line each."""
        origins = self.source.tensors.origins
        return (*self.source.notes, *list_gaps(self.config, [origins[module] for module in self.modules]))

    def scale(self, module: str) -> float:
        """Returns α/r, or α/√r for rank-stabilized LoRA (arXiv 2312.03732).

        Patterns in the config may set a module's own α.
        """
        rank = self.shapes[module][2]
        patterns = self.config.get("alpha_pattern") or {}
        key = find_pattern(patterns, self.source.tensors.origins[module])
        alpha = self.config["lora_alpha"] if key is None else patterns[key]
        return float(alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank)

    def why_not_low_rank(self, module: str) -> str:
        """Explains why a module's ΔW is not the product of the stored factors.

        Returns "" if it is.
        """
        kinds = self._kinds(module)
        if TOKENS in kinds:
            return "the embedding of some tokens"
        if not kinds.isdisjoint(WHOLE):
            return "a whole layer that it saves"
        if MAGNITUDE in kinds:
            return "DoRA"
        return base_init(self.config) or ""

    def is_embedding(self, module: str) -> bool:
        return not self._kinds(module).isdisjoint((EMBEDDING_A, EMBEDDING_B))

    def factors(self, module: str) -> tuple[Floats, Floats]:
        """Returns A, float32 (r, K), and B, float32 (N, r), scale included."""
        if reason := self.why_not_low_rank(module):
            raise InputError(f"adapter {self.name}: {module} is {reason}, no product of two factors; export it merged")
        return self._factors(module)

    def dense(self, module: str, weight: Floats | None = None) -> Floats:
        """Returns ΔW, float32 (N, K).

        weight: the base's, (N, K). Modules that are not low-rank need it. For an embedding or head of another vocabulary it is
        cut, or padded with rows of zeros, to vocab_size rows.
        """
        reason = self.why_not_low_rank(module)
        if not reason:
            a, b = self._factors(module)
            with np.errstate(all="ignore"):
                product: Floats = b @ a
                if np.isfinite(product.sum()):  # one pass: NaN and infinity stay in a sum
                    return product
            raise InputError(f"adapter {self.name}: the change of {module} is larger than float32 holds; check lora_alpha")
        if weight is None:
            raise InputError(
                f"adapter {self.name}: {module} is {reason}, whose change depends on the base's weights; "
                "use it in a merged variant of edgelora export, which reads them"
            )
        kinds, (_, _, rank) = self._kinds(module), self.shapes[module]
        changed = self._whole(module) if self._is_whole(module) else weight
        if changed.shape != weight.shape:
            sizes = ", ".join(
                f"{rows}x{columns} in {where}"
                for (rows, columns), where in ((changed.shape, self.name), (weight.shape, "the base"))
            )
            raise InputError(f"adapters of another base: {module} is {sizes}")
        if rank:
            if init := base_init(self.config):
                changed = changed - initial_product(init, weight, rank, self.scale(module))
            a, b = self._factors(module)
            changed = changed + b @ a
        if MAGNITUDE in kinds:
            changed = rescale_rows(changed, self._tensor(module, MAGNITUDE).reshape(-1))
        if TOKENS in kinds:
            changed = self._replace_tokens(module, changed)
        return changed - weight

    def bias(self, module: str, base_bias: Floats | None) -> Floats:
        """Returns Δb, float32 (N,), of a module in `biased`.

        base_bias: the base's own (N,), which a bias saved whole replaces. None if the base has none.
        """
        kinds = self._kinds(module)
        parts = [self._tensor(module, FACTOR_BIAS) * np.float32(self.scale(module))] if FACTOR_BIAS in kinds else []
        if saved := [kind for kind in SAVED_BIASES if kind in kinds]:
            parts.append(self._tensor(module, saved[0]) - (0 if base_bias is None else base_bias))
        change: Floats = np.sum(parts, axis=0, dtype=np.float32)
        return change

    def _kinds(self, module: str) -> Set[str]:
        return self.source.tensors.shapes[module].keys()

    def _is_whole(self, module: str) -> bool:
        return module in self.modules and not self._kinds(module).isdisjoint(WHOLE)

    def _whole(self, module: str) -> Floats:
        return self._tensor(module, next(kind for kind in WHOLE if kind in self._kinds(module)))

    def _replace_tokens(self, module: str, weight: Floats) -> Floats:
        rows = token_rows(module, self.source.tensors.origins[module], self.config)
        if max(rows, default=0) >= len(weight):
            raise InputError(
                f"adapter {self.name}: trainable_token_indices names token {max(rows)}, but {module} has {len(weight)} rows; "
                "it was trained on a larger vocabulary"
            )
        changed = weight.copy()
        changed[list(rows)] = self._tensor(module, TOKENS)
        return changed

    def _factors(self, module: str) -> tuple[Floats, Floats]:
        if self.is_embedding(module):
            a, b = (self._tensor(module, kind).T for kind in (EMBEDDING_B, EMBEDDING_A))
        else:
            a, b = (self._tensor(module, kind) for kind in (A, B))
        with np.errstate(over="ignore"):
            scaled = b * np.float32(self.scale(module))
        if not np.isfinite(scaled).all():
            raise InputError(f"adapter {self.name}: the scale of {module} makes B larger than float32 holds; check lora_alpha")
        return a, scaled

    def _tensor(self, module: str, kind: str) -> Floats:
        values: Floats = self.source.tensors.read(module, kind).astype(np.float32)
        if not np.isfinite(values).all():
            raise InputError(f"adapter {self.name}: {module} holds NaN or infinity; its training diverged")
        return values

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the bytes of the config and the weights."""
        digest = hashlib.sha256()
        for path in self.source.files:
            digest.update(path.read_bytes())
        return digest.hexdigest()


def find_template_options(adapters: Mapping[str, Adapter], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns what the chat template gets beside messages: what the adapters were trained with where they agree, and `given`."""
    trained = [adapter.provenance.template_options for adapter in adapters.values() if adapter.provenance is not None]
    names = dict.fromkeys(name for options in trained for name in options)
    agreed = {name: trained[0][name] for name in names if all(options.get(name) == trained[0].get(name) for options in trained)}
    return {**agreed, **(given or {})}


def open_adapters(
    folders: Mapping[str, Path | str],
    *,
    base: Mapping[str, Any] | None = None,
    trained_on: Mapping[str, str] | None = None,
    on_note: Callable[[str], None] = lambda note: None,
) -> dict[str, Adapter]:
    """Opens adapters, given as name → folder or file, and says through on_note what they name and lack.

    base, trained_on: as in Adapter.open, the latter by adapter.
    """
    opened = {}
    for name, folder in folders.items():
        opened[name] = Adapter.open(folder, name, base=base, trained_on=(trained_on or {}).get(name))
        for note in opened[name].notes:
            on_note(f"adapter {name}: {note}")
    return opened


def _open_source(folder: Path, label: str, base: Mapping[str, Any] | None) -> AdapterSource:
    look_up(folder)
    if is_gguf(folder):
        return open_gguf(folder, label, base)
    if not folder.is_dir():
        kind = "exists, but is no GGUF file" if folder.is_file() else "is not a folder"
        raise InputError(f"adapter {label}: {folder} {kind}; give a PEFT or MLX adapter's folder, or a GGUF file")
    config = read_json(folder / CONFIG, f"a PEFT adapter has {CONFIG} and {WEIGHTS}")
    return open_mlx(folder, label, config) if is_mlx(config) else open_peft(folder, label, config)


def _find_trained_on(provenance: Provenance | None, said: str | None, label: str) -> str | None:
    if said is not None and said not in TRAINED_ON:
        raise InputError(f"adapter {label}: trained_on = {said!r}; use one of {', '.join(TRAINED_ON)}")
    if provenance is None:
        return said
    if said not in (None, provenance.base_quantization):
        raise InputError(
            f"adapter {label}: trained_on = {said!r}, but its {PROVENANCE} says {provenance.base_quantization!r}; "
            "leave trained_on out"
        )
    return provenance.base_quantization
