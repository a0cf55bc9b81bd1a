"""Finds out how a base is quantized, and shows its weights as plain tensors or says that edgelora does not read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora_export.base.quantized import (
    auto_round,
    awq,
    bitsandbytes_4bit,
    bitsandbytes_8bit,
    compressed_tensors,
    fp8,
    gptq,
    mlx,
    modelopt,
)
from edgelora_export.base.quantized.unread import INSTEAD, UNREAD
from edgelora_export.base.quantized.weights.dequantized_tensors import DequantizedTensors
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from edgelora_export.base.quantized.weights.dequantized_tensors import Weight
    from edgelora_export.base.tensors import Tensors

    FindWeights = Callable[[Tensors, Mapping[str, Any]], dict[str, Weight]]

_KEYS = ("quantization_config", "compression_config", "quantization")  # compressed-tensors' old key, and mlx-lm's
_READERS: Mapping[str, FindWeights] = {
    "auto-round": auto_round.find_weights,
    "intel/auto-round": auto_round.find_weights,
    "awq": awq.find_weights,
    "bitsandbytes_4bit": bitsandbytes_4bit.find_weights,
    "bitsandbytes_8bit": bitsandbytes_8bit.find_weights,
    "compressed-tensors": compressed_tensors.find_weights,
    "fbgemm_fp8": fp8.find_weights,
    "fp8": fp8.find_weights,
    "gptq": gptq.find_weights,
    "metal": mlx.find_weights,
    "mlx": mlx.find_weights,
    "modelopt": modelopt.find_weights,
    "mxfp8": fp8.find_weights,
}
# Parts that only quantized activations and caches need: in float32 they have no effect.
_OF_ACTIVATIONS = {
    *("activation_scale", "input_global_scale", "input_scale", "input_scale_ub", "input_zero_point"),
    *("output_scale", "output_zero_point", "k_scale", "kv_scale", "q_scale", "v_scale"),
}
# Parts that no plain checkpoint has.
_OF_CODES = {
    *("SCB", "absmax", "bitsandbytes__fp4", "bitsandbytes__nf4", "g_idx", "pre_quant_scale", "qbiases", "qweight", "qzeros"),
    *("weight_g_idx", "weight_global_scale", "weight_packed", "weight_scale", "weight_scale_2", "weight_scale_inv"),
    "weight_zero_point",
}


def dequantize(tensors: Tensors, config: Mapping[str, Any], path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Shows a quantized base as a plain one: each weight in float32 under its plain name, and a config without quantization.

    The tensors that are there decide which modules are quantized. A base that is not quantized comes back as it is.
    path: the base, for messages.
    Raises InputError for formats that are not read, and for tensors that contradict each other or the config.
    """
    settings = _find_settings(config, path)
    try:
        if settings is None:
            _check_plain(tensors)
            return tensors, dict(config)
        weights = _find_weights(tensors, settings, config, path)
        files = _name_files(tensors, weights)
    except InputError as error:
        raise InputError(f"base {path}: {error}") from error
    return DequantizedTensors(tensors, weights, files), _without_quantization(config)


def name_method(settings: Mapping[str, Any]) -> str:
    """Names the format by its settings, as transformers does where they have no quant_method, or the program that writes none."""
    for width in ("4bit", "8bit"):
        if settings.get(f"load_in_{width}") is True:
            return f"bitsandbytes_{width}"
    method = settings.get("quant_method")
    if isinstance(method, str):
        return {"bitsandbytes": "bitsandbytes_4bit", "compressed_tensors": "compressed-tensors"}.get(
            method.lower(), method.lower()
        )
    if "config_groups" in settings:
        return "compressed-tensors"
    if "quant_algo" in settings:
        return "modelopt"
    return "mlx" if {"bits", "group_size"} <= settings.keys() else "an unnamed format"


def _find_settings(config: Mapping[str, Any], path: Path) -> Mapping[str, Any] | None:
    """Finds the quantization settings, which a wrapper of several models may keep with the text model's."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        for key in _KEYS:
            settings = place.get(key)
            if settings and not isinstance(settings, dict):
                raise InputError(f"base {path}: {key} in config.json is {type(settings).__name__}, not an object")
            if settings:
                return settings
    return None


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in config.items() if key not in _KEYS}
    if isinstance(text := plain.get("text_config"), dict):
        plain["text_config"] = {key: value for key, value in text.items() if key not in _KEYS}
    return plain


def _find_weights(tensors: Tensors, settings: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> dict[str, Weight]:
    method = name_method(settings)
    if method not in _READERS:
        origin = config.get("_name_or_path")
        named = isinstance(origin, str) and origin and path.name not in (origin, origin.rpartition("/")[2])
        instead = INSTEAD.get(method, "take the unquantized checkpoint")
        raise InputError(
            f"it is quantized as {UNREAD.get(method, method)}, which is not read; {instead}"
            + (f" (its config.json names {origin})" if named else "")
        )
    weights = _READERS[method](tensors, settings)
    if not weights:
        raise InputError(
            f"config.json says that it is quantized by {method}, and no tensor is; download it again, or, if its weights are "
            "plain, take quantization_config out of config.json"
        )
    return weights


def _name_files(tensors: Tensors, weights: Mapping[str, Weight]) -> dict[str, str]:
    """Lists the file of each plain and each encoded tensor. Raises InputError for a part that belongs to no weight."""
    used = {part for weight in weights.values() for part in weight.parts}
    modules = {name.removesuffix(".weight") for name in weights}
    files = {name: tensors.files[weight.parts[0]] for name, weight in weights.items()}
    for name, file in tensors.files.items():
        module, _, part = name.rpartition(".")
        if name in used or part in _OF_ACTIVATIONS:
            continue
        if part in _OF_CODES or name in weights or module in weights or (module in modules and part != "bias"):
            raise InputError(f"tensor {name} belongs to no weight that its quantization_config tells of; download it again")
        if part == "weight" and tensors.dtype(name).kind in "iub":
            raise InputError(f"tensor {name} is {tensors.dtype(name)}, which are codes without scales; download it again")
        files[name] = file
    return files


def _check_plain(tensors: Tensors) -> None:
    for name in tensors.files:
        if name.rpartition(".")[2] in _OF_CODES:
            raise InputError(
                f"tensor {name} is a part of a quantized weight, and config.json has no quantization_config; "
                "download config.json again"
            )
