"""GGUF files as llama.cpp's converter writes them, against the transformers models that they were written from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, dequantize
from gguf.quants import quantize
from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config

from edgelora_export.base.base import Base
from edgelora_runtime import Runtime
from edgelora_runtime.errors import InputError
from tests.gguf_files import write_gguf
from tests.inputs.cases import Case
from tests.tiny import export_base, make_base, make_tokenizer, random_tokens, torch_logits

if TYPE_CHECKING:
    from pathlib import Path

Kind = GGMLQuantizationType
TOLERANCE = 1e-5
TOKENS = random_tokens(40)
GEMMA = {"head_dim": 32, "tie_word_embeddings": True, "query_pre_attn_scalar": 32, "sliding_window": 7}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def check_logits(folder: Path, kind: Kind, config_class: Any, settings: dict[str, Any]) -> str:
    """Compares the float32 export with the model, whose matrices are rounded to what the file holds."""
    import torch

    model = make_base(folder / "base", config_class=config_class, pad_token_id=None, **settings)
    path = write_gguf(folder / "base", folder / "model.gguf", kind=kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and kind != Kind.F32:
                rounded = dequantize(quantize(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(np.array(rounded, np.float32)))
    export_base(path, folder / "bundle")
    with Runtime(folder / "bundle", threads=1) as runtime:
        expected = torch_logits(model, TOKENS)
        difference = float(np.abs(runtime.logits(TOKENS) - expected).max() / np.abs(expected).max())
        text = "<s>the café 日本語 🙂  </s>"
        assert runtime.encode(text) == make_tokenizer()(text)["input_ids"]
        message = [{"role": "user", "content": "the cat"}]
        assert runtime.encode(message) == make_tokenizer().apply_chat_template(
            message, add_generation_prompt=True, return_dict=False
        )
    assert difference <= TOLERANCE
    return f"equal to {difference:.0e} of the largest logit, and the same tokens"


def equal(name: str, kind: Kind, config_class: Any, **settings: Any) -> Case:
    return Case(name, "base", "the logits of the model before", "equal", lambda f: check_logits(f, kind, config_class, settings))


def refuse(folder: Path, said: str) -> str:
    with pytest.raises(InputError, match=said) as caught:
        Base.open(folder / "model.gguf")
    return str(caught.value)


def check_unknown(folder: Path) -> str:
    writer = GGUFWriter(folder / "model.gguf", "rwkv7")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return refuse(folder, "'rwkv7', which edgelora does not read from GGUF")


def check_cut(folder: Path) -> str:
    make_base(folder / "base")
    path = write_gguf(folder / "base", folder / "model.gguf")
    path.write_bytes(path.read_bytes()[:-1000])
    return refuse(folder, "before the end of")


def check_adapter(folder: Path) -> str:
    make_base(folder / "base")
    write_gguf(folder / "base", folder / "model.gguf", change=lambda writer: writer.add_type("adapter"))
    return refuse(folder, "a base must be a whole model")


CASES = [
    equal("GGUF, Llama, F16", Kind.F16, LlamaConfig),
    equal("GGUF, Llama, Q8_0", Kind.Q8_0, LlamaConfig),
    equal("GGUF, Llama, Q4_0", Kind.Q4_0, LlamaConfig),
    equal("GGUF, Llama 3.2's RoPE", Kind.F32, LlamaConfig, rope_parameters=LLAMA3, max_position_embeddings=16384, head_dim=32),
    equal("GGUF, Qwen 2", Kind.BF16, Qwen2Config),
    equal("GGUF, Qwen 3", Kind.F16, Qwen3Config, head_dim=32),
    equal("GGUF, Gemma 3", Kind.F32, Gemma3TextConfig, **GEMMA),
    Case("GGUF of an architecture without a native graph", "base", "loads some of them", "refused", check_unknown),
    Case("GGUF that was cut", "base", "a ValueError of numpy", "refused", check_cut),
    Case("GGUF of an adapter as a base", "base", "a KeyError", "refused", check_adapter),
]
