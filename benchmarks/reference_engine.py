"""The engine that decode.py --check holds the others against: transformers on the unquantized checkpoint.

    python benchmarks/reference_engine.py transformers CHECKPOINT --threads 2 --length 256

It takes and answers what edgelora/peers/engines.py does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.peers.engines import main

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora.peers.engines import Floats, Round


class TransformersEngine:
    """The reference for checking logits, never timed.

    It is transformers on the unquantized checkpoint in fp32.
    """

    def __init__(self, model: Path, threads: int, length: int) -> None:  # noqa: ARG002  (no cache)
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.version, self.settings = transformers.__version__, "fp32"
        self.torch: Any = torch
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.vocab_size: int = self.model.config.vocab_size

    def run_round(self, prompt: list[int], count: int) -> Round:
        raise NotImplementedError(f"the reference runs no rounds ({len(prompt)} + {count} tokens)")

    def warm_up(self, prompt: list[int], count: int) -> None:
        """Does nothing, as the reference is not timed."""

    def reload(self) -> None:
        raise NotImplementedError("the reference is not timed")

    def logits(self, prompt: list[int]) -> Floats:
        with self.torch.no_grad():
            output = self.model(self.torch.tensor([prompt]), logits_to_keep=1)
        return np.asarray(output.logits[0, -1].numpy(), np.float32)


if __name__ == "__main__":
    main({"transformers": TransformersEngine})
