"""The export of a GGUF file at the shape of a model of 1B parameters holds little of it in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from tests.gguf_files import add_byte_level
from tests.tiny import make_tokenizer

ROOT = Path(__file__).resolve().parents[4]
LIMIT = 1500  # MiB
# Llama 3.2 1B: https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 2048, 8192, 16, 32, 8, 128256
KIND = GGMLQuantizationType.Q8_0


def write_model(path: Path) -> None:
    """Writes random codes under one small scale, a tensor at a time."""
    make_tokenizer().save_pretrained(path.parent)
    writer = GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    add_byte_level(writer, path.parent)
    generator = np.random.default_rng(0)
    block, size = GGML_QUANT_SIZES[KIND]

    def add(name: str, rows: int, columns: int) -> None:
        raw = generator.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
        raw[:, :, :2] = np.frombuffer(np.float16(2e-4).tobytes(), np.uint8)
        writer.add_tensor(name, raw.reshape(rows, -1), raw_dtype=KIND)

    add("token_embd.weight", VOCABULARY, HIDDEN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    kv = HIDDEN // HEADS * KV_HEADS
    for index in range(LAYERS):
        for name, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", kv, HIDDEN),
            ("attn_v", kv, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", INTERMEDIATE, HIDDEN),
            ("ffn_up", INTERMEDIATE, HIDDEN),
            ("ffn_down", HIDDEN, INTERMEDIATE),
        ):
            add(f"blk.{index}.{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{index}.{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts in KiB on Linux alone")
def test_a_1b_model_is_exported_in_little_memory(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf")
    (tmp_path / "recipe.toml").write_text(
        'base = "model.gguf"\n[quantization]\nmethod = "rtn"\n[variants.base]\nmix = {}\n', encoding="utf-8"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))}
    command = [sys.executable, "-m", "edgelora", "export", "recipe.toml", "--output", "bundle"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # lest subprocess takes it for still running
    assert process.returncode == 0
    assert json.loads((tmp_path / "bundle" / "bundle.json").read_text(encoding="utf-8"))["variants"]
    peak = usage.ru_maxrss / 1024
    print(f"peak {peak:.0f} MiB, {usage.ru_utime + usage.ru_stime:.0f} s of CPU")
    assert peak < LIMIT
