"""Writes the golden bundle anew: python -m tests.runtime.bundle.make_golden, when the format has changed on purpose.

The golden bundle holds the format to its word: later readers must open the bytes that this version wrote.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from edgelora.adapters.folder import Adapter
from edgelora_export.base.base import Base
from edgelora_export.plan.variants import Quantization, Variant
from edgelora_runtime import Runtime
from edgelora_runtime.bundle.manifest import AdapterEntry
from tests.tiny import build_variants, make_adapter, make_base

GOLDEN = Path(__file__).with_name("golden")


def make_golden(folder: Path = GOLDEN) -> None:
    """Writes the bundle, and beside it what each variant answers to its prompt."""
    with tempfile.TemporaryDirectory() as scratch:
        base, adapter = Path(scratch) / "golden-base", Path(scratch) / "adapter"
        make_base(
            base, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64
        )
        make_adapter(base, adapter, size=0.2, target_modules=["q_proj", "down_proj"])
        opened = Adapter.open(adapter, "a")
        variants = [
            Variant("base"),
            Variant("tuned", {"a": 1.0}, delta=opened),
            Variant("alive", {"a": 0.5}, delta=opened, live={"a": 0.5}),
        ]
        build_variants(
            Base.open(base),
            variants,
            Path(scratch) / "bundle",
            quantization=Quantization(method="rtn"),
            adapters={"a": AdapterEntry(opened.sha256, opened.rank)},
            live_adapters={"a": opened},
        )
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(Path(scratch) / "bundle", folder / "bundle")
    with Runtime(folder / "bundle", kernels="onnxruntime", threads=1) as runtime:
        answers = {
            name: {
                "tokens": runtime.generate("the cat", variant=name, max_tokens=8, ignore_eos=True).tokens,
                "logits": [round(float(value), 4) for value in runtime.logits([5, 6, 7], variant=name)[-1, :16]],
            }
            for name in runtime.variants
        }
    (folder / "answers.json").write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make_golden()
