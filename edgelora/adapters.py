"""Adapters on disk: PEFT LoRA folders, read module by module, and the edgelora.json that says where one comes from."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from edgelora_export.files import read_json
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Set

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PROVENANCE = "edgelora.json"
# Settings of PEFT under which an adapter does something else than to add scale · B · A, always, to one linear layer.
_OTHER_KINDS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(frozen=True)
class Provenance:
    """Where an adapter comes from.

    base_sha256: edgelora_export.base.Base.sha256 of the base. base_quantization: nf4, int4 or none while training.
    data_sha256: of the training file. data_file: where it lies, seen from the adapter's folder; "" where nobody knows.
    init: how A and B began; "composed" for a mix.
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


def write_provenance(folder: Path, provenance: Provenance) -> None:
    """Writes edgelora.json into an adapter's folder."""
    (folder / PROVENANCE).write_text(json.dumps(asdict(provenance), indent=1) + "\n", encoding="utf-8")


def read_provenance(folder: Path) -> Provenance | None:
    """Reads edgelora.json; None where the adapter comes from another tool and has none."""
    if not (folder / PROVENANCE).is_file():
        return None
    value = read_json(folder / PROVENANCE, "train writes it")
    known = fields(Provenance)
    if absent := [field.name for field in known if field.name not in value and field.default is MISSING]:
        raise InputError(f"{folder / PROVENANCE} lacks {', '.join(absent)}; train the adapter again or delete the file")
    return Provenance(**{field.name: value[field.name] for field in known if field.name in value})


@dataclass(frozen=True)
class Adapter:
    """An opened PEFT LoRA adapter: ΔW = scale · B · A for each module that it targets.

    Satisfies edgelora_export's Delta and LowRank.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    provenance: Provenance | None
    shapes: Mapping[str, tuple[int, int, int]]  # per module (N, K, r)

    @classmethod
    def open(cls, folder: Path | str, name: str | None = None) -> Adapter:
        """Opens a folder with adapter_config.json and adapter_model.safetensors.

        Raises InputError for a folder that is no LoRA adapter, and for kinds whose ΔW is not scale · B · A.
        """
        folder = Path(folder)
        label = name or folder.name
        if not folder.is_dir():
            raise InputError(f"adapter {label}: {folder} is not a folder; give a PEFT adapter's")
        config = read_json(folder / CONFIG, f"a PEFT adapter has {CONFIG} and {WEIGHTS}")
        if reasons := _unsupported(config):
            raise InputError(f"adapter {label}: {'; '.join(reasons)}")
        return cls(label, folder, config, read_provenance(folder), _read_shapes(folder / WEIGHTS, label))

    @property
    def modules(self) -> Set[str]:
        return self.shapes.keys()

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(rank for _, _, rank in self.shapes.values())

    def scale(self, module: str) -> float:
        """α/r, or α/√r for rank-stabilized LoRA (arXiv 2312.03732), with the module's own α and r where patterns set them."""
        rank = self.shapes[module][2]
        patterns = self.config.get("alpha_pattern") or {}
        # PEFT's rule: the first pattern that matches a whole dotted ending of the name (peft.utils.get_pattern_key).
        key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
        alpha = self.config["lora_alpha"] if key is None else patterns[key]
        return float(alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank)

    def factors(self, module: str) -> tuple[Floats, Floats]:
        """A float32 (r, K), and B float32 (N, r) with the scale folded in."""
        with safe_open(self.folder / WEIGHTS, framework="numpy") as file:
            a, b = (file.get_tensor(f"base_model.model.{module}.lora_{factor}.weight").astype(np.float32) for factor in "AB")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise InputError(f"adapter {self.name}: {module} holds NaN or infinity; its training diverged")
        return a, b * np.float32(self.scale(module))

    def dense(self, module: str) -> Floats:
        """ΔW float32 (N, K)."""
        a, b = self.factors(module)
        return b @ a

    @cached_property
    def sha256(self) -> str:
        """Identity: SHA-256 over the config's and the weights' bytes."""
        digest = hashlib.sha256()
        for name in (CONFIG, WEIGHTS):
            digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()


def check_same_base(adapters: Mapping[str, Adapter], base_sha256: str | None = None) -> None:
    """Refuses adapters that were trained on different bases, or on another than the given one; names every mismatch.

    An adapter without edgelora.json says nothing of its base's weights; its shapes are then all that can be compared.
    """
    known = {name: adapter.provenance for name, adapter in adapters.items() if adapter.provenance is not None}
    wrong: list[str] = []
    if base_sha256 is None and known:
        first, origin = next(iter(known.items()))
        wrong += [
            f"{name} was trained on {_name_base(item)}, {first} on {_name_base(origin)}"
            for name, item in known.items()
            if item.base_sha256 != origin.base_sha256
        ]
    elif base_sha256 is not None:
        wrong += [
            f"{name} was trained on {_name_base(item)}, this base is {base_sha256[:12]}"
            for name, item in known.items()
            if item.base_sha256 != base_sha256
        ]
    shapes: dict[str, tuple[str, tuple[int, int]]] = {}
    for name, adapter in adapters.items():
        for module, (rows, columns, _) in adapter.shapes.items():
            other, shape = shapes.setdefault(module, (name, (rows, columns)))
            if shape != (rows, columns):
                wrong.append(f"{module} is {rows}x{columns} in {name}, {shape[0]}x{shape[1]} in {other}")
    if wrong:
        shown = "; ".join(wrong[:6]) + (f"; and {len(wrong) - 6} more" if len(wrong) > 6 else "")
        raise InputError(f"adapters of another base do not mix: {shown}")


def _name_base(provenance: Provenance) -> str:
    return f"{provenance.base_name} ({provenance.base_sha256[:12]})"


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    """Why an adapter's ΔW is not scale · B · A on an unchanged base, one reason per setting."""
    reasons = []
    if config.get("peft_type") != "LORA":
        reasons.append(f"peft_type is {config.get('peft_type')!r}; only LORA adapters can be mixed")
    elif not isinstance(config.get("lora_alpha"), int | float):
        reasons.append(f"lora_alpha is {config.get('lora_alpha')!r}, not a number")
    if config.get("use_dora"):
        reasons.append("use_dora is set: DoRA rescales the base's weights, so its change is not a sum")
    if config.get("modules_to_save"):
        reasons.append(f"modules_to_save is {config['modules_to_save']}: whole layers cannot be added up")
    if config.get("fan_in_fan_out"):
        reasons.append("fan_in_fan_out is set: weights of transposed layers are not supported")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        reasons.append("it trains biases, which are not supported")
    reasons += [f"{key} is set: that is not a plain sum on a linear layer" for key in _OTHER_KINDS if config.get(key)]
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        reasons.append(
            f"init_lora_weights is {init!r}, which changes the base; save it converted to plain LoRA "
            "(PEFT's path_initial_model_for_weight_conversion)"
        )
    return reasons


def _read_shapes(path: Path, label: str) -> dict[str, tuple[int, int, int]]:
    if not path.is_file():
        raise InputError(f"adapter {label}: {path} is missing; pickled adapters (.bin) are not read, save as safetensors")
    try:
        with safe_open(path, framework="numpy") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise InputError(f"adapter {label}: {path} is not a readable safetensors file ({error})") from error
    matches = {key: _KEY.fullmatch(key) for key in found}
    if odd := sorted(key for key, match in matches.items() if match is None):
        raise InputError(
            f"adapter {label}: {', '.join(odd[:3])} is no LoRA factor of a linear layer; such tensors are not supported"
        )
    modules = sorted({match["module"] for match in matches.values() if match is not None})
    shapes = {}
    for module in modules:
        a, b = (found.get(f"base_model.model.{module}.lora_{factor}.weight") for factor in "AB")
        if a is None or b is None or len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise InputError(
                f"adapter {label}: the factors of {module} have shapes {a} and {b}; they should be (r, K) and (N, r)"
            )
        shapes[module] = (b[0], a[1], a[0])
    if not shapes:
        raise InputError(f"adapter {label}: {path} holds no LoRA factors")
    return shapes
