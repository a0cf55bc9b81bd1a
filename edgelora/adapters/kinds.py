"""ΔW of LoRA kinds that depend on the base's weight: DoRA, PiSSA, OLoRA."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_runtime.bundle.manifest import FLOAT32_MAX

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

# PEFT settings under which an adapter is not a constant change of the weights of the layers that it names.
_OTHER_KINDS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
)
BIASES = ("none", "all", "lora_only")
_FROM_BASE = ("pissa", "olora")  # inits that are functions of the base's weight, so they can be recomputed
_BASE_CHANGING_INITS = re.compile(r"pissa|olora|corda|loftq|lora_ga")


def base_init(config: Mapping[str, Any]) -> str | None:
    """Finds the init that subtracted its factors from the base: "pissa" or "olora".

    Returns None if the base was left unchanged.
    """
    init = config.get("init_lora_weights", True)
    return init.lower() if isinstance(init, str) and init.lower() in _FROM_BASE else None


def unsupported(config: Mapping[str, Any]) -> list[str]:
    """Explains why ΔW cannot be computed from the adapter and the base.

    Returns one reason per setting.
    """
    reasons = []
    if config.get("peft_type") != "LORA":
        reasons.append(f"peft_type is {config.get('peft_type')!r}; only LORA adapters can be mixed")
    elif not _is_number(config.get("lora_alpha")):
        reasons.append(f"lora_alpha is {config.get('lora_alpha')!r}, not a number")
    if config.get("bias", "none") not in BIASES:
        reasons.append(f"bias is {config.get('bias')!r}; it should be one of {', '.join(BIASES)}")
    if isinstance(rank := config.get("r", 1), bool) or not isinstance(rank, int | None) or rank == 0:
        reasons.append(f"r is {rank!r}; a rank is a whole number, 1 or more")
    if config.get("target_modules") == [] and not config.get("trainable_token_indices"):
        reasons.append("target_modules is empty, so that nothing is adapted")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        reasons.append(f"modules_to_save is {saved!r}, not a list of names")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(_is_number(value) for value in patterns.values()):
            reasons.append(f"{key} is not a table of numbers by pattern")
    reasons += [f"{key} is set: that is not a plain change of a linear layer's weight" for key in _OTHER_KINDS if config.get(key)]
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and _BASE_CHANGING_INITS.match(init.lower()) and base_init(config) is None:
        why = "by a random decomposition" if init.lower().startswith("pissa_niter") else "by data or a quantizer not stored here"
        reasons.append(
            f"init_lora_weights is {init!r}, which changes the base {why}; save it converted to plain LoRA "
            "(PEFT's path_initial_model_for_weight_conversion)"
        )
    return reasons


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX


def initial_product(kind: str, weight: Floats, rank: int, scale: float) -> Floats:
    """Recomputes the product that PEFT subtracted from a base's weight (N, K) on initialization.

    pissa: the best approximation of that rank (arXiv 2404.02948). olora: scale times the product of Q's first columns and R's
    first rows (arXiv 2406.01775). Libraries choose the signs of singular vectors and of Q's columns, but they cancel in the
    product.
    """
    if kind == "pissa":
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        product: Floats = (u[:, :rank] * s[:rank]) @ vt[:rank]
    else:
        q, r = np.linalg.qr(weight)
        product = np.float32(scale) * (q[:, :rank] @ r[:rank])
    return product


def rescale_rows(weight: Floats, magnitude: Floats) -> Floats:
    """Scales each row of W + ΔW to its trained norm, magnitude (N,).

    This is DoRA's equation 5 (arXiv 2402.09353).
    """
    rescaled: Floats = weight * (magnitude / np.linalg.norm(weight, axis=1))[:, None]
    return rescaled
