"""The gate also measures a variant with a head of its own on the quantized base of its training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch

from edgelora.exporting.trained_base import hold_weight, read_trained_base
from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_export.bundle.gate import Gate
from edgelora_export.plan.calibration import Calibration, Sample
from edgelora_export.plan.variants import Quantization, Variant
from edgelora_runtime import Runtime
from tests.tiny import LINEARS, build_variants, load_base, make_base, random_tokens, torch_logits
from tests.trained_changes import mean_kl, train_somewhat

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = random_tokens(40, seed=3)


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, {"lora_bias": True}]
)
def test_trained_kl_is_that_of_torch_on_the_held_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    """int4 training holds embedding and head, too, also where the variant unties them."""
    make_base(tmp_path / "base", tie_word_embeddings=True)
    trained = train_somewhat(tmp_path / "base", tmp_path / "a", **settings)
    base = Base.open(tmp_path / "base")
    mix: Any = trained.change
    variant = Variant(
        "v",
        {"a": 1.0},
        delta=trained.change,
        calibration=Calibration(held_out=(Sample(tuple(TOKENS)),)),
        trained=read_trained_base(mix, "int4", read_decoder(base.config)),
    )
    grid = Quantization(bits=8, method="rtn")
    manifest = build_variants(base, [variant], tmp_path / "out", quantization=grid, gate=Gate(retention=-9.0))
    model = load_base(tmp_path / "base")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.rpartition(".")[2] not in (*LINEARS, "lm_head", "embed_tokens"):
                continue
            kept = trained.change.weights.get(name)
            module.weight.copy_(torch.from_numpy(hold_weight(module.weight.numpy(), "int4") if kept is None else kept))
            if name in trained.change.biases:
                module.bias = torch.nn.Parameter(torch.from_numpy(trained.change.biases[name]))
    with Runtime(tmp_path / "out") as runtime:
        wanted = mean_kl(torch_logits(model, TOKENS)[:-1], runtime.logits(TOKENS)[:-1])
    found = manifest.variants["v"].fidelity
    assert found is not None
    assert cast("float", found.trained_kl) == pytest.approx(wanted, rel=1e-3)
    assert np.isfinite(wanted)
    assert wanted > 10 * found.kl_mean
