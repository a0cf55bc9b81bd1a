"""The quantized formats that edgelora names and does not read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# By transformers' quant_method
# (https://github.com/huggingface/transformers/blob/1425768/src/transformers/utils/quantization_config.py)
UNREAD: Mapping[str, str] = {
    "aqlm": "AQLM, additive codebooks",
    "bitnet": "BitNet, ternary weights for quantized activations",
    "eetq": "EETQ, int8 in the order of its GPU kernels",
    "fouroversix": "Four Over Six, NVFP4 with scales of its own",
    "fp_quant": "FP-Quant, FP4 after a rotation",
    "gemma": "Gemma's own form, which rounds activations too",
    "gguf": "GGUF",
    "higgs": "HIGGS, vector codebooks after a rotation",
    "hqq": "HQQ",
    "mxfp4": "MXFP4 of fused experts, as gpt-oss has them",
    "nvfp4": "NVFP4 as transformers keeps it for its kernels",
    "quanto": "Quanto",
    "quark": "AMD Quark",
    "sinq": "SINQ",
    "spqr": "SpQR, codes with sparse outliers",
    "torchao": "torchao, tensors of its own classes",
    "vptq": "VPTQ, vector codebooks",
}
# Of these the unquantized checkpoint is not the way on.
INSTEAD: Mapping[str, str] = {
    "gguf": "give the .gguf file as the base",
    "mxfp4": "take a dense model, as edgelora has no graph for such experts",
}
