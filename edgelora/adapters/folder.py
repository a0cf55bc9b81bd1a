"""Adapters on disk: PEFT LoRA folders, and edgelora.json with their origin.

Weights are read module by module.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes as ml_dtypes  # numpy knows bfloat16 only once this is imported
import numpy as np
from safetensors import SafetensorError, safe_open

from edgelora.adapters.kinds import base_init, initial_product, rescale_rows, unsupported
from edgelora_export.base.files import read_json
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Set

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PROVENANCE = "edgelora.json"
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?P<kind>lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector|(base_layer\.)?weight)"
)
_FACTORS = ("lora_A.weight", "lora_B.weight")
_EMBEDDING_FACTORS = ("lora_embedding_B", "lora_embedding_A")  # an embedding's ΔW is (B·A)ᵀ, so A and B swap
_MAGNITUDE = "lora_magnitude_vector"
_WHOLE = ("weight", "base_layer.weight")  # a layer saved whole, which replaces the base's


@dataclass(frozen=True)
class Provenance:
    """The origin of an adapter.

    base_sha256: hash of the base's weights, as Base.sha256. base_quantization: nf4, int4 or none during training, or "mixed" for
    a mix of adapters that differ in it. data_sha256: hash of the training file. data_file: its path relative to the adapter's
    folder, or "" if unknown. init: how A and B were initialized, or "composed: …" or "learned: …" for a mix.
    rows_cut, rows_left_out: of data_rows, those that were cut to the maximum length, and those with nothing to learn within it.
    template_options: what the chat template got in training beside the messages.
    """

    base_name: str
    base_sha256: str
    base_quantization: str
    data_sha256: str
    data_rows: int
    init: str
    seed: int
    rank: int
    alpha: float
    steps: int
    learning_rate: float
    data_file: str = ""
    rows_cut: int = 0
    rows_left_out: int = 0
    template_options: Mapping[str, Any] = field(default_factory=dict)


def write_provenance(folder: Path, provenance: Provenance) -> None:
    """Writes edgelora.json into an adapter's folder."""
    (folder / PROVENANCE).write_text(json.dumps(asdict(provenance), indent=1) + "\n", encoding="utf-8")


def read_provenance(folder: Path) -> Provenance | None:
    """Reads edgelora.json. Returns None for an adapter of another tool, which has none."""
    if not (folder / PROVENANCE).is_file():
        return None
    value = read_json(folder / PROVENANCE, "train writes it")
    known = fields(Provenance)
    required = [each.name for each in known if each.default is MISSING and each.default_factory is MISSING]
    if absent := [name for name in required if name not in value]:
        raise InputError(f"{folder / PROVENANCE} lacks {', '.join(absent)}; train the adapter again or delete the file")
    return Provenance(**{each.name: value[each.name] for each in known if each.name in value})


def find_template_options(adapters: Mapping[str, Adapter], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns what the chat template gets beside messages: what the adapters were trained with where they agree, and `given`."""
    trained = [adapter.provenance.template_options for adapter in adapters.values() if adapter.provenance is not None]
    names = dict.fromkeys(name for options in trained for name in options)
    agreed = {name: trained[0][name] for name in names if all(options.get(name) == trained[0].get(name) for options in trained)}
    return {**agreed, **(given or {})}


@dataclass(frozen=True)
class Adapter:
    """An opened PEFT LoRA adapter.

    ΔW is scale · B · A for each target module, or what its kind (DoRA, PiSSA, …) defines.
    Satisfies edgelora_export's Delta, and LowRank for modules where why_not_low_rank() is empty.
    shapes: per module (N, K, r), with r = 0 for a layer saved whole. kinds: the tensors that the file holds for each module.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    provenance: Provenance | None
    shapes: Mapping[str, tuple[int, int, int]]
    kinds: Mapping[str, frozenset[str]]

    @classmethod
    def open(cls, folder: Path | str, name: str | None = None) -> Adapter:
        """Opens a folder with adapter_config.json and adapter_model.safetensors.

        Raises InputError for a folder that is not a LoRA adapter, and for kinds whose ΔW does not follow from it and the base.
        """
        folder = Path(folder)
        label = name or folder.name
        if not folder.is_dir():
            raise InputError(f"adapter {label}: {folder} is not a folder; give a PEFT adapter's folder")
        config = read_json(folder / CONFIG, f"a PEFT adapter has {CONFIG} and {WEIGHTS}")
        if reasons := unsupported(config):
            raise InputError(f"adapter {label}: {'; '.join(reasons)}")
        provenance = read_provenance(folder)
        if (init := base_init(config)) and provenance is not None and provenance.base_quantization != "none":
            raise InputError(
                f"adapter {label}: init_lora_weights is {init!r} on a base held as {provenance.base_quantization}: what it "
                "subtracts from rounded weights cannot be recomputed exactly; save it converted to plain LoRA "
                "(PEFT's path_initial_model_for_weight_conversion)"
            )
        return cls(label, folder, config, provenance, *_read_shapes(folder / WEIGHTS, label, config))

    @property
    def modules(self) -> Set[str]:
        return self.shapes.keys()

    @property
    def rank(self) -> int:
        """The largest rank over the modules."""
        return max(rank for _, _, rank in self.shapes.values())

    def scale(self, module: str) -> float:
        """Returns α/r, or α/√r for rank-stabilized LoRA (arXiv 2312.03732).

        Patterns in the config may set a module's own α and r.
        """
        rank = self.shapes[module][2]
        patterns = self.config.get("alpha_pattern") or {}
        # PEFT's rule: the first pattern that matches a whole dotted suffix of the name (peft.utils.get_pattern_key).
        key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
        alpha = self.config["lora_alpha"] if key is None else patterns[key]
        return float(alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank)

    def why_not_low_rank(self, module: str) -> str:
        """Explains why a module's ΔW is not the product of the stored factors.

        Returns "" if it is.
        """
        kinds = self.kinds[module]
        if not kinds.isdisjoint(_WHOLE):
            return "a whole layer that it saves"
        if _MAGNITUDE in kinds:
            return "DoRA"
        return base_init(self.config) or ""

    def is_embedding(self, module: str) -> bool:
        return not self.kinds[module].isdisjoint(_EMBEDDING_FACTORS)

    def factors(self, module: str) -> tuple[Floats, Floats]:
        """Returns A, float32 (r, K), and B, float32 (N, r), scale included."""
        if reason := self.why_not_low_rank(module):
            raise InputError(f"adapter {self.name}: {module} is {reason}, no product of two factors; export it merged")
        return self._factors(module)

    def dense(self, module: str, weight: Floats | None = None) -> Floats:
        """Returns ΔW, float32 (N, K).

        weight: the base's, (N, K). Modules that are not low-rank need it.
        """
        reason = self.why_not_low_rank(module)
        if not reason:
            a, b = self._factors(module)
            return b @ a
        if weight is None:
            raise InputError(
                f"adapter {self.name}: {module} is {reason}, whose change depends on the base's weights; "
                "use it in a merged variant of edgelora export, which reads them"
            )
        kinds = self.kinds[module]
        changed = next((self._tensor(module, kind) for kind in _WHOLE if kind in kinds), weight)
        if self.shapes[module][2]:
            if init := base_init(self.config):
                changed = changed - initial_product(init, weight, self.shapes[module][2], self.scale(module))
            a, b = self._factors(module)
            changed = changed + b @ a
        if _MAGNITUDE in kinds:
            changed = rescale_rows(changed, self._tensor(module, _MAGNITUDE).reshape(-1))
        return changed - weight

    def _factors(self, module: str) -> tuple[Floats, Floats]:
        if self.is_embedding(module):
            a, b = (self._tensor(module, kind).T for kind in _EMBEDDING_FACTORS)
        else:
            a, b = (self._tensor(module, kind) for kind in _FACTORS)
        return a, b * np.float32(self.scale(module))

    def _tensor(self, module: str, kind: str) -> Floats:
        with safe_open(self.folder / WEIGHTS, framework="numpy") as file:
            values: Floats = file.get_tensor(f"base_model.model.{module}.{kind}").astype(np.float32)
        if not np.isfinite(values).all():
            raise InputError(f"adapter {self.name}: {module} holds NaN or infinity; its training diverged")
        return values

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the bytes of the config and the weights."""
        digest = hashlib.sha256()
        for name in (CONFIG, WEIGHTS):
            digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()


def _read_shapes(
    path: Path, label: str, config: Mapping[str, Any]
) -> tuple[dict[str, tuple[int, int, int]], dict[str, frozenset[str]]]:
    """Reads (N, K, r) per module, and the tensors that the file holds for it."""
    if not path.is_file():
        raise InputError(f"adapter {label}: {path} is missing; pickled adapters (.bin) are not supported, save it as safetensors")
    try:
        with safe_open(path, framework="numpy") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise InputError(f"adapter {label}: {path} is not a readable safetensors file ({error})") from error
    tensors: dict[str, dict[str, tuple[int, ...]]] = {}
    odd = []
    for key, shape in found.items():
        match = _KEY.fullmatch(key)
        if match is None or (match["kind"] == _MAGNITUDE and not config.get("use_dora")) or not _is_matrix(match["kind"], shape):
            odd.append(key)
        else:
            tensors.setdefault(match["module"], {})[match["kind"]] = shape
    if odd:
        raise InputError(
            f"adapter {label}: {', '.join(sorted(odd)[:3])} is neither a LoRA factor of a linear layer or "
            "an embedding nor the weight of a layer saved whole; such tensors are not supported"
        )
    if not tensors:
        raise InputError(f"adapter {label}: {path} holds no LoRA factors")
    whole = [module for module, kinds in tensors.items() if not kinds.keys().isdisjoint(_WHOLE)]
    names = config.get("modules_to_save") or ()
    if lost := [name for name in names if not any(f".{module}".endswith(f".{name}") for module in whole)]:
        raise InputError(f"adapter {label}: modules_to_save names {', '.join(lost)}, but {path.name} has no weight for it")
    shapes = {module: _read_shape(module, tensors[module], label, config) for module in sorted(tensors)}
    return shapes, {module: frozenset(tensors[module]) for module in shapes}


def _is_matrix(kind: str, shape: tuple[int, ...]) -> bool:
    return kind == _MAGNITUDE or kind not in _WHOLE or len(shape) == 2


def _read_shape(
    module: str, tensors: Mapping[str, tuple[int, ...]], label: str, config: Mapping[str, Any]
) -> tuple[int, int, int]:
    embedding = any(kind in tensors for kind in _EMBEDDING_FACTORS)
    whole = next((tensors[kind] for kind in _WHOLE if kind in tensors), None)
    a, b = (tensors.get(kind) for kind in (_EMBEDDING_FACTORS if embedding else _FACTORS))
    if whole is not None and a is None and b is None:
        return whole[0], whole[1], 0
    if a is not None and b is not None and embedding:
        a, b = a[::-1], b[::-1]
    if a is None or b is None or len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise InputError(f"adapter {label}: the factors of {module} have shapes {a} and {b}; they should be (r, K) and (N, r)")
    if config.get("use_dora") and (embedding or int(np.prod(tensors.get(_MAGNITUDE, (0,)))) != b[0]):
        raise InputError(f"adapter {label}: use_dora is set, but {module} has no magnitude vector with one entry per output")
    if whole not in (None, (b[0], a[1])):
        raise InputError(f"adapter {label}: {module} is saved with shape {whole}, but its factors give {(b[0], a[1])}")
    return b[0], a[1], a[0]
